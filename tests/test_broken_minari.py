"""Minari datasets with damaged files and metadata: each is refused by name, or read as documented."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
from broken_inputs import MARKER, PICKLES, ending, refusal
from test_broken_data import claiming, linked, replaced, transformed
from test_minari import HOPPER_SPACE, ID, change_metadata, create, episodes

from flowrl.data import EpisodeDataset
from flowrl.training.config import TrainConfig
from flowrl.training.setup import load_dataset

pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks

CONFIG = TrainConfig(dataset=f"minari:{ID}", eval_episodes=0)


def load() -> EpisodeDataset:
    """What scripts/train.py does with ``--dataset minari:ID``."""
    return load_dataset(CONFIG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache with one whole dataset; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        create(episodes(HOPPER_SPACE)[:3], env="Hopper-v5")  # of 4, 1 and 7 steps
    return folder


@pytest.fixture(autouse=True)
def data(whole, tmp_path, monkeypatch):
    """The files of a copy of the dataset, in a cache of its own, and no network."""
    cache = tmp_path / "cache"
    shutil.copytree(whole, cache)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    return cache / ID / "data"


# What minari itself stumbles over is reported in its words, with the folder.
BROKEN: dict[str, tuple[str, Callable[[h5py.File, str], None], str]] = {
    **{
        f"no {key}": (key, lambda file, key: file.__delitem__(key), "cannot be read")
        for key in ("observations", "actions", "rewards", "terminations", "truncations")
    },
    "no steps": ("rewards", transformed(lambda values: values[:0]), "episode 2 has no steps"),
    "no last observation": (
        "observations",
        transformed(lambda values: values[:-1]),
        r"episode 2: 'observations' has shape \(7, 11\), expected \(8, 11\)",
    ),
    "one step short": (
        "truncations",
        transformed(lambda values: values[:-1]),
        r"episode 2: 'truncations' has shape \(6,\), expected \(7,\)",
    ),
    "another width": (  # which would broadcast
        "actions",
        transformed(lambda values: values[:, :1]),
        r"episode 2: 'actions' has shape \(7, 1\), expected \(7, 3\)",
    ),
    "text": ("actions", transformed(lambda values: values.astype("S8")), "'actions' must hold numbers"),
    "text of any length": ("observations", replaced(dtype=h5py.string_dtype()), "must hold numbers"),
    "a link to itself": ("rewards", linked(h5py.SoftLink("/episode_2/rewards")), "cannot be read"),
    "of 10^13 steps": ("actions", claiming(10**13), "cannot be read"),
    "nan": ("observations", transformed(lambda values: values * np.nan), r"'observations'\[5, 0\] is nan"),
    "too large": ("actions", transformed(lambda v: v.astype("f8") + 1e39), r"'actions'\[5, 0\] is inf"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_array_is_refused(data, case):
    key, change, message = BROKEN[case]
    with h5py.File(data / "main_data.hdf5", "a") as file:
        change(file, f"episode_2/{key}")
    refusal(load, ID, message)


METADATA: list[tuple[dict[str, Any], str]] = [
    ({"total_steps": 11}, "more than the 11 steps it states"),
    ({"total_steps": 13}, "its episodes have 12 steps, it states 13"),
    ({"total_steps": 10**13}, "10000000000000 steps take .* GiB of memory"),
    ({"total_steps": -1}, "are not counts"),
    ({"total_episodes": 2}, "its episodes have 5 steps, it states 12"),
    ({"total_episodes": 4}, "cannot be read"),
    ({"total_episodes": None}, "are not counts"),
    ({"observation_space": None}, "key 'observation_space' is missing"),
    ({"observation_space": '{"type": "os"}'}, "cannot be read"),
    ({"data_format": "pickle"}, "cannot be read"),
    ({"minari_version": "99.0"}, "does not support the dataset"),
    ({"env_spec": "{"}, "cannot be read"),
]


@pytest.mark.parametrize(("changes", "message"), METADATA, ids=str)
def test_metadata_that_is_wrong_is_refused(data, changes, message):
    change_metadata(data.parents[3], **changes)
    refusal(load, ID, message)


TOLERATED = [
    *(("ref_min_score", value) for value in ("low", float("nan"), 10**400, 1e9)),
    *(("env_spec", value) for value in (None, 5, '{"id": 5}', '{"id": "os:mkdir"}')),
    *(("eval_env_spec", value) for value in ("{", '{"id": "Hopper-v999"}', "\ud800")),
    *(("dataset_id", value) for value in (5, "../../x-v0")),
    ("requirements", ["no-such-package==99"]),
]


@pytest.mark.parametrize(("key", "value"), TOLERATED, ids=lambda value: ascii(value)[:20])
def test_metadata_that_may_be_wrong_gives_a_result_or_one_line(data, key, value):
    """The data stays readable; what depends on the entry (environment, reference scores) may be lost."""
    expected = load().sha256
    change_metadata(data.parents[3], **{key: value})
    config = replace(CONFIG, env="Hopper-v5")
    if ending(lambda: load_dataset(config)) is None:
        assert load_dataset(config).sha256 == expected


def test_a_dataset_cannot_name_code_to_run(data, tmp_path):
    """Without its spaces minari would make the environment, from any entry point that the file names."""
    spec = json.loads(gymnasium.spec("Hopper-v5").to_json())
    kwargs = {"path": str(tmp_path / "executed")}
    spec.update(entry_point="os:mkdir", kwargs=kwargs)
    space = json.loads((data / "metadata.json").read_text())["observation_space"]
    change_metadata(data.parents[3], env_spec=json.dumps(spec), observation_space=None)
    assert "key 'observation_space' is missing" in refusal(load)
    change_metadata(data.parents[3], observation_space=space)
    config = replace(CONFIG, eval_episodes=1)
    # Gymnasium's own Hopper takes no such argument.
    refusal(lambda: load_dataset(config), "Hopper-v5 cannot be made")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_truncated_and_flipped_files_are_refused_or_read(data, name):
    whole = (data / name).read_bytes()
    for length in range(0, len(whole) - 1, len(whole) // 6):
        (data / name).write_bytes(whole[:length])
        assert ID in refusal(load)
    refused = 0
    for position in range(0, len(whole), len(whole) // 12):
        (data / name).write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        refused += ending(load) is not None
    assert refused > 0


@pytest.mark.parametrize("content", [PICKLES[0], b"", b"[" * 100_000, None])
@pytest.mark.parametrize("name", ["metadata.json", "main_data.hdf5"])
def test_other_content_is_refused(data, tmp_path, name, content):
    (data / name).unlink()
    if content is not None:
        (data / name).write_bytes(content)
    assert ID in refusal(load)
    assert not (tmp_path / MARKER).exists()
