"""Files in D4RL's layout, written by hand with h5py, against plain loops."""

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.dataset import EpisodeDataset


def columns(steps: int = 12, observation_dim: int = 4, action_dim: int = 2) -> dict[str, np.ndarray]:
    """Episodes of 3, 1, 4 and 2 steps and 2 unfinished ones; step 7 both terminates and times out."""
    random = np.random.default_rng(1)
    data = {
        "observations": random.normal(size=(steps, observation_dim)).astype(np.float32),
        "actions": random.normal(size=(steps, action_dim)).astype(np.float32),
        "rewards": random.normal(size=steps).astype(np.float32),
        "terminals": np.zeros(steps, dtype=bool),
        "timeouts": np.zeros(steps, dtype=bool),
    }
    if steps == 12:
        data["terminals"][[2, 7]] = True
        data["timeouts"][[3, 7, 9]] = True
    return data


def write(path: Path, data: dict[str, Any], **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file.create_dataset(key, data=values, **options)
    return path


def naive_episodes(data: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Cut the steps into episodes one at a time."""
    episodes, current = [], []
    for step in range(len(data["rewards"])):
        current.append(step)
        if data["terminals"][step] or data["timeouts"][step]:
            episodes.append({"steps": current, "terminated": bool(data["terminals"][step])})
            current = []
    if current:
        episodes.append({"steps": current, "terminated": False})
    return episodes


def assert_matches(dataset: EpisodeDataset, data: dict[str, np.ndarray]) -> None:
    episodes = naive_episodes(data)
    assert dataset.episode_starts.tolist() == [episode["steps"][0] for episode in episodes]
    assert dataset.episode_lengths.tolist() == [len(episode["steps"]) for episode in episodes]
    assert dataset.terminated.tolist() == [episode["terminated"] for episode in episodes]
    for key in ("observations", "actions", "rewards"):
        assert np.array_equal(getattr(dataset, key), data[key].astype(np.float32))
    for episode in episodes:
        for position, step in enumerate(episode["steps"]):
            to_go = sum(float(np.float32(data["rewards"][later])) for later in episode["steps"][position:])
            assert dataset.returns_to_go[step] == pytest.approx(to_go, rel=1e-6)
            assert dataset.timesteps[step] == position


def test_episodes_end_at_terminals_and_timeouts_and_the_unfinished_tail_is_kept(tmp_path: Path) -> None:
    data = columns()
    dataset = read_d4rl_file(write(tmp_path / "a.hdf5", data))
    assert dataset.episode_lengths.tolist() == [3, 1, 4, 2, 2]
    assert dataset.terminated.tolist() == [True, False, True, False, False]
    assert_matches(dataset, data)
    assert dataset.notes == ("the last 2 steps end without terminal or timeout: kept as truncated",)
    assert dataset.dataset_id == "file:a.hdf5"
    assert dataset.environment is None
    assert dataset.reference is None


def test_finished_data_has_no_note_and_one_without_flags_is_one_episode(tmp_path: Path) -> None:
    data = columns()
    data["timeouts"][-1] = True
    dataset = read_d4rl_file(write(tmp_path / "a.hdf5", data))
    assert_matches(dataset, data)
    assert dataset.notes == ()
    unflagged = columns(7)
    dataset = read_d4rl_file(write(tmp_path / "b.hdf5", unflagged))
    assert_matches(dataset, unflagged)
    assert dataset.episode_lengths.tolist() == [7]
    assert "the last 7 steps" in dataset.notes[0]


def test_one_step_episodes_and_a_single_step(tmp_path: Path) -> None:
    data = columns()
    data["terminals"][:] = True
    dataset = read_d4rl_file(write(tmp_path / "a.hdf5", data))
    assert_matches(dataset, data)
    assert dataset.episode_lengths.tolist() == [1] * 12
    one = columns(1)
    assert_matches(read_d4rl_file(write(tmp_path / "b.hdf5", one)), one)


def test_peak_memory_stays_under_three_times_the_raw_arrays(tmp_path: Path) -> None:
    data = columns(60_000, 17, 6)
    data["timeouts"][499::500] = True
    path = write(tmp_path / "a.hdf5", {k: v.astype(">f8") if v.ndim == 2 else v for k, v in data.items()})
    raw = sum(values.nbytes for values in data.values())
    tracemalloc.start()
    try:
        read_d4rl_file(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert raw < peak < 2 * raw
