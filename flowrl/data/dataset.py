"""The one form of offline data: flat arrays of transitions with episode offsets."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from reprlib import repr as short_repr

import numpy as np

from flowrl.data.arrays import IN_MEMORY, Storage, chunks, release, row_chunks
from flowrl.envs.reference_scores import ReferenceScores, reference_scores
from flowrl.envs.specs import EnvironmentSpec, named_environment
from flowrl.errors import UserError

_SMALLEST_STD = 1e-6  # an observation that varies less is a constant; it is only centred


@dataclass(frozen=True)
class Statistics:
    """Of each number of the observations and actions, over all transitions; float32."""

    observation_mean: np.ndarray  # (observation_dim,)
    observation_std: np.ndarray  # 1 where a number does not vary, so that it becomes 0 and stays finite
    action_low: np.ndarray  # (action_dim,) the lowest in the data
    action_high: np.ndarray


@dataclass(frozen=True)
class EpisodeDataset:
    """N transitions of E episodes, stored one episode after another; large arrays may be mapped files.

    Episode e is the slice ``episode_starts[e] : episode_starts[e] + episode_lengths[e]``.
    """

    observations: np.ndarray  # (N, observation_dim) float32
    actions: np.ndarray  # (N, action_dim) float32; one-hot vectors where there are action_choices
    rewards: np.ndarray  # (N,) float32
    returns_to_go: np.ndarray  # (N,) float32: sum of rewards from this step to the episode's end, inclusive
    episode_starts: np.ndarray  # (E,) int64
    episode_lengths: np.ndarray  # (E,) int64
    episode_returns: np.ndarray  # (E,) float64: undiscounted
    terminated: np.ndarray  # (E,) bool: ended in a terminal state; False: cut off (time limit, end of data)
    statistics: Statistics
    dataset_id: str
    sha256: str  # of the data as read (see content_sha256); delayed_rewards and top_episodes keep it
    action_choices: tuple[int, ...] = ()  # numbers of choices of discrete actions, none for continuous ones
    environment: EnvironmentSpec | None = None
    reference: ReferenceScores | None = None
    notes: tuple[str, ...] = ()  # sentences about this data for the user

    @property
    def num_episodes(self) -> int:
        return len(self.episode_starts)

    @property
    def num_transitions(self) -> int:
        return len(self.rewards)

    @property
    def observation_dim(self) -> int:
        return int(self.observations.shape[1])

    @property
    def action_dim(self) -> int:
        return int(self.actions.shape[1])

    @property
    def max_episode_length(self) -> int:
        return int(self.episode_lengths.max())


def build_episodes(
    *,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    episode_lengths: np.ndarray,
    terminated: np.ndarray,
    dataset_id: str,
    where: str,
    action_choices: tuple[int, ...] = (),
    environment: EnvironmentSpec | str | None = None,
    reference: ReferenceScores | None = None,
    notes: Sequence[str] = (),
    storage: Storage = IN_MEMORY,
) -> EpisodeDataset:
    """Check arrays and derive offsets, returns, statistics and the content hash.

    Args:
        observations: (N, observation_dim); float32 C-contiguous arrays are kept without a copy.
        actions: (N, action_dim).
        rewards: (N,).
        episode_lengths: (E,) positive integers that sum to N.
        terminated: (E,) bool.
        dataset_id: name of the data in configurations, logs and score tables.
        where: file or dataset that error messages name.
        action_choices: numbers of choices of discrete actions, whose one-hot vectors ``actions`` holds.
        environment: where agents trained on this data are evaluated. A string is a Gymnasium id, whose
            published reference scores, if there are any, are the default of ``reference``.
        reference: returns that normalised scores are measured against.
        notes: sentences to show to the user.
        storage: where returns-to-go go.

    Raises:
        UserError: no episodes, lengths that do not match, wrong number of dimensions, or a value that is
            NaN, infinite or too large for float32 (the message names the key and the index); discrete actions
            that are not one-hot vectors; an unregistered environment.
    """
    if isinstance(environment, str):
        environment = named_environment(environment)
        reference = reference or reference_scores(environment.env_id)
    observations = np.ascontiguousarray(observations, dtype=np.float32)
    actions = np.ascontiguousarray(actions, dtype=np.float32)
    rewards = np.ascontiguousarray(rewards, dtype=np.float32)
    episode_lengths = np.ascontiguousarray(episode_lengths, dtype=np.int64)
    terminated = np.ascontiguousarray(terminated, dtype=bool)
    for key, array, dimensions in (
        ("observations", observations, 2),
        ("actions", actions, 2),
        ("rewards", rewards, 1),
        ("episode_lengths", episode_lengths, 1),
        ("terminated", terminated, 1),
    ):
        if array.ndim != dimensions or (dimensions == 2 and array.shape[1] == 0):
            raise UserError(f"{where}: '{key}' must have {dimensions} dimensions, its shape is {array.shape}")
    if not len(rewards) or not len(episode_lengths):
        raise UserError(f"{where}: no episodes: the data is empty")
    if not len(observations) == len(actions) == len(rewards):
        raise UserError(
            f"{where}: lengths differ: {len(observations)} observations, {len(actions)} actions, "
            f"{len(rewards)} rewards"
        )
    if len(terminated) != len(episode_lengths):
        raise UserError(
            f"{where}: {len(episode_lengths)} episode lengths, {len(terminated)} terminated flags"
        )
    if episode_lengths.min() < 1 or episode_lengths.sum() != len(rewards):
        raise UserError(f"{where}: episode lengths must be positive and sum to {len(rewards)}")
    for key, array in (("observations", observations), ("actions", actions), ("rewards", rewards)):
        _check_finite(where, key, array)
    if action_choices:
        _check_one_hot(where, actions, action_choices)

    episode_starts = np.cumsum(episode_lengths) - episode_lengths
    returns_to_go = storage.empty("returns_to_go", rewards.shape)
    episode_returns = _fill_returns_to_go(returns_to_go, rewards, episode_starts, episode_lengths)
    _check_finite(where, "rewards summed to returns-to-go", returns_to_go)
    return EpisodeDataset(
        observations=observations,
        actions=actions,
        rewards=rewards,
        returns_to_go=returns_to_go,
        episode_starts=episode_starts,
        episode_lengths=episode_lengths,
        episode_returns=episode_returns,
        terminated=terminated,
        statistics=_statistics(observations, actions),
        dataset_id=dataset_id,
        sha256=content_sha256(observations, actions, rewards, episode_lengths, terminated),
        action_choices=action_choices,
        environment=environment,
        reference=reference,
        notes=tuple(notes),
    )


def concatenate(datasets: Sequence[EpisodeDataset], storage: Storage = IN_MEMORY) -> EpisodeDataset:
    """Return the episodes of all datasets, one dataset after another, in arrays of ``storage``.

    Raises:
        UserError: they differ in the sizes of observations or actions, or in their environments.
    """
    first = datasets[0]
    for other in datasets[1:]:
        for what in ("observation_dim", "action_dim", "action_choices", "environment"):
            ours, theirs = getattr(first, what), getattr(other, what)
            if ours != theirs:
                remedy = "; give one with --env" if what == "environment" else ""
                raise UserError(
                    f"{first.dataset_id} and {other.dataset_id} differ in {what.replace('_', ' ')}: "
                    f"{ours} and {theirs}{remedy}"
                )
    dataset_id, notes = joined_about(datasets)
    steps = sum(dataset.num_transitions for dataset in datasets)
    storage.require(dataset_id, f"{steps} steps", 4 * steps * (first.observation_dim + first.action_dim + 2))
    arrays = {}
    for name in ("observations", "actions", "rewards"):
        parts = [getattr(dataset, name) for dataset in datasets]
        arrays[name] = storage.empty(name, (steps, *parts[0].shape[1:]))
        stop = 0
        for rows in (rows for part in parts for rows in row_chunks(part)):
            start, stop = stop, stop + len(rows)
            arrays[name][start:stop] = rows
            release(arrays[name])
    return build_episodes(
        **arrays,
        episode_lengths=np.concatenate([dataset.episode_lengths for dataset in datasets]),
        terminated=np.concatenate([dataset.terminated for dataset in datasets]),
        dataset_id=dataset_id,
        where=dataset_id,
        action_choices=first.action_choices,
        storage=storage,
        environment=first.environment,
        reference=first.reference,
        notes=notes,
    )


def joined_about(datasets: Sequence[EpisodeDataset]) -> tuple[str, tuple[str, ...]]:
    """The id and the notes of several datasets taken together."""
    notes = (f"{dataset.dataset_id}: {note}" for dataset in datasets for note in dataset.notes)
    return " + ".join(dataset.dataset_id for dataset in datasets), tuple(notes)


def delayed_rewards(dataset: EpisodeDataset) -> EpisodeDataset:
    """Return the data with each episode's whole return on its last step and zero reward before it.

    Every return-to-go then equals the episode's return. Source: the delayed-return setting of Chen et al.,
    "Decision Transformer" (2021).
    """
    returns = dataset.episode_returns.astype(np.float32)
    rewards = np.zeros_like(dataset.rewards)
    rewards[dataset.episode_starts + dataset.episode_lengths - 1] = returns
    return replace(
        dataset,
        rewards=rewards,
        returns_to_go=np.repeat(returns, dataset.episode_lengths),
        episode_returns=returns.astype(np.float64),
    )


def top_episodes(dataset: EpisodeDataset, fraction: float) -> EpisodeDataset:
    """Return the episodes of highest return, in their order, that fill ``fraction`` of the timesteps.

    The best come first (of equals the earlier), until the next would exceed the share; at least one stays.
    ``dataset_id`` states the share; ``sha256`` remains that of the data as read. Source: the percentile
    behaviour cloning of Chen et al., "Decision Transformer" (2021).
    """
    if fraction == 1:
        return dataset
    returns, lengths = dataset.episode_returns, dataset.episode_lengths
    best_first = np.argsort(-returns, kind="stable")
    timesteps = np.cumsum(lengths[best_first])  # (E,)
    budget = int(round(fraction * dataset.num_transitions, 6))  # 0.29 of 100 is 28.999...
    count = max(int(np.searchsorted(timesteps, budget, side="right")), 1)
    kept = np.sort(best_first[:count])
    note = (
        f"top {fraction:g} of the timesteps by return: {count} of {dataset.num_episodes} episodes, "
        f"{int(lengths[kept].sum())} of {dataset.num_transitions} transitions, returns from "
        f"{returns[kept].min():.1f} to {returns[kept].max():.1f}"
    )
    return replace(
        select_episodes(dataset, kept),
        dataset_id=f"{dataset.dataset_id} top {fraction:g}",
        notes=(*dataset.notes, note),
    )


def held_out(dataset: EpisodeDataset, fraction: float) -> tuple[EpisodeDataset, EpisodeDataset | None]:
    """Return the episodes to train on and those held out, drawn by a fixed seed; None for a fraction of 0.

    Raises:
        UserError: a single episode cannot be split.
    """
    if fraction == 0:
        return dataset, None
    if dataset.num_episodes == 1:
        raise UserError(f"{dataset.dataset_id}: a single episode, so that none can be held out")
    count = min(max(round(fraction * dataset.num_episodes), 1), dataset.num_episodes - 1)
    shuffled = np.random.default_rng(0).permutation(dataset.num_episodes)
    kept, left_out = np.sort(shuffled[count:]), np.sort(shuffled[:count])
    return select_episodes(dataset, kept), select_episodes(dataset, left_out)


def select_episodes(dataset: EpisodeDataset, kept: np.ndarray) -> EpisodeDataset:
    """The episodes with these rising numbers, (episodes,); ``sha256`` remains that of the data as read."""
    is_kept = np.zeros(dataset.num_episodes, dtype=bool)
    is_kept[kept] = True
    lengths = dataset.episode_lengths
    rows = np.repeat(is_kept, lengths)  # (N,) bool
    observations, actions = dataset.observations[rows], dataset.actions[rows]
    return replace(
        dataset,
        observations=observations,
        actions=actions,
        rewards=dataset.rewards[rows],
        returns_to_go=dataset.returns_to_go[rows],
        episode_starts=np.cumsum(lengths[kept]) - lengths[kept],
        episode_lengths=lengths[kept],
        episode_returns=dataset.episode_returns[kept],
        terminated=dataset.terminated[kept],
        statistics=_statistics(observations, actions),
    )


def content_sha256(
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    episode_lengths: np.ndarray,
    terminated: np.ndarray,
) -> str:
    """Hash the data itself, so that equal data has equal hashes whatever file it came from.

    SHA-256 over, for each of the five arrays in this order: name, shape, and little-endian values
    (float32, float32, float32, int64, uint8).
    """
    digest = hashlib.sha256()
    for name, array, dtype in (
        ("observations", observations, "<f4"),
        ("actions", actions, "<f4"),
        ("rewards", rewards, "<f4"),
        ("episode_lengths", episode_lengths, "<i8"),
        ("terminated", terminated, "u1"),
    ):
        digest.update(f"{name}{list(array.shape)}".encode())
        for rows in row_chunks(array):
            digest.update(np.ascontiguousarray(rows, dtype=dtype).data)
    return digest.hexdigest()


def _statistics(observations: np.ndarray, actions: np.ndarray) -> Statistics:
    """Sums are in float64."""
    mean = sum(rows.sum(axis=0, dtype=np.float64) for rows in row_chunks(observations)) / len(observations)
    squares = sum(np.square(rows - mean).sum(axis=0) for rows in row_chunks(observations))
    std = np.sqrt(squares / len(observations))
    lowest = np.min([rows.min(axis=0) for rows in row_chunks(actions)], axis=0)
    highest = np.max([rows.max(axis=0) for rows in row_chunks(actions)], axis=0)
    return Statistics(
        np.asarray(mean, dtype=np.float32),
        np.where(std < _SMALLEST_STD, 1.0, std).astype(np.float32),
        lowest,
        highest,
    )


def _fill_returns_to_go(
    result: np.ndarray, rewards: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Write each episode's suffix sums of rewards into ``result`` (N,); return the episodes' returns (E,).

    One float64 sum per episode, not one over all data: differences of a long running sum would let the
    rewards of one episode round off those of another.
    """
    returns = np.empty(len(starts))
    with np.errstate(over="ignore"):  # the caller reports overflow by index
        for episode, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            to_go = np.cumsum(rewards[start : start + length][::-1], dtype=np.float64)[::-1]
            result[start : start + length] = to_go
            returns[episode] = to_go[0]
    return returns


def _check_finite(where: str, key: str, array: np.ndarray) -> None:
    for start, rows in zip(chunks(len(array)), row_chunks(array), strict=True):
        finite = np.isfinite(rows)
        if not finite.all():
            first = np.argwhere(~finite)[0]
            index = ", ".join(str(i) for i in (first[0] + start.start, *first[1:]))
            raise UserError(
                f"{where}: '{key}'[{index}] is {rows[tuple(first)]}: every value must be finite and within "
                "float32"
            )


def _check_one_hot(where: str, actions: np.ndarray, choices: tuple[int, ...]) -> None:
    if min(choices) < 1 or actions.shape[1] != sum(choices):
        raise UserError(
            f"{where}: 'actions' has {actions.shape[1]} numbers a row, one-hot vectors of choices of "
            f"{choices} have {sum(choices)}"
        )
    starts = [sum(choices[:index]) for index in range(len(choices))]
    for chunk, rows in zip(chunks(len(actions)), row_chunks(actions), strict=True):
        sums = np.add.reduceat(rows, starts, axis=1)  # (rows, components)
        wrong = ((rows != 0) & (rows != 1)).any(axis=1) | (sums != 1).any(axis=1)
        if wrong.any():
            row = int(np.argmax(wrong))
            found = short_repr(rows[row].tolist())
            raise UserError(
                f"{where}: 'actions'[{chunk.start + row}] is {found}: expected one-hot vectors of choices of "
                f"{choices}"
            )
