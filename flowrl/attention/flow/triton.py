"""Causal Flow-Attention on a CUDA device, as Triton kernels with their gradient.

Sequences of one block are one kernel each way. Longer ones run block-parallel passes with prefix sums over
blocks between them, so that one long sequence fills the device as well as many short ones do. Normalisers,
flows and all sums are float32 whatever the inputs. Triton comes with CUDA builds of torch and is imported
when first needed; :func:`triton_supports` says where the kernels apply, the torch form does the rest.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl.attention.flow.cpu import results_like, same_strides

TOKENS = 64  # of a block; two would not fit into the registers together with their gradients
SMALLEST = 16  # side of a matrix product that the tensor cores take
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_WARPS = 8  # for kernels that would otherwise spill registers
LARGE_SHARED_MEMORY = (9, 10)  # compute capabilities; 128 columns take 192 KiB of it, 64 take 96
SUMS = "tf32x3"  # three products of TensorFloat-32 parts: as exact as float32


def triton_supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels can do causal attention on these (batch, heads, length, head_dim) tensors."""
    return (
        queries.is_cuda
        and values.shape[-1] == queries.shape[-1]
        and queries.shape[-1] in WIDTHS
        and {queries.dtype, keys.dtype, values.dtype} <= set(DTYPES)
        and _device_supports(queries.device, queries.shape[-1])
    )


@torch.compiler.disable
@cache
def _device_supports(device: torch.device, width: int) -> bool:
    """Whether triton is there, and the device has TensorFloat-32 and, for wide heads, the shared memory."""
    if importlib.util.find_spec("triton") is None or torch.version.cuda is None:
        return False
    generation = torch.cuda.get_device_capability(device)[0]
    return generation >= 8 if width <= 64 else generation in LARGE_SHARED_MEMORY


@torch.compiler.disable
def triton_flow_attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, clamp: float = 10.0, eps: float = 1e-6
) -> Tensor:
    """Causal Flow-Attention of (batch, heads, length, head_dim) tensors, queries and keys before the sigmoid.

    Returns (batch, heads, length, head_dim) in the dtype of ``values``. Inputs are those that
    :func:`triton_supports` accepts; any strides will do, those of slices of one projection without a copy.
    """
    return _TritonFlow.apply(queries, keys, values, clamp, eps)


class _TritonFlow(torch.autograd.Function):
    """``apply(queries, keys, values, clamp, eps)`` -> outputs."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, clamp: float, eps: float) -> Tensor:
        from flowrl.attention.flow import triton_forward as kernels

        queries, keys, values = inputs = same_strides(queries, keys, values)
        outputs = results_like(values)
        heads, length, sequences, blocks, sizes, precise, options = _plan(inputs)
        sources, targets = queries.stride()[:3], outputs.stride()[:3]
        with torch.cuda.device_of(queries):
            if blocks == 1:
                kernels.window_kernel[(sequences,)](
                    *inputs, outputs, heads, length, *sources, *targets,
                    eps, clamp, SUMS=SUMS, VALUES=precise, **sizes, **options,
                )  # fmt: skip
                ctx.save_for_backward(*inputs)
            else:
                width, grid = queries.shape[-1], (sequences * blocks,)
                shape = (heads, sequences, length, blocks, *sources)
                flows = queries.new_empty(5, sequences, length, dtype=torch.float32)
                sums, weighted = (_scanned(queries, 2 * sequences, blocks, width) for _ in range(2))
                exponentials = _scanned(queries, sequences, blocks)
                memory = _scanned(queries, sequences, blocks, width, width)
                kernels.sums_kernel[grid](queries, keys, sums, *shape, **sizes, **options)
                sums.cumsum_(1)
                kernels.flows_kernel[grid](
                    queries, keys, sums, weighted, flows, *shape, eps, SUMS=SUMS, **sizes, **options
                )
                weighted.cumsum_(1)
                kernels.conserved_kernel[grid](
                    queries, keys, weighted, exponentials, flows, *shape, eps, clamp,
                    SUMS=SUMS, **sizes, **options,
                )  # fmt: skip
                exponentials.cumsum_(1)
                kernels.memory_kernel[grid](
                    keys,
                    values,
                    exponentials,
                    memory,
                    flows,
                    *shape,
                    clamp,
                    VALUES=precise,
                    **sizes,
                    **options,
                )
                memory.cumsum_(1)
                kernels.outputs_kernel[grid](
                    *inputs,
                    outputs,
                    memory,
                    flows,
                    *shape,
                    *targets,
                    clamp,
                    VALUES=precise,
                    **sizes,
                    **options,
                )
                ctx.save_for_backward(*inputs, outputs, flows, sums, weighted, memory)
        ctx.constants = (clamp, eps)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from flowrl.attention.flow import triton_backward as kernels

        queries, keys, values, *kept = ctx.saved_tensors
        inputs, (clamp, eps) = (queries, keys, values), ctx.constants
        g_queries, g_keys, g_values = (results_like(x) for x in inputs)
        if g_outputs.stride() != g_values.stride():
            g_outputs = results_like(g_outputs).copy_(g_outputs)
        heads, length, sequences, blocks, sizes, precise, options = _plan(inputs)
        sources, targets = queries.stride()[:3], g_values.stride()[:3]
        with torch.cuda.device_of(queries):
            if blocks == 1:
                kernels.grad_window_kernel[(sequences,)](
                    *inputs, g_outputs, g_queries, g_keys, g_values, heads, length, *sources, *targets,
                    eps, clamp, SUMS=SUMS, VALUES=precise, **sizes, num_warps=MOST_WARPS,
                )  # fmt: skip
                return g_queries, g_keys, g_values, None, None
            outputs, flows, sums, weighted, memory = kept
            width, grid = queries.shape[-1], (sequences * blocks,)
            shape = (heads, sequences, length, blocks, *sources)
            grads = torch.empty_like(flows)
            g_sums, g_weighted = (_scanned(queries, 2 * sequences, blocks, width) for _ in range(2))
            g_exponentials = _scanned(queries, sequences, blocks)
            g_memory = _scanned(queries, sequences, blocks, width, width)
            kernels.grad_memory_kernel[grid](
                queries, outputs, g_outputs, g_memory, g_weighted, flows, grads, *shape, *targets, eps,
                VALUES=precise, **sizes, **options,
            )  # fmt: skip
            g_memory.cumsum_(1)
            kernels.grad_values_kernel[grid](
                *inputs, g_outputs, g_values, g_memory, g_exponentials, flows, grads, *shape, *targets, clamp,
                VALUES=precise, **sizes, **options,
            )  # fmt: skip
            g_exponentials.cumsum_(1)
            kernels.grad_source_kernel[grid](
                keys, g_exponentials, g_weighted, flows, grads, *shape, eps, clamp, **sizes, **options
            )
            g_weighted.cumsum_(1)
            kernels.grad_flows_kernel[grid](
                queries, keys, g_weighted, g_sums, flows, grads, *shape, eps, SUMS=SUMS, **sizes, **options
            )
            g_sums.cumsum_(1)
            kernels.grad_inputs_kernel[grid](
                *inputs, g_outputs, g_queries, g_keys, sums, weighted, memory, g_sums, g_weighted, g_memory,
                flows, grads, *shape, *targets, eps, clamp, VALUES=precise, **sizes, num_warps=MOST_WARPS,
            )  # fmt: skip
        return g_queries, g_keys, g_values, None, None


def _plan(inputs: tuple[Tensor, ...]) -> tuple[int, int, int, int, dict[str, int], str, dict[str, int]]:
    """Heads, length, sequences, blocks of one, the kernels' sizes, products' precision, launch options."""
    batch, heads, length, width = inputs[0].shape
    tokens = TOKENS if length > TOKENS else max(1 << (length - 1).bit_length(), SMALLEST)
    precise = SUMS if torch.float32 in {x.dtype for x in inputs} else "tf32"
    options = {"num_warps": MOST_WARPS if width > 64 else 4}
    return (
        heads,
        length,
        batch * heads,
        -(-length // tokens),
        {"TOKENS": tokens, "WIDTH": width},
        precise,
        options,
    )


def _scanned(like: Tensor, sequences: int, blocks: int, *shape: int) -> Tensor:
    """A buffer (sequences, blocks + 1, ...) whose cumulative sum over blocks gives what precedes each."""
    buffer = like.new_empty(sequences, blocks + 1, *shape, dtype=torch.float32)
    buffer[:, 0] = 0
    return buffer
