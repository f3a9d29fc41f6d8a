"""Gymnasium environments from a spec: one at a time, or many whose finished slots stay still."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import concatenate
from gymnasium.wrappers import FlattenObservation

from flowrl.envs.cued_speed import CUED_IDS, CuedSpeedVectorEnv
from flowrl.envs.hidden_dynamics import HIDDEN_IDS, HiddenDynamicsVectorEnv
from flowrl.envs.memory import TMAZE_ID, TMazeVectorEnv
from flowrl.envs.mujoco_vector import MUJOCO_VECTOR_IDS, MujocoVectorEnv
from flowrl.envs.slots import SlotVectorEnv
from flowrl.envs.specs import EnvironmentSpec, check_registered, import_modules
from flowrl.errors import UserError, one_line

# Recorded wrappers that are applied again. Others, such as those with running statistics, cannot be.
APPLICABLE_WRAPPERS = frozenset(
    (
        *("ClipAction", "RescaleAction", "StickyAction", "ClipReward", "TimeAwareObservation"),
        *("FlattenObservation", "FilterObservation", "RescaleObservation", "ReshapeObservation"),
        *("DtypeObservation", "DelayObservation", "FrameStackObservation"),
    )
)


_OWN_TASKS: dict[str, Callable[..., VectorEnv]] = {
    TMAZE_ID: TMazeVectorEnv,
    **dict.fromkeys(CUED_IDS.values(), CuedSpeedVectorEnv),
    **dict.fromkeys(HIDDEN_IDS.values(), HiddenDynamicsVectorEnv),
}


class EnvironmentUnavailable(UserError):
    """The environment cannot be made here."""


def make_env(environment: EnvironmentSpec, render_mode: str | None = None) -> gym.Env:
    """Make one environment with its wrappers, flat observations and the actions of :class:`FlatActions`.

    The modules of ``environment.imports`` are imported first. Observations other than a vector (Dict, Tuple,
    matrices, choices) are flattened as Gymnasium does it, Dict entries in the order of their keys, without
    those that are text.

    Raises:
        EnvironmentUnavailable: see :func:`make_plain_env`.
    """
    env = make_plain_env(environment, render_mode)
    if flat_actions(env.action_space) != env.action_space:
        env = FlatActions(env)
    if isinstance(env.observation_space, Box) and len(env.observation_space.shape) == 1:
        return env
    return FlattenObservation(env)


def make_plain_env(environment: EnvironmentSpec, render_mode: str | None = None) -> gym.Env:
    """Make one environment with its own actions and its own observations, but for text.

    Raises:
        EnvironmentUnavailable: an unregistered id, a missing dependency, arguments that the environment does
            not take, or a wrapper that cannot be applied.
    """
    rendering = {} if render_mode is None else {"render_mode": render_mode}
    try:
        import_modules(environment.imports)
        check_registered(environment.env_id)
        for name, arguments in environment.wrappers:
            if name not in APPLICABLE_WRAPPERS or arguments is None:
                raise UserError(f"it was recorded with the wrapper {name}, which cannot be applied here")
        with no_deprecations():
            env: gym.Env = gym.make(
                environment.env_id,
                max_episode_steps=environment.max_episode_steps,
                disable_env_checker=True,
                **environment.kwargs,
                **rendering,
            )
        for name, arguments in environment.wrappers:
            env = getattr(gym.wrappers, name)(env, **(arguments or {}))
    except Exception as error:  # an environment's constructor may raise anything
        raise EnvironmentUnavailable(
            f"environment {environment.env_id} cannot be made: {one_line(error)}"
        ) from error
    if text_keys(env.observation_space):
        env = WithoutText(env)
    return env


class FlatActions(gym.ActionWrapper[Any, Any, Any]):
    """Takes the actions that :meth:`flowrl.model.agent.Agent.act` returns, whatever the action space.

    Choices are counted from 0, in one row where there are several (Discrete, MultiDiscrete, MultiBinary);
    of a Box, the action is one row of float32 numbers, which are rounded where the space is of whole ones.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.action_space = flat_actions(env.action_space)

    def action(self, action: Any) -> Any:
        space: Any = self.env.action_space
        action = np.reshape(action, space.shape)
        if isinstance(space, Discrete | MultiDiscrete):
            action = action + space.start
        elif np.issubdtype(space.dtype, np.integer):
            action = np.rint(action)
        return action.astype(space.dtype)[()]


def flat_actions(space: gym.Space[Any]) -> gym.Space[Any]:
    """The space of what an agent returns for an action space; see :class:`FlatActions`."""
    space = as_choices(space)
    if isinstance(space, Discrete):
        return Discrete(space.n)
    if isinstance(space, MultiDiscrete):
        return Discrete(space.nvec.item()) if space.nvec.size == 1 else MultiDiscrete(space.nvec.ravel())
    if isinstance(space, Box) and (len(space.shape) != 1 or space.dtype != np.float32):
        return Box(space.low.ravel().astype(np.float32), space.high.ravel().astype(np.float32))
    return space


def as_choices(space: gym.Space[Any]) -> gym.Space[Any]:
    """Return a MultiBinary action space as a MultiDiscrete one, others as they are."""
    return MultiDiscrete(np.full(space.shape, 2)) if isinstance(space, MultiBinary) else space


class WithoutText(gym.ObservationWrapper[Any, Any, Any]):
    """Leaves text, such as MiniGrid's missions, out of Dict observations."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.left_out = text_keys(env.observation_space)
        self.observation_space = without_text(env.observation_space)

    def observation(self, observation: Any) -> Any:
        return {key: value for key, value in observation.items() if key not in self.left_out}


def text_keys(space: gym.Space[Any]) -> tuple[str, ...]:
    """The keys of a Dict space's text; none for other spaces."""
    parts = space.spaces.items() if isinstance(space, Dict) else ()
    return tuple(key for key, part in parts if part.dtype == np.dtype(str))


def without_text(space: gym.Space[Any]) -> gym.Space[Any]:
    """A Dict space without its text, in the same order; other spaces as they are."""
    left_out = text_keys(space)
    if not isinstance(space, Dict) or not left_out:
        return space
    return Dict([(key, part) for key, part in space.spaces.items() if key not in left_out])


def make_vector_env(environment: EnvironmentSpec, num_envs: int) -> VectorEnv:
    """Make ``num_envs`` copies of an environment whose slots stay still once their episode is over.

    The result follows Gymnasium's vector interface without autoreset. After a slot has terminated or
    was truncated, ``step`` ignores its action, does not touch its physics and returns the last observation,
    the same two flags and a reward of 0. ``reset(seed=[...])`` starts every slot anew;
    ``reset(seed=[...], options={"reset_mask": mask})``, ``mask`` (num_envs,) bool, only the chosen ones.

    Info dictionaries are dropped but for success: where the environments report it, ``step`` returns
    ``{"success": flags}``, (num_envs,) bool, set once an episode has succeeded; and for the hidden worlds of
    :mod:`flowrl.envs.hidden_dynamics`, ``{"world": worlds}``, (num_envs,) int.

    Gymnasium's planar robots and Ant with default arguments, and flowrl's tasks on them, run on all cores
    (:class:`flowrl.envs.mujoco_vector.MujocoVectorEnv`), T-Mazes as arrays
    (:class:`flowrl.envs.memory.TMazeVectorEnv`), everything else one after another.

    Raises:
        UserError: see :func:`make_env`.
    """
    if environment.env_id in _OWN_TASKS and not environment.wrappers:
        one = make_env(environment)
        one.close()
        assert one.spec is not None
        check_limit(environment, one.get_wrapper_attr("max_episode_steps"))
        return _OWN_TASKS[environment.env_id](num_envs, **one.spec.kwargs)
    if environment.env_id in MUJOCO_VECTOR_IDS and not environment.kwargs and not environment.wrappers:
        return MujocoVectorEnv(make_env(environment), num_envs)
    return StillVectorEnv(environment, num_envs)


def check_limit(environment: EnvironmentSpec, timesteps: int) -> None:
    """Raise a UserError if the time limit ends episodes of a task of flowrl's own before their reward."""
    limit = environment.max_episode_steps
    if limit is not None and limit < timesteps:
        raise UserError(
            f"environment {environment.env_id}: max_episode_steps {limit}: its episodes have {timesteps}"
        )


@contextmanager
def no_deprecations() -> Iterator[None]:
    """Keep quiet about what the user cannot change: old versions of environments and of robot models.

    D4RL's data belongs to the -v4 environments, and Gymnasium's HalfCheetah uses a compiler option that
    MuJoCo 4 deprecates, in lines on stderr and in a file MUJOCO_LOG.TXT, once per environment.
    """
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(
        lambda text: None if "deprecated" in text else warnings.warn(text, stacklevel=2)
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
            yield
    finally:
        mujoco.set_mju_user_warning(previous)


def reported_success(info: Any) -> bool | None:
    """Return whether a step's info reports success, None where it reports nothing about it.

    Read are ``success`` and ``is_success`` (Adroit, Fetch, mazes), and FrankaKitchen's
    ``tasks_to_complete``: success is that none is left.
    """
    if not isinstance(info, dict):
        return None
    if "tasks_to_complete" in info:
        return not info["tasks_to_complete"]
    value = info.get("success", info.get("is_success"))
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    return value > 0 if isinstance(value, bool | int | float) else None


class StillVectorEnv(SlotVectorEnv):
    """Copies of any environment, stepped one after another."""

    def __init__(self, environment: EnvironmentSpec, num_envs: int) -> None:
        self._envs = [make_env(environment) for _ in range(num_envs)]
        one = self._envs[0]
        super().__init__(num_envs, one.observation_space, one.action_space, one.metadata)
        self._last_observations: list[Any] = [None] * num_envs
        self._succeeded: list[bool | None] = [None] * num_envs  # in the episode; None: nothing was reported

    def close_extras(self, **kwargs: Any) -> None:
        for env in self._envs:
            env.close()

    def _start(self, mask: np.ndarray, seeds: Sequence[int | None]) -> None:
        for slot in np.flatnonzero(mask).tolist():
            self._last_observations[slot], _ = self._envs[slot].reset(seed=seeds[slot])
            self._succeeded[slot] = None
        concatenate(self.single_observation_space, self._last_observations, self.observations)

    def _advance(self, running: np.ndarray, actions: np.ndarray) -> np.ndarray:
        rewards = []
        for slot in np.flatnonzero(running).tolist():
            observation, reward, terminated, truncated, info = self._envs[slot].step(actions[slot])
            self._last_observations[slot] = observation
            self._terminated[slot], self._truncated[slot] = terminated, truncated
            rewards.append(np.asarray(reward, dtype=np.float64).item())
            reported = reported_success(info)
            if reported is not None:
                self._succeeded[slot] = reported or bool(self._succeeded[slot])
        concatenate(self.single_observation_space, self._last_observations, self.observations)
        return np.array(rewards)

    def _info(self) -> dict[str, Any]:
        reported = any(success is not None for success in self._succeeded)
        return {"success": np.array(self._succeeded, dtype=bool)} if reported else {}
