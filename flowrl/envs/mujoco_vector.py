"""Gymnasium's planar robots and Ant, many at once, with their physics on all cores.

Every slot has its own ``mujoco.MjData`` and takes the very ``mj_step`` calls that Gymnasium's environment
makes, so states agree bit for bit. The calls release Python's lock, so a few threads keep every core busy;
rewards, terminations and observations are then computed for all slots at once. (``mujoco.rollout`` moves
states instead of keeping them and does not return the solver's warm start, without which the next step
differs in its last digits.)

MuJoCo times the stages of each step, a fifth of what Hopper's takes; :func:`stop_timers` disables that.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np

from flowrl.envs.slots import SlotVectorEnv
from flowrl.machine import available_cores

SLOTS_PER_THREAD = 4  # fewer are stepped faster than another thread is woken


def _hopper_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    state = np.concatenate([qpos, qvel], axis=1)[:, 2:]
    upright = (qpos[:, 1] > 0.7) & (np.abs(qpos[:, 2]) < 0.2)
    return upright & (np.abs(state) < 100).all(axis=1)


def _walker_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    return (qpos[:, 1] > 0.8) & (qpos[:, 1] < 2.0) & (np.abs(qpos[:, 2]) < 1.0)


def _ant_healthy(qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    finite = np.isfinite(qpos).all(axis=1) & np.isfinite(qvel).all(axis=1)
    return finite & (qpos[:, 2] >= 0.2) & (qpos[:, 2] <= 1.0)


@dataclass(frozen=True)
class _Task:
    """What a Gymnasium environment adds to its physics; the values are its defaults."""

    control_cost_weight: float
    reset_noise_scale: float
    gaussian_velocity_noise: bool
    """Initial velocities are disturbed by a normal distribution, otherwise a uniform one."""
    healthy: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """From qpos (slots, nq) and qvel (slots, nv) whether each is healthy; None: it always is."""
    pays_when_unhealthy: bool = False
    """The -v4 environments pay the healthy reward in the terminal step too."""
    hidden_positions: int = 1
    """Leading entries of qpos that the observation leaves out."""
    velocity_limit: float = np.inf
    """Velocities are clipped to it in observations."""
    tracks_body: bool = False
    """Speed is that of the first body, as MuJoCo last computed it, instead of the first joint's."""
    contact_cost_weight: float | None = None
    """Contact forces are observed and cost."""


_TASKS = {
    "Hopper-v4": _Task(1e-3, 5e-3, False, _hopper_healthy, pays_when_unhealthy=True, velocity_limit=10),
    "Hopper-v5": _Task(1e-3, 5e-3, False, _hopper_healthy, velocity_limit=10),
    "Walker2d-v4": _Task(1e-3, 5e-3, False, _walker_healthy, pays_when_unhealthy=True, velocity_limit=10),
    "Walker2d-v5": _Task(1e-3, 5e-3, False, _walker_healthy, velocity_limit=10),
    "HalfCheetah-v4": _Task(0.1, 0.1, True),
    "HalfCheetah-v5": _Task(0.1, 0.1, True),
    "Ant-v4": _Task(
        0.5, 0.1, True, _ant_healthy, pays_when_unhealthy=True, hidden_positions=2, tracks_body=True
    ),
    "Ant-v5": _Task(
        0.5, 0.1, True, _ant_healthy, hidden_positions=2, tracks_body=True, contact_cost_weight=5e-4
    ),
}
MUJOCO_VECTOR_IDS = frozenset(_TASKS)


class MujocoVectorEnv(SlotVectorEnv):
    """``num_envs`` copies of one of :data:`MUJOCO_VECTOR_IDS` whose finished slots stay still.

    Observations, rewards, flags, reset noise and seeds are those of Gymnasium's single environment with
    default arguments; the info dictionaries are empty. See :func:`flowrl.envs.vector.make_vector_env` for
    what ``step`` and ``reset`` promise.
    """

    def __init__(self, template: gym.Env, num_envs: int) -> None:
        """``template`` is one such environment; its model, spaces and time limit are used."""
        base: Any = template.unwrapped
        if template.spec is None:
            raise ValueError("the template must come from gymnasium.make")
        self._task = _TASKS[template.spec.id]
        self._max_episode_steps = template.spec.max_episode_steps or np.inf
        self._model, self._frame_skip = base.model, base.frame_skip
        self.dt: float = base.dt  # seconds of an environment step
        self._init_qpos, self._init_qvel = base.init_qpos, base.init_qvel
        super().__init__(num_envs, template.observation_space, template.action_space, template.metadata)
        template.close()

        self.simulations = [mujoco.MjData(self._model) for _ in range(num_envs)]
        # Views into each slot's simulation, made once: MjData makes a new one at every access.
        self._qpos = [data.qpos for data in self.simulations]
        self._qvel = [data.qvel for data in self.simulations]
        self._ctrl = [data.ctrl for data in self.simulations]
        self._body = [data.xpos[1] for data in self.simulations]
        self._forces = [data.cfrc_ext for data in self.simulations]

        self.x = np.zeros(num_envs)  # position along the track that speed is computed from, m
        self._threads = max(1, min(available_cores(), num_envs // SLOTS_PER_THREAD))
        self._pool = ThreadPoolExecutor(self._threads)

    def still(self, slots: np.ndarray) -> None:
        """End the episodes of these slots, a (num_envs,) bool mask: they are stepped no more."""
        self._truncated |= slots & ~self._terminated

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _start(self, mask: np.ndarray, seeds: Sequence[int | None]) -> None:
        scale, model, slots = self._task.reset_noise_scale, self._model, np.flatnonzero(mask)
        for slot in slots.tolist():
            generator = self._generators[slot]
            mujoco.mj_resetData(model, self.simulations[slot])
            self._qpos[slot][:] = self._init_qpos + generator.uniform(-scale, scale, model.nq)
            if self._task.gaussian_velocity_noise:
                self._qvel[slot][:] = self._init_qvel + scale * generator.standard_normal(model.nv)
            else:
                self._qvel[slot][:] = self._init_qvel + generator.uniform(-scale, scale, model.nv)
            mujoco.mj_forward(model, self.simulations[slot])
        self._observe(slots)

    def _advance(self, running: np.ndarray, actions: np.ndarray) -> np.ndarray:
        task, slots = self._task, np.flatnonzero(running)
        x_before = self.x[slots]
        self._simulate(slots, actions)
        qpos, qvel = self._observe(slots)
        gains = (self.x[slots] - x_before) / self.dt
        # In the actions' own precision, as Gymnasium computes it.
        costs = task.control_cost_weight * np.square(actions[slots]).sum(axis=1)
        if task.contact_cost_weight is not None:
            costs = costs + task.contact_cost_weight * np.square(self._contact_forces(slots)).sum(axis=1)
        if task.healthy is not None:
            healthy = task.healthy(qpos, qvel)
            gains = gains + (healthy | task.pays_when_unhealthy)
            self._terminated[slots] = ~healthy
        self._truncated[slots] = self._timesteps[slots] >= self._max_episode_steps
        return gains - costs

    def _simulate(self, slots: np.ndarray, actions: np.ndarray) -> None:
        """Advance the physics of these slots by one environment step, on as many threads as pay off."""
        threads = max(1, min(self._threads, len(slots) // SLOTS_PER_THREAD))
        # One iterator for all threads: each takes the next slot when it is done with its last one.
        remaining = iter(slots.tolist())
        others = [self._pool.submit(self._simulate_each, remaining, actions) for _ in range(threads - 1)]
        self._simulate_each(remaining, actions)
        for other in others:
            other.result()

    def _simulate_each(self, slots: Iterator[int], actions: np.ndarray) -> None:
        for slot in slots:
            self._ctrl[slot][:] = actions[slot]
            mujoco.mj_step(self._model, self.simulations[slot], self._frame_skip)
            if self._task.contact_cost_weight is not None:
                mujoco.mj_rnePostConstraint(self._model, self.simulations[slot])  # computes cfrc_ext

    def _observe(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Update observations and positions of these slots; return their qpos and qvel."""
        task, chosen = self._task, slots.tolist()
        qpos = np.array([self._qpos[slot] for slot in chosen])  # (slots, nq)
        qvel = np.array([self._qvel[slot] for slot in chosen])  # (slots, nv)
        self.x[slots] = [self._body[slot][0] for slot in chosen] if task.tracks_body else qpos[:, 0]
        parts = [qpos[:, task.hidden_positions :], np.clip(qvel, -task.velocity_limit, task.velocity_limit)]
        if task.contact_cost_weight is not None:
            parts.append(self._contact_forces(slots)[:, 6:])  # without the world's
        self.observations[slots] = np.concatenate(parts, axis=1)
        return qpos, qvel

    def _contact_forces(self, slots: np.ndarray) -> np.ndarray:
        """Return the clipped external forces on all bodies, (slots, bodies * 6)."""
        forces = np.array([self._forces[slot] for slot in slots.tolist()])
        return np.clip(forces, -1.0, 1.0).reshape(len(slots), -1)


@cache
def stop_timers() -> None:
    """Disable MuJoCo's internal timers for the whole process, unless ``mujoco.set_mjcb_time`` set one.

    ``MjData.timer`` then stays as it is.
    """
    if mujoco.get_mjcb_time() is not None:
        return
    for path in Path(mujoco.__file__).parent.glob("libmujoco.*"):
        try:
            ctypes.c_void_p.in_dll(ctypes.CDLL(str(path)), "mjcb_time").value = None
        except (OSError, ValueError):  # the timers stay on
            continue
