"""Files in D4RL's layout, written by hand with h5py, against plain loops; and the ways they can be broken."""

import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.dataset import EpisodeDataset
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


STORAGE: list[dict[str, Any]] = [
    {},
    {"compression": "gzip", "chunks": True, "shuffle": True},
    {"compression": "lzf"},
    {"fletcher32": True},
    {"maxshape": None, "chunks": True},
]


@pytest.mark.parametrize("options", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f4", ">f8", "<f2"])
def test_every_storage_gives_the_same_data_and_hash(
    tmp_path: Path, dtype: str, options: dict[str, Any]
) -> None:
    data = columns()
    for key in ("observations", "actions", "rewards"):
        data[key] = data[key].astype(np.float16).astype(np.float32)  # exact in every dtype
    plain = read_d4rl_file(write(tmp_path / "plain.hdf5", data))
    stored = {
        key: values.astype(dtype) if values.dtype == np.float32 else values for key, values in data.items()
    }
    dataset = read_d4rl_file(write(tmp_path / "stored.hdf5", stored, **options))
    assert_matches(dataset, data)
    assert dataset.sha256 == plain.sha256


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
def test_flags_may_be_numbers(tmp_path: Path, dtype: type) -> None:
    data = columns()
    numbers = {
        **data,
        "terminals": data["terminals"].astype(dtype),
        "timeouts": data["timeouts"].astype(dtype),
    }
    assert_matches(read_d4rl_file(write(tmp_path / "a.hdf5", numbers)), data)


def test_other_keys_are_ignored(tmp_path: Path) -> None:
    data = columns()
    extra = {
        **data,
        "next_observations": np.full((99, 1), np.nan),
        "infos/qpos": np.zeros((3, 3)),
        "metadata/algorithm": b"SAC",
    }
    assert_matches(read_d4rl_file(write(tmp_path / "a.hdf5", extra)), data)


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


# Broken input from here on: each must give one line that names the file and, where one is at fault, the key.


def refuse(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_d4rl_file(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


Change = Callable[[dict[str, Any]], object]
BROKEN: dict[str, tuple[Change, str]] = {
    **{f"no {key}": (lambda data, key=key: data.pop(key), f"key '{key}' is missing") for key in columns()},
    **{
        f"{key} longer": (
            lambda data, key=key: data.update({key: np.concatenate([data[key], data[key][:1]])}),
            f"keys differ in length: .*{key} 13",
        )
        for key in columns()
    },
    **{
        f"{key} of strings": (
            lambda data, key=key: data.update({key: np.full(data[key].shape, b"x")}),
            f"'{key}' must hold numbers",
        )
        for key in columns()
    },
    **{
        f"{key} a scalar": (lambda data, key=key: data.update({key: 1.0}), f"'{key}' must have shape")
        for key in columns()
    },
    **{
        f"NaN in {key}": (
            lambda data, key=key: data.update(
                {key: np.where(data[key] == data[key].flat[5], np.nan, data[key])}
            ),
            rf"'{key}'\[.*\] is nan",
        )
        for key in ("observations", "actions", "rewards")
    },
    "observations flat": (
        lambda data: data.update(observations=data["observations"].ravel()),
        "'observations' must have shape",
    ),
    "observations 3-d": (
        lambda data: data.update(observations=data["observations"][:, None]),
        "'observations' must have shape",
    ),
    "observations of no numbers": (
        lambda data: data.update(observations=np.zeros((12, 0), dtype=np.float32)),
        "'observations' must have shape",
    ),
    "rewards 2-d": (lambda data: data.update(rewards=data["rewards"][:, None]), "'rewards' must have shape"),
    "complex actions": (
        lambda data: data.update(actions=data["actions"] * 1j),
        "'actions' must hold numbers",
    ),
    "actions too large": (
        lambda data: data.update(actions=np.full((12, 2), 1e39)),
        r"'actions'\[0, 0\] is inf",
    ),
    "bool observations": (
        lambda data: data.update(observations=np.zeros((12, 4), dtype=bool)),
        "'observations' must hold numbers",
    ),
    "NaN flags": (lambda data: data.update(terminals=np.full(12, np.nan)), r"'terminals'\[0\] is nan"),
    "flags of two": (
        lambda data: data.update(timeouts=np.arange(12)),
        r"'timeouts'\[2\] is 2: flags must be 0 or 1",
    ),
    "no steps": (
        lambda data: data.update({key: values[:0] for key, values in data.items()}),
        "no episodes: the arrays are empty",
    ),
    "empty dataspace": (
        lambda data: data.update(rewards=h5py.Empty("f4")),
        "'rewards' must have shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_columns_are_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    data: dict[str, Any] = columns()
    change(data)
    refuse(write(tmp_path / "broken.hdf5", data), message)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_bad_value_is_named_with_its_index(tmp_path: Path, value: float) -> None:
    data = columns()
    data["observations"][6, 3] = value
    data["observations"][8, 0] = value
    refuse(
        write(tmp_path / "broken.hdf5", data),
        rf"'observations'\[6, 3\] is {value}: every value must be a finite float32",
    )


def test_objects_and_groups_in_place_of_arrays_are_refused(tmp_path: Path) -> None:
    data: dict[str, Any] = columns()
    path = write(tmp_path / "a.hdf5", {key: data[key] for key in data if key != "rewards"})
    with h5py.File(path, "a") as file:
        file.create_group("rewards/inner")
    refuse(path, "'rewards' must be an array, not a group")
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file.create_dataset("rewards", shape=(12,), dtype=h5py.vlen_dtype(np.float32))
    refuse(path, "'rewards' must hold numbers")
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file["rewards"] = h5py.SoftLink("/nowhere")
    refuse(path, "key 'rewards' is missing")


def test_values_kept_in_other_files_are_refused(tmp_path: Path) -> None:
    data: dict[str, Any] = columns()
    other = write(tmp_path / "other.hdf5", {"rewards": data.pop("rewards")})
    path = write(tmp_path / "a.hdf5", data)
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.ExternalLink(str(other), "rewards")
    refuse(path, "'rewards' keeps its values in another file")
    with h5py.File(path, "a") as file:
        del file["rewards"]
        layout = h5py.VirtualLayout(shape=(12,), dtype="f4")
        layout[:] = h5py.VirtualSource(str(other), "rewards", shape=(12,))
        file.create_virtual_dataset("rewards", layout)
    refuse(path, "'rewards' keeps its values in another file")
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file.create_dataset("rewards", shape=(12,), dtype="f4", external=[(str(other), 0, 48)])
    refuse(path, "'rewards' keeps its values in another file")


@pytest.mark.parametrize("key", list(columns()))
def test_a_header_that_claims_terabytes_is_refused_before_anything_is_allocated(
    tmp_path: Path, key: str
) -> None:
    path = tmp_path / "huge.hdf5"
    steps = 10**11
    with h5py.File(path, "w") as file:
        for name, values in columns().items():
            file.create_dataset(name, shape=(steps, *values.shape[1:]), dtype=values.dtype, chunks=True)
    assert path.stat().st_size < 100_000
    if key in ("terminals", "timeouts"):  # reached only when the large arrays are believable
        with h5py.File(path, "a") as file:
            del file[key]
            file.create_dataset(key, data=np.zeros(3, dtype=bool))
        refuse(path, "keys differ in length")
        return
    tracemalloc.start()
    try:
        refuse(path, "would take .* bytes of memory but 0 are stored")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_a_chunk_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    data: dict[str, Any] = columns()
    del data["rewards"]
    path = write(tmp_path / "a.hdf5", data)
    with h5py.File(path, "a") as file:
        options = {"maxshape": (None,), "chunks": (1 << 29,), "compression": "gzip"}
        file.create_dataset("rewards", shape=(12,), dtype="f4", **options)
    refuse(path, "'rewards' of shape .* would take 2147483648 bytes")


def test_files_that_are_not_hdf5_are_refused_and_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    for content in (b"", b"HDF", b"\x89HDF\r\n\x1a\n", pickle.dumps(Payload()), b"<html>404</html>" * 100):
        path = tmp_path / "a.hdf5"
        path.write_bytes(content)
        refuse(path, "not a readable HDF5 file")
    assert not marker.exists()


def test_paths_without_a_file_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "missing.hdf5", "no such file")
    (tmp_path / "folder.hdf5").mkdir()
    refuse(tmp_path / "folder.hdf5", "not a file")


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.hdf5", columns(400), compression="gzip").read_bytes()
    path = tmp_path / "cut.hdf5"
    for length in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:length])
        refuse(path, "not a readable HDF5 file")


def test_a_damaged_file_gives_its_data_or_one_clear_error(tmp_path: Path) -> None:
    """A flipped byte may sit in a value, which no reader can tell from data; it must never be a traceback."""
    whole = bytearray(
        write(tmp_path / "whole.hdf5", columns(200), compression="gzip", fletcher32=True).read_bytes()
    )
    path, messages = tmp_path / "damaged.hdf5", []
    for position in range(0, len(whole), 101):
        damaged = whole.copy()
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read_d4rl_file(path)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)
