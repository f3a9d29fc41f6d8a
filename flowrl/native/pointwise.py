"""What stands between a model's matrix products, in as few passes over memory as it takes; gradients too.

On CPUs in float32 it is C++ (``pointwise.cpp``), called with its products as one autograd function.
Elsewhere, and under autocast or ``torch.compile``, torch does the same operation by operation. All tensors
are (..., width).
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowrl.native.library import native_library
from flowrl.native.products import WIDTH_MULTIPLE, input_gradient, multiply, weight_gradient

SOURCE = Path(__file__).with_name("pointwise.cpp")
PART = 64  # rows, as in pointwise.cpp
LEVELS = 1 << 16  # a component is dropped where one of this many equally likely numbers is below a threshold


class Dropout(nn.Module):
    """In training, drop each component with ``probability`` and scale the others up to keep the mean.

    On CPUs each component takes 16 random bits that a draw of torch's global generator decides, many times
    faster than ``nn.Dropout``'s; the probability is rounded to a multiple of 2^-16, the scale to match it.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same shape; x itself in evaluation."""
        if self.dropped_levels == 0:
            return x
        if native_supports(x):
            return _Dropout.apply(x, self.dropped_levels)
        if x.device.type != "cpu":
            return F.dropout(x, self.probability)
        return x * dropout_factors(x, self.dropped_levels)

    @property
    def dropped_levels(self) -> int:
        """How many of the 2^16 levels are dropped."""
        return round(self.probability * LEVELS) if self.training else 0

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


def linear_relu(x: Tensor, linear: nn.Linear) -> Tensor:
    """relu(linear(x)), (..., in_features) -> (..., out_features)."""
    if native_supports(x) and linear.out_features % WIDTH_MULTIPLE == 0:
        return _LinearReLU.apply(x, linear.weight, linear.bias)
    return linear(x).relu()


def add_linear(x: Tensor, inputs: Tensor, linear: nn.Linear, dropout: Dropout) -> Tensor:
    """x + dropout(linear(inputs)), where x is (..., out_features) and inputs are (..., in_features)."""
    if native_supports(x) and inputs.dtype == x.dtype:
        return _AddLinear.apply(x, inputs, linear.weight, linear.bias, dropout.dropped_levels)
    return x + dropout(linear(inputs))


def dropout_factors(x: Tensor, dropped_levels: int) -> Tensor:
    """Return factors of x's shape and type: 0 for ``dropped_levels`` of the 2^16 levels, else the scale."""
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits of each
    levels = draws.view(torch.int16)[: x.numel()].view(x.shape)  # uniform over -2^15 ... 2^15 - 1
    factors = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(levels, dropped_levels - LEVELS // 2, out=factors)
    return factors.mul_(LEVELS / (LEVELS - dropped_levels))


# C++ --------------------------------------------------------------------------------------------------------


@cache
def pointwise_library() -> ctypes.CDLL | None:
    """The C++ passes; None where they cannot be built."""
    return native_library(SOURCE, ("add_bias_relu", "relu_gradient", "add_residual", "drop"), ("REAL=float",))


def native_supports(x: Tensor) -> bool:
    """Whether the C++ passes can work on x."""
    return (
        not torch.compiler.is_compiling()  # a compiler of torch code cannot see into C++
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[-1] % WIDTH_MULTIPLE == 0
        and not torch.is_autocast_enabled("cpu")
        and pointwise_library() is not None
    )


class _Dropout(torch.autograd.Function):
    """``apply(x, dropped_levels)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped_levels: int) -> Tensor:
        ctx.drawn = _Drawn(dropped_levels)
        return _dropped(x, ctx.drawn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _dropped(gradient, ctx.drawn), None


class _LinearReLU(torch.autograd.Function):
    """``apply(x, weight, bias)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = multiply(_rows(x), weight)
        _call("add_bias_relu", outputs, _NOTHING, outputs, bias)
        ctx.save_for_backward(x, weight, outputs)
        return outputs.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, outputs = ctx.saved_tensors
        g_products, sums = torch.empty_like(outputs), _empty_sums(outputs)
        _call("relu_gradient", outputs, _NOTHING, gradient.contiguous(), outputs, g_products, sums)
        g_x = input_gradient(g_products, weight).view(x.shape)
        return g_x, weight_gradient(g_products, _rows(x)), sums.sum(0)


class _AddLinear(torch.autograd.Function):
    """``apply(x, inputs, weight, bias, dropped_levels)``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor, dropped_levels: int
    ) -> Tensor:
        outputs, ctx.drawn = multiply(_rows(inputs), weight), _Drawn(dropped_levels)
        _call("add_residual", outputs, ctx.drawn, x.contiguous(), bias, outputs)
        ctx.save_for_backward(inputs, weight)
        return outputs.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        sums = _empty_sums(gradient)
        dropped = _rows(_dropped(gradient, ctx.drawn, sums))
        g_inputs = input_gradient(dropped, weight).view(inputs.shape)
        return gradient, g_inputs, weight_gradient(dropped, _rows(inputs)), sums.sum(0), None


class _Drawn:
    """Which components are dropped."""

    def __init__(self, dropped_levels: int) -> None:
        self.dropped_levels = dropped_levels
        self.seed = int(torch.empty((), dtype=torch.int64).random_()) if dropped_levels else 0


_NOTHING = _Drawn(0)


class _Shape(ctypes.Structure):
    """Mirrors the C++ struct."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("dropped", "threads")),
    ]


def _dropped(x: Tensor, drawn: _Drawn, sums: Tensor | None = None) -> Tensor:
    """x without what is dropped; writes the sums of the rows of each part of it into ``sums``."""
    x = x.contiguous()
    dropped = torch.empty_like(x)
    _call("drop", x, drawn, x, dropped, sums)
    return dropped


def _rows(x: Tensor) -> Tensor:
    """(..., width) -> (rows, width)."""
    return x.reshape(-1, x.shape[-1])


def _empty_sums(x: Tensor) -> Tensor:
    """Room for the sums of the rows of each part of x (..., width): (parts, width)."""
    width = x.shape[-1]
    return x.new_empty(-(-x.numel() // (width * PART)), width)


def _call(name: str, x: Tensor, drawn: _Drawn, *tensors: Tensor | None) -> None:
    """Call ``name`` of the library, which is there, for the shape of x."""
    width = x.shape[-1]
    shape = _Shape(x.numel() // width, width, drawn.seed, drawn.dropped_levels, torch.get_num_threads())
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    getattr(pointwise_library(), name)(ctypes.byref(shape), *pointers)
