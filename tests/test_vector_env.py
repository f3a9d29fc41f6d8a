"""Vector environments against single ones, and slots that stay still after their episode."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env, make_vector_env
from flowrl.errors import UserError


class CountingEnv(gym.Env):
    """Terminates after a drawn number of steps, which it counts."""

    observation_space = Dict({"b": Box(-np.inf, np.inf, (2,)), "a": Box(-np.inf, np.inf, (1,))})
    action_space = Box(-10.0, 10.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.integers(1, 8))
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        return self._observation(), float(action[0]), self.steps == self.length, False, {}

    def _observation(self):
        return {
            "b": np.array([self.steps, self.length], np.float32),
            "a": np.array([-self.steps], np.float32),
        }


@pytest.fixture
def counting():
    gym.register("flowrl-test/Counting-v0", CountingEnv, max_episode_steps=6)
    yield EnvironmentSpec("flowrl-test/Counting-v0")
    del gym.registry["flowrl-test/Counting-v0"]


def test_finished_slots_stay_still_until_they_are_reset(counting):
    envs = make_vector_env(counting, 5)
    seeds = [3, 4, 5, 6, 7]
    lengths = [min(6, int(np.random.default_rng(seed).integers(1, 8))) for seed in seeds]
    assert len(set(lengths)) > 1
    observations, _ = envs.reset(seed=seeds)
    assert observations.shape == (5, 3)
    for step in range(1, 11):
        observations, rewards, terminations, truncations, infos = envs.step(np.full((5, 1), 2.0, np.float32))
        assert infos == {}
        for slot, length in enumerate(lengths):
            taken = min(step, length)
            assert envs.get_attr("steps")[slot] == taken
            assert rewards[slot] == (2.0 if step <= length else 0.0)
            assert observations[slot, 0] == -taken  # "a" comes before "b"
            assert (terminations | truncations)[slot] == (step >= length)
    mask = np.array([False, True, False, False, True])
    envs.reset(seed=[0, 0, 0, 0, 0], options={"reset_mask": mask})
    envs.step(np.ones((5, 1), np.float32))
    assert list(envs.get_attr("steps")) == [lengths[0], 1, lengths[2], lengths[3], 1]
    envs.close()


def test_an_environment_that_cannot_be_made_is_a_user_error():
    with pytest.raises(UserError, match=r"Hopper-v4 cannot be made: .*bogus"):
        make_env(EnvironmentSpec("Hopper-v4", {"bogus": 1}))
    with pytest.raises(UserError, match="NoSuchThing-v0 cannot be made"):
        make_vector_env(EnvironmentSpec("NoSuchThing-v0"), 2)
