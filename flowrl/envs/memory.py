"""Tasks that need a memory of the episode's first timestep, registered as ``flowrl/...``.

The T-Maze is a corridor: the cue is shown at the first timestep alone, the arm that it names must be chosen
at the last. Sources: Bakker, "Reinforcement Learning with Long Short-Term Memory" (2001); Ni et al., "When Do
Transformers Shine in RL?" (2023). Here the one action is continuous, and walking needs none.
"""

import re
from collections.abc import Sequence

import numpy as np
from gymnasium.spaces import Box

from flowrl.envs.slots import OneSlot, SlotVectorEnv
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError

TMAZE_ID = "flowrl/TMaze-v0"
SHORTEST, LONGEST = 2, 10_000_000
FEWEST_ARMS, MOST_ARMS = 2, 16
_NAME = re.compile(r"tmaze-(\d+)(?:-arms-(\d+))?(?:-distractors-(\d+))?")
_NOISE_BLOCK = 1024  # timesteps whose noise a slot draws together


class TMaze(OneSlot):
    """A corridor of ``length`` timesteps whose last one is a junction of ``arms`` arms.

    Observation, float32 in [-1, 1]: the cue, whether this is the junction, timestep / length, and noise.
    With two arms the cue is one number, -1 or 1; with more it is one-hot, as long as there are arms. It is
    zero after the first timestep, but for ``distractors`` timesteps in the middle: they show false cues.

    Action: one number in [-1, 1], where the arms lie evenly spaced; the nearest is taken at the junction, and
    before it actions do nothing. Reward: 1 at the end if that arm is the one of the cue, else 0.
    """

    def __init__(self, length: int = 500, arms: int = 2, distractors: int = 0) -> None:
        super().__init__(TMazeVectorEnv(1, length, arms, distractors), length)


class TMazeVectorEnv(SlotVectorEnv):
    """``num_envs`` T-Mazes in step; see :class:`TMaze`."""

    def __init__(self, num_envs: int, length: int = 500, arms: int = 2, distractors: int = 0) -> None:
        check_tmaze(length, arms, distractors)
        observation_space = Box(-1.0, 1.0, (cue_size(arms) + 3,), np.float32)
        super().__init__(num_envs, observation_space, Box(-1.0, 1.0, (1,), np.float32), {})
        self.length, self.arms, self.distractors = length, arms, distractors
        self._arm = np.zeros(num_envs, dtype=np.int64)
        self._false_cues: list[dict[int, int]] = [{}] * num_envs  # arms by the timestep that shows them
        self._noise = np.zeros((num_envs, _NOISE_BLOCK))

    def _start(self, mask: np.ndarray, seeds: Sequence[int | None]) -> None:
        slots = np.flatnonzero(mask)
        for slot in slots.tolist():
            generator = self._generators[slot]
            self._arm[slot] = generator.integers(self.arms)
            if self.distractors:
                timesteps = 1 + generator.choice(self.length - 2, self.distractors, replace=False)
                arms = generator.integers(self.arms, size=self.distractors)
                self._false_cues[slot] = dict(zip(timesteps.tolist(), arms.tolist(), strict=True))
        self._observe(slots)

    def _advance(self, running: np.ndarray, actions: np.ndarray) -> np.ndarray:
        places = (np.asarray(actions, dtype=np.float32)[:, 0].clip(-1, 1) + 1) / 2 * (self.arms - 1)
        right = np.floor(places + 0.5) == self._arm  # the nearest arm
        self._terminated = self._timesteps == self.length
        self.observations[self._terminated] = 0
        self._observe(np.flatnonzero(~self._terminated))
        return (self._terminated & right)[running]

    def _observe(self, slots: np.ndarray) -> None:
        """Write the observations of these slots, (slots,)."""
        timesteps, places = self._timesteps[slots], self._timesteps[slots] % _NOISE_BLOCK
        for slot in slots[places == 0].tolist():
            count = min(_NOISE_BLOCK, self.length - int(self._timesteps[slot]))
            self._noise[slot, :count] = self._generators[slot].uniform(-1, 1, count)
        observations = np.zeros((len(timesteps), self.observations.shape[1]), dtype=np.float32)
        first = timesteps == 0
        observations[first, :-3] = cue_vector(self._arm[slots][first], self.arms)
        if self.distractors:
            for row, slot in enumerate(slots.tolist()):
                shown = self._false_cues[slot].get(int(timesteps[row]))
                if shown is not None:
                    observations[row, :-3] = cue_vector(shown, self.arms)
        observations[:, -3] = timesteps == self.length - 1
        observations[:, -2] = timesteps / self.length
        observations[:, -1] = self._noise[slots, places]
        self.observations[slots] = observations


def tmaze_environment(name: str) -> EnvironmentSpec | None:
    """Return the T-Maze that ``--env`` calls ``tmaze-500``, or ``tmaze-500-arms-4-distractors-3``; else None.

    Raises:
        UserError: such a name with numbers that are out of range.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    length, arms, distractors = (int(number) for number in (match[1], match[2] or FEWEST_ARMS, match[3] or 0))
    check_tmaze(length, arms, distractors)
    return EnvironmentSpec(TMAZE_ID, {"length": length, "arms": arms, "distractors": distractors})


def check_tmaze(length: int, arms: int, distractors: int) -> None:
    """Raise a UserError that names the first argument out of range."""
    for name, value in (("length", length), ("arms", arms), ("distractors", distractors)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"T-Maze: {name} {value!r}: must be a whole number")
    middle = length - 2  # timesteps between the cue and the junction
    for name, value, lowest, highest in (
        ("length", length, SHORTEST, LONGEST),
        ("arms", arms, FEWEST_ARMS, MOST_ARMS),
        ("distractors", distractors, 0, middle),
    ):
        if not lowest <= value <= highest:
            raise UserError(f"T-Maze: {name} {value}: must be from {lowest} to {highest}")


def cue_size(arms: int) -> int:
    """Numbers in the cue: one for two arms, else one for each arm."""
    return 1 if arms == FEWEST_ARMS else arms


def cue_vector(arm: int | np.ndarray, arms: int) -> np.ndarray:
    """Return the cue of an arm, (..., cue_size(arms)) float32 for an array (...) of arms."""
    if arms == FEWEST_ARMS:
        return np.asarray(2 * np.asarray(arm) - 1, dtype=np.float32)[..., None]
    return np.eye(arms, dtype=np.float32)[arm]
