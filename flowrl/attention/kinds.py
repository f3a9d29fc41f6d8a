"""The attention kinds that ``--attention`` chooses from, under one contract.

Adding a kind takes one file with its two functions and one line in ``ATTENTION_KINDS``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl.attention.cosformer import cosformer_attention, cosformer_attention_step
from flowrl.attention.flow import flow_attention, flow_attention_step
from flowrl.attention.flow.recurrent import flow_attention_steps
from flowrl.attention.linear import linear_attention, linear_attention_step
from flowrl.attention.performer import performer_attention, performer_attention_step
from flowrl.attention.softmax import softmax_attention, softmax_attention_step

AttentionName = Literal["flow", "softmax", "linear", "performer", "cosformer"]
SOURCE_CLAMP = 10.0  # of the paper's code
State = Any  # a NamedTuple of tensors, each with the batch as its first dimension


@dataclass(frozen=True)
class AttentionKind:
    """A causal attention in its two forms, which compute the same function.

    ``parallel`` maps (batch, heads, length, head_dim) queries, keys and values to outputs of that shape;
    ``step`` maps one token's (batch, heads, head_dim) and the state (None at the start) to (output, state).
    ``few_steps``, where there is one, is faster than a ``step`` for each of a few tokens: (batch, heads,
    tokens, head_dim) and the state, which it may overwrite.
    """

    parallel: Callable[[Tensor, Tensor, Tensor], Tensor]
    step: Callable[[Tensor, Tensor, Tensor, State | None], tuple[Tensor, State]]
    few_steps: Callable[[Tensor, Tensor, Tensor, State | None], tuple[Tensor, State]] | None = None

    def steps(
        self, queries: Tensor, keys: Tensor, values: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        """Feed (batch, heads, tokens, head_dim); return outputs of that shape and the state after them.

        The state handed in must not be used again.
        """
        if self.few_steps is not None:
            return self.few_steps(queries, keys, values, state)
        outputs = []
        for query, key, value in zip(queries.unbind(2), keys.unbind(2), values.unbind(2), strict=True):
            output, state = self.step(query, key, value, state)
            outputs.append(output)
        return torch.stack(outputs, dim=2), state


ATTENTION_KINDS: dict[AttentionName, AttentionKind] = {
    "flow": AttentionKind(flow_attention, flow_attention_step, flow_attention_steps),
    "softmax": AttentionKind(softmax_attention, softmax_attention_step),
    "linear": AttentionKind(linear_attention, linear_attention_step),
    "performer": AttentionKind(performer_attention, performer_attention_step),
    "cosformer": AttentionKind(cosformer_attention, cosformer_attention_step),
}


def attention_kind(name: AttentionName, max_tokens: int, source_clamp: float = SOURCE_CLAMP) -> AttentionKind:
    """The kind in a model of contexts up to ``max_tokens``, by which cosFormer measures distance.

    ``source_clamp`` is Flow-Attention's bound on the conserved source.
    """
    if name == "flow" and source_clamp != SOURCE_CLAMP:
        return AttentionKind(
            partial(flow_attention, clamp=source_clamp),
            partial(flow_attention_step, clamp=source_clamp),
            partial(flow_attention_steps, clamp=source_clamp),
        )
    if name != "cosformer":
        return ATTENTION_KINDS[name]
    return AttentionKind(
        partial(cosformer_attention, max_tokens=max_tokens),
        partial(cosformer_attention_step, max_tokens=max_tokens),
    )


def select_rows(state: State, rows: Tensor) -> State:
    """Keep only these batch rows of a state, in this order."""
    return type(state)(*(tensor[rows] for tensor in state))


def clear_rows(state: State, rows: Tensor) -> State:
    """Put the rows where the (batch,) bool mask ``rows`` holds back to the state before the first token."""
    return type(state)(*(tensor.masked_fill(rows.view(-1, *[1] * (tensor.ndim - 1)), 0) for tensor in state))
