"""Vector environments of flowrl's own: slots with a random generator each, and one slot taken alone."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Space
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class SlotVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """``num_envs`` slots, reseeded as Gymnasium's environments are, which stay still after their episode.

    See :func:`flowrl.envs.vector.make_vector_env` for what ``step`` and ``reset`` promise. A subclass's
    ``_start`` and ``_advance`` write ``observations``, and ``_advance`` sets ``_terminated`` and
    ``_truncated``.
    """

    def __init__(
        self, num_envs: int, observation_space: Space[Any], action_space: Space[Any], metadata: dict[str, Any]
    ) -> None:
        """The spaces and ``metadata`` are those of one slot."""
        self.num_envs = num_envs
        self.metadata = {**metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        assert self.observation_space.shape is not None
        self.observations = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        self._generators = [seeding.np_random()[0] for _ in range(num_envs)]
        self._timesteps = np.zeros(num_envs, dtype=np.int64)  # taken in the episode
        self._terminated = np.zeros(num_envs, dtype=bool)
        self._truncated = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start every slot anew, or those of ``options["reset_mask"]``, (num_envs,) bool.

        ``seed`` is one seed per slot, or one number for slot 0 with the following ones for the others;
        without one a slot keeps its generator.

        Raises:
            ValueError: another number of seeds, or a mask of another shape.
        """
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + slot for slot in range(self.num_envs)]
        else:
            seeds = list(seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if len(seeds) != self.num_envs or mask.shape != (self.num_envs,):
            raise ValueError(f"expected {self.num_envs} seeds and a mask of that length")
        for slot in np.flatnonzero(mask).tolist():
            own = seeds[slot]
            if own is not None:
                self._generators[slot] = seeding.np_random(int(own))[0]
        self._timesteps[mask] = 0
        self._terminated[mask] = self._truncated[mask] = False
        self._start(mask, seeds)
        return self.observations.copy(), self._info()

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the slots that are in an episode; the actions (num_envs, ...) of others are ignored."""
        running = ~(self._terminated | self._truncated)
        rewards = np.zeros(self.num_envs)
        if running.any():
            self._timesteps[running] += 1
            rewards[running] = self._advance(running, actions)
        ended = (self._terminated.copy(), self._truncated.copy())
        return self.observations.copy(), rewards, *ended, self._info()

    def _start(self, mask: np.ndarray, seeds: Sequence[int | None]) -> None:
        """Begin an episode in these slots, (num_envs,) bool, whose generators have these seeds already."""
        raise NotImplementedError

    def _advance(self, running: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Step the slots that are running, (num_envs,) bool; return their rewards, (running,)."""
        raise NotImplementedError

    def _info(self) -> dict[str, Any]:
        return {}


class OneSlot(gym.Env[np.ndarray, np.ndarray]):
    """A vector environment of one slot as a single environment."""

    def __init__(self, envs: VectorEnv[np.ndarray, np.ndarray, np.ndarray], max_episode_steps: int) -> None:
        """``max_episode_steps`` are those after which its episodes end by themselves."""
        self._envs, self.max_episode_steps = envs, max_episode_steps
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space
        self.metadata = {**type(self).metadata, **envs.metadata}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        observations, info = self._envs.reset(seed=seed)
        return observations[0], {name: values[0] for name, values in info.items()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observations, rewards, *ended, info = self._envs.step(np.asarray(action)[None])
        terminated, truncated = (bool(flags[0]) for flags in ended)
        one_info = {name: values[0] for name, values in info.items()}
        return observations[0], float(rewards[0]), terminated, truncated, one_info

    def close(self) -> None:
        self._envs.close()
