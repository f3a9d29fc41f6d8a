"""Causal softmax attention with the interface of Flow-Attention: the Decision Transformer's."""

from functools import partial
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


# Of (batch, heads, length, head_dim) queries, keys and values, by torch's fused kernel.
softmax_attention = partial(F.scaled_dot_product_attention, is_causal=True)


def softmax_attention_step(
    query: Tensor, key: Tensor, value: Tensor, state: KeyValueCache | None = None
) -> tuple[Tensor, KeyValueCache]:
    """One token in, one out: (batch, heads, head_dim) tensors; time and memory grow with the past."""
    if state is None:
        keys, values = (x.new_zeros(*x.shape[:2], INITIAL_CAPACITY, x.shape[2]) for x in (key, value))
        num_tokens = torch.zeros(len(key), dtype=torch.int64, device=key.device)
    else:
        keys, values, num_tokens = state
    longest = 1 + max(num_tokens.tolist(), default=0)
    if longest > keys.shape[2]:  # double the length
        keys, values = (F.pad(x, (0, 0, 0, x.shape[2])) for x in (keys, values))
    row = torch.arange(len(key), device=key.device)
    keys[row, :, num_tokens] = key
    values[row, :, num_tokens] = value
    num_tokens = num_tokens + 1
    seen = torch.arange(longest, device=key.device) < num_tokens[:, None]  # (batch, longest)
    output = F.scaled_dot_product_attention(
        query[:, :, None], keys[:, :, :longest], values[:, :, :longest], attn_mask=seen[:, None, None]
    )
    return output[:, :, 0], KeyValueCache(keys, values, num_tokens)
