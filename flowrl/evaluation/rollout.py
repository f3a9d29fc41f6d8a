"""One episode per slot, all slots in one batch: the loop behind every reported return."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from flowrl.envs.failures import named_failure
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_vector_env
from flowrl.errors import UserError


class BatchedAgent(Protocol):
    """An agent that acts in several environments at once, such as :class:`flowrl.model.agent.Agent`."""

    def reset(self, num_envs: int, target_return: float | np.ndarray) -> None:
        """Forget everything and get ready to act in ``num_envs`` slots with targets (num_envs,)."""

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Actions for observations (num_envs, observation_dim), a row each: in the bounds, or choices."""

    def keep(self, indices: np.ndarray) -> None:
        """Drop all slots but these, in this order."""


@dataclass(frozen=True)
class Rollouts:
    """The outcome of one episode per slot; every array is (slots,).

    ``returns`` are undiscounted sums in float64 of the rewards that the environment gave, ``lengths``
    count its steps, ``terminated`` is False where a time limit cut the episode. ``successes`` is whether an
    episode succeeded at any of its steps, ``worlds`` the hidden world that it was in; None where the
    environment does not report it.
    """

    returns: np.ndarray
    lengths: np.ndarray
    terminated: np.ndarray
    successes: np.ndarray | None
    worlds: np.ndarray | None = None


def rollout(
    agent: BatchedAgent,
    environment: EnvironmentSpec,
    target_returns: np.ndarray,
    seeds: np.ndarray,
    record: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None] | None = None,
) -> Rollouts:
    """Run exactly one episode per slot and add up its rewards.

    Each slot's environment is reset with its own seed. A slot whose episode is over is neither stepped
    nor counted again, and the agent drops it (``agent.keep``), so that it costs nothing. A slot's outcome
    depends on its own seed and target, and on the others only through rounding: matrix products of another
    number of slots may sum in another order, which a falling robot amplifies.

    Args:
        agent: acts for all slots at once.
        environment: what to make; it must end its episodes by itself or by a time limit.
        target_returns: (slots,) the return that each slot aims at, in the reward's units.
        seeds: (slots,) integer seeds of the environments.
        record: called at every step with the slots that are still running, (running,), their observations
            (running, observation_dim), the agent's actions and the rewards (running,) that followed.

    Raises:
        UserError: NaN or infinity in an observation, a reward or an action, of which slot and step are named.
        EnvironmentFailure: the environment raised an exception.
    """
    slots = len(target_returns)
    returns = np.zeros(slots)
    lengths = np.zeros(slots, dtype=np.int64)
    terminated = np.zeros(slots, dtype=bool)
    infos: dict[str, np.ndarray] = {}
    envs = make_vector_env(environment, slots)
    try:
        # Gymnasium's vector classes take a list; the base class' annotation says int.
        with named_failure(environment, "reset"):
            observations, _ = envs.reset(seed=[int(seed) for seed in seeds])  # type: ignore[arg-type]
        agent.reset(slots, np.asarray(target_returns))
        running = np.arange(slots)  # (running,) slots still in their episode, in the agent's order
        rewards: np.ndarray | None = None  # (running,)
        space: Any = envs.single_action_space
        actions = np.zeros((slots, *space.shape), dtype=space.dtype)
        with tqdm(total=slots, desc="evaluate", unit="episode", leave=False, disable=None) as progress:
            for step in count():
                _check_finite("observation", observations[running], running, step)
                observed = observations[running]
                acted = agent.act(observed, rewards)
                _check_finite("action", acted, running, step)
                actions[running] = acted
                with named_failure(environment, f"step {step}"):
                    observations, step_rewards, terminations, truncations, infos = envs.step(actions)
                rewards = step_rewards[running]
                _check_finite("reward", rewards, running, step)
                if record is not None:
                    record(running, observed, acted, rewards)
                returns[running] += rewards
                lengths[running] += 1
                finished = (terminations | truncations)[running]
                if not finished.any():
                    continue
                terminated[running] = terminations[running]
                progress.update(int(finished.sum()))
                kept = np.flatnonzero(~finished)
                if len(kept) == 0:
                    break
                agent.keep(kept)
                running, rewards = running[kept], rewards[kept]
    finally:
        envs.close()
    # For all slots, including finished ones.
    successes, worlds = infos.get("success"), infos.get("world")
    return Rollouts(returns, lengths, terminated, successes, worlds)


def _check_finite(what: str, values: np.ndarray, running: np.ndarray, step: int) -> None:
    """Raise unless all values, (running,) or (running, dim), are finite; ``running`` are their slots."""
    if np.isfinite(values).all():
        return
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(axis=1)
    index = int(np.argmax(bad))
    raise UserError(f"environment {running[index]}, step {step}: {what} {values[index]} is not finite")
