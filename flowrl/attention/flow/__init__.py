"""Flow-Attention, linear in length: a parallel form for training, a recurrent form for acting.

One file for each way to compute it: ``naive.py`` the formulas, ``blocks.py`` torch, ``recurrent.py`` token
after token, ``cpu.py`` C++, ``triton.py`` CUDA. This file picks one; ``operators.py`` presents the last two
to torch.
"""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowrl.attention.flow import cpu, triton
from flowrl.attention.flow.blocks import bidirectional_flow, causal_flow_blocks
from flowrl.attention.flow.naive import naive_flow_attention
from flowrl.attention.flow.operators import flow_operator
from flowrl.attention.flow.recurrent import FlowState, empty_flow_state, flow_attention_step
from flowrl.attention.precision import accumulation_dtype, without_autocast

__all__ = [
    "FlowState",
    "empty_flow_state",
    "flow_attention",
    "flow_attention_step",
    "naive_flow_attention",
]


@overload
def flow_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    initial_state: FlowState | None = None,
    return_state: Literal[False] = False,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> Tensor: ...
@overload
def flow_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    initial_state: FlowState | None = None,
    return_state: Literal[True],
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> tuple[Tensor, FlowState]: ...
def flow_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool = True,
    mask: Tensor | None = None,
    initial_state: FlowState | None = None,
    return_state: bool = False,
    clamp: float = 10.0,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, FlowState]:
    """Flow-Attention of whole sequences, linear in length in time and memory (arXiv 2202.06258, Eq. 4-9).

    Args:
        queries: (batch, heads, length, head_dim), **before** the sigmoid.
        keys: the same; without ``causal`` their length may differ.
        values: (batch, heads, length, value_dim).
        causal: sums over the past only, as in the paper's reinforcement-learning experiments; otherwise
            the bidirectional form, where queries and keys may differ in length.
        mask: (batch, length) bool, True for valid tokens. The outputs of valid tokens are those of the same
            sequence without the others, whose outputs are 0.
        initial_state: what precedes the first token, in the causal form: a few new tokens may attend to a
            long past that was read before.
        return_state: also return the state after the last token, from which this function and
            :func:`flow_attention_step` continue.
        clamp: bound on the conserved source flow before its exponential.
        eps: added to every component of both factors of the four flows.

    Returns (batch, heads, length, value_dim) in the dtype of ``values``. Sums are float32, float64 where the
    queries are, or in the dtype of ``initial_state``, whatever the autocast state. Raises ValueError for
    arguments that do not fit.
    """
    _check(queries, keys, values, causal, mask, initial_state, return_state)
    # Traced into torch's own operations, at any length.
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    fast = causal and mask is None and initial_state is None and not (return_state or traced or transformed)
    with without_autocast(queries):
        if fast and triton.supports(queries, keys, values):
            return flow_operator(queries, keys, values, clamp, eps)
        dtype = accumulation_dtype(queries.dtype) if initial_state is None else initial_state.memory.dtype
        q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)
        state: FlowState | None = None
        if fast and cpu.supports(q, k, v):
            outputs = flow_operator(q, k, v, clamp, eps)
        elif causal:
            outputs, state = causal_flow_blocks(
                q, k, v, clamp=clamp, eps=eps, mask=mask, state=initial_state,
                return_state=return_state, one_block=traced,
            )  # fmt: skip
        else:
            outputs = bidirectional_flow(q, k, v, clamp=clamp, eps=eps, mask=mask)
    outputs = outputs.to(values.dtype)
    return outputs if state is None else (outputs, state)


def _check(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    causal: bool,
    mask: Tensor | None,
    initial_state: FlowState | None,
    return_state: bool,
) -> None:
    shapes = f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
    if queries.ndim != 4 or keys.ndim != 4 or values.ndim != 4:
        raise ValueError(f"flow_attention takes (batch, heads, length, head_dim) tensors, got {shapes}")
    if not all(x.is_floating_point() for x in (queries, keys, values)):
        raise ValueError(
            f"flow_attention takes floating-point tensors, got {queries.dtype}, {keys.dtype}, {values.dtype}"
        )
    if queries.shape[:2] != keys.shape[:2] or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries and keys differ in batch, heads or head_dim: {shapes}")
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"keys and values differ in batch, heads or length: {shapes}")
    if queries.shape[-2] == 0 or keys.shape[-2] == 0:
        raise ValueError(f"flow_attention takes at least one token, got {shapes}")
    if (causal or mask is not None) and queries.shape[-2] != keys.shape[-2]:
        raise ValueError(
            f"causal or masked attention takes as many queries as keys, got {shapes}; "
            "a longer past is given by initial_state"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (keys.shape[0], keys.shape[2])):
        raise ValueError(
            f"mask must be bool of shape (batch, length), got {mask.dtype} {tuple(mask.shape)} for {shapes}"
        )
    if not causal and (initial_state is not None or return_state):
        raise ValueError("initial_state and return_state belong to the causal form alone")
    if initial_state is not None:
        expected = (*keys.shape[:2], keys.shape[-1], values.shape[-1])
        if initial_state.memory.shape != expected:
            found = tuple(initial_state.memory.shape)
            raise ValueError(f"initial_state has a memory {found}, {expected} would fit {shapes}")
