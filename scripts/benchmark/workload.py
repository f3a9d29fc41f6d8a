"""What is measured: the sizes, data like hopper-medium's, and untrained agents of the paper's size.

Speed depends on neither the weights nor the data's values: both are made up here, nothing is downloaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from flowrl.attention.kinds import AttentionName
from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.envs.specs import EnvironmentSpec
from flowrl.model.agent import Agent
from flowrl.model.transformer import TokenLayout
from flowrl.signals import StopSignals
from flowrl.training.config import TrainConfig
from flowrl.training.setup import build_agent
from flowrl.training.trainer import Trainer

HOPPER = EnvironmentSpec("Hopper-v4")
OBSERVATION_DIM, ACTION_DIM, EPISODE_LIMIT = 11, 3, 1000


@dataclass(frozen=True)
class Sizes:
    """How much is measured. The defaults are those of the published figures."""

    windows: tuple[int, int, int, int] = (64, 4, 60, 64)
    """Attention over training windows: batch, heads, tokens, head_dim."""
    lengths: tuple[int, ...] = (192, 768, 3_072, 12_288, 49_152)
    """Tokens of the long attentions, batch 1."""
    num_layers: int = 3
    """Transformer blocks of the model."""
    embed_dim: int = 256
    """Width of the model; it has 4 heads."""
    batch_size: int = 64
    """Windows of 20 timesteps per update."""
    episode_batch_size: int = 4
    """Full episodes per update."""
    episode_length: int = EPISODE_LIMIT
    """Timesteps of a full episode in training."""
    large_batch: int = 4_096
    """Windows of the second sampling measurement."""
    transitions: int = 200_000
    """Size of the dataset that is sampled from."""
    episodes: int = 100
    """Episodes of the evaluation."""
    baseline_episodes: int = 3
    """Episodes of the evaluation one at a time, whose rate is compared."""
    behavior: str = "medium"
    """Shipped policy whose episodes they are; random's are 20 steps long."""
    late_step: int = 1_000
    """Episode step at which acting is compared with step 10."""


def make_episodes(transitions: int, length: int | None = None, seed: int = 0) -> EpisodeDataset:
    """Random episodes of Hopper's dimensions: all of ``length``, or like hopper-medium's, 200 to 700 long."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < transitions:
        drawn = length or int(generator.integers(200, 700))
        lengths.append(min(drawn, transitions - sum(lengths)))
    terminated = np.array(lengths) < EPISODE_LIMIT
    return build_episodes(
        observations=generator.standard_normal((transitions, OBSERVATION_DIM), dtype=np.float32),
        actions=generator.uniform(-1, 1, (transitions, ACTION_DIM)).astype(np.float32),
        rewards=generator.uniform(0, 3, transitions).astype(np.float32),
        episode_lengths=np.array(lengths),
        terminated=terminated,
        dataset_id="benchmark",
        where="benchmark data",
        environment=HOPPER,
    )


def paper_config(
    sizes: Sizes, attention: AttentionName = "flow", *, full_episodes: bool = False,
    token_layout: TokenLayout = "interleaved",
) -> TrainConfig:  # fmt: skip
    """The paper's model, trained on windows of 20 timesteps or on full episodes."""
    return TrainConfig(
        dataset=("benchmark",),
        attention=attention,
        token_layout=token_layout,
        context_length="episode" if full_episodes else 20,
        batch_size=sizes.episode_batch_size if full_episodes else sizes.batch_size,
        num_layers=sizes.num_layers,
        embed_dim=sizes.embed_dim,
        eval_episodes=0,
    )


def training_data(sizes: Sizes, config: TrainConfig) -> EpisodeDataset:
    """The data that :func:`paper_config`'s updates draw from."""
    if config.context_length == "episode":
        return make_episodes(4 * sizes.episode_batch_size * sizes.episode_length, sizes.episode_length)
    return make_episodes(sizes.transitions)


@contextmanager
def open_trainer(config: TrainConfig, dataset: EpisodeDataset, device: str = "cpu") -> Iterator[Trainer]:
    """A trainer whose run folder is gone afterwards."""
    with TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder), dataset, torch.device(device), StopSignals())
        try:
            yield trainer
        finally:
            trainer.close()


def make_agent(sizes: Sizes, config: TrainConfig) -> Agent:
    """An untrained agent that can act in Hopper."""
    torch.manual_seed(0)
    agent = build_agent(config, make_episodes(2 * EPISODE_LIMIT, EPISODE_LIMIT))
    agent.model.eval()
    return agent
