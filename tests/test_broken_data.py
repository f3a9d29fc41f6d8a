"""D4RL files that are broken in every way at hand: each is refused by name, or read as documented."""

import json
import os
import zlib
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
FLOATS, FLAGS = ("observations", "actions", "rewards"), ("terminals", "timeouts")
KEYS = FLOATS + FLAGS
CONFIG = TrainConfig(env="Hopper-v4", eval_episodes=0)


def load(path: Path, env: str | None = "Hopper-v4") -> EpisodeDataset:
    """What scripts/train.py does with ``--dataset`` and ``--env``."""
    return load_dataset(replace(CONFIG, dataset=str(path), env=env))


@pytest.fixture(scope="module")
def inflating() -> bytes:
    """Half a megabyte of deflate that becomes half a gigabyte."""
    compressor, zeros = zlib.compressobj(6), bytes(1 << 24)
    return b"".join(compressor.compress(zeros) for _ in range(32)) + compressor.flush()


def replaced(**options: Any) -> Callable[[h5py.File, str], None]:
    """Put another dataset in the place of a key's."""

    def change(file: h5py.File, key: str) -> None:
        shape = file[key].shape
        del file[key]
        file.create_dataset(key, **{"shape": shape, "dtype": "f4", **options})

    return change


def transformed(transform: Callable[[np.ndarray], Any]) -> Callable[[h5py.File, str], None]:
    def change(file: h5py.File, key: str) -> None:
        values = transform(file[key][()])
        del file[key]
        file[key] = values

    return change


def linked(link: Any) -> Callable[[h5py.File, str], None]:
    def change(file: h5py.File, key: str) -> None:
        del file[key]
        file[key] = link

    return change


def grouped(file: h5py.File, key: str) -> None:
    del file[key]
    file.create_group(f"{key}/{key}")


def named_type(file: h5py.File, key: str) -> None:
    del file[key]
    file[key] = np.dtype("f4")


def virtual(file: h5py.File, key: str) -> None:
    layout = h5py.VirtualLayout(shape=file[key].shape, dtype="f4")
    del file[key]
    file.create_virtual_dataset(key, layout)


def doubly_compressed(file: h5py.File, key: str) -> None:
    shape = file[key].shape
    del file[key]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(shape)
    properties.set_deflate(9)
    properties.set_filter(h5py.h5z.FILTER_DEFLATE, h5py.h5z.FLAG_MANDATORY, (9,))
    h5py.h5d.create(file.id, key.encode(), h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), properties)


REFUSED: dict[str, Callable[[h5py.File, str], None]] = {
    "missing": lambda file, key: file.__delitem__(key),
    "renamed": lambda file, key: file.move(key, key.upper()),
    "a group": grouped,
    "a type": named_type,
    "a scalar": transformed(lambda values: values.flat[0]),
    "no steps": transformed(lambda values: values[:0]),
    "one step short": transformed(lambda values: values[:-1]),
    "one step long": transformed(lambda values: np.concatenate((values, values[:1]))),
    "a dimension more": transformed(lambda values: values[:, None]),
    "steps last": transformed(lambda values: values.T[None] if values.ndim == 1 else values.T),
    "complex": transformed(lambda values: values * 1j),
    "text": transformed(lambda values: values.astype("S8")),
    "records": transformed(lambda values: np.zeros(values.shape, [("a", "f4"), ("b", "f4")])),
    "opaque": transformed(lambda values: np.zeros(values.shape, "V4")),
    "arrays in cells": replaced(dtype=np.dtype(("f4", (3,)))),
    "text of any length": replaced(dtype=h5py.string_dtype()),
    "rows of any length": replaced(dtype=h5py.vlen_dtype(np.float32)),
    "references": replaced(dtype=h5py.ref_dtype),
    "null": transformed(lambda values: h5py.Empty("f4")),
    "a link to nothing": linked(h5py.SoftLink("/nowhere")),
    "a link to itself": lambda file, key: linked(h5py.SoftLink(f"/{key}"))(file, key),
    "a link to the root": linked(h5py.SoftLink("/")),
    "a link to no file": linked(h5py.ExternalLink("absent.hdf5", "x")),
    "values in another file": replaced(external=[("/dev/zero", 0, 10_000)]),
    "values from anywhere": virtual,
    "a filter of few bits": replaced(dtype="i4", chunks=True, scaleoffset=2),
    "compressed twice": doubly_compressed,
    "of 10^12 steps": lambda file, key: replaced(
        shape=(10**12, *file[key].shape[1:]), chunks=(1, *file[key].shape[1:]), compression="gzip"
    )(file, key),
    "chunks of gigabytes": lambda file, key: replaced(
        chunks=(1 << 29, *file[key].shape[1:]), maxshape=(None, *file[key].shape[1:]), compression="gzip"
    )(file, key),
}
BAD_VALUES = {
    **dict.fromkeys(FLOATS, (np.nan, np.inf, -np.inf, 3.5e38)),
    **dict.fromkeys(FLAGS, (np.nan, np.inf, -1.0, 2.0, 0.5)),
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


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_key_is_refused_by_name(tmp_path: Path, case: str, key: str) -> None:
    path = write(tmp_path / "broken.hdf5")
    with h5py.File(path, "a") as file:
        REFUSED[case](file, key)
    line = refusal(lambda: load(path))
    assert str(path) in line
    assert key in line or "links" in line  # HDF5 follows them, and names none


@pytest.mark.parametrize("position", [0, STEPS // 2, STEPS - 1])
@pytest.mark.parametrize(("key", "value"), [(key, value) for key in KEYS for value in BAD_VALUES[key]])
def test_a_bad_value_is_named_with_its_place(tmp_path: Path, key: str, value: float, position: int) -> None:
    path = write(tmp_path / "broken.hdf5")
    with h5py.File(path, "a") as file:
        values = file[key][()].astype(np.float64)
        del file[key]
        values[position] = value
        file[key] = values
    assert f"{path}: '{key}'[{position}" in refusal(lambda: load(path))


def test_a_chunk_that_inflates_to_half_a_gigabyte_is_refused(tmp_path: Path, inflating: bytes) -> None:
    for key in KEYS:
        path = write(tmp_path / "bomb.hdf5")
        with h5py.File(path, "a") as file:
            shape = file[key].shape
            replaced(chunks=shape, compression="gzip")(file, key)
            file[key].id.write_direct_chunk((0,) * len(shape), inflating)
        assert path.stat().st_size < 1 << 20
        assert f"'{key}' has a compressed chunk of" in refusal(lambda path=path: load(path))


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_large_honest_chunks_are_read(tmp_path: Path, compression: str | None) -> None:
    """Stored sizes that could be bombs, and are none: one chunk of noise, checksummed."""
    random = np.random.default_rng(0)
    steps = 50_000
    noise = {"observations": random.normal(size=(steps, 11)), "actions": random.uniform(-1, 1, (steps, 3))}
    path = tmp_path / "large.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in noise.items():
            file.create_dataset(
                key, data=values, dtype="f4", chunks=values.shape, compression=compression, fletcher32=True
            )
        file["rewards"] = np.ones(steps, np.float32)
        file["terminals"] = file["timeouts"] = np.zeros(steps, bool)
    dataset = load(path)
    for key, values in noise.items():
        np.testing.assert_array_equal(getattr(dataset, key), values.astype(np.float32))


def write_one_chunk(path: Path, compression: str, chunk: bytes, filter_mask: int) -> None:
    """A file whose 100,000 observations are stored as one chunk of these bytes."""
    steps = 100_000
    with h5py.File(path, "w") as file:
        shape = (steps, 11)
        observations = file.create_dataset("observations", shape, "f4", chunks=shape, compression=compression)
        observations.id.write_direct_chunk((0, 0), chunk, filter_mask)
        file["actions"], file["rewards"] = np.zeros((steps, 3), np.float32), np.ones(steps, np.float32)
        file["terminals"] = file["timeouts"] = np.zeros(steps, bool)


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_a_chunk_that_was_left_uncompressed_is_read(tmp_path: Path, compression: str) -> None:
    """Its bytes are the values: as lzf's, so many would be refused for what they may become."""
    values = np.random.default_rng(0).normal(size=(100_000, 11)).astype(np.float32)
    write_one_chunk(tmp_path / "large.hdf5", compression, values.tobytes(), filter_mask=1)
    np.testing.assert_array_equal(load(tmp_path / "large.hdf5").observations, values)


def test_a_chunk_of_damaged_deflate_is_refused(tmp_path: Path, inflating: bytes) -> None:
    for name, chunk in (
        ("noise", np.random.default_rng(0).bytes(1 << 20)),
        ("head", bytes(9) + inflating[9:]),
    ):
        path = tmp_path / f"{name}.hdf5"
        write_one_chunk(path, "gzip", chunk, filter_mask=0)
        assert "not a readable HDF5 file" in refusal(lambda path=path: load(path))


LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "compressed": {"compression": "gzip", "chunks": True, "shuffle": True},
    "latest": {"libver": "latest", "compression": "lzf"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path, layout: str) -> None:
    whole = write(tmp_path / "whole.hdf5", **LAYOUTS[layout]).read_bytes()
    path = tmp_path / "cut.hdf5"
    lengths = [*range(0, 96, 8), *range(96, len(whole), len(whole) // 80)]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(lambda: load(path))
    assert len(lengths) > 80


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_byte_gives_data_or_one_line(tmp_path: Path, layout: str) -> None:
    """In the headers every byte, elsewhere some; a flip inside values cannot be told from data."""
    whole = write(tmp_path / "whole.hdf5", **LAYOUTS[layout]).read_bytes()
    path, refused = tmp_path / "flipped.hdf5", 0
    positions = [*range(96), *range(96, len(whole), max(len(whole) // 60, 1))]
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        refused += ending(lambda: load(path)) is not None
    assert len(positions) > 150
    assert refused > 40


def test_what_is_not_d4rls_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "extra.hdf5")
    expected = load(path).sha256
    with h5py.File(path, "a") as file:
        file["next_observations"] = np.full((3, 2), np.nan)
        file["infos/qpos"] = "text"
        file["metadata/algorithm"] = h5py.Empty("f4")
        file["elsewhere"] = h5py.ExternalLink("absent.hdf5", "x")
        file.create_dataset("huge", shape=(10**12,), dtype="f8", chunks=True)
    with path.open("ab") as raw:
        raw.write(b"behind the end" * 100)
    assert load(path).sha256 == expected


@pytest.mark.parametrize("pickled", PICKLES)
@pytest.mark.parametrize("name", ["data.hdf5", "data.h5", "data.pkl", "data", "data.npz", "data.hdf5.pt"])
def test_a_pickle_is_refused_under_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pickled: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickled)
    assert name in refusal(lambda: load(tmp_path / name))
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    ("env", "observation_dim", "action_dim"),
    [
        ("Hopper-v4", 12, 3),
        ("Hopper-v4", 11, 4),
        ("Hopper-v4", 3, 11),
        ("Hopper-v5", 1, 1),
        ("HalfCheetah-v4", 11, 3),
        ("Walker2d-v5", 17, 5),
        ("Ant-v4", 112, 8),
        ("Ant-v5", 27, 8),
        ("hopper-medium", 17, 6),
        ("CartPole-v1", 4, 1),
        ("Hopper-v999", 11, 3),
        ("no_such_module:Hopper-v4", 11, 3),
        ("", 11, 3),
        (None, 11, 3),
    ],
)
def test_the_wrong_environment_is_refused(
    tmp_path: Path, env: str | None, observation_dim: int, action_dim: int
) -> None:
    path = write(tmp_path / "data.hdf5")
    with h5py.File(path, "a") as file:
        for key, width in (("observations", observation_dim), ("actions", action_dim)):
            del file[key]
            file[key] = np.ones((STEPS, width), np.float32)
    config = replace(CONFIG, dataset=str(path), env=env, eval_episodes=1)
    assert "environment" in refusal(lambda: load_dataset(config))


NAMES = (
    *(
        "",
        ".",
        "..",
        "/",
        "~",
        "~nobody-of-this-name/x.hdf5",
        "/dev/null",
        "/dev/zero",
        "absent.hdf5",
        ".hdf5",
    ),
    *("a" * 300, "a" * 300 + ".hdf5", "a\0b", "a\0b.hdf5", "a\nb.hdf5", "é" * 200 + ".h5", "D4RL/hopper"),
    *("minari:", "minari:../../x-v0", "minari:/x-v0", "minari:x-v0\n", "minari:" + "a" * 300 + "-v0"),
    *("http://127.0.0.1:9/x.hdf5", "hopper-medium-v2", "flowrl", json.dumps({"a": 1})),
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_a_name_of_no_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refusal(lambda: load(name, env="Hopper-v4"))  # type: ignore[arg-type]
    assert [path for path in os.listdir(tmp_path) if path != "cache"] == []
