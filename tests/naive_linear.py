"""Kinds of attention other than Flow-Attention from their formulas, quadratic in length, as references."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl.attention.linear import (
    EPS,
    FEATURES_PER_DIMENSION,
    MAX_TOKENS,
    SMALLEST_NORMALISER,
    random_directions,
)


def naive_linear_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(elu(q) + 1) . (elu(k) + 1) as weights, for (batch, heads, length, head_dim) tensors."""
    return _weighted_mean((F.elu(queries) + 1) @ (F.elu(keys) + 1).mT, values)


def naive_performer_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Products of positive random features as weights, without any measure against overflow."""
    head_dim = queries.shape[-1]
    w = random_directions(head_dim, FEATURES_PER_DIMENSION * head_dim).to(queries)
    x, y = queries / head_dim**0.25, keys / head_dim**0.25
    query_features = (x @ w.mT - x.square().sum(-1, keepdim=True) / 2).exp()
    query_features = query_features / query_features.sum(-1, keepdim=True) + EPS
    key_features = (y @ w.mT - y.square().sum(-1, keepdim=True) / 2).exp() + EPS
    return _weighted_mean(query_features @ key_features.mT, values)


def naive_cosformer_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, max_tokens: int = MAX_TOKENS
) -> Tensor:
    """relu(q) . relu(k) cos(pi/2 (i - j) / M) as weights."""
    positions = torch.arange(queries.shape[-2], dtype=queries.dtype, device=queries.device)
    positions = positions.clamp(max=max_tokens)
    distances = positions[:, None] - positions  # (length, length), i - j
    return _weighted_mean(
        queries.relu() @ keys.relu().mT * torch.cos(math.pi / 2 * distances / max_tokens), values
    )


def naive_softmax_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Exponentials of q . k / sqrt(head_dim) as weights, without any measure against overflow."""
    return _weighted_mean((queries @ keys.mT / queries.shape[-1] ** 0.5).exp(), values)


def _weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    past = weights.tril()  # (batch, heads, length, length), 0 where j > i
    return past @ values / past.sum(-1, keepdim=True).clamp(min=SMALLEST_NORMALISER)
