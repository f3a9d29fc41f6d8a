"""Discounted returns along the data's episodes, which critics learn."""

import numpy as np

from flowrl.data.dataset import EpisodeDataset
from flowrl.errors import UserError

DISCOUNT = 0.99


def lambda_returns(
    dataset: EpisodeDataset, rewards: np.ndarray, taken: np.ndarray, chosen: np.ndarray, trace: float
) -> np.ndarray:
    """Discounted returns of a policy along episodes of another one, (transitions,) float32.

    Args:
        dataset: the episodes.
        rewards: theirs, (transitions,), in any unit.
        taken: values of their states with the actions that were taken, (transitions,).
        chosen: likewise with the policy's own actions; ``taken`` itself for the data's policy.
        trace: lambda, from 0 for one reward and the next state's value to 1 for all that is left of the
            episode.

    The return of a truncated episode's last transition is its value ``taken``. Source: Q(lambda) of
    Harutyunyan et al. (2016), arXiv 1602.04951, Eq. 4; with ``chosen`` equal to ``taken`` it is the
    lambda-return of Sutton and Barto, "Reinforcement Learning", second edition, section 12.1.
    """
    lengths = dataset.episode_lengths
    ends = dataset.episode_starts + lengths - 1
    returns = np.empty(len(rewards), dtype=np.float32)
    returns[ends] = np.where(dataset.terminated, rewards[ends], taken[ends])
    for back in range(1, dataset.max_episode_length):  # timesteps before the last one
        now = ends[lengths > back] - back
        following = chosen[now + 1] + trace * (returns[now + 1] - taken[now + 1])
        returns[now] = rewards[now] + DISCOUNT * following
    return returns


def observed_returns(dataset: EpisodeDataset, rewards: np.ndarray) -> np.ndarray:
    """Discounted returns that the episodes had, (transitions,), of their ``rewards`` in any unit.

    What would have followed on a truncated episode counts as the mean reward forever.
    """
    forever = np.full_like(rewards, rewards.mean() / (1 - DISCOUNT))
    return lambda_returns(dataset, rewards, forever, forever, 1.0)


def with_known_return(dataset: EpisodeDataset) -> np.ndarray:
    """The transitions that critics can learn from, (transitions,) int64.

    All but the last of truncated episodes: what follows it is not in the data.

    Raises:
        UserError: there are none.
    """
    known = np.ones(dataset.num_transitions, dtype=bool)
    known[(dataset.episode_starts + dataset.episode_lengths - 1)[~dataset.terminated]] = False
    if not known.any():
        raise UserError(f"{dataset.dataset_id}: no episode has a state after its first action")
    return np.flatnonzero(known)
