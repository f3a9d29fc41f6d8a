"""Queries, keys and values as slices of one projection, and their gradients as slices of its gradient.

Autograd would copy the three gradients twice to put them together; here they are written in place, or once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_heads(projected: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, 3 * width) -> queries, keys and values (batch, heads, length, head_dim), as views."""
    return _SplitHeads.apply(projected, num_heads)


def empty_slices(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three empty tensors of this shape, (batch, heads, length, head_dim), as from :func:`split_heads`."""
    batch, heads, length, head_dim = like.shape
    return _slices(like.new_empty(batch, length, 3 * heads * head_dim), heads)


def _slices(packed: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = packed.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return queries, keys, values


class _SplitHeads(torch.autograd.Function):
    """``apply(projected, num_heads)`` -> (queries, keys, values)."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return _slices(projected, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        first = gradients[0]
        batch, heads, length, head_dim = first.shape
        width = heads * head_dim
        strides = (3 * width * length, head_dim, 3 * width, 1)
        together = all(
            gradient.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and gradient.stride() == strides
            and gradient.storage_offset() == first.storage_offset() + place * width
            for place, gradient in enumerate(gradients)
        )
        if together:
            rows = (3 * width * length, 3 * width, 1)
            return first.as_strided((batch, length, 3 * width), rows, first.storage_offset()), None
        packed = first.new_empty(batch, length, 3 * width)
        for part, gradient in zip(_slices(packed, heads), gradients, strict=True):
            part.copy_(gradient)
        return packed, None
