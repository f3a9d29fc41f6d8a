"""What must agree between data and the environment that agents are evaluated in."""

from dataclasses import replace

import numpy as np

from flowrl.data.arrays import row_chunks
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.tmaze import check_corridor
from flowrl.envs.spaces import check_environment
from flowrl.errors import UserError

_TOLERANCE = 1e-3  # of the range between the bounds: actions beyond them by rounding alone
_MOST_OUTSIDE = 0.5  # a larger share of actions outside their bounds means another scaling


def match_environment(dataset: EpisodeDataset) -> EpisodeDataset:
    """Compare the data with its environment; return it with a time limit, and notes of what differs.

    Where the environment has no time limit, it gets twice the length of the data's longest episode.

    Raises:
        EnvironmentUnavailable: the environment cannot be made here.
        UserError: other sizes of observations or actions than the data's, spaces that no agent can be in, or
            more than half of the data's actions outside the bounds.
    """
    environment = dataset.environment
    assert environment is not None
    check_corridor(dataset)
    facts = check_environment(
        environment, dataset.observation_dim, dataset.action_dim, dataset.action_choices
    )
    notes = list(dataset.notes)
    if facts.left_out:
        notes.append(f"{environment.env_id}: text is left out of observations: {', '.join(facts.left_out)}")
    low, high = facts.action_bounds
    margin = np.where(np.isfinite(high - low), _TOLERANCE * (high - low), 0.0)
    low_in_data, high_in_data = dataset.statistics.action_low, dataset.statistics.action_high
    if (low_in_data < low - margin).any() or (high_in_data > high + margin).any():
        counts = (
            np.count_nonzero(((rows < low - margin) | (rows > high + margin)).any(axis=1))
            for rows in row_chunks(dataset.actions)
        )
        outside = sum(counts) / dataset.num_transitions
        reached = (_shortest(low_in_data), _shortest(high_in_data))
        beyond = (
            f"{100 * outside:.3g}% of the actions are outside the bounds of {environment.env_id}, "
            f"{_shortest(low)} to {_shortest(high)}; they reach from {' to '.join(reached)}"
        )
        if outside > _MOST_OUTSIDE:
            raise UserError(f"{dataset.dataset_id}: {beyond}: the data is of another environment or scaling")
        notes.append(f"{beyond}: no agent can take them there")
    if facts.max_episode_steps is None:
        limit = 2 * dataset.max_episode_length
        environment = replace(environment, max_episode_steps=limit)
        notes.append(
            f"{environment.env_id} has no time limit: evaluated for at most {limit} steps, twice the data's "
            "longest episode; --max-episode-steps gives another"
        )
    return replace(dataset, environment=environment, notes=tuple(notes))


def _shortest(values: np.ndarray) -> str:
    """One number where all are the same, else the list."""
    if (values == values[0]).all():
        return f"{values[0]:g}"
    return f"[{' '.join(f'{value:g}' for value in values)}]"
