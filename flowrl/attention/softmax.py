"""Causal softmax attention with the interface of Flow-Attention: the Decision Transformer we compare with."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

INITIAL_CAPACITY = 64


class KeyValueCache(NamedTuple):
    """The past of softmax attention; grows with length (doubling, so appending stays cheap)."""

    keys: Tensor  # (batch, heads, capacity, head_dim)
    values: Tensor  # (batch, heads, capacity, value_dim)
    num_tokens: Tensor  # (batch,) int64, tokens in the cache of each batch row


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool = True) -> Tensor:
    """Scaled dot-product attention of (batch, heads, length, head_dim) tensors, by torch's fused kernel."""
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)


def softmax_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: KeyValueCache | None = None
) -> tuple[Tensor, KeyValueCache]:
    """One token in, one out: (batch, heads, head_dim) tensors; time and memory grow with the past."""
    if state is None:
        state = _empty_cache(key, value, INITIAL_CAPACITY)
    longest = int(state.num_tokens.max()) + 1
    if longest > state.keys.shape[2]:
        state = _grown(state)
    row = torch.arange(key.shape[0], device=key.device)
    keys, values = state.keys, state.values
    keys[row, :, state.num_tokens] = key
    values[row, :, state.num_tokens] = value
    num_tokens = state.num_tokens + 1
    seen = torch.arange(longest, device=key.device) < num_tokens[:, None]  # (batch, longest)
    output = F.scaled_dot_product_attention(
        query[:, :, None], keys[:, :, :longest], values[:, :, :longest], attn_mask=seen[:, None, None]
    )
    return output[:, :, 0], KeyValueCache(keys, values, num_tokens)


def _empty_cache(key: Tensor, value: Tensor, capacity: int) -> KeyValueCache:
    batch, heads = key.shape[:2]
    return KeyValueCache(
        key.new_zeros(batch, heads, capacity, key.shape[-1]),
        value.new_zeros(batch, heads, capacity, value.shape[-1]),
        torch.zeros(batch, dtype=torch.int64, device=key.device),
    )


def _grown(state: KeyValueCache) -> KeyValueCache:
    padding = (0, 0, 0, state.keys.shape[2])  # doubles the length dimension
    return KeyValueCache(F.pad(state.keys, padding), F.pad(state.values, padding), state.num_tokens)
