"""flowrl: offline reinforcement learning as sequence modelling, with causal Flow-Attention."""

import os
from importlib.metadata import version

# How long torch's threads look for work before they sleep, in GCC's OpenMP; read as torch is imported. By
# default so long that they take the cores from the physics, and evaluation lasts a quarter longer.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

from flowrl.attention import flow_attention, flow_attention_step
from flowrl.model import Agent, load_agent

__version__ = version("flowrl")
__all__ = ["Agent", "__version__", "flow_attention", "flow_attention_step", "load_agent"]
