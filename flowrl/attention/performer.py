"""Performer attention: positive random features of the softmax kernel (FAVOR+, Choromanski et al. 2021,
arXiv 2009.14794).

With x = q / head_dim^(1/4), y = k / head_dim^(1/4) and random directions w_r,

    exp(q . k / sqrt(head_dim)) = E_r[exp(w_r . x - |x|^2 / 2) exp(w_r . y - |y|^2 / 2)].

The directions are not learnt and not stored: the same for every model of a head_dim, drawn once from a fixed
seed, so that training, acting, and a run that was saved and resumed all see the same features.

Stability without a look into the future: a maximum over keys would tell a token about later ones. A query's
features are divided by their own sum, which the normaliser of attention cancels. A key's feature r cannot
exceed exp(|w_r|^2 / 2); where that is more than exp(LARGEST_LOG_FEATURE), the excess, a constant of the
direction, moves from the key to the query.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.attention.causal_linear import LinearState, causal_linear_attention, causal_linear_attention_step

FEATURES_PER_DIMENSION = 4  # near the paper's d log d features where head_dim is 32 to 64
LARGEST_LOG_FEATURE = 50.0  # e^50 times a million tokens times values of 1e6 is far from float32's largest
EPS = 1e-6  # added to every feature, as the authors do: far from all keys, a query sees nearly their mean
_SEED = 2009_14794


def performer_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal Performer attention of (batch, heads, length, head_dim) tensors; see ``causal_linear.py``."""
    return causal_linear_attention(queries, keys, values, performer_features)


def performer_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: LinearState | None = None
) -> tuple[Tensor, LinearState]:
    """One token in, one out: (batch, heads, head_dim) tensors; constant time and memory."""
    return causal_linear_attention_step(query, key, value, state, performer_features)


def performer_features(queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positive random features (..., FEATURES_PER_DIMENSION * head_dim), the same at every position."""
    head_dim = queries.shape[-1]
    directions = _directions_on(head_dim, queries.device, queries.dtype)  # (features, head_dim)
    excess = (directions.square().sum(-1) / 2 - LARGEST_LOG_FEATURE).clamp(min=0)  # (features,)
    scaled_directions = directions * head_dim**-0.25
    half_norms = keys.square().sum(-1, keepdim=True) / (2 * head_dim**0.5)
    query_features = F.linear(queries, scaled_directions, excess).softmax(-1)
    key_features = F.linear(keys, scaled_directions, -excess).sub_(half_norms).exp_()
    return query_features + EPS, key_features + EPS


def random_directions(head_dim: int, num_features: int) -> Tensor:
    """Return (num_features, head_dim) float64 rows, each distributed as a standard Gaussian vector.

    Each ``head_dim`` of them are orthogonal, which lowers the variance of the estimate. The same at every
    call: drawn on the CPU from a generator of its own.
    """
    generator = torch.Generator(device="cpu").manual_seed(_SEED)
    rows = []
    for start in range(0, num_features, head_dim):
        gaussian, lengths = (
            torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64, device="cpu")
            for _ in range(2)
        )
        basis, triangle = torch.linalg.qr(gaussian)
        basis = basis * triangle.diagonal().sign()  # else the signs are the linear algebra library's choice
        norms = lengths.norm(dim=-1, keepdim=True)
        rows.append((basis.mT * norms)[: num_features - start])
    return torch.cat(rows)


@cache
def _directions_on(head_dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # acting may be first to ask, and training needs a normal tensor
        return random_directions(head_dim, FEATURES_PER_DIMENSION * head_dim).to(device, dtype)
