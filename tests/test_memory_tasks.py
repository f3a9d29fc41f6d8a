"""Memory tasks: their environments, one and many at a time, their data, and acting far beyond its length."""

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
from broken_inputs import refusal
from gymnasium.utils.env_checker import check_env
from test_evaluate import ConstantAgent
from test_mujoco_vector import assert_slots_are_single_environments
from tiny_training import resume_here, train_here

from flowrl import load_agent
from flowrl.behavior.shipped import load_behavior
from flowrl.data import load_episodes
from flowrl.data.collect import collect
from flowrl.data.embedded import EMBEDDED
from flowrl.data.sources import environment_named
from flowrl.data.tmaze import check_corridor
from flowrl.envs.cued_speed import SPEEDS
from flowrl.envs.memory import TMazeVectorEnv
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import StillVectorEnv, make_env, make_vector_env
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import episode_seeds, evaluate, format_table
from flowrl.evaluation.rollout import rollout
from flowrl.training.setup import velocities

LEVELS = ["tmaze-20", "tmaze-1100", "tmaze-30-arms-4-distractors-3", "tmaze-5-arms-16", "tmaze-2"]


class Oracle:
    """Goes where the cue points: remembers the first observation, with a number for each of several arms."""

    def reset(self, num_envs: int, target_return: np.ndarray) -> None:
        self.cues = None

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        if self.cues is None:
            self.cues = observations[:, :-3]
        numbers = self.cues.shape[1]
        return self.cues if numbers == 1 else 2 * self.cues.argmax(axis=1, keepdims=True) / (numbers - 1) - 1

    def keep(self, indices: np.ndarray) -> None:
        self.cues = self.cues[indices]


@pytest.mark.parametrize("name", LEVELS[2:])
def test_tmaze_passes_gymnasiums_checker(name):
    check_env(make_env(environment_named(name)).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("name", LEVELS)
def test_many_tmazes_equal_single_ones(name):
    environment, seeds = environment_named(name), [3, 4, 5]
    envs = make_vector_env(environment, len(seeds))
    assert isinstance(envs, TMazeVectorEnv)
    singles, length = [make_env(environment) for _ in seeds], environment.kwargs["length"]
    assert_slots_are_single_environments(envs, singles, seeds, 2 * length)
    envs.reset(seed=seeds)
    for _ in range(length):
        _, _, finished, truncated, _ = envs.step(np.ones((3, 1), np.float32))
    assert (finished.all(), truncated.any()) == (True, False)
    envs.reset(seed=[0] * 3, options={"reset_mask": np.arange(3) < 1})
    after, rewards, finished, _, _ = envs.step(np.ones((3, 1), np.float32))
    assert finished.tolist() == [False, True, True]  # the others stay still
    assert not rewards[1:].any()
    assert not after[1:].any()


@pytest.mark.parametrize("name", LEVELS)
def test_an_oracle_always_succeeds_and_a_guess_succeeds_as_often_as_there_are_arms(name):
    environment = environment_named(name)
    arms = environment.kwargs["arms"]
    outcome = rollout(Oracle(), environment, np.ones(50), np.arange(50))
    assert outcome.returns.tolist() == [1.0] * 50
    assert set(outcome.lengths) == {environment.kwargs["length"]}
    if environment.kwargs["length"] < 100:
        data = load_episodes(name)
        assert set(data.episode_returns) == {0.0, 1.0}
        spread = 4 * (1 / arms * (1 - 1 / arms) / data.num_episodes) ** 0.5
        assert abs(data.episode_returns.mean() - 1 / arms) < spread


def test_distractors_show_false_cues_between_the_cue_and_the_junction():
    data = load_episodes("tmaze-12-arms-4-distractors-5")
    shown = data.observations.reshape(data.num_episodes, 12, -1)[:, :, :4].any(axis=2)
    assert shown[:, 0].all()
    assert not shown[:, -1].any()
    assert (shown.sum(axis=1) == 6).all()
    assert shown[:, 1:-1].mean(axis=0).min() > 0.3


def test_data_is_the_environments_and_the_same_every_time():
    data = load_episodes("tmaze-15")
    assert data.sha256 == load_episodes("flowrl", "tmaze-15").sha256
    assert data.environment == EnvironmentSpec("flowrl/TMaze-v0", {"length": 15, "arms": 2, "distractors": 0})
    assert (data.episode_lengths == 15).all()
    observations = data.observations.reshape(-1, 15, 4)
    right = (observations[:, 0, 0] == np.sign(data.actions.reshape(-1, 15)[:, -1])).astype(np.float64)
    np.testing.assert_array_equal(data.episode_returns, right)
    np.testing.assert_array_equal(observations[0, :, 1], np.arange(15) == 14)
    np.testing.assert_array_equal(observations[0, :, 2], np.arange(15, dtype=np.float32) / 15)


def test_numbers_limits_and_robots_that_a_task_does_not_have_are_refused():
    for name, message in {
        "tmaze-1": "length 1: must be from 2 to",
        "tmaze-50-arms-0": "arms 0: must be from 2 to 16",
        "tmaze-50-arms-17": "arms 17: must be from 2 to 16",
        "tmaze-50-distractors-49": "distractors 49: must be from 0 to 48",
        "tmaze-100001": "made for corridors of up to 100000",
    }.items():
        assert message in refusal(lambda name=name: load_episodes(name))
    with pytest.raises(UserError, match=r"T-Maze: .*must be a whole number"):
        gymnasium.make("flowrl/TMaze-v0", length=2.5)
    for task, timesteps in (("Cued", 400), ("Hidden", 300)):
        with pytest.raises(UserError, match="no robot 'ant'; known: halfcheetah, walker2d, hopper"):
            gymnasium.make(f"flowrl/Hopper{task}-v0", robot="ant")
        with pytest.raises(UserError, match=f"max_episode_steps 99: .* have {timesteps}"):
            make_vector_env(EnvironmentSpec(f"flowrl/Hopper{task}-v0", max_episode_steps=99), 2)


def test_data_of_another_corridor_and_a_limit_before_the_junction_are_refused():
    data = load_episodes("tmaze-20", "tmaze-30")
    with pytest.raises(UserError, match=r"flowrl/tmaze-20: its longest episode has 20 .*corridor 30"):
        check_corridor(data)
    check_corridor(load_episodes("tmaze-20"))
    early = EnvironmentSpec("flowrl/TMaze-v0", {"length": 20}, max_episode_steps=19)
    for refused in (
        lambda: make_vector_env(early, 2),
        lambda: check_corridor(replace(load_episodes("tmaze-20"), environment=early)),
    ):
        with pytest.raises(UserError, match="max_episode_steps 19: its episodes have 20"):
            refused()


@pytest.mark.parametrize(
    ("robot", "task", "strength"),
    [("HalfCheetah", "Cued", 0.1), ("Hopper", "Hidden", 0.2), ("Walker2d", "Hidden", 1.0)],
)
def test_many_robots_equal_single_ones(robot, task, strength):
    environment, seeds = EnvironmentSpec(f"flowrl/{robot}{task}-v0"), [1, 2, 3]
    envs, singles = make_vector_env(environment, 3), StillVectorEnv(environment, 3)
    observations, info = envs.reset(seed=seeds)
    np.testing.assert_array_equal(observations, singles.reset(seed=seeds)[0])
    worlds = [make_env(environment).reset(seed=seed)[1].get("world") for seed in seeds]
    assert list(info.get("world", [None] * 3)) == worlds
    generator = np.random.default_rng(0)
    for _ in range(400):
        actions = strength * generator.uniform(-1, 1, envs.action_space.shape).astype(np.float32)
        *outcome, info = envs.step(actions)
        assert list(info.get("world", [None] * 3)) == worlds
        for got, want in zip(outcome, singles.step(actions)[:4], strict=True):
            np.testing.assert_array_equal(got, want)
    assert (outcome[2] | outcome[3]).all()


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_the_target_speed_is_shown_for_ten_timesteps_and_pays_after_the_run_up():
    env = make_env(EnvironmentSpec("flowrl/HalfCheetahCued-v0"))
    check_env(env.unwrapped, skip_render_check=True)
    observation, _ = env.reset(seed=2)
    simulation: Any = env.unwrapped._simulation  # type: ignore[attr-defined]
    cue, positions, generator = observation[-3], [simulation.qpos[0]], np.random.default_rng(1)
    target = 3.5 + (cue + 1) / 2 * (11.5 - 3.5)
    assert min(abs(target - known) for known in SPEEDS["halfcheetah"].targets) < 1e-9
    for timestep in range(1, 401):
        observation, reward, _, truncated, _ = env.step(generator.uniform(-1, 1, 6).astype(np.float32))
        positions.append(simulation.qpos[0])
        shown = timestep < 10
        assert observation[-3:].tolist() == [cue * shown, shown, timestep >= 100]
        speed = (positions[-1] - positions[max(timestep - 50, 0)]) / (50 * 0.05)
        assert reward == pytest.approx(max(0.0, 1 - abs(speed - target) / 4.0) if timestep >= 150 else 0.0)
        assert truncated == (timestep == 400)


def test_cued_data_has_one_run_up_and_right_and_wrong_policies_after_it():
    recipe = replace(EMBEDDED["hopper-cued"], steps=6_000)
    episodes = collect(recipe).episodes
    assert {episode.policy for episode in episodes} == {"350k", "expert"}
    assert recipe.provenance()["recipe"]["opening"] == "350k"
    assert "opening" not in EMBEDDED["hopper-medium"].provenance()["recipe"]
    policy = load_behavior("hopper", "350k")
    for episode in episodes:
        mean = policy.act(episode.observations[:-1, :-3], 0.0)
        distance = np.abs(mean - episode.actions).mean(axis=1)
        assert (distance[100:].mean() > 1.3 * distance[:100].mean()) == (episode.policy == "expert")
    cues = {(episode.policy, episode.observations[0, -3]) for episode in episodes}
    assert cues == {("350k", -1), ("350k", 1), ("expert", -1), ("expert", 1)}
    assert environment_named("hopper-cued") == EnvironmentSpec("flowrl/HopperCued-v0")
    with pytest.raises(UserError, match="did you mean 'hopper-cued'"):
        environment_named("hopper-cue")


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_a_hidden_world_reverses_an_actuator_and_is_in_no_observation():
    env, plain = make_env(EnvironmentSpec("flowrl/HalfCheetahHidden-v0")), gymnasium.make("HalfCheetah-v5")
    check_env(env.unwrapped, skip_render_check=True)
    worlds = [env.reset(seed=seed)[1]["world"] for seed in range(100)]
    assert worlds == [env.reset(seed=seed)[1]["world"] for seed in range(100)]
    assert set(worlds) == set(range(7))
    for world in range(7):
        seed, generator = worlds.index(world), np.random.default_rng(world)
        observation, own = env.reset(seed=seed)[0], plain.reset(seed=seed)[0]
        np.testing.assert_array_equal(observation, [*own, 0])
        for timestep in range(300):
            action, expected = generator.uniform(-1, 1, 6).astype(np.float32), 0.0
            wired = np.where(np.arange(1, 7) == world, -action, action)
            if timestep < 20 or timestep >= 50:
                own, reward, *_ = plain.step(wired)
                expected = float(reward) * (timestep >= 50)
            elif timestep == 49:
                own, _ = plain.reset()
            observation, reward, terminated, truncated, info = env.step(action)
            is_off = 19 <= timestep < 49
            np.testing.assert_array_equal(observation, np.zeros(18) if is_off else [*own, timestep >= 49])
            assert (reward, terminated, truncated) == (expected, False, timestep == 299)
            assert info == {"world": world}


def test_hidden_data_has_a_naive_trial_and_a_run_that_makes_the_wiring_good():
    assert environment_named("hopper-hidden") == EnvironmentSpec("flowrl/HopperHidden-v0")
    episodes = collect(replace(EMBEDDED["hopper-hidden"], steps=4_000)).episodes
    env = make_env(EnvironmentSpec("flowrl/HopperHidden-v0"))
    seen = set()
    for episode in episodes:
        world = env.reset(seed=episode.seed)[1]["world"]
        seen.add((episode.policy, world))
        observations = episode.observations[:-1, :-1]
        opening = load_behavior("hopper", "expert").act(observations, 0.0)
        policy = load_behavior("hopper", episode.policy).act(observations, 0.0)
        wired = np.where(np.arange(1, 4) == world, -episode.actions, episode.actions)
        assert np.abs(opening - episode.actions)[:20].mean() < 0.3
        assert not episode.actions[20:50].any()
        assert np.abs(policy - wired)[50:].mean() < 0.3
        assert episode.rewards.sum() > 600
    assert {world for _, world in seen} == {0, 1, 2, 3}
    assert {policy for policy, _ in seen} == {"medium", "expert"}


def test_an_evaluation_has_the_world_of_each_episode():
    environment, agent = environment_named("hopper-hidden"), ConstantAgent()
    (result,) = evaluate(agent, environment, [1.0], 8, seed=0, reference=None)
    env = make_env(environment)
    worlds = [env.reset(seed=int(seed))[1]["world"] for seed in episode_seeds(0, 8)]
    assert result.to_dict()["worlds"] == worlds
    of_world_0 = result.returns[np.array(worlds) == 0].mean()
    assert f"return by world, target 1: 0: {of_world_0:.1f}" in format_table([result])


@pytest.mark.parametrize("agent", ["transformer", "bc"])
def test_masked_velocities_are_nothing_to_the_agent(tiny_dataset, tmp_path, agent):
    """Neither while it trains nor after it is loaded or resumed; positions matter."""
    train_here(tiny_dataset, tmp_path / "run", agent=agent, mask_velocities="", steps=20, eval_every=0)
    resume_here(tmp_path / "run", steps=25)
    loaded = load_agent(tmp_path / "run")
    observations = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)

    def first_actions(changed):
        seen = observations.copy()
        seen[:, changed] += 3
        loaded.reset(3, 30.0)
        return np.stack([loaded.act(seen, np.zeros(3)) for _ in range(4)])

    unchanged = first_actions(slice(0))
    np.testing.assert_array_equal(first_actions(slice(5, 11)), unchanged)  # Hopper's six velocities
    assert (first_actions(slice(4, 5)) != unchanged).any()


@pytest.mark.parametrize("environment", ["InvertedDoublePendulum-v5", "Humanoid-v5", "flowrl/HopperCued-v0"])
def test_velocities_are_masked_only_where_they_are_known(environment):
    for spec in (None, EnvironmentSpec(environment)):
        refusal(lambda spec=spec: velocities(spec), r"--mask-velocities: where .* (None|.*-v[05]) hold")
    for version in ("v4", "v5"):
        assert velocities(EnvironmentSpec(f"Walker2d-{version}")) == slice(8, 17)
    assert velocities(EnvironmentSpec("Ant-v5")) == slice(13, 27)  # contact forces follow
