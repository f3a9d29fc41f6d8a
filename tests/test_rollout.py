"""Rollouts against a hand-written loop over single Gymnasium environments, episode by episode."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box

from flowrl.data.collect import Part, Recipe
from flowrl.data.writers import collect_d4rl
from flowrl.envs.failures import failures_kept
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation.rollout import rollout


class LinearAgent:
    """A fixed random linear policy with a memory per slot, so that mixed-up slots change actions.

    The action depends on the target return, on the rewards received so far and on a running mean of
    the slot's observations.
    """

    def __init__(self, observation_dim, action_dim, scale=1.0):
        rng = np.random.default_rng(7)
        self.from_memory = scale * rng.normal(size=(observation_dim, action_dim))
        self.from_target = 0.01 * rng.normal(size=action_dim)

    def reset(self, num_envs, target_return):
        self.to_go = np.broadcast_to(np.asarray(target_return, dtype=np.float64), num_envs).copy()
        self.memory = np.zeros((num_envs, len(self.from_memory)))

    def act(self, observations, rewards=None):
        assert len(observations) == len(self.memory)
        if rewards is not None:
            self.to_go -= rewards
        self.memory = 0.7 * self.memory + 0.3 * observations
        # A sum per slot: a matrix product may round differently for another number of slots.
        actions = (self.memory[:, :, None] * self.from_memory).sum(axis=1)
        return np.clip(actions + self.to_go[:, None] * self.from_target, -1, 1).astype(np.float32)

    def keep(self, indices):
        self.to_go, self.memory = self.to_go[indices], self.memory[indices]


def loop_over_single_environments(agent, environment, target_returns, seeds):
    """The reference: one environment at a time, a return added up by hand."""
    returns, lengths, terminated = [], [], []
    for target_return, seed in zip(target_returns, seeds, strict=True):
        limit = environment.max_episode_steps
        env = gym.make(environment.env_id, max_episode_steps=limit, **environment.kwargs)
        observation, _ = env.reset(seed=int(seed))
        agent.reset(1, target_return)
        total, length, reward, over = 0.0, 0, None, False
        while not over:
            action = agent.act(observation[None], None if reward is None else np.array([reward]))[0]
            observation, reward, is_terminated, is_truncated, _ = env.step(action)
            total += reward
            length += 1
            over = is_terminated or is_truncated
        returns.append(total)
        lengths.append(length)
        terminated.append(is_terminated)
        env.close()
    return np.array(returns), np.array(lengths), np.array(terminated)


@pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
@pytest.mark.parametrize(
    ("environment", "dims", "scale"),
    [
        (EnvironmentSpec("Hopper-v4"), (11, 3), 0.05),
        (EnvironmentSpec("Walker2d-v5", max_episode_steps=12), (17, 6), 0.1),
        (EnvironmentSpec("HalfCheetah-v4", max_episode_steps=30), (17, 6), 0.5),
        (EnvironmentSpec("Hopper-v5", {"reset_noise_scale": 0.05}, 24), (11, 3), 0.3),
        (EnvironmentSpec("InvertedPendulum-v5", max_episode_steps=6), (4, 1), 3.0),
    ],
    ids=lambda value: value.env_id if isinstance(value, EnvironmentSpec) else "",
)
def test_returns_and_lengths_equal_those_of_single_environments(environment, dims, scale):
    agent = LinearAgent(*dims, scale=scale)
    targets = np.repeat([50.0, 300.0, -20.0], 4)
    seeds = np.tile([5, 0, 11, 7], 3)
    returns, lengths, terminated = loop_over_single_environments(agent, environment, targets, seeds)
    result = rollout(agent, environment, targets, seeds)
    np.testing.assert_allclose(result.returns, returns, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(result.lengths, lengths)
    np.testing.assert_array_equal(result.terminated, terminated)
    assert result.returns.dtype == np.float64
    if environment.env_id == "HalfCheetah-v4":
        assert set(lengths) == {30}  # it never terminates
    else:
        assert len(set(lengths)) > 1  # slots were dropped at different steps
    if environment.max_episode_steps is not None:
        assert not terminated.all()


class FaultyEnv(gym.Env):
    """Runs for ``seed`` steps; odd ones succeed at the second. At the third a NaN where ``fault`` names."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float64)
    action_space = Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, fault=""):
        self.fault = fault

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        return np.zeros(2), {}

    def step(self, action):
        assert self.steps < self.seed, "stepped after its end"
        self.steps += 1
        broken = self.seed == 9 and self.steps == 3
        observation = np.array([self.steps, np.inf if broken and self.fault == "observation" else 0.0])
        reward = float("nan") if broken and self.fault == "reward" else 1e8 + self.seed / 1024
        success = self.seed % 2 == 1 and self.steps == 2
        return observation, reward, self.steps == self.seed, False, {"success": success}


@pytest.fixture
def faulty():
    gym.register("flowrl-test/Faulty-v0", FaultyEnv, max_episode_steps=50)
    yield "flowrl-test/Faulty-v0"
    del gym.registry["flowrl-test/Faulty-v0"]


def test_a_finished_slot_is_never_stepped_and_sums_are_exact(faulty):
    seeds = np.array([4, 1, 9, 2, 4, 50, 3])
    result = rollout(LinearAgent(2, 1), EnvironmentSpec(faulty), np.zeros(7), seeds)
    np.testing.assert_array_equal(result.lengths, seeds)
    np.testing.assert_array_equal(result.returns, seeds * (1e8 + seeds / 1024))  # float32 would lose these
    assert result.terminated.all()
    assert np.flatnonzero(result.successes).tolist() == [2, 6]  # the second one ends after one step


@pytest.mark.parametrize(("fault", "step"), [("observation", 3), ("reward", 2)])
def test_a_non_finite_value_names_the_slot_and_the_step(faulty, fault, step):
    seeds = np.array([1, 5, 2, 9, 6])  # slots 0 and 2 are gone when slot 3 breaks
    with pytest.raises(UserError, match=f"environment 3, step {step}: {fault} "):
        rollout(LinearAgent(2, 1), EnvironmentSpec(faulty, {"fault": fault}), np.zeros(5), seeds)


@pytest.mark.parametrize("when", ["reset", "step 3"])
def test_an_environment_that_raises_is_named_and_its_traceback_kept(tmp_path, faulty, monkeypatch, when):
    def fail(self, *_, **__):
        if when == "reset" or self.steps == 3:
            raise RuntimeError("the simulator\nis unstable")
        self.steps += 1
        return np.zeros(2), 1.0, False, False, {}

    monkeypatch.setattr(FaultyEnv, when.split()[0], fail)
    line = f"^environment {faulty} failed at {when}: RuntimeError: the simulator is unstable; its traceback "
    with pytest.raises(UserError, match=line), failures_kept(tmp_path):
        rollout(LinearAgent(2, 1), EnvironmentSpec(faulty), np.zeros(2), np.array([7, 8]))
    path = tmp_path / "environment-error.txt"
    kept = path.read_text()
    assert kept.startswith("Traceback")
    assert "in fail" in kept
    recipe = Recipe(faulty, (Part("uniform"),), steps=10, spec=EnvironmentSpec(faulty))
    with pytest.raises(UserError, match=r"failed at (reset|a step): RuntimeError: the simulator is unstable"):
        collect_d4rl(recipe, tmp_path / "x.hdf5")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=line[:-20]) as caught, failures_kept(path):
        rollout(LinearAgent(2, 1), EnvironmentSpec(faulty), np.zeros(2), np.array([7, 8]))
    assert "its traceback" not in str(caught.value)  # no folder to write it to
