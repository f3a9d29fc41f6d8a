"""D4RL files that are broken in every way at hand: each is refused by name, or read as documented."""

import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from broken_inputs import MARKER, PICKLES, ending, refusal
from conftest import write_tiny_dataset

from flowrl.data import EpisodeDataset
from flowrl.training.config import TrainConfig
from flowrl.training.setup import load_dataset

STEPS = 60
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
CONFIG = TrainConfig(env="Hopper-v4", eval_episodes=0)

Change = Callable[[h5py.File, str], None]


def load(path: Path, env: str | None = "Hopper-v4") -> EpisodeDataset:
    """What scripts/train.py does with ``--dataset`` and ``--env``."""
    return load_dataset(replace(CONFIG, dataset=str(path), env=env))


def replaced(**options: Any) -> Change:
    """Put another dataset in the place of a key's."""

    def change(file: h5py.File, key: str) -> None:
        shape = file[key].shape
        del file[key]
        file.create_dataset(key, **{"shape": shape, "dtype": "f4", **options})

    return change


def transformed(transform: Callable[[np.ndarray], Any]) -> Change:
    def change(file: h5py.File, key: str) -> None:
        values = transform(file[key][()])
        del file[key]
        file[key] = values

    return change


def linked(link: Any) -> Change:
    def change(file: h5py.File, key: str) -> None:
        del file[key]
        file[key] = link

    return change


def grouped(file: h5py.File, key: str) -> None:
    del file[key]
    file.create_group(f"{key}/{key}")


def claiming(steps: int) -> Change:
    """Data of this many steps, none of which is stored."""

    def change(file: h5py.File, key: str) -> None:
        shape = file[key].shape[1:]
        replaced(shape=(steps, *shape), chunks=(1, *shape), compression="gzip")(file, key)

    return change


REFUSED: dict[str, tuple[str, Change, str]] = {
    **{f"no {key}": (key, lambda file, key: file.__delitem__(key), f"'{key}'.* is missing") for key in KEYS},
    "renamed": ("rewards", lambda file, key: file.move(key, key.upper()), "'rewards' is missing"),
    "a group": ("rewards", grouped, "'rewards' must be an array, not a group"),
    "a scalar": ("terminals", transformed(lambda values: values.flat[0]), "'terminals' must have shape"),
    "one step short": ("observations", transformed(lambda values: values[:-1]), "observations 59"),
    "a dimension more": ("actions", transformed(lambda values: values[:, None]), "'actions' must have shape"),
    "complex": ("actions", transformed(lambda values: values * 1j), "'actions' must hold numbers"),
    "records": ("rewards", transformed(lambda v: np.zeros(v.shape, [("a", "f4")])), "must hold numbers"),
    "rows of any length": ("rewards", replaced(dtype=h5py.vlen_dtype(np.float32)), "must hold numbers"),
    "null": ("rewards", transformed(lambda values: h5py.Empty("f4")), "'rewards' must have shape"),
    "a link to itself": ("rewards", linked(h5py.SoftLink("/rewards")), "not a readable HDF5 file"),
    "a link to no file": ("rewards", linked(h5py.ExternalLink("absent.hdf5", "x")), "is missing"),
    "flags of two": ("timeouts", transformed(np.cumsum), r"'timeouts'\[.*\] is 2: flags must be 0 or 1"),
    "flags of nan": ("terminals", transformed(lambda v: v * np.nan), r"'terminals'\[0\] is nan"),
    **{
        f"{value} in {key}": (key, transformed(lambda v, value=value: v + np.float64(value)), rf"'{key}'\[0")
        for key, value in zip(KEYS[:3] * 2, (np.nan, np.inf, -np.inf, 3.5e38, np.nan, 1e39), strict=True)
    },
}


def write(path: Path, **options: Any) -> Path:
    write_tiny_dataset(path)
    if options:
        with h5py.File(path, "r") as file:
            columns = {key: file[key][()] for key in KEYS}
        with h5py.File(path, "w", libver=options.pop("libver", None)) as file:
            for key, values in columns.items():
                file.create_dataset(key, data=values, **options)
    return path


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_key_is_refused_by_name(tmp_path, case):
    path = write(tmp_path / "broken.hdf5")
    key, change, message = REFUSED[case]
    with h5py.File(path, "a") as file:
        change(file, key)
    refusal(lambda: load(path), str(path), message)


def test_data_larger_than_memory_is_refused_before_anything_is_allocated(tmp_path):
    path = write(tmp_path / "huge.hdf5")
    with h5py.File(path, "a") as file:
        for key in KEYS:
            claiming(10**12)(file, key)
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert "1000000000000 steps take 59,604.6 GiB of memory" in refusal(lambda: load(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


LAYOUTS: dict[str, dict[str, Any]] = {"contiguous": {}, "latest": {"libver": "latest", "compression": "lzf"}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused_and_a_flipped_byte_gives_data_or_one_line(tmp_path, layout):
    """A flip inside a value cannot be distinguished from data."""
    path, refused = write(tmp_path / "data.hdf5", **LAYOUTS[layout]), 0
    whole = path.read_bytes()
    for length in [0, 8, 64, *range(96, len(whole), len(whole) // 10)]:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(lambda: load(path))
    for position in [*range(0, 96, 6), *range(96, len(whole), len(whole) // 20)]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        refused += ending(lambda: load(path)) is not None
    assert refused > 5


@pytest.mark.parametrize("content", [*PICKLES, b"", b"\x89HDF\r\n\x1a\n", b"<html>404</html>" * 100])
@pytest.mark.parametrize("name", ["data.hdf5", "data.h5", "data.pkl", "data"])
def test_other_content_is_refused_and_never_unpickled(tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert name in refusal(lambda: load(tmp_path / name))
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(("env", "width"), [("Hopper-v4", 12), ("Hopper-v999", 11), (None, 11)])
def test_the_wrong_environment_is_refused(tmp_path, env, width):
    path = write(tmp_path / "data.hdf5")
    with h5py.File(path, "a") as file:
        replaced(shape=(STEPS, width), fillvalue=1.0)(file, "observations")
    config = replace(CONFIG, dataset=str(path), env=env, eval_episodes=1)
    assert "environment" in refusal(lambda: load_dataset(config))


NAMES = (
    *("", ".", "/", "~", "~nobody-of-this-name/x.hdf5", "/dev/zero", "absent.hdf5", ".hdf5"),
    *("a" * 300 + ".hdf5", "a\0b", "a\0b.hdf5", "a\nb.hdf5", "é" * 200 + ".h5"),
    *("minari:", "minari:../../x-v0", "minari:x-v0\n", "minari:" + "a" * 300 + "-v0"),
    *("http://127.0.0.1:9/x.hdf5", "hopper-medium-v2", "flowrl"),
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_a_name_of_no_data_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refusal(lambda: load(name, env="Hopper-v4"))  # type: ignore[arg-type]
    assert [path for path in os.listdir(tmp_path) if path != "cache"] == []
