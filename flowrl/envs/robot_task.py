"""What flowrl's own tasks on Gymnasium's robots have in common, one and many at once."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from flowrl.envs.mujoco_vector import MujocoVectorEnv
from flowrl.envs.slots import SlotGenerators
from flowrl.errors import UserError

ENV_IDS = {"halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5", "hopper": "Hopper-v5"}


class RobotTask(gym.Env[np.ndarray, np.ndarray]):
    """A robot whose observations have ``added`` numbers after its own."""

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array", "depth_array"]}  # noqa: RUF012

    def __init__(self, robot: str, added: int, render_mode: str | None) -> None:
        """Raise UserError for a robot that is not in :data:`ENV_IDS`."""
        if robot not in ENV_IDS:
            raise UserError(f"no robot {robot!r}; known: {', '.join(ENV_IDS)}")
        self.robot, self.render_mode = robot, render_mode
        self._env: Any = gym.make(ENV_IDS[robot], disable_env_checker=True, render_mode=render_mode)
        self.metadata = self._env.metadata
        self.action_space, own = self._env.action_space, self._env.observation_space
        assert isinstance(own, Box)
        self.observation_space = Box(-np.inf, np.inf, (own.shape[0] + added,), np.float64)

    def render(self) -> Any:
        return self._env.render()

    @property
    def mujoco_renderer(self) -> Any:
        """What Gymnasium draws the robot with."""
        return self._env.unwrapped.mujoco_renderer

    def close(self) -> None:
        self._env.close()


class RobotTaskVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` robots, each with a variant of the task that is drawn at every reset.

    Their physics run on all cores. See :func:`flowrl.envs.vector.make_vector_env` for what ``step`` and
    ``reset`` promise.
    """

    def __init__(self, template: gym.Env, num_envs: int, variants: int, episode_timesteps: int) -> None:
        """``template`` is one such environment, whose robot is taken."""
        base: Any = template.unwrapped
        limit = None if template.spec is None else template.spec.max_episode_steps
        if limit != episode_timesteps:
            raise UserError(f"max_episode_steps {limit}: the episodes of this task have {episode_timesteps}")
        self.robot: str = base.robot
        own = gym.make(ENV_IDS[self.robot], disable_env_checker=True)
        self._envs = MujocoVectorEnv(own, num_envs)
        self._variant_count = variants
        self.num_envs = num_envs
        self.metadata = self._envs.metadata
        self.single_observation_space = template.observation_space
        self.single_action_space = template.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = SlotGenerators(num_envs)
        self._variants = np.zeros(num_envs, dtype=np.int64)
        self._timesteps = np.zeros(num_envs, dtype=np.int64)
        self._finished = np.zeros((2, num_envs), dtype=bool)  # terminated, truncated
        template.close()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every slot anew, or those of ``options["reset_mask"]``; see :class:`MujocoVectorEnv`."""
        own, _ = self._envs.reset(seed=seed, options=options)
        slots, generators = self._generators.reset(seed, options)
        self._variants[slots] = [generator.integers(self._variant_count) for generator in generators]
        self._timesteps[slots], self._finished[:, slots] = 0, False
        return self._observe(own), self._info()

    def behavior_actions(self, opening: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """What is done in data, (num_envs, action_dim), from the actions of two policies.

        ``opening`` are those of the policy of every episode's beginning, ``actions`` those of the other.
        """
        raise NotImplementedError

    def close_extras(self, **kwargs: Any) -> None:
        self._envs.close()

    def _observe(self, own: np.ndarray) -> np.ndarray:
        """Observations from the robots' own."""
        raise NotImplementedError

    def _info(self) -> dict[str, Any]:
        return {}
