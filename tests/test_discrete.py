"""Discrete actions and observations from the data to the score."""

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from tiny_training import train_here

from flowrl.data import load_episodes
from flowrl.data.collect import Part, Recipe
from flowrl.data.minari import read_minari
from flowrl.data.writers import collect_minari
from flowrl.envs.options import EvaluationOptions
from flowrl.envs.spaces import environment_facts
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import FlatActions, make_env, make_vector_env
from flowrl.errors import UserError
from flowrl.evaluation.command import EvaluateConfig, evaluate_run
from flowrl.finetuning.command import run_finetune
from flowrl.model.checkpoint import load_checkpoint
from flowrl.model.loading import load_agent
from flowrl.report.estimate import EstimateConfig, estimate_run

STEPS = 2  # of an episode of the toys


class Locks(gym.Env[Any, Any]):
    """Pays for every wheel that is turned to the number shown for it; shows new numbers at each step."""

    action_space = spaces.MultiDiscrete([2, 3], start=[0, 1])
    observation_space = spaces.Dict(
        [
            ("wheels", spaces.MultiDiscrete([2, 3], start=[0, 1])),
            ("lamp", spaces.Tuple([spaces.Discrete(2), spaces.MultiBinary(2)])),
            ("hint", spaces.Text(10)),
            (
                "noise",
                spaces.Dict([("wrist", spaces.Box(-1, 1, (1, 2))), ("elbow", spaces.Box(-1, 1, (2, 2)))]),
            ),
        ]
    )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(1000)))
        self.shown = self.observation_space.sample()
        return self.shown, {}

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(np.asarray(action)), action
        reward = float((np.asarray(action) == self.shown["wheels"]).sum())
        self.shown = self.observation_space.sample()
        return self.shown, reward, False, False, {}


class Binary(Locks):
    """The same with three switches, rewarded when on."""

    action_space = spaces.MultiBinary(3)

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action)
        self.shown = self.observation_space.sample()
        return self.shown, float(action.sum()), False, False, {}


@pytest.fixture(autouse=True)
def toys(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    gym.register("flowrl-test/Locks-v0", f"{__name__}:Locks", max_episode_steps=STEPS)
    gym.register("flowrl-test/Binary-v0", f"{__name__}:Binary", max_episode_steps=STEPS)
    yield
    del gym.registry["flowrl-test/Locks-v0"], gym.registry["flowrl-test/Binary-v0"]


def stacked(values: list[Any]) -> Any:
    """Observations one after another, as minari stores them."""
    if isinstance(values[0], dict):
        return {key: stacked([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stacked(list(parts)) for parts in zip(*values, strict=True))
    return values if isinstance(values[0], str) else np.array(values)


def store(env_id: str, count: int) -> list[EpisodeBuffer]:
    """Random episodes in Minari's storage."""
    env = gym.make(env_id, disable_env_checker=True)
    env.action_space.seed(0)
    buffers = []
    for number in range(count):
        observations, actions, rewards = [env.reset(seed=number)[0]], [], []
        for _ in range(STEPS):
            actions.append(env.action_space.sample())
            observation, reward, *_ = env.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        last = np.arange(STEPS) == STEPS - 1
        taken, seen = np.array(actions), stacked(observations)
        buffers.append(EpisodeBuffer(number, None, None, seen, taken, rewards, last & False, last, {}))
    minari.create_dataset_from_buffers("test/toy-v0", buffers, env=env)
    return buffers


@pytest.mark.filterwarnings("ignore")  # minari asks for authors and permalinks
@pytest.mark.parametrize("env_id", ["flowrl-test/Locks-v0", "flowrl-test/Binary-v0"])
def test_one_hot_vectors_are_gymnasiums_own(env_id):
    buffers = store(env_id, 3)
    dataset = read_minari("test/toy-v0")
    env = gym.make(env_id, disable_env_checker=True)
    seen = spaces.Dict([(key, part) for key, part in Locks.observation_space.items() if key != "hint"])
    acted = env.action_space if env_id.endswith("Locks-v0") else spaces.MultiDiscrete([2, 2, 2])
    row = 0
    for buffer in buffers:
        for step in range(STEPS):
            observation = {
                "wheels": buffer.observations["wheels"][step],
                "lamp": tuple(part[step] for part in buffer.observations["lamp"]),
                "noise": {name: part[step] for name, part in buffer.observations["noise"].items()},
            }
            np.testing.assert_array_equal(dataset.observations[row], spaces.flatten(seen, observation))
            np.testing.assert_array_equal(dataset.actions[row], spaces.flatten(acted, buffer.actions[step]))
            row += 1
    assert row == dataset.num_transitions
    assert dataset.environment == EnvironmentSpec(env_id, {}, STEPS)
    assert dataset.action_choices == ((2, 3) if env_id.endswith("Locks-v0") else (2, 2, 2))
    facts = environment_facts(EnvironmentSpec(env_id))
    assert (facts.observation_dim, facts.action_dim) == (dataset.observation_dim, dataset.action_dim)
    assert (facts.action_choices, facts.left_out) == (dataset.action_choices, ("hint",))
    reset = make_env(EnvironmentSpec(env_id)).reset(seed=1)[0]
    np.testing.assert_array_equal(reset, dataset.observations[STEPS])


def test_what_an_agent_returns_becomes_an_action_of_the_environment():
    for space, returned, taken in (
        (spaces.MultiDiscrete([2, 3], start=[0, 1]), np.array([1, 2]), [1, 3]),
        (spaces.MultiDiscrete([[2], [3]]), np.array([1, 2]), [[1], [2]]),
        (spaces.MultiDiscrete([3], start=[4]), np.int64(1), [5]),
        (spaces.Box(-3, 3, (1,), np.float64), np.float32([-1.5]), [-1.5]),
        (spaces.Discrete(3, start=-1), np.int64(2), 1),
        (spaces.MultiBinary(2), np.array([1, 0]), [1, 0]),
        (spaces.Box(-3, 3, (1, 1), np.int8), np.float32([-1.6]), [[-2]]),
    ):
        env = Locks()
        env.action_space = space
        action = FlatActions(env).action(returned)
        assert FlatActions(env).action_space.contains(returned)
        assert space.contains(action)
        assert action.tolist() == taken


@pytest.mark.filterwarnings("ignore")
def test_whole_numbers_in_a_matrix_are_collected_as_they_were_taken(monkeypatch):
    monkeypatch.setattr(Binary, "action_space", spaces.Box(0, 1, (1, 3), np.int8))
    environment = EnvironmentSpec("flowrl-test/Binary-v0", {}, STEPS)
    recipe = Recipe(environment.env_id, (Part("uniform", noise=0.3),), steps=9, spec=environment)
    collect_minari(recipe, "test/toy-v0")
    dataset = read_minari("test/toy-v0")
    assert dataset.environment == environment
    np.testing.assert_array_equal(dataset.rewards, dataset.actions.sum(axis=1))
    gym.register("flowrl-test/Binary-v0", Binary, max_episode_steps=STEPS)
    with pytest.raises(UserError, match="Binary-v0: Minari cannot record it: Callable found"):
        collect_minari(recipe, "test/b-v0")


@pytest.mark.filterwarnings("ignore")
def test_choices_side_by_side_are_learned(tmp_path):
    """At random a step pays 5/6 of 2; which choices are right depends on what is shown."""
    store("flowrl-test/Locks-v0", 200)
    options = {"steps": 150, "embed_dim": 32, "context_length": 2, "batch_size": 128, "eval_episodes": 20}
    options |= {"learning_rate": 0.01, "max_episode_steps": None, "targets": "4 0"}
    for agent, fraction in (("transformer", 1), ("bc", 0.1)):
        run, own = tmp_path / agent, {"agent": agent, "top_fraction": fraction}
        results = train_here("minari:test/toy-v0", run, env="flowrl-test/Locks-v0", **options, **own).results
        acting = load_agent(run)
        assert acting.config.model.action_choices == (2, 3)
        envs = make_vector_env(acting.environment, 2)  # which checks every action
        acting.reset(2, 4.0)
        envs.step(acting.act(envs.reset(seed=[0, 1])[0]))
        assert results[0].returns.mean() > 1.5 * STEPS
        assert agent == "bc" or results[1].returns.mean() < 0.5 * STEPS


@pytest.mark.filterwarnings("ignore")
def test_choices_are_drawn_in_fine_tuning_and_replayed_beside_what_they_earned(tmp_path):
    store("flowrl-test/Locks-v0", 20)
    options = {"max_episode_steps": None, "steps": 1, "embed_dim": 8, "eval_episodes": 0}
    train_here("minari:test/toy-v0", tmp_path / "run", env="flowrl-test/Locks-v0", **options)
    flags = ["--episodes-per-round=50", "--replay-timesteps=100", "--steps=1", "--eval-episodes=0"]
    run_finetune([str(tmp_path / "run"), *flags, f"--run-dir={tmp_path / 'online'}"])
    saved = load_checkpoint(tmp_path / "online", for_training=True).training_tensors
    observations, actions = saved["replay.observations"], saved["replay.actions"]
    assert len(actions) == 50 * STEPS  # all of them new
    assert len(actions.unique(dim=0)) == 2 * 3
    assert actions.sum(-1).unique() == 2
    with pytest.raises(UserError, match="online: estimates need continuous actions, this agent"):
        estimate_run(EstimateConfig(tmp_path / "online"))
    wheels = observations[:, :5]  # one-hot, as the actions
    assert ((wheels * actions).sum(-1) == saved["replay.rewards"]).all()


def noisy_cartpole(path: Path, column: bool) -> float:
    """Write half-random data of CartPole; the mean return of its episodes."""
    env, random = gym.make("CartPole-v1"), np.random.default_rng(0)
    rows: list[tuple[Any, int, float, bool, bool]] = []
    returns = []
    while len(rows) < 2000:
        observation, _ = env.reset(seed=len(rows))
        start, ended = len(rows), False
        while not ended:
            angle, speed = observation[2:] + 0.05 * observation[:2]
            action = int(random.integers(2)) if random.random() < 0.7 else int(angle + 0.3 * speed > 0)
            following, reward, terminated, truncated, _ = env.step(action)
            rows.append((observation, action, reward, terminated, truncated))
            observation, ended = following, terminated or truncated
        returns.append(len(rows) - start)
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    with h5py.File(path, "w") as file:
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            file[name] = np.array(values)[:, None] if name == "actions" and column else np.array(values)
    return float(np.mean(returns))


def test_cartpole_is_learned_from_poor_data_and_acted_in_at_a_temperature(tmp_path):
    mean = noisy_cartpole(tmp_path / "cartpole.hdf5", column=False)
    options: dict[str, Any] = {"env": "CartPole-v1", "max_episode_steps": None, "steps": 150, "embed_dim": 32}
    options |= {"context_length": 5, "eval_episodes": 4, "eval_every": 0, "targets": 500}
    options |= {"learning_rate": 0.003, "batch_size": 32}
    results = train_here(tmp_path / "cartpole.hdf5", tmp_path / "run", **options).results
    assert results[0].returns.mean() > 1.5 * mean

    def scores(temperature):
        path = tmp_path / "scores.json"
        evaluate_run(EvaluateConfig(tmp_path / "run", episodes=4, temperature=temperature, json=path))
        return json.loads(path.read_text())["targets"][0]["returns"]

    drawn = scores(3.0)
    assert drawn == scores(3.0)
    assert np.mean(drawn) < np.mean(scores(0.0))


def test_columns_of_choices_and_observations_become_one_hot_where_an_environment_says_so(tmp_path):
    path = tmp_path / "cartpole.hdf5"
    noisy_cartpole(path, column=True)
    dataset = load_episodes(str(path), "CartPole-v1", EvaluationOptions())
    with h5py.File(path, "a") as file:
        taken = file["actions"][()]
        np.testing.assert_array_equal(dataset.actions, np.eye(2)[taken[:, 0]])
        del file["actions"]
        file["actions"] = np.where(np.arange(len(taken)) == 7, 2, taken[:, 0])
    with pytest.raises(UserError, match=r"'actions' holds 2, row 7, column 0: .* whole numbers from 0 to 1"):
        load_episodes(str(path), "CartPole-v1")
    assert load_episodes(str(path)).actions.shape == (len(taken), 1)  # numbers, where nothing says otherwise
    with h5py.File(tmp_path / "lake.hdf5", "w") as file:
        file["observations"], file["actions"] = np.array([0, 4, 15]), np.array([1.0, 2.0, 3.0])
        file["rewards"], file["dones"] = np.zeros(3), np.array([0, 0, 1])
    dataset = load_episodes(str(tmp_path / "lake.hdf5"), "FrozenLake-v1")
    np.testing.assert_array_equal(dataset.observations, np.eye(16)[[0, 4, 15]])
    np.testing.assert_array_equal(dataset.actions, np.eye(4)[[1, 2, 3]])
    larger = EvaluationOptions(env_kwargs='{"map_name": "8x8"}')
    assert load_episodes(str(tmp_path / "lake.hdf5"), "FrozenLake-v1", larger).observation_dim == 64
