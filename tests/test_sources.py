"""What --dataset and --env name, and where D4RL's files are looked for."""

import hashlib
import shutil
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from failing_server import Server, sends, status
from test_minari import create

from flowrl.data import EpisodeDataset, d4rl, load_episodes, sources
from flowrl.envs.options import EvaluationOptions
from flowrl.envs.reference_scores import REFERENCE_SCORES
from flowrl.envs.spaces import check_environment
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError

FILE = "hopper_medium-v2.hdf5"


@pytest.fixture(autouse=True)
def folders(own_folders, monkeypatch):
    # flowrl's own data would stand in for a file that was not found, after minutes of collecting it.
    monkeypatch.setattr(sources, "load_embedded", lambda name, *_, why="": pytest.fail(f"{name}: {why}"))
    return own_folders


def write(path: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["observations"] = random.normal(size=(9, 11))
        file["actions"] = random.normal(size=(9, 3))
        file["rewards"] = random.normal(size=9)
        file["terminals"] = np.arange(9) == 4
        file["timeouts"] = np.arange(9) == 8
    return path


def publish(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let the file at ``path`` be what D4RL published as hopper-medium."""
    monkeypatch.setitem(d4rl.PUBLISHED, "hopper-medium", hashlib.sha256(path.read_bytes()).hexdigest())


def first_reward(dataset: EpisodeDataset) -> float:
    return float(dataset.rewards[0])


def test_a_path_is_read_and_its_environment_comes_from_env_alone(tmp_path):
    path = write(tmp_path / "mine.h5")
    for source in (str(path), str(shutil.copy(path, tmp_path / "mine.HDF5"))):
        dataset = load_episodes(source)
        assert dataset.episode_lengths.tolist() == [5, 4]
        assert dataset.dataset_id == f"file:{Path(source).name}"
        assert (dataset.environment, dataset.reference, dataset.notes) == (None, None, ())
    for env in ("hopper-medium", "Hopper-v4"):
        dataset = load_episodes(str(path), env)
        assert dataset.environment == EnvironmentSpec("Hopper-v4")
        assert dataset.reference == REFERENCE_SCORES["hopper"]
    dataset = load_episodes(str(path), "Pendulum-v1")
    assert (dataset.environment, dataset.reference) == (EnvironmentSpec("Pendulum-v1"), None)
    with pytest.raises(UserError, match="Pendulum-v1 has observations of 3"):
        check_environment(EnvironmentSpec("Pendulum-v1"), dataset.observation_dim, dataset.action_dim)
    with pytest.raises(UserError, match=r"CartPole-v1 has actions that are choices of \(2,\), .* continuous"):
        check_environment(EnvironmentSpec("CartPole-v1"), dataset.observation_dim, dataset.action_dim)
    for env in ("Hopper-v4", "my.module:Robot-v0", "minary:a/b-v0"):
        said = f"unknown dataset '{env}'" if "/" in env else f"'{env}' is an environment: name the data too"
        with pytest.raises(UserError, match=said):
            load_episodes(env)
    with pytest.raises(UserError, match="dataset 'flowrl': give its name too, such as --env hopper-medium"):
        load_episodes("flowrl")


def test_d4rl_files_are_found_in_the_variables_folder_first_then_in_the_home_folder(tmp_path, monkeypatch):
    in_home = write(tmp_path / "home" / ".d4rl" / "datasets" / "walker2d_medium_replay-v2.hdf5", seed=1)
    home_reward = first_reward(load_episodes(str(in_home)))
    assert first_reward(load_episodes("walker2d-medium-replay")) == home_reward
    in_folder = write(tmp_path / "d4rl" / "walker2d_medium_replay-v2.hdf5", seed=2)
    folder_reward = first_reward(load_episodes(str(in_folder)))
    assert folder_reward != home_reward
    dataset = load_episodes("walker2d-medium-replay")
    assert first_reward(dataset) == folder_reward
    assert dataset.dataset_id == "d4rl/walker2d-medium-replay-v2"
    assert dataset.environment == EnvironmentSpec("Walker2d-v4")
    assert dataset.reference == REFERENCE_SCORES["walker2d"]
    assert "no published hash is known" in dataset.notes[0]
    with h5py.File(in_folder, "a") as file:
        del file["timeouts"]
    dataset = load_episodes("walker2d-medium-replay", options=EvaluationOptions(max_episode_steps=2))
    assert dataset.episode_lengths.tolist() == [2, 2, 1, 2, 2]
    monkeypatch.setenv("D4RL_DATASET_DIR", "~nobody-here/d4rl")
    assert first_reward(load_episodes("walker2d-medium-replay")) == home_reward
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert first_reward(load_episodes("walker2d-medium-replay")) == home_reward


def test_only_the_published_file_is_called_d4rls(tmp_path, monkeypatch):
    path = write(tmp_path / "d4rl" / FILE)
    dataset = load_episodes("hopper-medium")
    assert dataset.dataset_id == f"file:{FILE}"
    assert "is not D4RL's published hopper-medium-v2: its scores are not D4RL scores" in dataset.notes[0]
    assert dataset.environment == EnvironmentSpec("Hopper-v4")
    publish(monkeypatch, path)
    dataset = load_episodes("hopper-medium")
    assert (dataset.dataset_id, dataset.notes) == ("d4rl/hopper-medium-v2", ())
    size = path.stat().st_size
    with h5py.File(path, "a") as file:
        file["rewards"][3] = 0.25
    assert path.stat().st_size == size  # only the hash can tell
    dataset = load_episodes("hopper-medium")
    assert dataset.dataset_id == f"file:{FILE}"
    assert "is not D4RL's published" in dataset.notes[0]


def serve(server: Server, monkeypatch: pytest.MonkeyPatch, path: str, content: bytes) -> None:
    """Let the server on this machine be D4RL's, with a mirror, and have this file alone."""
    base = server.url("/", status(404)).removesuffix("/")
    for name in (f"/{FILE}", f"/mirror/{FILE}"):
        server.url(name, sends(content) if name == path else status(404))
    monkeypatch.setattr(d4rl, "D4RL_URLS", (f"{base}/{{file}}", f"{base}/mirror/{{file}}"))


@pytest.mark.parametrize("place", ["", "/mirror"])
def test_a_missing_file_is_downloaded_once_into_the_variables_folder(tmp_path, server, monkeypatch, place):
    source = write(tmp_path / "source.hdf5")
    publish(monkeypatch, source)
    serve(server, monkeypatch, f"{place}/{FILE}", source.read_bytes())
    for _ in range(2):
        assert load_episodes("hopper-medium").dataset_id == "d4rl/hopper-medium-v2"
    assert (tmp_path / "d4rl" / FILE).read_bytes() == source.read_bytes()
    assert server.requests.count(f"{place}/{FILE}") == 1


def test_a_downloaded_file_is_used_only_if_its_content_is_right(tmp_path, server, monkeypatch):
    content = write(tmp_path / "source.hdf5").read_bytes()  # valid, but not the file that D4RL published
    serve(server, monkeypatch, f"/{FILE}", content)
    with pytest.raises(UserError, match="does not match the known hash"):
        d4rl.read_d4rl("hopper-medium")
    monkeypatch.delitem(d4rl.PUBLISHED, "hopper-medium")
    for damaged in (b"<html>moved</html>", content[:-100]):
        serve(server, monkeypatch, f"/{FILE}", damaged)
        with pytest.raises(UserError, match=r"-v2.hdf5: Unable to synchronously open file"):
            d4rl.read_d4rl("hopper-medium")
    assert list((tmp_path / "d4rl").glob("*hdf5")) == []


def test_ants_empty_contact_forces_are_dropped_and_recorded_ones_switched_on(tmp_path):
    path = tmp_path / "d4rl" / "ant_medium-v2.hdf5"
    path.parent.mkdir()
    observations = np.random.default_rng(0).normal(size=(9, 111)).astype(np.float32)
    for forces, steps in ((True, None), (True, 9), (False, 9), (False, None)):
        observations[:, 27:] *= forces
        with h5py.File(path, "w") as file:
            file.update({"observations": observations, "actions": np.zeros((9, 8)), "rewards": np.ones(9)})
            file.update({"terminals": np.zeros(9, bool), "timeouts": np.arange(9) == 8})
        source = (str(path), "Ant-v4") if steps else ("ant-medium", None)
        dataset = load_episodes(*source, options=EvaluationOptions(max_episode_steps=steps))
        check_environment(dataset.environment, dataset.observation_dim, dataset.action_dim)
        if forces:
            assert dataset.observation_dim == 111
            assert dataset.environment == EnvironmentSpec("Ant-v4", {"use_contact_forces": True}, steps)
        else:
            assert np.array_equal(dataset.observations, observations[:, :27])
            assert dataset.environment == EnvironmentSpec("Ant-v4", {}, steps)
            assert any("84 contact-force columns are all zero: dropped" in note for note in dataset.notes)
    assert load_episodes(str(path)).observation_dim == 111


@pytest.mark.filterwarnings("ignore")
def test_minari_datasets_bring_their_environment_which_env_replaces():
    create(dataset_id="test/hopper-v0", env="Hopper-v5")
    dataset = load_episodes("minari:test/hopper-v0")
    assert dataset.dataset_id == "minari:test/hopper-v0"
    assert dataset.environment == EnvironmentSpec("Hopper-v5", {}, 1000)
    assert dataset.episode_lengths.tolist() == [4, 1, 7, 2]
    replaced = load_episodes("minari:test/hopper-v0", "hopper-medium")
    assert replaced.environment == EnvironmentSpec("Hopper-v4")
    assert replaced.reference == REFERENCE_SCORES["hopper"]
    assert "evaluated in Hopper-v4, not in the data's own Hopper-v5(max_episode_steps=1000)" in replaced.notes
    assert replaced.sha256 == dataset.sha256
    create(dataset_id="test/nameless-v0")
    with_module = load_episodes("minari:test/hopper-v0", "gymnasium.envs.mujoco:Hopper-v5")
    assert with_module.environment == EnvironmentSpec("Hopper-v5", {}, 1000, ("gymnasium.envs.mujoco",))
    named = load_episodes("minari:test/nameless-v0", "Hopper-v5")
    assert named.environment == EnvironmentSpec("Hopper-v5")
    assert named.reference == REFERENCE_SCORES["hopper"]


@pytest.mark.filterwarnings("ignore")
def test_several_sources_are_taken_together(tmp_path):
    files = [str(write(tmp_path / f"{seed}.hdf5", seed)) for seed in range(2)]
    create(dataset_id="test/hopper-v0", env="Hopper-v5")
    together = load_episodes([*files, "minari:test/hopper-v0"], "Hopper-v4")
    parts = [load_episodes(source, "Hopper-v4") for source in (*files, "minari:test/hopper-v0")]
    assert together.dataset_id == "file:0.hdf5 + file:1.hdf5 + minari:test/hopper-v0"
    assert together.episode_lengths.tolist() == [5, 4, 5, 4, 4, 1, 7, 2]
    for name in ("observations", "actions", "rewards", "returns_to_go", "terminated"):
        expected = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(together, name), expected)
    assert together.environment == EnvironmentSpec("Hopper-v4")
    assert together.reference == REFERENCE_SCORES["hopper"]
    assert together.sha256 not in {part.sha256 for part in parts}
    assert "minari:test/hopper-v0: evaluated in Hopper-v4" in together.notes[-1]
    with pytest.raises(UserError, match=r"0\.hdf5 and minari:.* differ in environment: .* with --env"):
        load_episodes([files[0], "minari:test/hopper-v0"])
    options = EvaluationOptions(env_kwargs='{"frame_skip": 5}')
    recorded = load_episodes([files[0], "minari:test/hopper-v0"], "Hopper-v5", options)  # by its id alone
    assert recorded.environment == EnvironmentSpec("Hopper-v5", {"frame_skip": 5}, 1000)
    create(dataset_id="test/short-v0", env=gymnasium.make("Hopper-v5", max_episode_steps=300).spec)
    with pytest.raises(UserError, match="differ in environment"):
        load_episodes(["minari:test/short-v0", "minari:test/hopper-v0"], "Hopper-v5")
    narrow = write(tmp_path / "narrow.hdf5")
    with h5py.File(narrow, "a") as file:
        del file["actions"]
        file["actions"] = np.zeros((9, 2))
    with pytest.raises(UserError, match=r"0\.hdf5 and file:narrow\.hdf5 differ in action dim: 3 and 2"):
        load_episodes([files[0], str(narrow)])
