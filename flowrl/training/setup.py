"""What a run starts from: the data, the environment, and an agent that knows the data's statistics."""

import ctypes
import sys

import gymnasium
import numpy as np
import torch

from flowrl.data import EpisodeDataset, load_episodes
from flowrl.data.dataset import delayed_rewards, top_episodes
from flowrl.envs.spaces import action_bounds, check_environment
from flowrl.errors import UserError
from flowrl.machine import available_memory
from flowrl.model.agent import Agent, AgentConfig
from flowrl.model.behavior_cloning import BehaviorCloningConfig
from flowrl.model.loading import untrained_model
from flowrl.model.transformer import TOKENS_PER_TIMESTEP, ModelConfig, SequenceModel
from flowrl.options import LARGEST_DIMENSION
from flowrl.training.config import TrainConfig

_ROWS_AT_ONCE = 1 << 16  # bounds the float64 copies that the statistics need
_TENSORS_PER_PARAMETER = 4  # itself, its gradient, and AdamW's two moments
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
_SMALLEST_STD = 1e-6  # an observation that varies less is a constant; it is only centred


def load_dataset(config: TrainConfig) -> EpisodeDataset:
    """Load what ``--dataset`` or ``--env`` names and check it against its environment."""
    if config.dataset is not None:
        dataset = load_episodes(config.dataset, config.env)
    elif config.env is not None:
        dataset = load_episodes(config.env)
    else:
        raise UserError("nothing to train on: give --env (such as hopper-medium) or --dataset")
    if dataset.environment is not None:
        check_environment(dataset.environment, dataset.observation_dim, dataset.action_dim)
    elif config.eval_episodes > 0:
        raise UserError(
            f"{dataset.dataset_id}: no environment to evaluate in is known; give --env, such as Hopper-v4, "
            "or --eval-episodes 0"
        )
    dataset = top_episodes(dataset, config.top_fraction)
    return delayed_rewards(dataset) if config.reward_mode == "delayed" else dataset


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors of up to 1 GiB for the next update, for this whole process.

    By default it gives those above 32 MiB back, and the kernel clears their pages anew in every update: an
    eighth of the time of full episodes, with the same peak. Without glibc nothing changes.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def build_agent(config: TrainConfig, dataset: EpisodeDataset) -> Agent:
    """Make an untrained agent whose normalisation, return scale and action bounds come from the data.

    Raises:
        UserError: a model that cannot be trained in this machine's memory.
    """
    longest = dataset.max_episode_length
    whole = config.context_length == "episode"
    context_length = (
        longest if isinstance(config.context_length, str) else min(config.context_length, longest)
    )
    model_config = _model_config(config, dataset, context_length)
    _check_memory(config, model_config)
    model = untrained_model(model_config)
    mean, std = observation_statistics(dataset.observations)
    low, high = _bounds(dataset)
    largest_return = float(np.abs(dataset.returns_to_go).max())
    with torch.no_grad():
        model.observation_mean.copy_(torch.from_numpy(mean))
        model.observation_std.copy_(torch.from_numpy(std))
        if isinstance(model, SequenceModel):
            model.return_scale.fill_(config.return_scale or largest_return or 1.0)
        model.action_low.copy_(torch.from_numpy(low))
        model.action_high.copy_(torch.from_numpy(high))
    targets = config.targets or default_targets(dataset)
    agent_config = AgentConfig(
        model=model.config,
        context_length=context_length,
        full_episodes=whole,
        targets=targets[:1] if config.agent == "bc" else targets,  # to which it is blind: one will do
        reward_mode=config.reward_mode,
        dataset_id=dataset.dataset_id,
        dataset_sha256=dataset.sha256,
        environment=dataset.environment,
        reference=dataset.reference,
    )
    return Agent(model, agent_config, acting=config.acting)


def _model_config(
    config: TrainConfig, dataset: EpisodeDataset, context_length: int
) -> ModelConfig | BehaviorCloningConfig:
    max_timesteps = max(dataset.max_episode_length, _time_limit(dataset))
    if config.agent == "bc":
        return BehaviorCloningConfig(
            observation_dim=dataset.observation_dim,
            action_dim=dataset.action_dim,
            max_timesteps=max_timesteps,
            num_layers=config.num_layers,
            embed_dim=config.embed_dim,
            dropout=config.dropout,
        )
    tokens = context_length * TOKENS_PER_TIMESTEP[config.token_layout]
    return ModelConfig(
        observation_dim=dataset.observation_dim,
        action_dim=dataset.action_dim,
        max_timesteps=max_timesteps,
        attention=config.attention,
        token_layout=config.token_layout,
        num_layers=config.num_layers,
        embed_dim=config.embed_dim,
        num_heads=config.num_heads,
        dropout=config.dropout,
        context_tokens=min(tokens, LARGEST_DIMENSION),
    )


def _check_memory(config: TrainConfig, model_config: ModelConfig | BehaviorCloningConfig) -> None:
    with torch.device("meta"):  # which takes no memory itself
        parameters = list(untrained_model(model_config).parameters())
    needed = _TENSORS_PER_PARAMETER * sum(parameter.nbytes for parameter in parameters)
    memory = available_memory()
    if memory is not None and needed > memory:
        raise UserError(
            f"--embed-dim {config.embed_dim}, --num-layers {config.num_layers}: to train this model takes "
            f"{needed / 2**30:,.1f} GiB of memory, this machine has {memory / 2**30:,.1f}"
        )


def default_targets(dataset: EpisodeDataset) -> tuple[float, ...]:
    """The best return in the data and half of it."""
    best = float(dataset.episode_returns.max())
    return (best, best / 2)


def observation_statistics(observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 mean and standard deviation (observation_dim,), summed in float64.

    A component that does not vary gets standard deviation 1, so that it becomes 0 and stays finite.
    """
    parts = [observations[i : i + _ROWS_AT_ONCE] for i in range(0, len(observations), _ROWS_AT_ONCE)]
    mean = sum(part.sum(axis=0, dtype=np.float64) for part in parts) / len(observations)
    squares = sum(np.square(part - mean).sum(axis=0) for part in parts)
    std = np.sqrt(squares / len(observations))
    std = np.where(std < _SMALLEST_STD, 1.0, std)
    return np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)


def _bounds(dataset: EpisodeDataset) -> tuple[np.ndarray, np.ndarray]:
    """Action bounds of the environment, of the data where the environment has none (or is not known)."""
    low, high = dataset.actions.min(axis=0), dataset.actions.max(axis=0)
    if dataset.environment is not None:
        env_low, env_high = action_bounds(dataset.environment)
        low, high = (np.where(np.isfinite(e), e, d) for e, d in ((env_low, low), (env_high, high)))
    constant = high <= low  # nothing to scale by: give it a unit range
    return np.where(constant, low - 1, low).astype(np.float32), np.where(constant, low + 1, high).astype(
        np.float32
    )


def _time_limit(dataset: EpisodeDataset) -> int:
    if dataset.environment is None:
        return 1
    return (
        dataset.environment.max_episode_steps
        or gymnasium.spec(dataset.environment.env_id).max_episode_steps
        or 1
    )
