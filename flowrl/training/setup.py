"""What a run starts from: its random streams, the data, and an agent with the data's statistics."""

from contextlib import suppress
from dataclasses import asdict, fields, replace
from enum import IntEnum

import numpy as np
import torch

from flowrl.data import EpisodeDataset, load_episodes
from flowrl.data.dataset import delayed_rewards, top_episodes
from flowrl.data.matching import match_environment
from flowrl.envs.spaces import environment_facts
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import EnvironmentUnavailable, make_env
from flowrl.errors import UserError
from flowrl.machine import available_memory
from flowrl.model.agent import Agent, AgentConfig
from flowrl.model.behavior_cloning import BehaviorCloningConfig
from flowrl.model.loading import MODELS, untrained_model
from flowrl.model.transformer import TOKENS_PER_TIMESTEP, ModelConfig, SequenceModel
from flowrl.options import LARGEST_DIMENSION
from flowrl.training.config import TrainConfig

_TENSORS_PER_PARAMETER = 4  # itself, its gradient, and AdamW's two moments; one more with an average
_HIDDEN_STD = 1e20  # scales what the agent must not see to less than float32 adds to anything
_WITHOUT_OTHER_VELOCITIES = {"skipped_qpos", "qpos", "qvel", "cfrc_ext"}  # Humanoid has more, in "cvel"
DEFAULT_BATCH_SIZE = 64
_CPU = torch.device("cpu")


class Stream(IntEnum):
    """What a run draws random numbers for; each stream is independent of the others."""

    WEIGHTS = 0
    BATCHES = 1
    DROPOUT = 2
    EVALUATION = 3
    COLLECTION = 4
    CRITICS = 5


def stream_seed(seed: int, stream: Stream, number: int = 0) -> int:
    """The 32-bit seed of one random stream of the run with this seed, by NumPy's SeedSequence.

    ``number`` is that of a process, or of a round of collecting.
    """
    return int(np.random.SeedSequence(seed, spawn_key=(stream, number)).generate_state(1)[0])


def evaluation_seed(config: TrainConfig) -> int:
    """The seed that evaluations during training take, as ``scripts/evaluate.py --seed`` does."""
    return stream_seed(config.seed, Stream.EVALUATION) if config.eval_seed is None else config.eval_seed


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Fill in the defaults that depend on the machine and the length of the run, once for all its resumes.

    ``device`` is the current CUDA device, if it is one. On GPUs before Ampere bfloat16 is emulated, and slow.
    """
    precision = config.precision
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if native else "float32"
    return replace(config, warmup_steps=config.warmup, precision=precision)


def batch_size(config: TrainConfig, dataset: EpisodeDataset) -> int:
    """Windows per update: ``--batch-size``, or by ``--timesteps-per-update``, or 64.

    :class:`flowrl.data.sampler.WindowSampler` draws episodes in proportion to their lengths, so that windows
    are longer than a plain mean over episodes. What overhangs an episode's ends counts.
    """
    if config.batch_size is not None or config.timesteps_per_update is None:
        return config.batch_size or DEFAULT_BATCH_SIZE
    lengths = windows = dataset.episode_lengths.astype(np.float64)
    if isinstance(config.context_length, int):
        windows = np.minimum(lengths, config.context_length)
    return max(1, round(config.timesteps_per_update / np.average(windows, weights=lengths)))


def load_dataset(config: TrainConfig, episodes: EpisodeDataset | None = None) -> EpisodeDataset:
    """Load what ``--dataset`` or ``--env`` names, or take ``episodes``; check it against its environment."""
    if episodes is None and not config.dataset:
        assert config.env is not None  # checked by check_values
        dataset = load_episodes(config.env, None, config, config.split_at_timeouts, config.memory_map)
    else:
        source = config.dataset if episodes is None else episodes
        try:
            dataset = load_episodes(source, config.env, config, config.split_at_timeouts, config.memory_map)
        except UserError as error:
            if config.resume is None:
                raise
            raise UserError(
                f"{error}; the data of the run may be given by --dataset, or from Python"
            ) from error
    if dataset.environment is not None:
        try:
            dataset = match_environment(dataset)
        except EnvironmentUnavailable as error:
            if config.eval_episodes > 0:
                raise
            dataset = replace(dataset, notes=(*dataset.notes, str(error)))
    elif config.eval_episodes > 0:
        raise UserError(
            f"{'; '.join((dataset.dataset_id, *dataset.notes))}: no environment to evaluate in; give --env, "
            "such as Hopper-v4, or --eval-episodes 0"
        )
    if config.keep_best == "normalized_score_mean" and dataset.reference is None:
        raise UserError(f"--keep-best {config.keep_best}: there is none without --reference-scores LOW HIGH")
    if config.mask_velocities:
        velocities(dataset.environment)  # refused before a run folder is made
    dataset = top_episodes(dataset, config.top_fraction)
    return delayed_rewards(dataset) if config.reward_mode == "delayed" else dataset


def build_agent(config: TrainConfig, dataset: EpisodeDataset, device: torch.device = _CPU) -> Agent:
    """Make an untrained agent whose normalisation, return scale and action bounds come from the data.

    Raises:
        UserError: a model that cannot be trained in the memory of ``device``.
    """
    longest = min(dataset.max_episode_length, LARGEST_DIMENSION)
    whole = config.context_length == "episode"
    context_length = (
        longest if isinstance(config.context_length, str) else min(config.context_length, longest)
    )
    model_config = _model_config(config, dataset, context_length)
    _check_memory(config, model_config, device)
    model = untrained_model(model_config)
    mean, std = dataset.statistics.observation_mean, dataset.statistics.observation_std.copy()
    if config.mask_velocities:
        std[velocities(dataset.environment)] = _HIDDEN_STD
    low, high = _bounds(dataset)
    largest_return = max(-float(dataset.returns_to_go.min()), float(dataset.returns_to_go.max()))
    with torch.no_grad():
        model.observation_mean.copy_(torch.from_numpy(mean))
        model.observation_std.copy_(torch.from_numpy(std))
        if isinstance(model, SequenceModel):
            model.return_scale.fill_(config.return_scale or largest_return or 1.0)
        model.action_low.copy_(torch.from_numpy(low))
        model.action_high.copy_(torch.from_numpy(high))
    targets = tuple(dict.fromkeys(config.targets)) or default_targets(dataset)
    agent_config = AgentConfig(
        model=model.config,
        context_length=context_length,
        full_episodes=whole,
        targets=targets[:1] if config.agent == "bc" else targets,  # unused: one suffices
        reward_mode=config.reward_mode,
        conditioning=config.conditioning,
        acting=config.acting,
        dataset_id=dataset.dataset_id,
        dataset_sha256=dataset.sha256,
        environment=dataset.environment,
        reference=dataset.reference,
    )
    return Agent(model, agent_config)


def _model_config(
    config: TrainConfig, dataset: EpisodeDataset, context_length: int
) -> ModelConfig | BehaviorCloningConfig:
    """Of the options those that the model has, by name, and the sizes of the data."""
    tokens = context_length * TOKENS_PER_TIMESTEP[config.token_layout]
    time_limit = dataset.environment.time_limit if dataset.environment else None
    values = asdict(config) | {
        "observation_dim": dataset.observation_dim,
        "action_dim": dataset.action_dim,
        "action_choices": dataset.action_choices,
        "max_timesteps": min(max(dataset.max_episode_length, time_limit or 1), LARGEST_DIMENSION),
        "context_tokens": min(tokens, LARGEST_DIMENSION),
    }
    kind = MODELS[config.agent]
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def _check_memory(
    config: TrainConfig, model_config: ModelConfig | BehaviorCloningConfig, device: torch.device
) -> None:
    with torch.device("meta"):  # which takes no memory itself
        model = untrained_model(model_config)
    tensors = _TENSORS_PER_PARAMETER + (config.ema_decay > 0)
    needed = tensors * sum(parameter.nbytes for parameter in model.parameters())
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if memory is not None and needed > memory:
        raise UserError(
            f"--embed-dim {config.embed_dim}, --num-layers {config.num_layers}: to train this model takes "
            f"{needed / 2**30:,.1f} GiB of memory, device {device} has {memory / 2**30:,.1f}"
        )


def default_targets(dataset: EpisodeDataset) -> tuple[float, ...]:
    """The best episode's return in the data and the median one's; one target where they are equal."""
    returns = dataset.episode_returns
    median = np.quantile(returns, 0.5, method="lower")  # of an episode, not between two
    return tuple(dict.fromkeys((float(returns.max()), float(median))))


def velocities(environment: EnvironmentSpec | None) -> slice:
    """Return where observations hold velocities, which Gymnasium's -v5 robots describe, the same for others.

    Raises:
        UserError: an environment for which this is not known.
    """
    if environment is not None and not environment.wrappers:
        newest = f"{environment.env_id.rpartition('-v')[0]}-v5"
        with suppress(EnvironmentUnavailable):
            robot = make_env(replace(environment, env_id=newest, max_episode_steps=None))
            structure = getattr(robot.unwrapped, "observation_structure", {})
            robot.close()
            if {"qpos", "qvel"} <= structure.keys() <= _WITHOUT_OTHER_VELOCITIES:
                return slice(structure["qpos"], structure["qpos"] + structure["qvel"])
    raise UserError(
        f"--mask-velocities: where observations of environment {environment} hold velocities is not known; "
        "it is for Gymnasium's Hopper, HalfCheetah, Walker2d, Ant, Swimmer and InvertedPendulum"
    )


def _bounds(dataset: EpisodeDataset) -> tuple[np.ndarray, np.ndarray]:
    """Action bounds of the environment, of the data where the environment has none (or is not known)."""
    low, high = dataset.statistics.action_low, dataset.statistics.action_high
    if dataset.action_choices:  # one-hot vectors enter the model as they are
        low, high = -np.ones_like(low), np.ones_like(high)
    elif dataset.environment is not None:
        with suppress(EnvironmentUnavailable):
            env_low, env_high = environment_facts(dataset.environment).action_bounds
            low, high = (np.where(np.isfinite(e), e, d) for e, d in ((env_low, low), (env_high, high)))
    constant = high <= low  # nothing to scale by: give it a unit range
    return np.where(constant, low - 1, low), np.where(constant, low + 1, high)
