"""Causal Flow-Attention on CPUs in C++, with its gradient: see ``cpu.cpp``.

The library is compiled on first use for one dtype and one width of heads. Flows and all sums are float32
(float64 for float64 inputs).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flowrl.native.kernels import constant_when_compiled, kernels_enabled
from flowrl.native.library import native_library

NAME = "Flow-Attention in C++"
Inputs = tuple[Tensor, ...]  # queries and keys before the sigmoid, values; or the gradients by them
Results = tuple[Tensor, ...]  # outputs, and what the backward pass needs besides: flows, sums and memories
SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = {torch.float32: "float", torch.float64: "double"}
BLOCK = 64  # tokens, as in cpu.cpp
WIDTHS = (16, 32, 64, 128)
FLOWS, SUMS = 5, 4  # kept for the gradient: numbers per token, vectors per block
MOST_STEPS = 4  # tokens at a time of ``flow_steps``, by which models act: see ``flowrl/native/acting.py``


class Layout(ctypes.Structure):
    """Where (batch, heads, length, width) tensors lie, in elements; mirrors the C++ struct."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length")),
        *((f"{side}_{of}", ctypes.c_int64) for side in ("in", "out") for of in ("batch", "head", "token")),
        *((name, ctypes.c_double) for name in ("eps", "clamp")),
        ("threads", ctypes.c_int64),
    ]


@cache
def flow_library(dtype: torch.dtype, width: int) -> ctypes.CDLL | None:
    """The library for this dtype and width of heads; None where it cannot be built."""
    functions = ("flow_forward", "flow_backward", "flow_steps")
    return native_library(SOURCE, functions, (f"REAL={NUMBERS[dtype]}", f"WIDTH={width}"))


@constant_when_compiled
def is_available(dtype: torch.dtype, width: int) -> bool:
    """Whether kernels are switched on and the library is there."""
    return kernels_enabled() and flow_library(dtype, width) is not None


@constant_when_compiled
def _num_threads() -> int:
    return torch.get_num_threads()


def supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the C++ form can do causal attention on these (batch, heads, length, head_dim) tensors.

    A sequence is one thread's work: where there are more threads than long sequences, torch is faster.
    """
    batch, heads, length, width = queries.shape
    return (
        queries.device.type == "cpu"
        and width in WIDTHS
        and values.shape[-1] == width
        and (length <= BLOCK or batch * heads >= _num_threads())
        and queries.dtype == keys.dtype == values.dtype
        and queries.dtype in NUMBERS
        and is_available(queries.dtype, int(width))
    )


def empty_results(queries: Tensor, values: Tensor, keep: bool) -> Results:
    """What :func:`forward` fills; all but the outputs are empty unless ``keep``."""
    batch, heads, length, width = queries.shape
    sequences, blocks = (batch * heads if keep else 0), -(-length // BLOCK)
    if blocks == 1:
        blocks = 0  # nothing precedes the only block
    return (
        results_like(values),
        queries.new_empty(sequences, FLOWS, length),
        queries.new_empty(sequences, blocks, SUMS, width),
        queries.new_empty(sequences, blocks, width, width),
    )


def forward(inputs: Inputs, clamp: float, eps: float, keep: bool) -> Results:
    """Causal Flow-Attention of tensors that :func:`supports` accepts."""
    inputs = same_strides(inputs)
    results = empty_results(inputs[0], inputs[2], keep)
    _call("flow_forward", _layout(inputs[0], results[0], clamp, eps), *inputs, *results)
    return results


def backward(inputs: Inputs, g_outputs: Tensor, results: Results, clamp: float, eps: float) -> Inputs:
    """The gradients by the inputs, from that by the outputs and the results of :func:`forward`."""
    inputs = same_strides(inputs)
    outputs, g_outputs = tokens_first(results[0]), tokens_first(g_outputs)
    kept = (x.contiguous() for x in results[1:])
    gradients = tuple(results_like(x) for x in inputs)
    layout = _layout(inputs[0], outputs, clamp, eps)
    _call("flow_backward", layout, *inputs, outputs, g_outputs, *kept, *gradients)
    return gradients


def _call(name: str, layout: Layout, *tensors: Tensor) -> None:
    """Call the library for the first tensor's dtype and width; empty tensors are null pointers."""
    library = flow_library(tensors[0].dtype, tensors[0].shape[-1])
    pointers = (ctypes.c_void_p(x.data_ptr() if x.numel() else None) for x in tensors)
    getattr(library, name)(ctypes.byref(layout), *pointers)


def _layout(inputs: Tensor, outputs: Tensor, clamp: float, eps: float) -> Layout:
    strides = (*inputs.stride()[:3], *outputs.stride()[:3])
    return Layout(*inputs.shape[:3], *strides, eps, clamp, torch.get_num_threads())


def results_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape with tokens before heads in memory, as the next projection reads it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def tokens_first(x: Tensor) -> Tensor:
    """The tensor, copied unless it lies in memory as :func:`results_like` has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def same_strides(tensors: Inputs) -> Inputs:
    """The tensors, copied unless they share one memory layout whose last dimension is dense."""
    if len({x.stride() for x in tensors}) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return tuple(x.contiguous() for x in tensors)
