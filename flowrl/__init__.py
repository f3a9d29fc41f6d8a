"""flowrl: offline reinforcement learning as sequence modelling, with causal Flow-Attention."""

from importlib.metadata import version

from flowrl.attention import flow_attention, flow_attention_step
from flowrl.model import Agent, load_agent

__version__ = version("flowrl")
__all__ = ["Agent", "__version__", "flow_attention", "flow_attention_step", "load_agent"]
