"""Data larger than memory: make a file of it, then train from the disk beside the same in memory.

    python scripts/benchmark/large_data.py make DATA.hdf5
    python scripts/benchmark/large_data.py train DATA.hdf5 MAP  # converts it into the folder MAP
    python scripts/benchmark/large_data.py train DATA.hdf5 MAP  # finds it there

The second command prints seconds to the first batch, peak memory, and how long updates and batches take
compared with data in memory.
"""

import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import tyro
from timing import interleaved, resident
from tyro.conf import Positional
from workload import open_trainer

from flowrl.data import EpisodeDataset
from flowrl.training.config import TrainConfig
from flowrl.training.setup import load_dataset

OBSERVATION_DIM, ACTION_DIM, EPISODE = 17, 3, 1000
ROWS = 1_000_000  # written at once
GIB = 1 << 30


def make(path: Positional[Path], transitions: int = 100_000_000) -> None:
    """Write random transitions in D4RL's layout, in episodes of 1,000."""
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        shapes = {"observations": (OBSERVATION_DIM,), "actions": (ACTION_DIM,), "rewards": ()}
        columns = {
            key: file.create_dataset(key, (transitions, *shape), "f4") for key, shape in shapes.items()
        }
        for start in range(0, transitions, ROWS):
            stop = min(start + ROWS, transitions)
            for column in columns.values():
                column[start:stop] = generator.random((stop - start, *column.shape[1:]), dtype=np.float32)
        file["terminals"] = np.zeros(transitions, dtype=bool)
        file["timeouts"] = np.arange(1, transitions + 1) % EPISODE == 0


def train(
    path: Positional[Path],
    memory_map: Positional[Path],
    updates: int = 500,
    rounds: int = 15,
    in_memory: int = 10_000_000,
) -> None:
    """Update the paper's model, windows of 20, from the disk; compare with some of it in memory."""
    config = TrainConfig(dataset=(str(path),), memory_map=memory_map, eval_episodes=0)
    start = time.perf_counter()
    dataset = load_dataset(config)
    with open_trainer(config, dataset) as mapped:
        mapped.state.sampler.sample()
        print(f"first batch after {time.perf_counter() - start:.1f} s, {_memory()}")
        for _ in range(updates):
            mapped.update()
        print(f"after {updates} updates of {mapped.state.sampler.batch_size} windows: {_memory()}")
        for _ in range(100 * updates):
            mapped.state.sampler.sample()
        print(f"after {100 * updates} more batches: {_memory()}")
        with open_trainer(config, _first(dataset, in_memory)) as other:
            for name, disk, memory in (
                ("update", mapped.update, other.update),
                ("batch", mapped.state.sampler.sample, other.state.sampler.sample),
            ):
                times = interleaved({"disk": disk, "memory": memory}, rounds)
                ratio = times["disk"].ratio_to(times["memory"])
                print(
                    f"{name}: {1e3 * times['disk'].median:.3g} ms from the disk, "
                    f"{1e3 * times['memory'].median:.3g} ms in memory; "
                    f"ratio {ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
                )


def _memory() -> str:
    return f"peak memory {resident('VmHWM') / GIB:.2f} GiB, now {resident('VmRSS') / GIB:.2f}"


def _first(dataset: EpisodeDataset, transitions: int) -> EpisodeDataset:
    """The first so many transitions, in memory."""
    episodes = slice(int(np.searchsorted(dataset.episode_starts, transitions)))
    return replace(
        dataset,
        observations=np.array(dataset.observations[:transitions]),
        actions=np.array(dataset.actions[:transitions]),
        rewards=np.array(dataset.rewards[:transitions]),
        returns_to_go=np.array(dataset.returns_to_go[:transitions]),
        episode_starts=dataset.episode_starts[episodes],
        episode_lengths=dataset.episode_lengths[episodes],
        episode_returns=dataset.episode_returns[episodes],
        terminated=dataset.terminated[episodes],
    )


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"make": make, "train": train})
