"""Random episodes as a D4RL file, a Minari dataset and arrays in memory: one form, bit for bit."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import dataset_of
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from test_minari import create

from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.minari import read_minari

pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks

ID = "test/random-v0"
NAMES = (
    *("observations", "actions", "rewards", "returns_to_go"),
    *("episode_starts", "episode_lengths", "terminated"),
)
STORAGE: list[dict[str, Any]] = [
    {},
    {"compression": "gzip", "shuffle": True},
    {"compression": "lzf"},
    {"chunks": True, "fletcher32": True},
]


def random_episodes(random: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray, list[str]]:
    """Float64 columns of all steps, the lengths of one to five episodes, and how each ends."""
    lengths = random.choice((1, 1, 2, 5, 9, 1000), size=random.integers(1, 6))
    endings = random.choice(("terminal", "timeout", "both"), size=len(lengths)).tolist()
    if random.random() < 0.5:
        endings[-1] = "unfinished"
    steps, scale = lengths.sum(), random.choice((0.0, 1e-30, 1.0, 1e4, 1e30))
    columns = {
        "observations": scale * random.normal(size=(steps, random.integers(1, 6))),
        "actions": random.uniform(-1, 1, size=(steps, random.integers(1, 4))),
        "rewards": scale * random.normal(size=steps),
        "terminals": np.zeros(steps, bool),
        "timeouts": np.zeros(steps, bool),
    }
    for end, ending in zip(np.cumsum(lengths) - 1, endings, strict=True):
        columns["terminals"][end] = ending in ("terminal", "both")
        columns["timeouts"][end] = ending in ("timeout", "both")
    return columns, lengths, endings


def write_d4rl(path: Path, columns: dict[str, np.ndarray], random: np.random.Generator) -> Path:
    dtype, flags = random.choice(("<f4", ">f4", "<f8", ">f8")), random.choice(("bool", "u1", ">f4", "i8"))
    storage = STORAGE[random.integers(len(STORAGE))]
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file.create_dataset(key, data=values.astype(flags if values.dtype == bool else dtype), **storage)
        file["next_observations"] = columns["observations"][::-1]  # ignored
    return path


def write_minari(columns: dict[str, np.ndarray], lengths: np.ndarray, dtype: type) -> None:
    """T + 1 observations an episode; the last one is unused, so it may be anything."""
    buffers = []
    for index, (stop, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
        own = {name: column[stop - length : stop] for name, column in columns.items()}
        final = np.full_like(own["observations"][:1], np.nan if index % 2 else 7.0)
        observations = np.concatenate((own["observations"], final)).astype(dtype)
        ends = {"terminations": own["terminals"].tolist(), "truncations": own["timeouts"].tolist()}
        rewards, actions = own["rewards"].tolist(), own["actions"].astype(dtype)
        buffers.append(EpisodeBuffer(observations=observations, actions=actions, rewards=rewards, **ends))
    observed, acted = (columns[name].shape[1:] for name in ("observations", "actions"))
    action_space = spaces.Box(-1.0, 1.0, acted, dtype)
    create(buffers, ID, spaces.Box(-np.inf, np.inf, observed, dtype), action_space=action_space)


@pytest.mark.parametrize("seed", range(12))
def test_file_minari_and_memory_agree(seed, tmp_path, monkeypatch):
    random = np.random.default_rng(seed)
    columns, lengths, endings = random_episodes(random)
    terminated = np.array([ending in ("terminal", "both") for ending in endings])
    arrays = (columns[name] for name in ("observations", "actions", "rewards"))
    memory = dataset_of(*arrays, lengths, terminated=terminated)
    from_file = read_d4rl_file(write_d4rl(tmp_path / "episodes.hdf5", columns, random))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    write_minari(columns, lengths, np.float64 if random.random() < 0.5 else np.float32)
    for other in (from_file, read_minari(ID)):
        for name in NAMES:
            np.testing.assert_array_equal(getattr(memory, name), getattr(other, name), name, strict=True)
        assert other.sha256 == memory.sha256
    note = f"the last {lengths[-1]} steps end without terminal or timeout: kept as truncated"
    assert (note in from_file.notes) == (endings[-1] == "unfinished")
