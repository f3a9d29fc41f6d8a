"""Linear attention and its kinds, which differ by their features alone.

Output i is the sum over j <= i of (f(q_i) . g(k_j)) v_j, divided by the sum of the same weights; f and g are
the kind's features, non-negative up to rounding. Source: Katharopoulos et al. 2020 (arXiv 2006.16236).

A kind is a function ``features(queries, keys, positions)``, where positions (counted from 0) broadcast
against all but the last dimension of queries and keys.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.attention.precision import accumulation_dtype, without_autocast

FeatureMap = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ONE_BLOCK = 128  # tokens up to which one block does the whole job
SHORTEST_BLOCK = 64  # else a block of as many tokens as features: the pairs cost what the memory does
SMALLEST_NORMALISER = 1e-8  # where all weights vanish, a ReLU's for instance, the output is 0


class LinearState(NamedTuple):
    """Everything that linear attention remembers of the past; constant in size, float32 or float64."""

    num_tokens: Tensor  # (batch, heads), tokens seen
    sum_keys: Tensor  # (batch, heads, features), sum of g(k_j)
    memory: Tensor  # (batch, heads, features, value_dim), sum of g(k_j) v_j^T


def linear_attention(queries: Tensor, keys: Tensor, values: Tensor, *, features: FeatureMap) -> Tensor:
    """The parallel form, linear in length in time and memory.

    ``queries`` and ``keys`` are (batch, heads, length, head_dim), ``values`` (batch, heads, length,
    value_dim). Returns (batch, heads, length, value_dim) in the dtype of ``values``; sums are float32
    (float64 for float64 input) whatever the autocast state.
    """
    with without_autocast(queries):
        dtype = accumulation_dtype(queries.dtype)
        positions = torch.arange(queries.shape[-2], dtype=dtype, device=queries.device)
        q, k = features(queries.to(dtype), keys.to(dtype), positions)  # (batch, heads, length, features)
        counted = F.pad(values.to(dtype), (0, 1), value=1.0)  # a last column of ones sums the weights
        sums = _causal_product(q, k, counted)
        outputs = sums[..., :-1] / sums[..., -1:].clamp(min=SMALLEST_NORMALISER)
    return outputs.to(values.dtype)


def linear_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: LinearState | None = None, *, features: FeatureMap
) -> tuple[Tensor, LinearState]:
    """The recurrent form: one token in, one out, in constant time and memory.

    ``query`` and ``key`` are (batch, heads, head_dim), ``value`` is (batch, heads, value_dim); ``state`` is
    None before the first token. Returns the output (batch, heads, value_dim) and the new state.
    """
    with without_autocast(query):
        dtype = accumulation_dtype(query.dtype)
        num_tokens = query.new_zeros(query.shape[:2], dtype=dtype) if state is None else state.num_tokens
        q, k = features(query.to(dtype), key.to(dtype), num_tokens)  # (batch, heads, features)
        sum_keys, memory = k, k[..., :, None] * value.to(dtype)[..., None, :]
        if state is not None:
            sum_keys, memory = state.sum_keys + sum_keys, state.memory + memory
        normaliser = (q * sum_keys).sum(-1, keepdim=True).clamp(min=SMALLEST_NORMALISER)
        output = (q[..., None, :] @ memory)[..., 0, :] / normaliser
    return output.to(value.dtype), LinearState(num_tokens + 1, sum_keys, memory)


def _causal_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The sum over j <= i of (q_i . k_j) v_j, for (batch, heads, length, width) tensors.

    Within a block by its masked pairs, from earlier blocks by the prefix sums of k^T v.
    """
    length, features = q.shape[-2:]
    block = length if length <= ONE_BLOCK else max(features, SHORTEST_BLOCK)
    padding = -length % block  # zeros add nothing to any sum
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, block)) for x in (q, k, v))
    product = (q @ k.mT).tril() @ v  # (batch, heads, blocks, block, value_dim)
    if length > block:
        sums = k.mT @ v  # of each block
        before = torch.cat((torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]), dim=2).cumsum(2)
        product = product + q @ before
    return product.flatten(2, 3)[:, :, :length]


# Features: elu + 1 -----------------------------------------------------------------------------------------


def elu_features(queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """elu(x) + 1 of both, (..., head_dim) (Katharopoulos et al. 2020); the same at every position."""
    return _elu_plus_one(queries), _elu_plus_one(keys)


def _elu_plus_one(x: Tensor) -> Tensor:
    # x + 1 above 0 and exp(x) below; elu(x) itself rounds to -1 long before its sum with 1 should vanish.
    return x.relu() + x.clamp(max=0).exp()


# Features: Performer (FAVOR+, Choromanski et al. 2021, arXiv 2009.14794) -----------------------------------
#
# With x = q / head_dim^(1/4), y = k / head_dim^(1/4) and random directions w_r,
#
#     exp(q . k / sqrt(head_dim)) = E_r[exp(w_r . x - |x|^2 / 2) exp(w_r . y - |y|^2 / 2)].
#
# The directions are neither learnt nor stored: the same for every model of a head_dim, drawn once from a
# fixed seed, so that training, acting and a resumed run all see the same features.
#
# Stability must not depend on later tokens, so there is no maximum over keys. A query's features are divided
# by their own sum, which the normaliser of attention cancels. A key's feature r cannot exceed exp(|w_r|^2 /
# 2); where that is more than exp(LARGEST_LOG_FEATURE), the excess, a constant of the direction, moves from
# the key to the query.

FEATURES_PER_DIMENSION = 4  # near the paper's d log d features where head_dim is 32 to 64
LARGEST_LOG_FEATURE = 50.0  # e^50 times a million tokens times values of 1e6 is far from float32's largest
EPS = 1e-6  # added to every feature, as the authors do: far from all keys, a query sees nearly their mean
_SEED = 2009_14794


def performer_features(queries: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Positive random features (..., FEATURES_PER_DIMENSION * head_dim), the same at every position."""
    head_dim = queries.shape[-1]
    directions = _directions_on(head_dim, queries.device, queries.dtype)  # (features, head_dim)
    excess = (directions.square().sum(-1) / 2 - LARGEST_LOG_FEATURE).clamp(min=0)  # (features,)
    scaled_directions = directions * head_dim**-0.25
    half_norms = keys.square().sum(-1, keepdim=True) / (2 * head_dim**0.5)
    query_features = F.linear(queries, scaled_directions, excess).softmax(-1)
    key_features = (F.linear(keys, scaled_directions, -excess) - half_norms).exp()
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
    with torch.inference_mode(False):  # acting may be first, and training needs a normal tensor
        return random_directions(head_dim, FEATURES_PER_DIMENSION * head_dim).to(device, dtype)


# Features: cosFormer (Qin et al. 2022, arXiv 2202.08791) ---------------------------------------------------
#
# The weight of token j for token i is relu(q_i) . relu(k_j) cos(pi/2 (i - j) / M). The cosine of a difference
# is cos cos + sin sin, which splits it into features of each token's position alone.
#
# M is a constant of the model, the longest context it is trained on, not the length at hand as in the
# authors' code: a token's weight must not depend on how many tokens follow, or a window in training, the
# shorter one at an episode's start and the recurrent state would be three different functions. Beyond M the
# cosine would turn negative. Tokens from the M-th on therefore share its position: they weigh one another
# fully, and the past by its distance from M, never below zero.

MAX_TOKENS = 4096  # the default M: three tokens for each of the 1,000 timesteps of a MuJoCo episode fit


def cosine_features(
    queries: Tensor, keys: Tensor, positions: Tensor, *, max_tokens: int = MAX_TOKENS
) -> tuple[Tensor, Tensor]:
    """relu(x) times the cosine and the sine of its token's angle, (..., 2 * head_dim)."""
    angles = positions.clamp(max=max_tokens)[..., None] * (math.pi / 2 / max_tokens)
    cosines, sines = angles.cos(), angles.sin()

    def reweighted(x: Tensor) -> Tensor:
        rectified = x.relu()
        return torch.cat((rectified * cosines, rectified * sines), dim=-1)

    return reweighted(queries), reweighted(keys)
