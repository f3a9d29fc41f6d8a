"""Causal Flow-Attention on a CUDA device, as Triton kernels with their gradient.

Sequences of one block are one kernel each way. Longer ones run block-parallel passes with prefix sums over
blocks between them, so that one long sequence fills the device as well as many short ones do. Flows and all
sums are float32 whatever the inputs. Triton comes with CUDA builds of torch and is imported when first
needed.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

from flowrl.attention.flow.cpu import Inputs, Results, results_like, same_strides, tokens_first
from flowrl.native.kernels import constant_when_compiled, kernels_enabled

NAME = "Flow-Attention in Triton"
BLOCK = 64  # tokens; two blocks would not fit into the registers together with their gradients
SMALLEST = 16  # side of a matrix product that the tensor cores take
WIDTHS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGE_SHARED_MEMORY = (9, 10)  # major compute capabilities
MOST_WARPS = 8  # for kernels that would otherwise spill registers


def supports(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernels can do causal attention on these (batch, heads, length, head_dim) tensors."""
    width = queries.shape[-1]
    return (
        queries.is_cuda
        and values.shape[-1] == width
        and {queries.dtype, keys.dtype, values.dtype} <= set(DTYPES)
        and width in WIDTHS
        and is_available(queries.device, int(width))
    )


@constant_when_compiled
def is_available(device: torch.device, width: int) -> bool:
    """Whether kernels are switched on, triton is there and the device can run them at this width."""
    return kernels_enabled() and _runs_on(device, width)


@cache
def _runs_on(device: torch.device, width: int) -> bool:
    if torch.version.cuda is None or getattr(importlib.util.find_spec("triton"), "origin", None) is None:
        return False
    return fits(torch.cuda.get_device_capability(device), width)


def fits(capability: tuple[int, int], width: int) -> bool:
    """Whether a device of this compute capability has TensorFloat-32 and the shared memory.

    Heads of up to 64 columns take 96 KiB of it, which all have; 128 columns take 192, which only the large
    devices of some generations have.
    """
    return capability[0] >= 8 if width <= 64 else capability[0] in LARGE_SHARED_MEMORY


def empty_results(queries: Tensor, values: Tensor, keep: bool) -> Results:
    """What :func:`forward` fills; all but the outputs are empty for a window, whose backward finds it again.

    Flows (5, sequences, length); sums of keys, queries, (n / O) keys and (n / I) queries before each block,
    (4 * sequences, blocks + 1, width); memories (sequences, blocks + 1, width, width).
    """
    batch, heads, length, width = queries.shape
    sequences, blocks = batch * heads, -(-length // BLOCK)
    if blocks == 1:
        sequences = 0

    def empty(*shape: int) -> Tensor:
        return queries.new_empty(shape, dtype=torch.float32)

    flows, sums = empty(5, sequences, length), empty(4 * sequences, blocks + 1, width)
    return results_like(values), flows, sums, empty(sequences, blocks + 1, width, width)


def forward(inputs: Inputs, clamp: float, eps: float, keep: bool) -> Results:
    """Causal Flow-Attention of tensors that :func:`supports` accepts; outputs have the values' dtype."""
    from flowrl.attention.flow import triton_kernels as kernels

    queries, keys, values = inputs = same_strides(inputs)
    results = outputs, flows, sums, memory = empty_results(queries, values, keep)
    heads, length, sequences, blocks, launch, precise = _plan(inputs)
    sources, targets = queries.stride()[:3], outputs.stride()[:3]
    with torch.cuda.device_of(queries):
        if blocks == 1:
            kernels.window_kernel[(sequences,)](
                *inputs, outputs, heads, length, *sources, *targets, eps, clamp, VALUES=precise, **launch
            )
            return results
        grid, shape = (sequences * blocks,), (heads, sequences, length, blocks, *sources)
        plain, weighted = sums.tensor_split(2)
        exponentials = _scanned(queries.new_empty(sequences, blocks + 1, dtype=torch.float32))
        kernels.sums_kernel[grid](queries, keys, _scanned(plain), *shape, **launch)
        plain.cumsum_(1)
        kernels.flows_kernel[grid](queries, keys, plain, _scanned(weighted), flows, *shape, eps, **launch)
        weighted.cumsum_(1)
        kernels.conserved_kernel[grid](
            queries, keys, weighted, exponentials, flows, *shape, eps, clamp, **launch
        )
        exponentials.cumsum_(1)
        kernels.memory_kernel[grid](
            keys, values, exponentials, _scanned(memory), flows, *shape, clamp, VALUES=precise, **launch
        )
        memory.cumsum_(1)
        kernels.outputs_kernel[grid](
            *inputs, outputs, memory, flows, *shape, *targets, clamp, VALUES=precise, **launch
        )
    return results


def backward(inputs: Inputs, g_outputs: Tensor, results: Results, clamp: float, eps: float) -> Inputs:
    """The gradients by the inputs, from that by the outputs and the results of :func:`forward`."""
    from flowrl.attention.flow import triton_kernels as kernels

    queries, keys, _ = inputs = same_strides(inputs)
    outputs, flows, sums, memories = results
    outputs, g_outputs = tokens_first(outputs), tokens_first(g_outputs)
    gradients = g_queries, g_keys, g_values = tuple(results_like(x) for x in inputs)
    heads, length, sequences, blocks, launch, precise = _plan(inputs)
    sources, targets = queries.stride()[:3], g_values.stride()[:3]
    spread = launch | {"num_warps": MOST_WARPS}
    with torch.cuda.device_of(queries):
        if blocks == 1:
            kernels.grad_window_kernel[(sequences,)](
                *inputs, g_outputs, *gradients, heads, length, *sources, *targets, eps, clamp,
                VALUES=precise, **spread,
            )  # fmt: skip
            return gradients
        grid, shape = (sequences * blocks,), (heads, sequences, length, blocks, *sources)
        plain, weighted = sums.tensor_split(2)
        grads = torch.empty_like(flows)
        g_plain, g_weighted, g_memories = (_scanned(torch.empty_like(x)) for x in (plain, weighted, memories))
        g_exponentials = _scanned(queries.new_empty(sequences, blocks + 1, dtype=torch.float32))
        kernels.grad_memory_kernel[grid](
            queries, outputs, g_outputs, g_memories, g_weighted, flows, grads, *shape, *targets, eps,
            VALUES=precise, **launch,
        )  # fmt: skip
        g_memories.cumsum_(1)
        kernels.grad_values_kernel[grid](
            *inputs, g_outputs, g_values, g_memories, g_exponentials, flows, grads, *shape, *targets, clamp,
            VALUES=precise, **launch,
        )  # fmt: skip
        g_exponentials.cumsum_(1)
        kernels.grad_source_kernel[grid](
            keys, g_exponentials, g_weighted, flows, grads, *shape, eps, clamp, **launch
        )
        g_weighted.cumsum_(1)
        kernels.grad_flows_kernel[grid](
            queries, keys, g_weighted, g_plain, flows, grads, *shape, eps, **launch
        )
        g_plain.cumsum_(1)
        kernels.grad_inputs_kernel[grid](
            *inputs, g_outputs, g_queries, g_keys, plain, weighted, memories, g_plain, g_weighted, g_memories,
            flows, grads, *shape, *targets, eps, clamp, VALUES=precise, **spread,
        )  # fmt: skip
    return gradients


def _plan(inputs: Inputs) -> tuple[int, int, int, int, dict[str, int], str]:
    """Heads, length, sequences, blocks of one, the kernels' sizes and warps, products' precision."""
    batch, heads, length, width = inputs[0].shape
    tokens = BLOCK if length > BLOCK else max(1 << (length - 1).bit_length(), SMALLEST)
    launch = {"TOKENS": tokens, "WIDTH": width, "num_warps": MOST_WARPS if width > 64 else 4}
    precise = "tf32x3" if torch.float32 in {x.dtype for x in inputs} else "tf32"
    return heads, length, batch * heads, -(-length // tokens), launch, precise


def _scanned(buffer: Tensor) -> Tensor:
    """(sequences, blocks + 1, ...) ready for blocks' sums, whose cumulative sum gives what precedes each."""
    buffer[:, 0] = 0
    return buffer
