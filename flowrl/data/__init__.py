"""Offline data: D4RL files and Minari datasets in one form, in memory or mapped."""

from flowrl.data.dataset import EpisodeDataset
from flowrl.data.sources import load_episodes

__all__ = ["EpisodeDataset", "load_episodes"]
