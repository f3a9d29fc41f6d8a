"""What data must fit: an environment's observation and action spaces, and its time limit."""

import math
from dataclasses import dataclass

import numpy as np
from gymnasium.spaces import Box, Dict, Space
from gymnasium.wrappers import FlattenObservation

from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env
from flowrl.errors import UserError

_LARGEST_BOUND = 1e6  # beyond it a bound stands for none, as in Box(float32.min, float32.max)


@dataclass(frozen=True)
class EnvironmentFacts:
    """Of one environment as it is evaluated in, Dict observations flattened."""

    observation_dim: int
    action_space: Box
    max_episode_steps: int | None
    """None: it has no time limit."""

    @property
    def action_dim(self) -> int:
        return math.prod(self.action_space.shape)

    @property
    def action_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest actions, float32 (action_dim,); infinite where there is no bound."""
        low = self.action_space.low.astype(np.float32).ravel()
        high = self.action_space.high.astype(np.float32).ravel()
        return np.where(low < -_LARGEST_BOUND, -np.inf, low), np.where(high > _LARGEST_BOUND, np.inf, high)


def refuse_images(where: str, space: Space) -> None:
    """Raise UserError if the space, or a part of it, is of images."""
    parts = space.spaces.items() if isinstance(space, Dict) else [("observations", space)]
    for name, part in parts:
        if isinstance(part, Dict):
            refuse_images(where, part)
        elif isinstance(part, Box) and part.dtype == np.uint8 and len(part.shape) == 3:
            raise UserError(
                f"{where}: '{name}' are images of shape {part.shape}: there is no encoder for images here, "
                "give data and an environment of vectors"
            )


def environment_facts(environment: EnvironmentSpec) -> EnvironmentFacts:
    """Make the environment once, as evaluation does, to read its spaces and its limit.

    Raises:
        EnvironmentUnavailable: it cannot be made.
        UserError: its spaces are not Box (or Dict of Box for observations), or observations are images.
    """
    env = make_env(environment)
    try:
        observation_space, action_space = env.observation_space, env.action_space
        if isinstance(env, FlattenObservation):
            refuse_images(f"environment {environment.env_id}", env.env.observation_space)
        limit = None if env.spec is None else env.spec.max_episode_steps
        if limit is None:  # some environments have a limit of their own
            limit = getattr(env.unwrapped, "max_episode_steps", getattr(env.unwrapped, "max_steps", None))
    finally:
        env.close()
    if not isinstance(observation_space, Box):
        raise UserError(
            f"environment {environment.env_id}: observations must be Box, not {observation_space}"
        )
    if not isinstance(action_space, Box):
        raise UserError(f"environment {environment.env_id}: actions must be Box, not {action_space}")
    return EnvironmentFacts(
        math.prod(observation_space.shape), action_space, limit if isinstance(limit, int) else None
    )


def check_environment(
    environment: EnvironmentSpec, observation_dim: int, action_dim: int
) -> EnvironmentFacts:
    """Check that the data's dimensions are the environment's, and return what is known of that.

    Raises:
        EnvironmentUnavailable: it cannot be made.
        UserError: they differ, or see :func:`environment_facts`.
    """
    facts = environment_facts(environment)
    if (observation_dim, action_dim) != (facts.observation_dim, facts.action_dim):
        raise UserError(
            f"environment {environment.env_id} has observations of {facts.observation_dim} and actions of "
            f"{facts.action_dim} numbers, the data {observation_dim} and {action_dim}: "
            "give the environment that the data is from"
        )
    return facts
