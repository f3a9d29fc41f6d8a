"""The matrix products of linear layers: a matrix library's, or C++ where the library is held back.

torch multiplies by MKL, which on processors other than Intel's keeps to vectors of AVX2's width even where
AVX-512 is there: a little over a third of what ``products.cpp`` reaches on one from AMD. Elsewhere MKL is as
fast as the processor, and stays.
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

SOURCE = Path(__file__).with_name("products.cpp")
WIDTH_MULTIPLE = 32  # two vectors of AVX-512
FEWEST_ROWS = 128  # below, putting the weights in order takes longer than it saves
_CPUINFO = Path("/proc/cpuinfo")


class Linear(nn.Linear):
    """``nn.Linear`` by the products of this file."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if _native_supports(x, self.weight) and not torch.is_autocast_enabled("cpu"):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (rows, inputs), (outputs, inputs), (outputs,) -> (rows, outputs)."""
    if not _native_supports(x, weight):
        return F.linear(x, weight, bias)
    x, weight = x.contiguous(), weight.contiguous()
    outputs = x.new_empty(len(x), len(weight))
    _call("linear_outputs", x, weight, x, weight, bias, torch.empty_like(weight), outputs)
    return outputs


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight: (rows, outputs), (outputs, inputs) -> (rows, inputs)."""
    if not _native_supports(gradient, weight):
        return gradient @ weight
    gradient, weight = gradient.contiguous(), weight.contiguous()
    g_x = gradient.new_empty(len(gradient), weight.shape[1])
    _call("linear_input_gradient", g_x, weight, gradient, weight, torch.empty_like(weight), g_x)
    return g_x


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient.T @ x: (rows, outputs), (rows, inputs) -> (outputs, inputs)."""
    g_weight = x.new_empty(gradient.shape[1], x.shape[1])
    if not _native_supports(x, g_weight):
        return torch.mm(gradient.T, x, out=g_weight)
    gradient, x = gradient.contiguous(), x.contiguous()
    _call("linear_weight_gradient", x, g_weight, gradient, x, g_weight)
    return g_weight


class _Linear(torch.autograd.Function):
    """``apply(x, weight, bias)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        g_x = input_gradient(rows, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return g_x, weight_gradient(rows, x.flatten(0, -2)), rows.sum(0)


# C++ --------------------------------------------------------------------------------------------------------


class _Sizes(ctypes.Structure):
    """Mirrors the C++ struct."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "threads")]


@cache
def products_library() -> ctypes.CDLL | None:
    """The C++ products; None where they cannot be built."""
    functions = ("linear_outputs", "linear_input_gradient", "linear_weight_gradient")
    return native_library(SOURCE, functions, ("REAL=float",))


@cache
def library_is_held_back() -> bool:
    """Whether the processor has wider vectors than MKL uses on it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return _CPUINFO.exists() and "GenuineIntel" not in _CPUINFO.read_text()


def _native_supports(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of (..., width) rows with a weight (outputs, inputs), or its gradient, is for C++."""
    return (
        not torch.compiler.is_compiling()  # a compiler of torch code cannot see into C++
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[0] % WIDTH_MULTIPLE == 0
        and weight.shape[1] % WIDTH_MULTIPLE == 0
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and library_is_held_back()
        and products_library() is not None
    )


def _call(name: str, x: Tensor, weight: Tensor, *tensors: Tensor | None) -> None:
    """Call ``name`` of the library, which is there, for x (rows, inputs) and weight (outputs, inputs)."""
    sizes = _Sizes(len(x), weight.shape[1], weight.shape[0], torch.get_num_threads())
    pointers = (ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors)
    getattr(products_library(), name)(ctypes.byref(sizes), *pointers)
