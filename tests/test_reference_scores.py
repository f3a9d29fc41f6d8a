"""Reference scores and environment specifications."""

import json

import gymnasium
import numpy as np
import pytest

from flowrl.envs.reference_scores import REFERENCE_SCORES, reference_scores
from flowrl.envs.spaces import action_bounds, check_environment
from flowrl.envs.specs import (
    EnvironmentSpec,
    registered_environment,
    wrappers_in_gymnasium_json,
)
from flowrl.errors import UserError


@pytest.mark.parametrize(
    ("env_id", "episode_return", "score"),
    [
        # Worked out by hand from D4RL's table.
        ("Hopper-v4", 3234.3, 100.0),
        ("Hopper-v5", -20.272305, 0.0),
        ("Hopper-v4", 1607.0138475, 50.0),
        ("HalfCheetah-v4", 5927.4105235, 50.0),
        ("Walker2d-v4", 1.629008 - 45.90670992, -1.0),
        ("Ant-v4", 3879.7 + 42.053, 101.0),
    ],
)
def test_normalized_scores(env_id: str, episode_return: float, score: float) -> None:
    reference = reference_scores(env_id)
    assert reference is not None
    assert reference.normalized_score(episode_return) == pytest.approx(score, abs=1e-9)


def test_environments_outside_the_table_have_none() -> None:
    for env_id in ("Humanoid-v5", "Hopper2-v4", "Pendulum-v1", "hop-per"):
        assert reference_scores(env_id) is None
    d4rls = {name for name in REFERENCE_SCORES if not name.startswith("flowrl/")}
    assert d4rls == {"hopper", "halfcheetah", "walker2d", "ant"}


def test_a_spec_survives_its_json_form() -> None:
    spec = EnvironmentSpec("Hopper-v5", {"forward_reward_weight": 2.0}, 123)
    assert EnvironmentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert EnvironmentSpec.from_dict({"env_id": "Hopper-v4"}) == EnvironmentSpec("Hopper-v4")


def test_gymnasium_json_gives_id_kwargs_and_limit_only() -> None:
    env = gymnasium.make("Pendulum-v1", g=1.5, max_episode_steps=77, render_mode="rgb_array")
    env = gymnasium.wrappers.TimeAwareObservation(env)
    assert env.spec is not None
    text = env.spec.to_json()
    assert EnvironmentSpec.from_gymnasium_json(text) == EnvironmentSpec("Pendulum-v1", {"g": 1.5}, 77)
    assert wrappers_in_gymnasium_json(text) == ("TimeAwareObservation",)


def test_an_entry_point_in_a_file_is_never_used() -> None:
    spec = json.loads(gymnasium.spec("Pendulum-v1").to_json())
    spec["entry_point"] = "subprocess:run"
    loaded = EnvironmentSpec.from_gymnasium_json(json.dumps(spec))
    assert loaded == EnvironmentSpec("Pendulum-v1", {}, 200)
    check_environment(loaded, 3, 1)  # Gymnasium's own Pendulum


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "expected a mapping with 'env_id'"),
        ({"env_id": 3}, "expected a mapping with 'env_id'"),
        ([], "expected a mapping with 'env_id'"),
        ({"env_id": "Hoper-v4"}, "'Hoper-v4' is not registered with Gymnasium; did you mean 'Hopper-v4'"),
        ({"env_id": "antigravity:Hopper-v4"}, "'antigravity:Hopper-v4' is not registered"),
        ({"env_id": "Hopper-v4", "kwargs": [1]}, "'kwargs' must be a mapping"),
        ({"env_id": "Hopper-v4", "kwargs": {"entry_point": "os:system"}}, "'entry_point' is not allowed"),
        ({"env_id": "Hopper-v4", "max_episode_steps": 0}, "'max_episode_steps' must be a positive integer"),
        ({"env_id": "Hopper-v4", "max_episode_steps": "9"}, "'max_episode_steps' must be a positive integer"),
        (
            {"env_id": "Hopper-v4", "max_episode_steps": True},
            "'max_episode_steps' must be a positive integer",
        ),
    ],
)
def test_broken_specs_are_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EnvironmentSpec.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"id": 4}', '{"id": "os:x-v0"}', "[" * 100_000])
def test_broken_gymnasium_json_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="environment"):
        EnvironmentSpec.from_gymnasium_json(text)


@pytest.mark.parametrize("kwargs", ['["a"]', '"a"', "7"])
def test_gymnasium_json_with_odd_kwargs_is_refused(kwargs: str) -> None:
    with pytest.raises(UserError, match="'kwargs' must be a mapping"):
        EnvironmentSpec.from_gymnasium_json(f'{{"id": "Hopper-v4", "kwargs": {kwargs}}}')


def test_dimensions_and_bounds_are_the_environments() -> None:
    hopper = EnvironmentSpec("Hopper-v4")
    check_environment(hopper, 11, 3)
    for observation_dim, action_dim in ((12, 3), (11, 2), (3, 11)):
        with pytest.raises(UserError, match=r"Hopper-v4 has observations of 11 and actions of 3 numbers"):
            check_environment(hopper, observation_dim, action_dim)
    low, high = action_bounds(EnvironmentSpec("Pendulum-v1"))
    assert (low.tolist(), high.tolist(), low.dtype) == ([-2.0], [2.0], np.float32)


def test_environments_without_vectors_or_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UserError, match="CartPole-v1: actions must be Box"):
        action_bounds(EnvironmentSpec("CartPole-v1"))
    with pytest.raises(UserError, match="Hopper-v4 cannot be made"):
        check_environment(EnvironmentSpec("Hopper-v4", {"no_such_option": 1}), 11, 3)
    with pytest.raises(UserError, match="not registered"):
        check_environment(EnvironmentSpec("this:Hopper-v4"), 11, 3)


def test_an_unknown_name_is_answered_with_the_closest_one() -> None:
    assert registered_environment("Hopper-v4") == EnvironmentSpec("Hopper-v4")
    with pytest.raises(UserError, match="did you mean 'hopper-medium'"):
        registered_environment("hoppermedium", also_known=("hopper-medium",))
    with pytest.raises(UserError, match=r"not registered with Gymnasium$"):
        registered_environment("zzzzqqqq")
