"""Minari datasets with damaged files and metadata: each is refused by name, or read as documented."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pytest
from broken_inputs import MARKER, PICKLES, ending, refusal
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from test_broken_data import (
    doubly_compressed,
    grouped,
    linked,
    named_type,
    replaced,
    transformed,
    virtual,
)

from flowrl.data import EpisodeDataset
from flowrl.training.config import TrainConfig
from flowrl.training.setup import load_dataset

pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks

ID = "test/hopper/tiny-v0"
LENGTHS = (4, 1, 7)
CONFIG = TrainConfig(dataset=f"minari:{ID}", eval_episodes=0)
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


def load() -> EpisodeDataset:
    """What scripts/train.py does with ``--dataset minari:ID``."""
    return load_dataset(CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one whole dataset; not to be changed."""
    folder, random = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    buffers = [
        EpisodeBuffer(
            observations=random.normal(size=(length + 1, 11)),
            actions=random.uniform(-1, 1, size=(length, 3)).astype(np.float32),
            rewards=random.normal(size=length).tolist(),
            terminations=[False] * (length - 1) + [True],
            truncations=[False] * length,
            infos={"extra": np.arange(length + 1)},
        )
        for length in LENGTHS
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        minari.create_dataset_from_buffers(
            ID,
            buffers,
            env="Hopper-v5",
            observation_space=spaces.Box(-np.inf, np.inf, (11,), np.float64),
            action_space=spaces.Box(-1.0, 1.0, (3,), np.float32),
        )
    return folder


@pytest.fixture(autouse=True)
def data(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a copy of the dataset, in a cache of our own, and no network to ask."""
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    return cache / ID / "data"


def change_metadata(data: Path, **changes: Any) -> None:
    metadata = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps({**metadata, **changes}))


def test_the_whole_one_is_read() -> None:
    assert load().episode_lengths.tolist() == list(LENGTHS)


BROKEN: dict[str, Callable[[h5py.File, str], None]] = {
    "missing": lambda file, key: file.__delitem__(key),
    "a group": grouped,
    "a type": named_type,
    "a scalar": transformed(lambda values: values.flat[0]),
    "no steps": transformed(lambda values: values[:0]),
    "one step short": transformed(lambda values: values[:-1]),
    "one step long": transformed(lambda values: np.concatenate((values, values[:1]))),
    "a dimension more": transformed(lambda values: values[:, None]),
    "text": transformed(lambda values: values.astype("S8")),
    "records": transformed(lambda values: np.zeros(values.shape, [("a", "f4"), ("b", "f4")])),
    "null": transformed(lambda values: h5py.Empty("f4")),
    "text of any length": replaced(dtype=h5py.string_dtype()),
    "a link to nothing": linked(h5py.SoftLink("/nowhere")),
    "a link to itself": lambda file, key: linked(h5py.SoftLink(f"/{key}"))(file, key),
    "a link to another file": linked(h5py.ExternalLink("absent.hdf5", "x")),
    "values in another file": replaced(external=[("/dev/zero", 0, 10_000)]),
    "values from anywhere": virtual,
    "compressed twice": doubly_compressed,
    "of 10^12 steps": lambda file, key: replaced(
        shape=(10**12, *file[key].shape[1:]), chunks=(1, *file[key].shape[1:]), compression="gzip"
    )(file, key),
    "of 10^9 steps": lambda file, key: replaced(
        shape=(10**9, *file[key].shape[1:]), chunks=(1, *file[key].shape[1:]), compression="gzip"
    )(file, key),
    "chunks of gigabytes": lambda file, key: replaced(
        chunks=(1 << 29, *file[key].shape[1:]), maxshape=(None, *file[key].shape[1:]), compression="gzip"
    )(file, key),
}


# What minari itself stumbles over is reported in its words, with the folder.
NAMED_BY_MINARI = (
    "missing",
    "a group",
    "a type",
    "a scalar",
    "no steps",
    "one step short",
    "one step long",
    "null",
)


@pytest.mark.parametrize("key", ARRAYS)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_array_is_refused(data: Path, case: str, key: str) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        BROKEN[case](file, f"episode_2/{key}")
    line = refusal(load)
    assert ID in line
    if case not in NAMED_BY_MINARI:
        assert key in line


def test_infos_that_claim_gigabytes_or_lead_elsewhere_are_refused(data: Path) -> None:
    """Nobody asks for them, but minari reads them."""
    for case in ("of 10^9 steps", "chunks of gigabytes", "a link to another file", "values in another file"):
        shutil.copy(data / "main_data.hdf5", data / "kept.hdf5")
        with h5py.File(data / "main_data.hdf5", "a") as file:
            BROKEN[case](file, "episode_0/infos/extra")
        assert "infos/extra" in refusal(load)
        (data / "kept.hdf5").replace(data / "main_data.hdf5")
    load()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.5e38])
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_a_bad_value_is_named_with_its_place(data: Path, key: str, value: float) -> None:
    with h5py.File(data / "main_data.hdf5", "a") as file:
        transformed(lambda values: np.full(values.shape, value, np.float64))(file, f"episode_1/{key}")
    assert f"minari:{ID}: '{key}'[4" in refusal(load)


NOT_COUNTS = (None, -1, 1.5, "many", [3], {}, True, 10**9, 10**30, float("nan"), float("inf"))
METADATA = [
    *(("total_steps", value) for value in (*NOT_COUNTS, 0, 11, 13)),
    *(("total_episodes", value) for value in (*NOT_COUNTS, 0, 2, 4)),
    *(
        (key, value)
        for key in ("observation_space", "action_space")
        for value in (None, 5, [], {}, True, "", "{", "{}", "[]", "null", '{"type": "Box"}', '{"type": "os"}')
    ),
    *(("data_format", value) for value in (None, 5, "", "pickle", "../hdf5", "arrow")),
    *(("minari_version", value) for value in (None, 5, "", "99.0", "x" * 1000)),
]


@pytest.mark.parametrize(("key", "value"), METADATA, ids=lambda value: str(value)[:20])
def test_metadata_that_is_wrong_is_refused(data: Path, key: str, value: Any) -> None:
    change_metadata(data, **{key: value})
    assert ID in refusal(load)


TOLERATED = [
    *(("ref_min_score", value) for value in (None, "low", float("nan"), 10**400, [1], 1e9)),
    *(("ref_max_score", value) for value in ("high", float("inf"), {}, True, -1e9)),
    *(("env_spec", value) for value in (None, 5, [], "", "{", '{"id": 5}', '{"id": "os:mkdir"}', "null")),
    *(("eval_env_spec", value) for value in (5, "{", '{"id": "Hopper-v999"}', "\ud800")),
    *(("dataset_id", value) for value in (5, "../../x-v0")),
    *(("requirements", value) for value in (5, ["no-such-package==99"], "x")),
    *(("author", value) for value in (5, None, {})),
]


@pytest.mark.parametrize(("key", "value"), TOLERATED, ids=lambda value: ascii(value)[:20])
def test_metadata_that_may_be_wrong_gives_a_result_or_one_line(data: Path, key: str, value: Any) -> None:
    """The data stays readable; what hangs on the entry (environment, reference scores) may be lost."""
    expected = load().sha256
    change_metadata(data, **{key: value})
    config = replace(CONFIG, env="Hopper-v5")
    if ending(lambda: load_dataset(config)) is None:
        assert load_dataset(config).sha256 == expected


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_truncated_files_are_refused_at_every_length(data: Path, name: str) -> None:
    whole = (data / name).read_bytes()
    lengths = range(0, len(whole) - 1, len(whole) // 50)
    for length in lengths:
        (data / name).write_bytes(whole[:length])
        assert ID in refusal(load)
    assert len(lengths) > 49


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_flipped_bytes_give_data_or_one_line(data: Path, name: str) -> None:
    whole, refused = (data / name).read_bytes(), 0
    positions = range(0, len(whole), len(whole) // 80)
    for position in positions:
        (data / name).write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        refused += ending(load) is not None
    assert len(positions) > 79
    assert refused > 5


@pytest.mark.parametrize("content", [*PICKLES, b"", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 5000, None])
@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_other_content_is_refused(data: Path, tmp_path: Path, name: str, content: bytes | None) -> None:
    (data / name).unlink()
    if content is not None:
        (data / name).write_bytes(content)
    assert ID in refusal(load)
    (data / name).unlink(missing_ok=True)
    (data / name).mkdir()
    assert ID in refusal(load)
    assert not (tmp_path / MARKER).exists()
