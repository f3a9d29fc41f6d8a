"""Sampling a batch: one gather by index against a Python loop over its windows."""

import numpy as np
import torch
from tables import Goal, Measurement, Row, Section
from timing import interleaved
from workload import Sizes, make_episodes, open_trainer, paper_config

from flowrl.data.dataset import EpisodeDataset
from flowrl.data.sampler import Batch, WindowSampler
from flowrl.window import Window


class LoopSampler:
    """Windows sliced one at a time and padded one at a time, as in kzl/decision-transformer's ``get_batch``.

    As there, an episode is a dictionary of its arrays, and a window's returns-to-go are summed anew over
    all rewards up to the episode's end, unless ``sums_returns`` is off and they are looked up.
    """

    def __init__(
        self,
        dataset: EpisodeDataset,
        context_length: int,
        batch_size: int,
        seed: int,
        *,
        sums_returns: bool = True,
    ) -> None:
        self._context_length, self._batch_size = context_length, batch_size
        self._sums_returns = sums_returns
        self._starts = dataset.episode_starts
        self._generator = np.random.default_rng(seed)
        self._chances = dataset.episode_lengths / dataset.num_transitions
        self._episodes = [
            {
                name: getattr(dataset, name)[start : start + length]
                for name in ("observations", "actions", "rewards", "returns_to_go")
            }
            for start, length in zip(dataset.episode_starts, dataset.episode_lengths, strict=True)
        ]

    def sample(self) -> Batch:
        """Draw episodes by their length and a start in each, one after another."""
        episodes = self._generator.choice(len(self._episodes), self._batch_size, p=self._chances)
        offsets = [int(self._generator.integers(len(self._episodes[e]["rewards"]))) for e in episodes]
        return self.gather(episodes.tolist(), offsets)

    def gather(self, episodes: list[int], offsets: list[int]) -> Batch:
        """Return the windows that start ``offsets`` timesteps into these episodes."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in Window._fields}
        spans = []
        for number, offset in zip(episodes, offsets, strict=True):
            episode = self._episodes[number]
            if len(episode["rewards"]) <= self._context_length:
                offset = 0
            end = min(offset + self._context_length, len(episode["rewards"]))
            start = int(self._starts[number])
            spans.append((start + offset, start + end))
            window = {
                "observations": episode["observations"][offset:end],
                "actions": episode["actions"][offset:end],
                "previous_actions": _previous(episode["actions"], offset, end),
                "returns_to_go": self._returns_to_go(episode, offset, end),
                "timesteps": np.arange(offset, end),
                "valid": np.ones(end - offset, dtype=bool),
            }
            for name, values in window.items():
                columns[name].append(_padded(values, self._context_length))
        tensors = {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}
        num_timesteps = int(tensors["valid"].sum())
        return Batch(Window(**tensors), torch.tensor(spans), num_timesteps, share=1.0)

    def _returns_to_go(self, episode: dict[str, np.ndarray], offset: int, end: int) -> np.ndarray:
        if not self._sums_returns:
            return episode["returns_to_go"][offset:end]
        rewards = episode["rewards"][offset:]
        returns = np.zeros(len(rewards))
        total = 0.0
        for t in reversed(range(len(rewards))):
            total += float(rewards[t])
            returns[t] = total
        return returns[: end - offset].astype(np.float32)


def measure_sampling(sizes: Sizes, repetitions: int) -> Section:
    """Two batch sizes against both loops; the smaller also as a share of the update that it feeds."""
    section = Section("sampling")
    dataset = make_episodes(sizes.transitions)
    for batch_size in (sizes.batch_size, sizes.large_batch):
        loops = {
            name: LoopSampler(dataset, 20, batch_size, 0, sums_returns=sums)
            for name, sums in (("loop", True), ("loop, returns looked up", False))
        }
        sampler = WindowSampler(dataset, 20, batch_size, seed=0)
        contenders = {"gather": sampler.sample, **{name: loop.sample for name, loop in loops.items()}}
        timings = interleaved(contenders, repetitions)
        case = f"{batch_size:,} x 20 timesteps"
        for name, timing in timings.items():
            section.measurements.append(Measurement(name, f"batch, {case}", batch_size, timing))
        what = f"sampling a batch, {case}"
        for name, against, goal in (
            ("loop", "a per-item Python loop, as kzl's get_batch", Goal(100.0)),
            ("loop, returns looked up", "the same loop, returns-to-go looked up", None),
        ):
            section.rows.append(Row(what, against, "x", timings[name].ratio_to(timings["gather"]), goal))
    section.rows += _share_rows(sizes, dataset, repetitions)
    section.notes.append(
        "The update that a batch of 4,096 feeds is taken to last as long as 64 updates of 64 windows."
    )
    return section


def _share_rows(sizes: Sizes, dataset: EpisodeDataset, repetitions: int) -> list[Row]:
    small, large = (WindowSampler(dataset, 20, size, 0) for size in (sizes.batch_size, sizes.large_batch))
    with open_trainer(paper_config(sizes), dataset) as trainer:
        contenders = {"update": trainer.update, "small": small.sample, "large": large.sample}
        timings = interleaved(contenders, repetitions)
    updates = sizes.large_batch / sizes.batch_size
    goal = Goal(2.0, at_least=False)
    return [
        Row(
            f"sampling a batch, {size:,} x 20 timesteps: share of its update",
            "100%",
            "%",
            timings[name].ratio_to(timings["update"], factor=100 / number),
            goal,
        )
        for name, size, number in (("small", sizes.batch_size, 1), ("large", sizes.large_batch, updates))
    ]


def _previous(actions: np.ndarray, offset: int, end: int) -> np.ndarray:
    """The action before each; what stands before the first of an episode has no meaning."""
    if offset > 0:
        return actions[offset - 1 : end - 1]
    return np.concatenate([np.zeros_like(actions[:1]), actions[: end - 1]])


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    padding = np.zeros((length - len(values), *values.shape[1:]), dtype=values.dtype)
    return np.concatenate([values, padding])
