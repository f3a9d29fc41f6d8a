"""Causal Flow-Attention on CPUs, as C++ with its gradient: see ``cpu.cpp`` for how it works.

:func:`native_supports` says where it applies; torch does the rest. Normalisers, flows and all sums are
float32 (float64 for float64 input), as everywhere.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl.attention.heads import empty_slices
from flowrl.native.library import native_library

SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = {torch.float32: "float", torch.float64: "double"}
BLOCK = 64  # tokens, as in cpu.cpp
WIDTHS = (16, 32, 64, 128)
FLOWS, SUMS = 5, 4  # kept for the gradient: numbers per token, vectors per block
MOST_STEPS = 4


class Layout(ctypes.Structure):
    """Where (batch, heads, length, width) tensors lie, in elements; mirrors the C++ struct."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length")),
        *(
            (f"{side}_{of}", ctypes.c_int64)
            for side in ("in", "out", "gradient")
            for of in ("batch", "head", "token")
        ),
        *((name, ctypes.c_double) for name in ("eps", "clamp")),
        ("threads", ctypes.c_int64),
    ]


@cache
def flow_library(dtype: torch.dtype, width: int) -> ctypes.CDLL | None:
    """The library for this type of numbers and width of heads; None where it cannot be built."""
    functions = ("flow_forward", "flow_backward", "flow_steps")
    return native_library(SOURCE, functions, (f"REAL={NUMBERS[dtype]}", f"WIDTH={width}"))


def native_supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the C++ form can do causal attention on these (batch, heads, length, head_dim) tensors.

    A sequence is one thread's work: where there are more threads than long sequences, torch is faster.
    """
    batch, heads, length, width = queries.shape
    return (
        not torch.compiler.is_compiling()  # a compiler of torch code cannot see into C++
        and queries.device.type == "cpu"
        and width in WIDTHS
        and values.shape[-1] == width
        and (length <= BLOCK or batch * heads >= torch.get_num_threads())
        and queries.dtype == keys.dtype == values.dtype
        and queries.dtype in NUMBERS
        and flow_library(queries.dtype, width) is not None
    )


def native_flow_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, clamp: float = 10.0, eps: float = 1e-6
) -> Tensor:
    """Causal Flow-Attention of (batch, heads, length, head_dim) tensors, queries and keys before the sigmoid.

    Returns (batch, heads, length, head_dim), tokens before heads in memory. Inputs are those that
    :func:`native_supports` accepts; slices of one projection are read where they lie.
    """
    inputs = same_strides(queries, keys, values)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _NativeFlow.apply(*inputs, clamp, eps)
    outputs = results_like(values)
    _call("flow_forward", _layout(inputs[0], outputs, clamp, eps), *inputs, outputs, None, None, None)
    return outputs


def native_flow_attention_steps(
    queries: Tensor, keys: Tensor, values: Tensor, state: tuple[Tensor, ...], *, clamp: float, eps: float
) -> Tensor:
    """Feed up to ``MOST_STEPS`` tokens, (batch, heads, tokens, head_dim); changes the FlowState ``state``.

    Inputs and state have one dtype that :func:`native_supports` accepts; the state is contiguous.
    """
    inputs = same_strides(queries, keys, values)
    batch, heads, tokens, width = queries.shape
    outputs = values.new_empty(tokens, batch, heads, width).permute(1, 2, 0, 3)
    num_tokens, sum_k, sum_q, sum_wk, sum_wq, exponentials, memory = state
    layout = _layout(inputs[0], outputs, clamp, eps)
    sums = (sum_k, sum_q, sum_wk, sum_wq)
    _call("flow_steps", layout, *inputs, outputs, num_tokens, *sums, exponentials, memory)
    return outputs


class _NativeFlow(torch.autograd.Function):
    """``apply(queries, keys, values, clamp, eps)`` -> outputs."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, clamp: float, eps: float) -> Tensor:
        batch, heads, length, width = queries.shape
        outputs = results_like(values)
        flows = queries.new_empty(batch * heads, FLOWS, length)
        blocks = -(-length // BLOCK)
        sums = memories = None
        if blocks > 1:
            sums = queries.new_empty(batch * heads, blocks, SUMS, width)
            memories = queries.new_empty(batch * heads, blocks, width, width)
        layout = _layout(queries, outputs, clamp, eps)
        _call("flow_forward", layout, queries, keys, values, outputs, flows, sums, memories)
        ctx.save_for_backward(queries, keys, values, outputs, flows, sums, memories)
        ctx.constants = (clamp, eps)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_outputs: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, outputs, flows, sums, memories = ctx.saved_tensors
        gradients = empty_slices(queries)
        if g_outputs.stride() != outputs.stride():
            g_outputs = results_like(outputs).copy_(g_outputs)
        clamp, eps = ctx.constants
        layout = _layout(queries, outputs, clamp, eps, gradients[0])
        kept = (flows, sums, memories)
        _call("flow_backward", layout, queries, keys, values, outputs, g_outputs, *kept, *gradients)
        return *gradients, None, None


def _call(name: str, layout: Layout, *tensors: Tensor | None) -> None:
    """Call ``name`` of the library for the first tensor's type and width, which is there."""
    assert tensors[0] is not None
    library = flow_library(tensors[0].dtype, tensors[0].shape[-1])
    pointers = (ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors)
    getattr(library, name)(ctypes.byref(layout), *pointers)


def _layout(
    inputs: Tensor, outputs: Tensor, clamp: float, eps: float, gradient: Tensor | None = None
) -> Layout:
    of_gradient = (0, 0, 0) if gradient is None else gradient.stride()[:3]
    strides = (*inputs.stride()[:3], *outputs.stride()[:3], *of_gradient)
    return Layout(*inputs.shape[:3], *strides, eps, clamp, torch.get_num_threads())


def results_like(x: Tensor) -> Tensor:
    """An empty tensor of x's shape with tokens before heads in memory, as a projection wants to read it."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied unless they share one memory layout whose last dimension is dense."""
    if len({x.stride() for x in tensors}) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return tuple(x.contiguous() for x in tensors)
