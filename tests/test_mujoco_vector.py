"""The threaded MuJoCo vector environment against Gymnasium's single environments, bit for bit."""

import gymnasium as gym
import numpy as np
import pytest

from flowrl.envs.mujoco_vector import MujocoVectorEnv
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import StillVectorEnv, make_vector_env

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")

EVERY_ID = [f"{name}-v{n}" for name in ("Ant", "HalfCheetah", "Hopper", "Walker2d") for n in (4, 5)]


def assert_slots_are_single_environments(envs, singles, seeds, steps, action_scale=1.0):
    """Over random steps; finished slots are reset without a seed, so that generators are compared too."""
    observations, _ = envs.reset(seed=seeds)
    for single, seed, observation in zip(singles, seeds, observations, strict=True):
        np.testing.assert_array_equal(observation, single.reset(seed=seed)[0])
    rng, episodes = np.random.default_rng(3), 0
    for _ in range(steps):
        actions = rng.uniform(-action_scale, action_scale, envs.action_space.shape).astype(np.float32)
        outcome = envs.step(actions)
        expected = [single.step(action) for single, action in zip(singles, actions, strict=True)]
        for got, want in zip(outcome[:4], list(zip(*expected, strict=True))[:4], strict=True):
            np.testing.assert_array_equal(got, want)
        finished = outcome[2] | outcome[3]
        if finished.any():
            episodes += int(finished.sum())
            observations, _ = envs.reset(options={"reset_mask": finished})
            for slot in np.flatnonzero(finished):
                np.testing.assert_array_equal(observations[slot], singles[slot].reset()[0])
    assert episodes >= len(seeds)


@pytest.mark.parametrize("env_id", EVERY_ID)
@pytest.mark.parametrize(("action_scale", "limit"), [(1.0, None), (0.1, 90)], ids=["wild", "gentle"])
def test_every_step_equals_gymnasiums(env_id, action_scale, limit):
    """Over 1,000 steps, or 200 of several episodes."""
    seeds = [17, 2**31]
    singles = [gym.make(env_id, max_episode_steps=limit, disable_env_checker=True) for _ in seeds]
    envs = make_vector_env(EnvironmentSpec(env_id, max_episode_steps=limit), len(seeds))
    assert isinstance(envs, MujocoVectorEnv)
    assert envs.single_observation_space == singles[0].observation_space
    assert envs.single_action_space == singles[0].action_space
    assert_slots_are_single_environments(envs, singles, seeds, 1000 if limit is None else 200, action_scale)
    envs.close()


@pytest.mark.parametrize(("name", "kind"), [("Hopper-v4", MujocoVectorEnv), ("CartPole-v1", StillVectorEnv)])
def test_finished_slots_stand_still_until_they_are_reset(name, kind):
    envs = make_vector_env(EnvironmentSpec(name, max_episode_steps=30), 12)
    assert isinstance(envs, kind)
    envs.action_space.seed(0)
    kept, _ = envs.reset(seed=list(range(12)))
    kept, frozen = kept.copy(), np.zeros(12, dtype=bool)
    finishing_steps = set()
    for step in range(35):
        observations, rewards, terminations, truncations, infos = envs.step(envs.action_space.sample())
        assert infos == {}
        assert (rewards[frozen] == 0).all()
        assert (rewards[~frozen] != 0).all()
        np.testing.assert_array_equal(observations[frozen], kept[frozen])
        assert (terminations | truncations)[frozen].all()
        newly = (terminations | truncations) & ~frozen
        kept[newly] = observations[newly]
        frozen |= newly
        if newly.any():
            finishing_steps.add(step)
    assert frozen.all()
    assert len(finishing_steps) > 2
    first = np.arange(12) < 5
    again, _ = envs.reset(seed=list(range(12)), options={"reset_mask": first})
    np.testing.assert_array_equal(again[~first], kept[~first])
    fresh, _ = envs.reset(seed=0)  # slot i gets seed + i
    np.testing.assert_array_equal(again[first], fresh[first])
    envs.close()
