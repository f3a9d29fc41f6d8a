"""A task of flowrl's own on one of Gymnasium's robots, many at once: what such tasks have in common."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space

from flowrl.envs.mujoco_vector import MujocoVectorEnv
from flowrl.errors import UserError


class RobotTaskVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` robots, each with a variant of the task that is drawn at every reset.

    Their physics run on all cores. See :func:`flowrl.envs.vector.make_vector_env` for what ``step`` and
    ``reset`` promise.
    """

    def __init__(
        self, template: gym.Env, num_envs: int, env_id: str, variants: int, episode_timesteps: int
    ) -> None:
        """``template`` is one such environment, ``env_id`` the robot's own."""
        limit = None if template.spec is None else template.spec.max_episode_steps
        if limit != episode_timesteps:
            raise UserError(
                f"max_episode_steps {limit}: this task's episodes have {episode_timesteps} timesteps"
            )
        self._envs = MujocoVectorEnv(gym.make(env_id, disable_env_checker=True), num_envs)
        self._variant_count = variants
        self.num_envs = num_envs
        self.metadata = self._envs.metadata
        self.single_observation_space = template.observation_space
        self.single_action_space = template.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._variants = np.zeros(num_envs, dtype=np.int64)
        self._timesteps = np.zeros(num_envs, dtype=np.int64)
        self._finished = np.zeros((2, num_envs), dtype=bool)  # terminated, truncated
        template.close()

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every slot anew, or those of ``options["reset_mask"]``; see :class:`MujocoVectorEnv`."""
        own, _ = self._envs.reset(seed=seed, options=options)
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + slot for slot in range(self.num_envs)]
        else:
            seeds = list(seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        for slot in np.flatnonzero(mask).tolist():
            generator = self._generators[slot]
            if seeds[slot] is not None or generator is None:
                generator = self._generators[slot] = seeding.np_random(seeds[slot])[0]
            self._variants[slot] = generator.integers(self._variant_count)
        self._timesteps[mask], self._finished[:, mask] = 0, False
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
