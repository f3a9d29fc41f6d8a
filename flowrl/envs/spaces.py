"""What data must fit: the sizes and bounds of an environment's observations and actions."""

import math

import numpy as np
from gymnasium.spaces import Box

from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env
from flowrl.errors import UserError


def check_environment(environment: EnvironmentSpec, observation_dim: int, action_dim: int) -> None:
    """Check that the data's dimensions are the environment's (Dict observations count flattened).

    Raises:
        UserError: they differ, the environment cannot be made, or its spaces are not Box (or Dict of Box).
    """
    observation_space, action_space = _flat_spaces(environment)
    expected = (math.prod(observation_space.shape), math.prod(action_space.shape))
    if (observation_dim, action_dim) != expected:
        raise UserError(
            f"environment {environment.env_id} has observations of {expected[0]} and actions of "
            f"{expected[1]} numbers, the data {observation_dim} and {action_dim}: "
            "give the environment that the data is from"
        )


def action_bounds(environment: EnvironmentSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return the (low, high) bounds of the environment's actions, float32 arrays of shape (action_dim,).

    Raises:
        UserError: the environment cannot be made or its spaces are not Box (or Dict of Box).
    """
    _, action_space = _flat_spaces(environment)
    return action_space.low.astype(np.float32).ravel(), action_space.high.astype(np.float32).ravel()


def _flat_spaces(environment: EnvironmentSpec) -> tuple[Box, Box]:
    """Make the environment once, as evaluation does, to read its observation and action spaces."""
    environment = EnvironmentSpec.from_dict(environment.to_dict())  # refuses an unregistered id
    env = make_env(environment)
    try:
        observation_space, action_space = env.observation_space, env.action_space
    finally:
        env.close()
    if not isinstance(observation_space, Box):
        raise UserError(
            f"environment {environment.env_id}: observations must be Box, not {observation_space}"
        )
    if not isinstance(action_space, Box):
        raise UserError(f"environment {environment.env_id}: actions must be Box, not {action_space}")
    return observation_space, action_space
