"""cosFormer attention: ReLU features whose product decays with distance (Qin et al. 2022, arXiv 2202.08791).

The weight of token j for token i is relu(q_i) . relu(k_j) cos(pi/2 (i - j) / M). The cosine of a difference
is cos cos + sin sin, which splits it into features of each token's position alone.

M is a constant of the model, the longest context it is trained on, not the length at hand as in the authors'
code: a token's weight must not depend on how many tokens follow, or a window in training, the shorter one at
an episode's start and the recurrent state would be three different functions.
Beyond M the cosine would turn negative. Tokens from the M-th on therefore share its position: they weigh one
another fully, and the past by its distance from M, never below zero.
"""

import math
from functools import partial

import torch
from torch import Tensor

from flowrl.attention.causal_linear import LinearState, causal_linear_attention, causal_linear_attention_step

MAX_TOKENS = 4096  # unless said: three tokens for each of the 1,000 timesteps of a MuJoCo episode fit


def cosformer_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """Causal cosFormer attention of (batch, heads, length, head_dim) tensors; see ``causal_linear.py``.

    ``max_tokens`` is M.
    """
    features = partial(cosine_features, max_tokens=max_tokens)
    return causal_linear_attention(queries, keys, values, features)


def cosformer_attention_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: LinearState | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
) -> tuple[Tensor, LinearState]:
    """One token in, one out: (batch, heads, head_dim) tensors; constant time and memory."""
    features = partial(cosine_features, max_tokens=max_tokens)
    return causal_linear_attention_step(query, key, value, state, features)


def cosine_features(
    queries: Tensor, keys: Tensor, positions: Tensor, *, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """relu(x) times the cosine and the sine of its token's angle, (..., 2 * head_dim)."""
    angles = positions.clamp(max=max_tokens)[..., None] * (math.pi / 2 / max_tokens)
    cosines, sines = angles.cos(), angles.sin()

    def reweighted(x: Tensor) -> Tensor:
        rectified = x.relu()
        return torch.cat((rectified * cosines, rectified * sines), dim=-1)

    return reweighted(queries), reweighted(keys)
