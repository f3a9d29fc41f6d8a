"""Running at a speed that was shown at the beginning alone: Gymnasium's planar robots with a cue.

A run-up separates the cue from what it decides, since a robot that already runs at the right speed needs no
memory of it: the gait is one.
"""

from dataclasses import dataclass

import numpy as np

from flowrl.envs.robot_task import ENV_IDS, RobotTask, RobotTaskVectorEnv

CUE_TIMESTEPS = 10  # at whose observations the target is shown
RUN_UP = 100  # timesteps before the target speed should be taken up
SPEED_TIMESTEPS = 50  # over which speed is averaged: longer than a stride


@dataclass(frozen=True)
class Speeds:
    """A robot's target speeds in m/s, rising, and the distance from them that is worth nothing."""

    targets: tuple[float, ...]
    tolerance: float


# The targets are what policies that ship with flowrl run at after the run-up; see flowrl.data.embedded.
SPEEDS = {
    "halfcheetah": Speeds((3.5, 7.7, 11.5), 4.0),
    "walker2d": Speeds((2.5, 3.5), 1.0),
    "hopper": Speeds((2.3, 2.6), 0.4),
}
CUED_IDS = {robot: f"flowrl/{env_id.removesuffix('-v5')}Cued-v0" for robot, env_id in ENV_IDS.items()}


class CuedSpeed(RobotTask):
    """Run at the target speed that the first ten observations show, from timestep 150 to the end at 400.

    Observation: the robot's own, then the target speed from -1, the slowest, to 1, the fastest (0 after
    timestep 9), whether it is shown, and whether the run-up of 100 timesteps is over. Reward: from timestep
    150 on, 1 - |speed - target| / tolerance, at least 0, where speed is that of the last 50 timesteps; 0
    before. The robot's own rewards do not count; an unhealthy one ends the episode as in its own environment.
    """

    def __init__(self, robot: str = "halfcheetah", render_mode: str | None = None) -> None:
        super().__init__(CuedSpeedVectorEnv(1, robot), render_mode)


class CuedSpeedVectorEnv(RobotTaskVectorEnv):
    """``num_envs`` robots with cues; each is what :class:`CuedSpeed` is alone."""

    max_episode_steps = 400

    def __init__(self, num_envs: int, robot: str = "halfcheetah") -> None:
        super().__init__(num_envs, robot, added=3)
        self._speeds = SPEEDS[robot]
        self._variant_count = len(self._speeds.targets)
        self._positions = np.zeros((num_envs, SPEED_TIMESTEPS))  # of the last timesteps

    def behavior_actions(self, opening: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The opening policy's actions in the run-up, then the other's."""
        return np.where(self._timesteps[:, None] < RUN_UP, opening, actions)

    @property
    def _targets(self) -> np.ndarray:
        return np.array(self._speeds.targets)[self._variants]

    def _advance(self, running: np.ndarray, actions: np.ndarray) -> np.ndarray:
        self._envs.still(~running)
        _, _, self._terminated, _, _ = self._envs.step(actions)
        self._truncated = self._timesteps >= self.max_episode_steps
        slots, places = np.flatnonzero(running), self._timesteps[running] % SPEED_TIMESTEPS
        positions = self._envs.x[running]
        speeds = (positions - self._positions[slots, places]) / (SPEED_TIMESTEPS * self._envs.dt)
        self._positions[slots, places] = positions
        self._observe()
        nearness = np.maximum(0.0, 1 - np.abs(speeds - self._targets[running]) / self._speeds.tolerance)
        return np.where(self._timesteps[running] >= RUN_UP + SPEED_TIMESTEPS, nearness, 0.0)

    def _observe(self) -> None:
        """The robots' own, then their target speed, whether it is shown, and whether it counts."""
        shown, counts = self._timesteps < CUE_TIMESTEPS, self._timesteps >= RUN_UP
        slowest, fastest = self._speeds.targets[0], self._speeds.targets[-1]
        speeds = 2 * (self._targets - slowest) / (fastest - slowest) - 1  # in m/s they hardly differ
        self.observations = np.column_stack((self._envs.observations, speeds * shown, shown, counts))
