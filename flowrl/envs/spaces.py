"""What data must fit: an environment's observation and action spaces, and its time limit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple, flatdim

from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import as_choices, make_plain_env
from flowrl.errors import UserError

_LARGEST_BOUND = 1e6  # beyond it a bound stands for none, as in Box(float32.min, float32.max)
_SMALLEST_IMAGE = 1024  # bytes; what is smaller, such as MiniGrid's grids of 7 by 7, is taken as numbers


@dataclass(frozen=True)
class EnvironmentFacts:
    """Of one environment as it is evaluated in, its observations flattened."""

    observation_space: Space[Any]  # before it is flattened, without text
    action_space: Space[Any]
    max_episode_steps: int | None
    """None: it has no time limit."""
    left_out: tuple[str, ...] = ()
    """Names of the text in its observations."""

    @property
    def observation_dim(self) -> int:
        return flatdim(self.observation_space)

    @property
    def action_dim(self) -> int:
        """Numbers of an action; of a discrete one, of its one-hot vectors."""
        return sum(self.action_choices) or math.prod(self.action_space.shape or ())

    @property
    def action_choices(self) -> tuple[int, ...]:
        return choices_of(self.action_space)

    @property
    def action_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and highest actions, float32 (action_dim,); infinite where there is no bound.

        One-hot vectors are between -1 and 1.
        """
        if not isinstance(self.action_space, Box):
            highest = np.ones(self.action_dim, dtype=np.float32)
            return -highest, highest
        low = self.action_space.low.astype(np.float32).ravel()
        high = self.action_space.high.astype(np.float32).ravel()
        return np.where(low < -_LARGEST_BOUND, -np.inf, low), np.where(high > _LARGEST_BOUND, np.inf, high)


def choices_of(space: Space[Any] | None) -> tuple[int, ...]:
    """Return the numbers of choices of a Discrete or MultiDiscrete space's components, none for others."""
    if isinstance(space, Discrete):
        return (int(space.n),)
    return tuple(space.nvec.ravel().tolist()) if isinstance(space, MultiDiscrete) else ()


def check_spaces(where: str, observation_space: Space[Any], action_space: Space[Any]) -> None:
    """Raise UserError unless an agent can observe and act in these spaces."""
    _check_observed(where, "observations", observation_space)
    if not isinstance(action_space, Box | Discrete | MultiDiscrete):
        raise UserError(
            f"{where}: actions must be Box, Discrete, MultiDiscrete or MultiBinary, not {action_space}"
        )


def _check_observed(where: str, name: str, space: Space[Any]) -> None:
    if isinstance(space, Dict | Tuple):
        for key, part in _parts(space):
            _check_observed(where, str(key), part)
    elif not isinstance(space, Box | Discrete | MultiDiscrete | MultiBinary):
        raise UserError(f"{where}: '{name}' must be numbers or choices, not {space}")
    elif isinstance(space, Box) and _is_image(space):
        raise UserError(
            f"{where}: '{name}' are images of shape {space.shape}: there is no encoder for images here, "
            "give data and an environment of vectors"
        )


def _is_image(space: Box) -> bool:
    return space.dtype == np.uint8 and len(space.shape) > 1 and math.prod(space.shape) >= _SMALLEST_IMAGE


def _parts(space: Dict | Tuple) -> Iterable[tuple[Any, Space[Any]]]:
    return space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)


def flat_rows(where: str, name: str, space: Space[Any], values: Any, rows: int) -> np.ndarray:
    """Flatten the values of ``rows`` timesteps as Gymnasium flattens each: (rows, flatdim(space)).

    Choices become one-hot vectors. ``where`` and ``name`` are for messages.

    Raises:
        UserError: a shape other than the space's, what is not a number, or a choice that there is not.
    """
    if isinstance(space, Dict | Tuple):
        parts = [flat_rows(where, f"{name}/{key}", part, values[key], rows) for key, part in _parts(space)]
        return np.concatenate(parts, axis=1)
    values = np.asarray(values)
    expected = (rows, *(space.shape or ()))
    if values.dtype.kind not in "fiub":
        raise UserError(f"{where}: '{name}' must hold numbers, not {values.dtype}")
    if values.shape != expected:
        raise UserError(f"{where}: '{name}' has shape {values.shape}, expected {expected}")
    values = values.reshape(rows, -1)
    if isinstance(space, Discrete | MultiDiscrete):
        return one_hot(where, name, values, choices_of(space), np.ravel(space.start))
    return values


def one_hot(
    where: str, name: str, values: np.ndarray, choices: tuple[int, ...], starts: np.ndarray | int = 0
) -> np.ndarray:
    """(rows, len(choices)) numbers from ``starts`` -> (rows, sum(choices)) float32; see :func:`flat_rows`."""
    counted = values - starts
    wrong = ~((counted >= 0) & (counted < choices) & (counted == np.floor(counted)))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        value, start = values[row, column], (values - counted)[row, column]
        raise UserError(
            f"{where}: '{name}' holds {value:g}, row {row}, column {column}: "
            f"choices are whole numbers from {start:g} to {start + choices[column] - 1:g}"
        )
    ends = np.cumsum(choices)
    result = np.zeros((len(values), int(ends[-1])), dtype=np.float32)
    np.put_along_axis(result, counted.astype(np.int64) + ends - choices, 1.0, axis=1)
    return result


def environment_facts(environment: EnvironmentSpec) -> EnvironmentFacts:
    """Make the environment once, as evaluation does, to read its spaces and its limit.

    Raises:
        EnvironmentUnavailable: it cannot be made.
        UserError: observations or actions that no agent here can have, such as images.
    """
    env = make_plain_env(environment)
    try:
        left_out = env.get_wrapper_attr("left_out") if env.has_wrapper_attr("left_out") else ()
        limit = None if env.spec is None else env.spec.max_episode_steps
        if limit is None:  # some environments have a limit of their own
            limit = getattr(env.unwrapped, "max_episode_steps", getattr(env.unwrapped, "max_steps", None))
    finally:
        env.close()
    action_space = as_choices(env.action_space)
    check_spaces(f"environment {environment.env_id}", env.observation_space, action_space)
    return EnvironmentFacts(
        env.observation_space, action_space, limit if isinstance(limit, int) else None, left_out
    )


def check_environment(
    environment: EnvironmentSpec, observation_dim: int, action_dim: int, action_choices: tuple[int, ...] = ()
) -> EnvironmentFacts:
    """Check that the data's dimensions are the environment's, and return what is known of that.

    Raises:
        EnvironmentUnavailable: it cannot be made.
        UserError: they differ, or see :func:`environment_facts`.
    """
    facts = environment_facts(environment)
    if action_choices != facts.action_choices:
        kinds = [f"choices of {c}" if c else "continuous" for c in (facts.action_choices, action_choices)]
        raise UserError(
            f"environment {environment.env_id} has actions that are {kinds[0]}, those of the data are "
            f"{kinds[1]}: give the environment that the data is from, in training too; files hold choices as "
            "numbers, a column each, not as one-hot vectors"
        )
    if (observation_dim, action_dim) != (facts.observation_dim, facts.action_dim):
        raise UserError(
            f"environment {environment.env_id} has observations of {facts.observation_dim} and actions of "
            f"{facts.action_dim} numbers, the data {observation_dim} and {action_dim}: "
            "give the environment that the data is from"
        )
    return facts
