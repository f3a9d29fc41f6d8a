"""Offline data: D4RL files and Minari datasets in one in-memory form."""

from flowrl.data.dataset import EpisodeDataset
from flowrl.data.sources import load_episodes

__all__ = ["EpisodeDataset", "load_episodes"]
