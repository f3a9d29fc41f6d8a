"""Robots with one actuator wired the wrong way round, which no observation shows.

The fault is seen in a short trial, whose motions do not count. The robot is then switched off and put back on
the start line before the run that counts, for longer than a window of 20 timesteps: without the pause such a
window would still hold the trial.
"""

from typing import Any

import numpy as np

from flowrl.envs.robot_task import ENV_IDS, RobotTask, RobotTaskVectorEnv

TRIAL = 20  # timesteps
START = 50  # timestep at which the run begins
HIDDEN_IDS = {robot: f"flowrl/{env_id.removesuffix('-v5')}Hidden-v0" for robot, env_id in ENV_IDS.items()}


class HiddenDynamics(RobotTask):
    """Run with one of the actuators reversed, or none: a world that is drawn at every reset.

    World 0 is the robot as built; in world k > 0 the action's component k - 1 acts with the opposite sign.
    Which one it is, ``info["world"]``, is in no observation.

    Timesteps 0 to 19 are the trial; a fall ends its motion. From 20 to 49 the robot is off: actions do
    nothing, and observations are zeros. At 50 it is at the start again, until 300 timesteps are over or, as
    in its own environment, it falls. Observation: the robot's own, then whether it is the run. Reward: the
    robot's own in the run, 0 before.
    """

    def __init__(self, robot: str = "halfcheetah", render_mode: str | None = None) -> None:
        super().__init__(HiddenDynamicsVectorEnv(1, robot), render_mode)


class HiddenDynamicsVectorEnv(RobotTaskVectorEnv):
    """``num_envs`` robots, each what :class:`HiddenDynamics` is alone; info holds (num_envs,) worlds."""

    max_episode_steps = 300

    def __init__(self, num_envs: int, robot: str = "halfcheetah") -> None:
        super().__init__(num_envs, robot, added=1)
        assert self.single_action_space.shape is not None
        signs = np.eye(self.single_action_space.shape[0], dtype=np.float32)
        # The sign of each actuator in each world, (1 + action_dim, action_dim).
        self._wirings = np.concatenate((np.ones_like(signs[:1]), 1 - 2 * signs))
        self._variant_count = len(self._wirings)

    def behavior_actions(self, opening: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The opening policy's in the trial, none while off, then the other's with the wiring made good."""
        timesteps = self._timesteps[:, None]
        made_good = actions * self._wirings[self._variants]
        return np.where(timesteps < TRIAL, opening, np.where(timesteps < START, 0, made_good))

    def _advance(self, running: np.ndarray, actions: np.ndarray) -> np.ndarray:
        timesteps = self._timesteps - 1  # at which the actions are taken
        in_run = running & (timesteps >= START)
        self._envs.still(~in_run & (timesteps >= TRIAL))
        _, rewards, fallen, _, _ = self._envs.step(actions * self._wirings[self._variants])
        at_start = running & (self._timesteps == START)
        if at_start.any():
            self._envs.reset(options={"reset_mask": at_start})
        self._terminated[in_run] = fallen[in_run]
        self._truncated = self._timesteps >= self.max_episode_steps
        self._observe()
        return (rewards * in_run)[running]

    def _observe(self) -> None:
        """The robots' own, zeros while they are off, then whether it is the run."""
        in_run = self._timesteps >= START
        is_on = in_run | (self._timesteps < TRIAL)
        self.observations = np.column_stack((self._envs.observations * is_on[:, None], in_run))

    def _info(self) -> dict[str, Any]:
        return {"world": self._variants.copy()}
