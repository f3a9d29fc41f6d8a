"""Attention kinds, each with a parallel form for training and a recurrent step for acting."""

from flowrl.attention.flow import FlowState, flow_attention, flow_attention_step, naive_flow_attention
from flowrl.attention.kinds import AttentionKind, AttentionName, attention_kind
from flowrl.attention.softmax import KeyValueCache, softmax_attention, softmax_attention_step

__all__ = [
    "AttentionKind",
    "AttentionName",
    "FlowState",
    "KeyValueCache",
    "attention_kind",
    "flow_attention",
    "flow_attention_step",
    "naive_flow_attention",
    "softmax_attention",
    "softmax_attention_step",
]
