"""Running at a speed that was shown at the beginning alone: Gymnasium's planar robots with a cue.

A run-up separates the cue from what it decides, since a robot that already runs at the right speed needs no
memory of it: the gait is one.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from flowrl.envs.robot_task import ENV_IDS, RobotTask, RobotTaskVectorEnv

CUE_TIMESTEPS = 10  # at whose observations the target is shown
RUN_UP = 100  # timesteps before the target speed should be taken up
SPEED_TIMESTEPS = 50  # over which speed is averaged: longer than a stride
EPISODE_TIMESTEPS = 400
CUE_SIZE = 3


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
        super().__init__(robot, CUE_SIZE, render_mode)
        self._speeds = SPEEDS[robot]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        own, _ = self._env.reset(seed=seed)
        self._target = self._speeds.targets[int(self.np_random.integers(len(self._speeds.targets)))]
        self._timestep = 0
        self._positions = np.zeros(SPEED_TIMESTEPS)  # of the last timesteps, by timestep modulo their number
        return np.concatenate((own, cue_of(self._speeds, self._target, 0))), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        own, _, terminated, _, _ = self._env.step(action)
        self._timestep += 1
        place, position = self._timestep % SPEED_TIMESTEPS, self._env.unwrapped.data.qpos[0]
        speed = (position - self._positions[place]) / (SPEED_TIMESTEPS * self._env.unwrapped.dt)
        self._positions[place] = position
        reward = speed_reward(speed, self._target, self._timestep, self._speeds)
        truncated = self._timestep >= EPISODE_TIMESTEPS
        observation = np.concatenate((own, cue_of(self._speeds, self._target, self._timestep)))
        return observation, float(reward), terminated, truncated, {}


class CuedSpeedVectorEnv(RobotTaskVectorEnv):
    """``num_envs`` robots with cues; each is what :class:`CuedSpeed` is alone."""

    def __init__(self, template: gym.Env, num_envs: int) -> None:
        """``template`` is one such environment, whose robot is taken."""
        base: Any = template.unwrapped
        self._speeds = SPEEDS[base.robot]
        self._positions = np.zeros((num_envs, SPEED_TIMESTEPS))
        super().__init__(template, num_envs, len(self._speeds.targets), EPISODE_TIMESTEPS)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the slots whose episode is under way; the actions of others are ignored."""
        running = ~(self._finished[0] | self._finished[1])
        self._envs.still(~running)
        own, _, terminated, _, _ = self._envs.step(actions)
        self._timesteps[running] += 1
        slots, places = np.arange(self.num_envs), self._timesteps % SPEED_TIMESTEPS
        positions = self._envs.x
        speeds = (positions - self._positions[slots, places]) / (SPEED_TIMESTEPS * self._envs.dt)
        self._positions[slots[running], places[running]] = positions[running]
        rewards = np.where(running, speed_reward(speeds, self._targets, self._timesteps, self._speeds), 0.0)
        self._finished[:, running] = terminated[running], self._timesteps[running] >= EPISODE_TIMESTEPS
        return self._observe(own), rewards, *self._finished.copy(), {}

    def behavior_actions(self, opening: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The opening policy's actions in the run-up, then the other's."""
        return np.where(self._timesteps[:, None] < RUN_UP, opening, actions)

    @property
    def _targets(self) -> np.ndarray:
        return np.array(self._speeds.targets)[self._variants]

    def _observe(self, own: np.ndarray) -> np.ndarray:
        return np.concatenate((own, cue_of(self._speeds, self._targets, self._timesteps)), axis=1)


def cue_of(speeds: Speeds, target: float | np.ndarray, timestep: int | np.ndarray) -> np.ndarray:
    """The observation's last three, (..., 3): target speed, whether it is shown, whether it counts."""
    shown = np.asarray(timestep) < CUE_TIMESTEPS
    slowest, fastest = speeds.targets[0], speeds.targets[-1]
    speed = 2 * (target - slowest) / (fastest - slowest) - 1  # in m/s the targets of a robot hardly differ
    return np.stack((speed * shown, shown, np.asarray(timestep) >= RUN_UP), axis=-1).astype(np.float64)


def speed_reward(
    speed: float | np.ndarray, target: float | np.ndarray, timestep: int | np.ndarray, speeds: Speeds
) -> np.ndarray:
    """Return the reward of the step that led to ``timestep``, 0 to 1."""
    nearness = np.maximum(0.0, 1 - np.abs(speed - target) / speeds.tolerance)
    return np.where(np.asarray(timestep) >= RUN_UP + SPEED_TIMESTEPS, nearness, 0.0)
