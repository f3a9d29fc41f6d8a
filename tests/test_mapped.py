"""Data that is read from disk as needed is the same as in memory, bit for bit, and takes no memory."""

import os
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny_dataset
from test_minari import create
from tiny_training import figures, train_here

from flowrl.data import EpisodeDataset, load_episodes, mapped
from flowrl.data.arrays import Storage, release, row_chunks
from flowrl.data.dataset import concatenate
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.training.config import TrainConfig
from flowrl.training.setup import load_dataset

LARGE = ("observations", "actions", "rewards", "returns_to_go")


def assert_equal(ours: EpisodeDataset, theirs: EpisodeDataset) -> None:
    for field in fields(EpisodeDataset):
        expected, value = getattr(theirs, field.name), getattr(ours, field.name)
        if field.name == "statistics":
            for name in vars(expected):
                np.testing.assert_array_equal(getattr(value, name), getattr(expected, name), strict=True)
        elif isinstance(expected, np.ndarray):
            np.testing.assert_array_equal(value, expected, err_msg=field.name, strict=True)
        else:
            assert value == expected, field.name


def loaded(folder: Path, *sources: Any, env: str | None = None) -> EpisodeDataset:
    """The data through ``folder``, after a comparison with the data in memory."""
    names = tuple(map(str, sources))
    dataset = load_episodes(names, env, memory_map=folder)
    assert_equal(dataset, load_episodes(names, env))
    assert all(getattr(dataset, name).mode == "r" for name in LARGE)  # a change would be lost
    return dataset


@pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks
def test_files_minari_and_several_are_the_same_as_in_memory(tiny_dataset, own_folders, monkeypatch):
    create(env="Hopper-v5")
    other = own_folders / "other.hdf5"
    write_tiny_dataset(other, seed=1)
    folder, minari_id = own_folders / "map", "minari:test/hopper/tiny-v0"
    loaded(folder, tiny_dataset, env="Hopper-v4")
    loaded(folder, minari_id)
    (own_folders / "d4rl").mkdir()
    write_tiny_dataset(own_folders / "d4rl" / "hopper_medium-v2.hdf5", seed=3)
    loaded(folder, "hopper-medium")
    named = load_dataset(TrainConfig(env="hopper-medium", memory_map=folder, eval_episodes=0))
    assert isinstance(named.observations, np.memmap)
    assert loaded(folder, tiny_dataset, other, minari_id, env="Hopper-v4").num_episodes == 14
    for version in (4, 5):  # with other notes of the same data
        loaded(folder, tiny_dataset, minari_id, env=f"Hopper-v{version}")
    assert sum(path.is_dir() for path in folder.iterdir()) == 7
    monkeypatch.setattr(mapped, "_write", lambda *_: pytest.fail("it is there already"))
    load_episodes((str(tiny_dataset), str(other), minari_id), "Hopper-v4", memory_map=folder)
    monkeypatch.undo()
    write_tiny_dataset(other, seed=2)
    os.utime(other, ns=(1, 1))
    loaded(folder, other, env="Hopper-v4")  # has changed
    for name in ("a.hdf5", "b.hdf5"):  # of one content
        loaded(folder, tiny_dataset, shutil.copy(tiny_dataset, own_folders / name))


def test_a_training_is_the_same_as_in_memory(unevaluated, tiny_dataset, tmp_path):
    train_here(tiny_dataset, tmp_path / "disk", eval_episodes=0, memory_map=tmp_path / "map", device="cpu:0")
    assert figures(tmp_path / "disk") == figures(unevaluated)


def test_what_is_damaged_is_refused_and_what_fails_leaves_nothing(tiny_dataset, tmp_path, monkeypatch):
    folder = tmp_path / "map"
    with pytest.raises(UserError, match="no such file"):
        load_episodes(str(tmp_path / "none.hdf5"), memory_map=folder)
    dataset = load_episodes(str(tiny_dataset), memory_map=folder)
    (kept,) = (path for path in folder.iterdir() if path.is_dir())
    np.save(kept / "rewards.npy", dataset.rewards[:-1])
    with pytest.raises(UserError, match=r"damaged \(lengths differ: \[59, 60\]\); delete it"):
        load_episodes(str(tiny_dataset), memory_map=folder)
    (kept / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"damaged .*dataset\.json"):
        load_episodes(str(tiny_dataset), memory_map=folder)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"--memory-map .*file: a file; give"):
        load_episodes(str(tiny_dataset), memory_map=file)
    with pytest.raises(UserError, match=r"x: 5 steps take 931,322,574\.6 GiB on disk, .* free"):
        Storage(kept).require("x", "5 steps", 10**18)
    alike, other = (replace(dataset, environment=EnvironmentSpec(f"Hopper-v{n}")) for n in (4, 5))
    load_episodes([alike, alike], memory_map=folder)
    with pytest.raises(UserError, match="differ in environment"):
        load_episodes([alike, other], memory_map=folder)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(UserError, match=r"tiny\.hdf5 \+ file:tiny\.hdf5: 120 steps take .* on disk"):
        concatenate([dataset] * 2, Storage(kept))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_that_were_read_leave_memory(tmp_path):
    np.save(tmp_path / "large.npy", np.ones((1 << 18, 64), np.float32))  # 64 MiB
    array = np.load(tmp_path / "large.npy", mmap_mode="r")

    def resident():
        return int(Path("/proc/self/status").read_text().partition("RssFile:")[2].split()[0]) >> 10  # MiB

    before = resident()
    array.sum()
    assert resident() > before + 60
    release(array[5:])
    assert resident() < before + 5
    assert max(resident() for rows in row_chunks(array) if rows.sum() > 0) < before + 20
