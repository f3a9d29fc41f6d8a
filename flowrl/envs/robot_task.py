"""What flowrl's own tasks on Gymnasium's robots have in common, one and many at once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

from flowrl.envs.mujoco_vector import MujocoVectorEnv
from flowrl.envs.slots import OneSlot, SlotVectorEnv
from flowrl.errors import UserError

ENV_IDS = {"halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5", "hopper": "Hopper-v5"}


class RobotTask(OneSlot):
    """A single robot, drawn as Gymnasium draws it."""

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array", "depth_array"]}  # noqa: RUF012

    def __init__(self, envs: "RobotTaskVectorEnv", render_mode: str | None) -> None:
        super().__init__(envs, envs.max_episode_steps)
        self._env_id, self._simulation = ENV_IDS[envs.robot], envs.simulations[0]
        self.render_mode = render_mode

    @cached_property
    def mujoco_renderer(self) -> Any:
        """What Gymnasium draws the robot with."""
        plain: Any = gym.make(self._env_id, disable_env_checker=True, render_mode=self.render_mode).unwrapped
        plain.mujoco_renderer.data = self._simulation
        return plain.mujoco_renderer

    def render(self) -> Any:
        return self.mujoco_renderer.render(self.render_mode)

    def close(self) -> None:
        if "mujoco_renderer" in vars(self):
            self.mujoco_renderer.close()
        super().close()


class RobotTaskVectorEnv(SlotVectorEnv):
    """``num_envs`` robots on all cores, each with a variant of the task that is drawn at every reset."""

    max_episode_steps: int
    _variant_count: int

    def __init__(self, num_envs: int, robot: str, added: int) -> None:
        """``added`` numbers follow the robot's own in its observations.

        Raises:
            UserError: a robot that is not in :data:`ENV_IDS`.
        """
        if robot not in ENV_IDS:
            raise UserError(f"no robot {robot!r}; known: {', '.join(ENV_IDS)}")
        self._envs = MujocoVectorEnv(gym.make(ENV_IDS[robot], disable_env_checker=True), num_envs)
        self.robot, self.simulations = robot, self._envs.simulations
        own = self._envs.single_observation_space
        assert isinstance(own, Box)
        observation_space = Box(-np.inf, np.inf, (own.shape[0] + added,), np.float64)
        super().__init__(num_envs, observation_space, self._envs.single_action_space, self._envs.metadata)
        self._variants = np.zeros(num_envs, dtype=np.int64)

    def close_extras(self, **kwargs: Any) -> None:
        self._envs.close()

    def _start(self, mask: np.ndarray, seeds: Sequence[int | None]) -> None:
        self._envs.reset(seed=seeds, options={"reset_mask": mask})  # their generators are other ones
        for slot in np.flatnonzero(mask).tolist():
            self._variants[slot] = self._generators[slot].integers(self._variant_count)
        self._observe()

    def _observe(self) -> None:
        """Write observations from the robots' own."""
        raise NotImplementedError
