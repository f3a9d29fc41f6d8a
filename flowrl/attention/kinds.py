"""The attention kinds that ``--attention`` chooses from, under one contract.

Adding a kind takes one file with its two functions, its name in ``AttentionName`` and a branch in
``attention_kind``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from flowrl.attention.flow import flow_attention, flow_attention_step
from flowrl.attention.linear import (
    MAX_TOKENS,
    FeatureMap,
    cosine_features,
    elu_features,
    linear_attention,
    linear_attention_step,
    performer_features,
)
from flowrl.attention.softmax import softmax_attention, softmax_attention_step

AttentionName = Literal["flow", "softmax", "linear", "performer", "cosformer"]
SOURCE_CLAMP = 10.0  # of the paper's code
State = Any  # a NamedTuple of tensors, each with the batch as its first dimension


@dataclass(frozen=True)
class AttentionKind:
    """A causal attention in its forms, which compute the same function.

    ``parallel`` maps (batch, heads, length, head_dim) queries, keys and values to outputs of that shape.
    ``step`` maps one token's (batch, heads, head_dim) and the state (None at the start) to (output, state).
    """

    parallel: Callable[[Tensor, Tensor, Tensor], Tensor]
    step: Callable[[Tensor, Tensor, Tensor, State | None], tuple[Tensor, State]]


def attention_kind(
    name: AttentionName, max_tokens: int = MAX_TOKENS, source_clamp: float = SOURCE_CLAMP
) -> AttentionKind:
    """The kind in a model of contexts up to ``max_tokens``, by which cosFormer measures distance.

    ``source_clamp`` is Flow-Attention's bound on the conserved source.
    """
    if name == "flow":
        return AttentionKind(
            partial(flow_attention, clamp=source_clamp),
            partial(flow_attention_step, clamp=source_clamp),
        )
    if name == "softmax":
        return AttentionKind(softmax_attention, softmax_attention_step)
    features: dict[AttentionName, FeatureMap] = {
        "linear": elu_features,
        "performer": performer_features,
        "cosformer": partial(cosine_features, max_tokens=max_tokens),
    }
    return AttentionKind(
        partial(linear_attention, features=features[name]),
        partial(linear_attention_step, features=features[name]),
    )


def select_rows(state: State, rows: Tensor) -> State:
    """Keep only these batch rows of a state, in this order."""
    return type(state)(*(tensor[rows] for tensor in state))


def clear_rows(state: State, rows: Tensor) -> State:
    """Put the rows where the (batch,) bool mask ``rows`` holds back to the state before the first token."""
    return type(state)(*(tensor.masked_fill(rows.view(-1, *[1] * (tensor.ndim - 1)), 0) for tensor in state))
