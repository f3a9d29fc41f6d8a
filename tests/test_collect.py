"""Collection against a plain loop over one environment, and what it leaves on disk, whole or interrupted."""

import signal
import time
from dataclasses import replace
from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
from broken_inputs import files_of_at_most, refusal
from processes import Command, finish, wait_for

from flowrl.__main__ import COMMANDS
from flowrl.behavior.shipped import load_behavior
from flowrl.data import collect as collect_module
from flowrl.data import writers
from flowrl.data.collect import Part, Recipe, collect, to_dataset
from flowrl.data.command import CollectCommand, run_collect
from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.minari import read_minari
from flowrl.data.writers import collect_d4rl, collect_minari, ensure_minari, read_provenance
from flowrl.envs import mujoco_vector
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError

SMALL = Recipe("hopper", (Part("25k"),), steps=300, seed=4)
MIXED = Recipe("hopper", (Part("random", 1.0, noise=0.3), Part("25k", 2.0)), steps=2400, seed=5)
WIDE = '{"exclude_current_positions_from_observation": false}'  # 12 numbers in place of 11


@pytest.fixture(autouse=True)
def storage(tmp_path, monkeypatch):
    """Minari's local storage, for this test alone."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def visible(storage: Path) -> list[str]:
    """What is in the storage besides lock files."""
    paths = (path.relative_to(storage) for path in storage.rglob("*"))
    return sorted(str(path) for path in paths if path.suffix != ".lock")


@pytest.fixture(scope="module")
def mixed():
    return collect(MIXED)


def test_episodes_are_those_of_a_plain_loop(mixed):
    env, episodes = gymnasium.make("Hopper-v5"), list(mixed.episodes)
    for index, (part, target) in enumerate(zip(MIXED.parts, (800, 1600), strict=True)):
        policy = load_behavior("hopper", part.policy)
        steps = number = 0
        while steps < target:
            generator = np.random.default_rng([5, index, number])
            seed = int(generator.integers(2**31))
            normals, noise = generator.standard_normal((1000, 3)), generator.standard_normal((1000, 3))
            episode = episodes.pop(0)
            assert (episode.policy, episode.seed) == (part.policy, seed)
            observation, _ = env.reset(seed=seed)
            for step in range(len(episode.rewards)):
                np.testing.assert_array_equal(episode.observations[step], observation)
                mean, log_std = policy.distribution(observation[None])
                action = np.tanh(mean + np.exp(log_std) * normals[step]) + part.noise * noise[step]
                np.testing.assert_allclose(episode.actions[step], np.clip(action[0], -1, 1), 0, atol=1e-5)
                observation, reward, terminated, truncated, _ = env.step(episode.actions[step])
                assert episode.rewards[step] == reward
                assert (terminated or truncated) == (step == len(episode.rewards) - 1)
            np.testing.assert_array_equal(episode.observations[-1], observation)
            assert episode.terminated == terminated
            number, steps = number + 1, steps + len(episode.rewards)
        assert number > collect_module.SLOTS / 4
    assert episodes == []


def test_a_seed_gives_the_same_bytes_on_any_number_of_cores(mixed, monkeypatch):
    hashes = {to_dataset(mixed, "x").sha256}
    for cores, slots in ((1, 32), (5, 32), (2, 3)):
        monkeypatch.setattr(mujoco_vector, "available_cores", lambda n=cores: n)
        monkeypatch.setattr(collect_module, "SLOTS", slots)
        hashes.add(to_dataset(collect(MIXED), "x").sha256)
    assert len(hashes) == 1
    assert to_dataset(collect(replace(SMALL, seed=5)), "x").sha256 != to_dataset(collect(SMALL), "x").sha256


def test_minari_d4rl_and_memory_hold_the_same_data(mixed, tmp_path, storage):
    expected = to_dataset(mixed, "x")
    folder = collect_minari(MIXED, "mine/hopper/mixed-v0")
    assert folder == storage / "mine" / "hopper" / "mixed-v0"
    dataset = read_minari("mine/hopper/mixed-v0")
    assert collect_d4rl(MIXED, tmp_path / "mixed.hdf5") == expected.sha256
    file = read_d4rl_file(tmp_path / "mixed.hdf5")
    assert dataset.sha256 == file.sha256 == expected.sha256
    assert dataset.notes == file.notes == ()
    assert (dataset.environment.env_id, dataset.environment.max_episode_steps) == ("Hopper-v5", 1000)
    assert dataset.reference == expected.reference

    stored = minari.load_dataset("mine/hopper/mixed-v0")
    assert list(minari.list_local_datasets()) == ["mine/hopper/mixed-v0"]
    assert isinstance(stored.recover_environment().unwrapped, gymnasium.envs.mujoco.hopper_v5.HopperEnv)
    for episode, source in zip(stored.iterate_episodes(), mixed.episodes, strict=True):
        np.testing.assert_array_equal(episode.observations, source.observations)
        np.testing.assert_array_equal(episode.rewards, source.rewards)
    provenance = read_provenance(folder)
    assert provenance["sha256"] == expected.sha256
    assert provenance["recipe"]["seed"] == 5
    assert provenance["environment"]["env_id"] == "Hopper-v5"
    assert set(provenance["policy_sha256"]) == {"random", "25k"}
    assert provenance["flowrl_version"]


def test_uniform_actions_are_collected_in_any_environment(tmp_path):
    options = {"env_kwargs": '{"g": 5.0}', "max_episode_steps": 30, "steps": 2000, "seed": 3}
    command = CollectCommand("Pendulum-v1", ("uniform",), id="mine/pendulum-v0", **options)
    run_collect(command)
    dataset = read_minari("mine/pendulum-v0")
    assert dataset.environment == EnvironmentSpec("Pendulum-v1", {"g": 5.0}, 30)
    assert set(dataset.episode_lengths.tolist()) == {30}
    env = gymnasium.make("Pendulum-v1", g=5.0, max_episode_steps=30)
    generator = np.random.default_rng([3, 0, 1])  # the second episode
    observation, _ = env.reset(seed=int(generator.integers(2**31)))
    for step in range(30, 60):
        np.testing.assert_array_equal(dataset.observations[step], observation)
        observation, reward, *_ = env.step(dataset.actions[step])
        assert dataset.rewards[step] == np.float32(reward)
    shares = np.histogram(dataset.actions, bins=8, range=(-2, 2))[0] / len(dataset.actions)
    assert (np.abs(shares - 1 / 8) < 0.03).all()
    run_collect(replace(command, format="d4rl", id=None, out=tmp_path / "same.hdf5"))
    assert read_d4rl_file(tmp_path / "same.hdf5").sha256 == dataset.sha256


def test_an_existing_dataset_is_replaced_only_when_asked(tmp_path, storage):
    collect_minari(SMALL, "mine/x-v0")
    before, files = read_minari("mine/x-v0").sha256, visible(storage)
    other = replace(SMALL, seed=9)
    with pytest.raises(UserError, match=r"mine/x-v0 exists already .* --overwrite"):
        collect_minari(other, "mine/x-v0")
    assert read_minari("mine/x-v0").sha256 == before
    collect_minari(other, "mine/x-v0", overwrite=True)
    assert read_minari("mine/x-v0").sha256 == to_dataset(collect(other), "x").sha256 != before
    assert visible(storage) == files
    path = tmp_path / "x.hdf5"
    collect_d4rl(SMALL, path)
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"x\.hdf5 exists already"):
        collect_d4rl(other, path)
    assert path.read_bytes() == content
    collect_d4rl(other, path, overwrite=True)
    assert path.read_bytes() != content


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (CollectCommand("CartPole-v1", ("uniform",), id="a-v0"), "'uniform' is for continuous actions"),
        (CollectCommand("hoper-medium"), "did you mean 'hopper-medium'"),
        (CollectCommand("Pendulum-v1", ("medium",)), "give --policies, of uniform"),
        (CollectCommand("hopper", ("25k",), id="a-v0", env_kwargs="{"), "--env-kwargs {: Invalid JSON"),
        (CollectCommand("hopper", ("25k",), id="a-v0", env_kwargs='{"a": NaN}'), "not JSON compliant"),
        (CollectCommand("hopper", ("25k",), id="a-v0", env_kwargs=WIDE), "not those of hopper"),
        (CollectCommand("hopper", ("25k",), id="a-v0", max_episode_steps=10**12), "GiB of memory"),
        (CollectCommand("hopper"), "give --policies, of random, "),
        (CollectCommand("hopper", ("mediun",), id="a-v0"), "did you mean 'medium'"),
        (CollectCommand("hopper", ("medium",), steps=0, id="a-v0"), "--steps 0"),
        (CollectCommand("hopper", ("medium",)), "--id"),
        (CollectCommand("hopper", ("medium",), id="../a-v0"), "malformed Minari id"),
        (CollectCommand("hopper-medium", steps=100, id="flowrl/hopper/medium-v0"), "--id"),
        (CollectCommand("hopper-medium", ("expert",)), "has its own policies"),
        (CollectCommand("hopper-medium", format="d4rl"), "--out FILE.hdf5"),
    ],
)
def test_options_that_make_no_sense_are_refused(storage, command, message):
    assert message in refusal(lambda: COMMANDS["collect"].call(command))
    assert not storage.exists() or visible(storage) == []


@pytest.mark.parametrize(
    ("words", "lock"),
    [
        ("collect hopper --policies 25k --steps 9000000 --id mine/x-v0", ".mine--x-v0.lock"),
        ("train --env hopper-medium --dataset flowrl", ".flowrl--hopper--medium-v0.lock"),
    ],
)
def test_a_signal_leaves_nothing_and_exits_with_its_code(storage, words, lock):
    process = Command(words.split())
    wait_for(lambda: (storage / lock).exists(), process)  # it is collecting, or about to
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143
    assert visible(storage) == []


KILLED = """
import os, signal
from flowrl.data import writers
writers._add_namespaces = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # all written, nothing renamed
"""


def test_a_killed_collection_is_discarded(storage):
    words = "collect hopper --policies 25k --steps 300 --seed 4 --id mine/x-v0"
    assert finish(Command(words.split(), KILLED))[0] == -signal.SIGKILL
    assert not (storage / "mine" / "x-v0").exists()
    assert [path for path in visible(storage) if path.endswith("main_data.hdf5")]  # it got that far
    assert ensure_minari(SMALL, "mine/x-v0") == storage / "mine" / "x-v0"
    assert read_minari("mine/x-v0").sha256 == to_dataset(collect(SMALL), "x").sha256
    assert [path for path in visible(storage) if "incomplete" in path] == []


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, storage):
    recipe = replace(SMALL, steps=3000)
    with files_of_at_most(20_000), pytest.raises(UserError, match="cannot be written"):
        collect_minari(recipe, "mine/x-v0")
    with files_of_at_most(20_000), pytest.raises(UserError, match="cannot be written"):
        collect_d4rl(recipe, tmp_path / "x.hdf5")
    assert visible(storage) == []
    assert [path.name for path in tmp_path.iterdir()] == ["minari"]


def test_what_another_process_has_collected_meanwhile_is_used(storage, monkeypatch):
    staging, collect, collected = writers.staging, writers.collect, []

    def waited(root, name):
        monkeypatch.setattr(writers, "staging", staging)
        writers.ensure_minari(SMALL, "mine/x-v0")  # as the process that is waited for does
        return staging(root, name)

    monkeypatch.setattr(writers, "staging", waited)
    monkeypatch.setattr(writers, "collect", lambda recipe: collected.append(recipe) or collect(recipe))
    writers.ensure_minari(SMALL, "mine/x-v0")
    assert collected == [SMALL]
