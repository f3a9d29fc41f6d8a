"""Files in D4RL's layout, written by hand with h5py: where episodes end, and the memory it takes."""

import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from flowrl.data.d4rl import read_d4rl_file
from flowrl.errors import UserError


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


def test_peak_memory_stays_under_three_times_the_raw_arrays(tmp_path):
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


def test_without_timeouts_episodes_end_after_the_given_steps(tmp_path):
    data = columns()
    del data["timeouts"]
    path = write(tmp_path / "a.hdf5", data)
    with pytest.raises(UserError, match=r"a\.hdf5: key 'timeouts' is missing: give --max-episode-steps"):
        read_d4rl_file(path)
    dataset = read_d4rl_file(path, max_episode_steps=3)
    # Terminals at steps 2 and 7: 0-2 terminated, 3-5 cut, 6-7 terminated, 8-10 cut, 11 unfinished.
    assert dataset.episode_lengths.tolist() == [3, 3, 2, 3, 1]
    assert dataset.terminated.tolist() == [True, False, True, False, False]
    assert read_d4rl_file(path, max_episode_steps=5).episode_lengths.tolist() == [3, 5, 4]
    cut = read_d4rl_file(path, max_episode_steps=5, split_at_timeouts=True)
    assert cut.episode_lengths.tolist() == [5, 5, 2]


def test_dones_alone_mark_every_end(tmp_path):
    data = columns()
    data["dones"] = data.pop("terminals") | data.pop("timeouts")
    path = write(tmp_path / "a.hdf5", data)
    dataset = read_d4rl_file(path)
    assert dataset.episode_lengths.tolist() == [3, 1, 4, 2, 2]
    assert dataset.terminated.tolist() == [True, True, True, True, False]
    with pytest.raises(UserError, match="'timeouts' is missing: give --max-episode-steps"):
        read_d4rl_file(path, split_at_timeouts=True)


def test_terminal_flags_that_stay_set_are_reported_or_ignored(tmp_path):
    """As in AntMaze: 2 trajectories of 6 steps, at the goal from step 4 of the first on."""
    data = columns()
    data["terminals"] = np.isin(np.arange(12), [4, 5])
    data["timeouts"] = np.isin(np.arange(12), [5, 11])
    path = write(tmp_path / "a.hdf5", data)
    dataset = read_d4rl_file(path)
    assert dataset.episode_lengths.tolist() == [5, 1, 6]
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith("1 episodes have one step, as a terminal follows on a terminal")
    whole = read_d4rl_file(path, split_at_timeouts=True)
    assert whole.episode_lengths.tolist() == [6, 6]
    assert (whole.terminated.tolist(), whole.notes) == ([True, False], ())
