"""flowrl: offline reinforcement learning as sequence modelling, with causal Flow-Attention.

Importing it changes nothing in the process, and its parts are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl.attention import flow_attention, flow_attention_step
    from flowrl.model.agent import Agent
    from flowrl.model.loading import load_agent
    from flowrl.training.callbacks import Callback, TrackerCallback
    from flowrl.training.config import TrainConfig
    from flowrl.training.run import Run, train

__version__ = "0.1.0"
__all__ = [
    "Agent",
    "Callback",
    "Run",
    "TrackerCallback",
    "TrainConfig",
    "__version__",
    "flow_attention",
    "flow_attention_step",
    "load_agent",
    "train",
]

_PLACES = {
    "Agent": "flowrl.model.agent",
    "Callback": "flowrl.training.callbacks",
    "Run": "flowrl.training.run",
    "TrackerCallback": "flowrl.training.callbacks",
    "TrainConfig": "flowrl.training.config",
    "flow_attention": "flowrl.attention",
    "flow_attention_step": "flowrl.attention",
    "load_agent": "flowrl.model.loading",
    "train": "flowrl.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'flowrl' has no attribute '{name}'")
    return getattr(import_module(_PLACES[name]), name)
