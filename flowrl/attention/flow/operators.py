"""The fast forms of causal Flow-Attention as operators of torch, ``torch.ops.flowrl.flow_*``.

With its shape function and gradient, an operator is right under FakeTensor, ``torch.compile``, ``make_fx``
and whatever else works with operators. Each form (C++ on CPUs, Triton on CUDA devices) is checked against
torch before its first use for a device, dtype and width; where it fails, the operator computes by torch.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flowrl.attention.flow import cpu, triton
from flowrl.attention.flow.blocks import causal_flow_blocks
from flowrl.attention.precision import accumulation_dtype, without_autocast
from flowrl.native.kernels import give_up, in_clean_thread, is_trusted, largest_difference

CHECK_LENGTHS = (cpu.BLOCK - 4, 2 * cpu.BLOCK + 5)  # one block; several, the last of them cut short
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CLAMP, EPS = 10.0, 1e-6  # of the checks

_INPUTS = "Tensor queries, Tensor keys, Tensor values"
_KEPT = "Tensor flows, Tensor sums, Tensor memories"
_library = torch.library.Library("flowrl", "FRAGMENT")
_library.define(
    f"flow_forward({_INPUTS}, float clamp, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"flow_backward({_INPUTS}, Tensor g_outputs, Tensor outputs, {_KEPT}, float clamp, float eps) "
    "-> (Tensor, Tensor, Tensor)"
)


def flow_operator(queries: Tensor, keys: Tensor, values: Tensor, clamp: float, eps: float) -> Tensor:
    """Causal Flow-Attention of (batch, heads, length, head_dim) tensors that a fast form supports."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (queries, keys, values))
    return torch.ops.flowrl.flow_forward(queries, keys, values, clamp, eps, keep)[0]


def _forward(
    queries: Tensor, keys: Tensor, values: Tensor, clamp: float, eps: float, keep: bool
) -> cpu.Results:
    form, inputs = _form(queries), (queries, keys, values)

    def plain() -> cpu.Results:
        results = form.empty_results(queries, values, keep)
        results[0].copy_(_by_torch(*inputs, clamp, eps))
        return results

    return _run(form, queries, partial(form.forward, inputs, clamp, eps, keep), plain)


def _backward(
    queries: Tensor, keys: Tensor, values: Tensor, g_outputs: Tensor, *results_and_options: Any
) -> cpu.Inputs:
    form, inputs = _form(queries), (queries, keys, values)
    *results, clamp, eps = results_and_options

    def plain() -> cpu.Inputs:
        return _results_by_torch(inputs, g_outputs, clamp, eps)[1:]

    fast = partial(form.backward, inputs, g_outputs, tuple(results), clamp, eps)
    return _run(form, queries, fast, lambda: in_clean_thread(plain))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    queries, keys, values, clamp, eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(queries, keys, values, *output)
    ctx.options = clamp, eps


def _gradient(ctx: Any, g_outputs: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    queries, keys, values, *kept = ctx.saved_tensors
    if g_outputs is None:
        return (None,) * 6
    if torch.is_grad_enabled():  # gradients that are differentiated again
        outputs = _by_torch(queries, keys, values, *ctx.options)
        inputs = [x for x in (queries, keys, values) if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, inputs, g_outputs, create_graph=True))
        return *(next(found) if x.requires_grad else None for x in (queries, keys, values)), None, None, None
    gradients = torch.ops.flowrl.flow_backward(queries, keys, values, g_outputs, *kept, *ctx.options)
    return *gradients, None, None, None


def _run(form: ModuleType, queries: Tensor, fast: Any, plain: Any) -> tuple[Tensor, ...]:
    """``fast()`` where this form is trusted; otherwise, and from its first exception on, ``plain()``.

    Out-of-memory errors are raised.
    """
    case = (queries.device, queries.dtype, queries.shape[-1])
    check = partial(check_error, form, *case)
    if is_trusted(form.NAME, case, check, TOLERANCE[queries.dtype]):
        try:
            return fast()
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            give_up((form.NAME, case), f"failed: {failure}")
    return plain()


def _form(queries: Tensor) -> ModuleType:
    return cpu if queries.device.type == "cpu" else triton


def _by_torch(queries: Tensor, keys: Tensor, values: Tensor, clamp: float, eps: float) -> Tensor:
    with without_autocast(queries):
        dtype = accumulation_dtype(queries.dtype)
        inputs = (x.to(dtype) for x in (queries, keys, values))
        return causal_flow_blocks(*inputs, clamp=clamp, eps=eps)[0].to(values.dtype)


def _results_by_torch(
    inputs: tuple[Tensor, ...], g_outputs: Tensor, clamp: float, eps: float
) -> tuple[Tensor, ...]:
    """Outputs, and the gradients by queries, keys and values."""
    queries, keys, values = (x.detach().requires_grad_() for x in inputs)
    outputs = _by_torch(queries, keys, values, clamp, eps)
    with torch.autograd.set_multithreading_enabled(False):  # a CUDA device's own thread may wait for this one
        return outputs, *torch.autograd.grad(outputs, (queries, keys, values), g_outputs)


def check_error(form: ModuleType, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """The largest difference of a form's outputs and gradients from torch's, over tiny cases."""
    generator, errors = torch.Generator().manual_seed(0), []
    for length in CHECK_LENGTHS:
        numbers = torch.randn(4, 1, 2, length, width, generator=generator)
        *inputs, g_outputs = given = numbers.to(device, dtype)
        results = form.forward(tuple(inputs), CLAMP, EPS, True)
        gradients = form.backward(tuple(inputs), g_outputs, results, CLAMP, EPS)
        *exact, g_exact = given.to(accumulation_dtype(dtype))
        expected = _results_by_torch(tuple(exact), g_exact, CLAMP, EPS)
        errors.append(largest_difference((results[0], *gradients), expected))
    return max(errors)


for _device in ("CPU", "CUDA"):
    _library.impl("flow_forward", _forward, _device)
    _library.impl("flow_backward", _backward, _device)
torch.library.register_fake(
    "flowrl::flow_forward",
    lambda queries, keys, values, clamp, eps, keep: _form(queries).empty_results(queries, values, keep),
    lib=_library,
)
torch.library.register_fake(
    "flowrl::flow_backward",
    lambda queries, keys, values, *_: tuple(cpu.results_like(x) for x in (queries, keys, values)),
    lib=_library,
)
torch.library.register_autograd("flowrl::flow_forward", _gradient, setup_context=_setup_context, lib=_library)
