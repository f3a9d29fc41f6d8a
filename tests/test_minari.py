"""Minari datasets written with minari itself: their environments, reference scores, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from broken_inputs import refusal
from conftest import left_in
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from flowrl.data.minari import read_minari
from flowrl.envs.reference_scores import REFERENCE_SCORES, ReferenceScores
from flowrl.envs.specs import EnvironmentSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks

LENGTHS = (4, 1, 7, 2)
TERMINATED = (True, False, True, False)
ID = "test/hopper/tiny-v0"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A local cache of its own, and no network."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    return tmp_path / "cache"


def episodes(observation_space: spaces.Box, action_dim: int = 3) -> list[EpisodeBuffer]:
    random = np.random.default_rng(0)
    shape, dtype = observation_space.shape, observation_space.dtype
    return [
        EpisodeBuffer(
            observations=random.normal(size=(length + 1, *shape)).astype(dtype),
            actions=random.uniform(-1, 1, size=(length, action_dim)).astype(np.float32),
            rewards=random.normal(size=length).tolist(),
            terminations=[False] * (length - 1) + [terminated],
            truncations=[False] * (length - 1) + [not terminated],
            infos={"extra": np.arange(length + 1)},
        )
        for length, terminated in zip(LENGTHS, TERMINATED, strict=True)
    ]


HOPPER_SPACE = spaces.Box(-np.inf, np.inf, (11,), np.float64)
ACTION_SPACE = spaces.Box(-1.0, 1.0, (3,), np.float32)


def create(buffers=None, dataset_id=ID, observation_space=HOPPER_SPACE, **options: Any) -> None:
    buffers = episodes(observation_space) if buffers is None else buffers
    options = {"action_space": ACTION_SPACE, "observation_space": observation_space, **options}
    minari.create_dataset_from_buffers(dataset_id, buffers, **options)


def test_the_environment_is_the_one_the_dataset_names_for_evaluation():
    create(env=gymnasium.make("Hopper-v5", forward_reward_weight=2.0, max_episode_steps=300).spec)
    assert read_minari(ID).environment == EnvironmentSpec("Hopper-v5", {"forward_reward_weight": 2.0}, 300)
    create(dataset_id="test/two-v0", env="Hopper-v5", eval_env="Hopper-v4")
    assert read_minari("test/two-v0").environment == EnvironmentSpec("Hopper-v4", {}, 1000)


def test_a_dataset_without_a_usable_environment_says_so(cache):
    create()
    dataset = read_minari(ID)
    assert (dataset.environment, dataset.reference) == (None, None)
    assert "the dataset names no environment: give one with --env to evaluate" in dataset.notes
    change_metadata(cache, env_spec=gymnasium.spec("Hopper-v5").to_json().replace("Hopper-v5", "os:mkdir"))
    dataset = read_minari(ID)
    assert dataset.environment is None
    assert "the dataset's environment 'os:mkdir': 'env_id': String should match" in dataset.notes[0]


def test_its_own_reference_scores_win_over_the_table(cache):
    create(env="Hopper-v5", ref_min_score=-3.0, ref_max_score=7.5)
    dataset = read_minari(ID)
    assert dataset.reference == ReferenceScores(-3.0, 7.5)
    assert dataset.notes == ()
    for scores in ({"ref_min_score": None}, {"ref_min_score": 8.0}, {"ref_min_score": "low"}):
        change_metadata(cache, **scores)
        dataset = read_minari(ID)
        assert dataset.reference == REFERENCE_SCORES["hopper"]
        note = "the dataset has no reference scores of its own: D4RL's are used to normalise"
        assert dataset.notes == (note,)


def change_metadata(cache: Path, **changes: Any) -> None:
    path = cache / ID / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata.update(changes)
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def refuse(message: str, dataset_id: str = ID) -> str:
    return refusal(lambda: read_minari(dataset_id), dataset_id, message)


def test_what_is_neither_here_nor_downloadable_is_refused_quickly_and_leaves_nothing(cache):
    create(env="Hopper-v5")
    text = refuse("could not download it", "test/hopper/tini-v0")
    assert f"not in {cache}; did you mean '{ID}'?" in text
    assert "http://127.0.0.1:9: [Errno 111] Connection refused" in text
    assert left_in(cache) == {"test"}


def test_a_download_that_breaks_off_is_not_taken_for_the_dataset(cache, monkeypatch):
    create(env="Hopper-v5")
    source, attempts = cache.with_name("remote"), []
    cache.rename(source)
    (cache / f".incomplete-{ID.replace('/', '--')}" / ID).mkdir(parents=True)  # of a process killed earlier
    monkeypatch.setenv("MINARI_REMOTE", "gcp://none")  # no request before the download

    def download_dataset(dataset_id):
        attempts.append(dataset_id)
        target = Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id
        shutil.copytree(source / dataset_id, target)
        if len(attempts) == 1:
            (target / "data" / "main_data.hdf5").unlink()
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(minari, "download_dataset", download_dataset)
    refuse("ConnectionError: reset by peer")
    assert not (cache / ID).exists()
    assert read_minari(ID).num_episodes == 4
    assert read_minari(ID).num_episodes == 4
    assert attempts == [ID, ID]
    assert os.environ["MINARI_DATASETS_PATH"] == str(cache)
    assert left_in(cache) == {"test"}


def test_other_spaces_and_no_episodes_are_refused():
    create([])
    refuse("no episodes")
    image = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    for number, (options, message) in enumerate(
        (
            ({"observation_space": image}, r"'observations' are images of shape \(64, 64, 3\)"),
            ({"observation_space": spaces.Dict(a=spaces.Dict(eye=image))}, "'eye' are images"),
            ({"observation_space": spaces.Text(5)}, "'observations' must be numbers or choices, not Text"),
            (
                {"action_space": spaces.Dict(a=ACTION_SPACE)},
                "actions must be Box, Discrete, MultiDiscrete or MultiBinary, not Dict",
            ),
        )
    ):
        create([], f"test/other-v{number}", **options)
        refuse(message, f"test/other-v{number}")
