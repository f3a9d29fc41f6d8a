"""The sequence model, the agent that acts with it, and their files."""

from flowrl.model.agent import Agent, AgentConfig
from flowrl.model.behavior_cloning import BehaviorCloningConfig, BehaviorCloningModel
from flowrl.model.loading import load_agent
from flowrl.model.transformer import ModelConfig, SequenceModel

__all__ = [
    "Agent",
    "AgentConfig",
    "BehaviorCloningConfig",
    "BehaviorCloningModel",
    "ModelConfig",
    "SequenceModel",
    "load_agent",
]
