"""The command ``flowrl info``: what a dataset holds, and the notes and errors of training on it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from flowrl.data.arrays import row_chunks
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.matching import match_environment
from flowrl.data.sources import load_episodes
from flowrl.envs.options import EvaluationOptions
from flowrl.errors import UserError

_BINS, _BAR = 12, 50  # of the histogram: rows, and characters of the longest bar


@dataclass(frozen=True)
class InfoConfig(EvaluationOptions):
    """Show what a dataset holds: episodes, lengths, returns, numbers, environment, and what is unusual."""

    dataset: tyro.conf.Positional[tuple[str, ...]]
    """As train's --dataset: hopper-medium, minari:mujoco/hopper/medium-v0, PATH.hdf5; several are taken
    together."""
    env: str | None = None
    """Environment to compare the data with, if not the data's own: such as Hopper-v4."""
    split_at_timeouts: bool = False
    """Episodes of D4RL files end at timeouts alone."""
    memory_map: Path | None = None
    """As train's --memory-map."""


def describe_dataset(config: InfoConfig) -> str:
    """Return the description, several lines of plain text.

    Raises:
        UserError: data that cannot be read, or an environment that is not known.
    """
    dataset = load_episodes(config.dataset, config.env, config, config.split_at_timeouts, config.memory_map)
    refusal = ""
    if dataset.environment is None:
        refusal = "no environment to evaluate in: give one with --env, or train with --eval-episodes 0"
    else:
        try:
            dataset = match_environment(dataset)
        except UserError as error:
            refusal = str(error)
    lines = [
        f"dataset      {dataset.dataset_id}",
        f"SHA-256      {dataset.sha256}",
        f"transitions  {dataset.num_transitions}",
        f"episodes     {dataset.num_episodes}, {int(dataset.terminated.sum())} of them terminated",
        f"lengths      {_quantiles(dataset.episode_lengths)}",
        f"returns      {_quantiles(dataset.episode_returns)}",
        *_scores(dataset),
        *(f"             {line}" for line in histogram(dataset.episode_returns)),
        f"observations {_numbers(dataset.observations)}",
        f"actions      {_choices(dataset) or _numbers(dataset.actions)}",
        f"rewards      {_quantiles(dataset.rewards)}",
        f"environment  {dataset.environment or 'none'}",
        *(f"note         {note}" for note in dataset.notes),
        *([f"refused      {refusal}"] if refusal else []),
    ]
    return "\n".join(lines)


def histogram(values: np.ndarray) -> list[str]:
    """Return lines of text: a bin's lower edge, how many of the values (N,) are in it, and a bar."""
    low, high = values.min(), values.max()
    # Edges that are given may repeat; NumPy's own may not, which fails where values differ by rounding alone.
    counts, edges = np.histogram(values, np.linspace(low, high, _BINS + 1) if low < high else _BINS)
    bars = np.ceil(_BAR * counts / counts.max()).astype(int)
    return [
        f"{edge:12.6g}  {count:8d}  {'#' * bar}".rstrip()
        for edge, count, bar in zip(edges[:-1], counts.tolist(), bars.tolist(), strict=True)
    ]


def _scores(dataset: EpisodeDataset) -> list[str]:
    if dataset.reference is None:
        return []
    low, high = dataset.reference.minimum, dataset.reference.maximum
    scores = dataset.reference.normalized_score(dataset.episode_returns)
    return [f"normalised   {_quantiles(scores)}; returns of {low:g} and {high:g} are 0 and 100"]


def _quantiles(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, (0, 0.5, 1), method="lower")  # the median is one of the values
    mean = np.mean(values, dtype=np.float64)
    return f"from {low:.6g} to {high:.6g}, median {median:.6g}, mean {mean:.6g}"


def _choices(dataset: EpisodeDataset) -> str:
    """Describe discrete actions: the numbers of choices and how often each is taken; empty for others."""
    if not dataset.action_choices:
        return ""
    totals = sum(rows.sum(axis=0, dtype=np.float64) for rows in row_chunks(dataset.actions))
    shares = np.split(totals / dataset.num_transitions, np.cumsum(dataset.action_choices)[:-1])
    return "choices of " + ", ".join(
        f"{len(each)}, taken {' '.join(f'{share:.3g}' for share in each)} of the time" for each in shares
    )


def _numbers(values: np.ndarray) -> str:
    """Describe (N, dim) values: how many there are, their range, and how many of them never change."""
    lows = np.min([rows.min(axis=0) for rows in row_chunks(values)], axis=0)
    highs = np.max([rows.max(axis=0) for rows in row_chunks(values)], axis=0)
    constant = int((lows == highs).sum())
    text = f"{values.shape[1]} numbers from {lows.min():g} to {highs.max():g}"
    return f"{text}, {constant} of them constant" if constant else text
