"""Attention kinds, each with a parallel form for training and a recurrent step for acting."""

from flowrl.attention.flow import FlowState, flow_attention, flow_attention_step, naive_flow_attention
from flowrl.attention.kinds import ATTENTION_KINDS, AttentionKind, AttentionName
from flowrl.attention.softmax import KeyValueCache, softmax_attention, softmax_attention_step

__all__ = [
    "ATTENTION_KINDS",
    "AttentionKind",
    "AttentionName",
    "FlowState",
    "KeyValueCache",
    "flow_attention",
    "flow_attention_step",
    "naive_flow_attention",
    "softmax_attention",
    "softmax_attention_step",
]
