"""What is noted, refused and filled in when data meets the environment that it is evaluated in."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box

from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.data.matching import match_environment
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError

LARGEST = float(np.finfo(np.float32).max)


class Endless(gym.Env):
    """Has no time limit and never ends."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, bound: float = 2.0) -> None:
        self.action_space = Box(-bound, bound, (2,), np.float32)


@pytest.fixture(autouse=True)
def endless() -> None:
    gym.register("flowrl-test/Endless-v0", Endless)
    yield
    del gym.registry["flowrl-test/Endless-v0"]


def dataset(actions: np.ndarray, environment: EnvironmentSpec) -> EpisodeDataset:
    """Two episodes, of 3 and of the other steps, with these (steps, 2) actions."""
    steps = len(actions)
    return build_episodes(
        observations=np.zeros((steps, 3)),
        actions=actions,
        rewards=np.ones(steps),
        episode_lengths=np.array([3, steps - 3]),
        terminated=np.zeros(2, bool),
        dataset_id="test",
        where="test",
        environment=environment,
        notes=["first"],
    )


def test_an_environment_without_a_limit_gets_twice_the_longest_episode() -> None:
    matched = match_environment(dataset(np.zeros((10, 2)), EnvironmentSpec("flowrl-test/Endless-v0")))
    assert matched.environment == EnvironmentSpec("flowrl-test/Endless-v0", max_episode_steps=14)
    assert matched.notes[0] == "first"
    assert "has no time limit: evaluated for at most 14 steps" in matched.notes[1]
    given = EnvironmentSpec("flowrl-test/Endless-v0", max_episode_steps=5)
    matched = match_environment(dataset(np.zeros((10, 2)), given))
    assert (matched.environment, matched.notes) == (given, ("first",))


LIMITED = EnvironmentSpec("flowrl-test/Endless-v0", max_episode_steps=5)


def test_actions_outside_the_bounds_are_noted_with_their_share() -> None:
    actions = np.zeros((10, 2))
    actions[[2, 7, 9], [0, 1, 1]] = [2.0001, -3.0, 8.0]  # the first is rounding
    notes = match_environment(dataset(actions, LIMITED)).notes
    assert notes[1].startswith(
        "20% of the actions are outside the bounds of flowrl-test/Endless-v0, -2 to 2; they reach from "
        "[0 -3] to [2.0001 8]"
    )


def test_actions_of_another_scaling_are_refused() -> None:
    actions = np.random.default_rng(0).uniform(0, 100, (50, 2))
    with pytest.raises(UserError, match=r"^test: 100% of the actions .* another environment or scaling"):
        match_environment(dataset(actions, LIMITED))


@pytest.mark.parametrize("bound", [np.inf, LARGEST])
def test_bounds_beyond_all_use_are_none(bound: float) -> None:
    unbounded = EnvironmentSpec("flowrl-test/Endless-v0", {"bound": bound}, 5)
    assert match_environment(dataset(np.full((10, 2), 1e5), unbounded)).notes == ("first",)
