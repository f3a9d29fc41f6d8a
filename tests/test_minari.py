"""Minari datasets written with minari itself, against plain loops."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from conftest import left_in
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from flowrl.data.minari import read_minari
from flowrl.envs.reference_scores import REFERENCE_SCORES, ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env
from flowrl.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks

LENGTHS = (4, 1, 7, 2)
TERMINATED = (True, False, True, False)
ID = "test/hopper/tiny-v0"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A local cache of our own, and no network."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("MINARI_REMOTE", raising=False)
    return tmp_path / "cache"


def episodes(observation_space: spaces.Space[Any], action_dim: int = 3) -> list[EpisodeBuffer]:
    random = np.random.default_rng(0)

    def observe(space: spaces.Space[Any], count: int) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: observe(inner, count) for key, inner in space.spaces.items()}
        assert isinstance(space, spaces.Box)
        return random.normal(size=(count, *space.shape)).astype(space.dtype)

    return [
        EpisodeBuffer(
            observations=observe(observation_space, length + 1),
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


def create(
    buffers: list[EpisodeBuffer] | None = None,
    dataset_id: str = ID,
    observation_space: spaces.Space[Any] = HOPPER_SPACE,
    **options: Any,
) -> list[EpisodeBuffer]:
    buffers = episodes(observation_space) if buffers is None else buffers
    options.setdefault("action_space", ACTION_SPACE)
    minari.create_dataset_from_buffers(dataset_id, buffers, observation_space=observation_space, **options)
    return buffers


def test_observations_are_aligned_with_the_actions_taken_on_them():
    buffers = create(env="Hopper-v5")
    dataset = read_minari(ID)
    assert dataset.episode_lengths.tolist() == list(LENGTHS)
    assert dataset.episode_starts.tolist() == [0, 4, 5, 12]
    assert dataset.terminated.tolist() == list(TERMINATED)
    row = 0
    for buffer in buffers:
        length = len(buffer.rewards)
        for step in range(length):
            assert np.array_equal(dataset.observations[row], buffer.observations[step].astype(np.float32))
            assert np.array_equal(dataset.actions[row], buffer.actions[step])
            assert dataset.rewards[row] == np.float32(buffer.rewards[step])
            to_go = sum(float(np.float32(reward)) for reward in buffer.rewards[step:])
            assert dataset.returns_to_go[row] == pytest.approx(to_go, rel=1e-6)
            row += 1
    assert row == dataset.num_transitions == 14
    assert dataset.observations.dtype == np.float32
    assert dataset.dataset_id == f"minari:{ID}"


class NestedEnv(gymnasium.Env[Any, Any]):
    """Its Dict spaces are nested and, written as sequences, keep an order that is not alphabetical."""

    observation_space = spaces.Dict(
        [
            ("speed", spaces.Box(-9, 9, (2,), np.float64)),
            ("arm", spaces.Dict([("wrist", spaces.Box(-9, 9, (1,))), ("elbow", spaces.Box(-9, 9, (2, 2)))])),
        ]
    )
    action_space = ACTION_SPACE

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        elbow = np.array([[4, 5], [6, 7]], np.float32)
        arm = {"wrist": np.array([3], np.float32), "elbow": elbow}
        return {"speed": np.array([1.0, 2.0]), "arm": arm}, {}


def test_dict_observations_are_flattened_as_the_evaluation_environment_flattens_them():
    buffers = episodes(NestedEnv.observation_space)
    observation, _ = NestedEnv().reset()
    buffers[0].observations["speed"][0] = observation["speed"]
    for key in ("wrist", "elbow"):
        buffers[0].observations["arm"][key][0] = observation["arm"][key]
    # A string as entry point, so that the specification has a JSON form.
    gymnasium.register("flowrl-test/Nested-v0", f"{__name__}:NestedEnv")
    try:
        create(buffers, env="flowrl-test/Nested-v0", observation_space=NestedEnv.observation_space)
        dataset = read_minari(ID)
        assert dataset.environment == EnvironmentSpec("flowrl-test/Nested-v0")
        flat, _ = make_env(dataset.environment).reset()
    finally:
        del gymnasium.registry["flowrl-test/Nested-v0"]
    assert dataset.observations[0].tolist() == flat.tolist() == [1, 2, 3, 4, 5, 6, 7]
    row = 0
    for buffer in buffers:
        for step in range(len(buffer.rewards)):
            arm = buffer.observations["arm"]
            parts = (buffer.observations["speed"][step], arm["wrist"][step], arm["elbow"][step].ravel())
            assert np.array_equal(dataset.observations[row], np.concatenate(parts).astype(np.float32))
            row += 1


def test_the_environment_is_the_one_the_dataset_names_for_evaluation():
    spec = gymnasium.make("Hopper-v5", forward_reward_weight=2.0, max_episode_steps=300).spec
    create(env=spec)
    assert read_minari(ID).environment == EnvironmentSpec("Hopper-v5", {"forward_reward_weight": 2.0}, 300)
    create(dataset_id="test/two-v0", env="Hopper-v5", eval_env="Hopper-v4")
    assert read_minari("test/two-v0").environment == EnvironmentSpec("Hopper-v4", {}, 1000)


def test_a_dataset_without_a_usable_environment_says_so(cache):
    create()
    dataset = read_minari(ID)
    assert (dataset.environment, dataset.reference) == (None, None)
    assert "the dataset names no environment: give one with --env to evaluate" in dataset.notes
    assert "the dataset has no reference scores: returns are not normalized" in dataset.notes
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
        assert dataset.notes == (
            "the dataset has no reference scores of its own: D4RL's are used to normalize",
        )


# Broken input from here on.


def change_metadata(cache: Path, **changes: Any) -> None:
    path = cache / ID / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    metadata.update(changes)
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


def refuse(message: str, dataset_id: str = ID) -> str:
    with pytest.raises(UserError, match=message) as caught:
        read_minari(dataset_id)
    text = str(caught.value)
    assert dataset_id in text
    assert "\n" not in text
    return text


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


@pytest.mark.parametrize(
    ("observation_space", "message"),
    [
        (spaces.Box(0, 255, (64, 64, 3), np.uint8), r"'observations' are images of shape \(64, 64, 3\)"),
        (spaces.Dict(a=spaces.Dict(eye=spaces.Box(0, 255, (64, 64), np.uint8))), "'eye' are images"),
        (spaces.Text(5), "'observations' must be numbers or choices, not Text"),
    ],
)
def test_other_observation_spaces_are_refused(observation_space, message):
    create([], observation_space=observation_space)
    refuse(message)


def test_other_action_spaces_and_no_episodes_are_refused():
    create([])
    refuse("no episodes")
    create([], "test/other-v0", action_space=spaces.Dict(a=ACTION_SPACE))
    refuse("actions must be Box, Discrete, MultiDiscrete or MultiBinary, not Dict", "test/other-v0")
