"""What an agent would achieve, estimated from data alone: off-policy evaluation without a simulator."""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from flowrl.data import EpisodeDataset
from flowrl.data.dataset import held_out, select_episodes
from flowrl.data.returns import lambda_returns, observed_returns
from flowrl.errors import UserError
from flowrl.model.agent import Agent
from flowrl.model.critic import CriticLearner

MEMBERS = 2  # critics of different initial weights, whose mean counts
TRACE = 0.95  # lambda: about twenty timesteps of the data enter a target
ROUNDS = 8  # of targets of fitted Q evaluation


@dataclass(frozen=True)
class Estimates:
    """Undiscounted returns of the held-out episodes, (episodes,) each."""

    data: np.ndarray
    """Of the data's own policy."""
    first_order: np.ndarray
    """Of the agent, by critics of the data's policy."""
    fitted_q: np.ndarray
    """Of the agent, by critics of the agent: fitted Q evaluation."""


def estimate(
    agent: Agent,
    dataset: EpisodeDataset,
    target: float,
    share: float = 0.2,
    timesteps: int = 50_000,
    updates: int = 1_000,
    seed: int = 0,
) -> Estimates:
    """Learn critics on part of the data, and estimate the agent's return on the ``share`` held out.

    Each estimate is a held-out episode's return plus the sum over its timesteps of
    Q(s, agent's action) - Q(s, data's action). With the agent's own Q and without discount this would be
    exact (performance difference lemma, Kakade and Langford 2002). *First order* takes the Q of the data's
    policy, regressed on its discounted returns. *Fitted Q evaluation* (Le et al. 2019, arXiv 1903.08738)
    continues from there with targets for the agent's actions.

    Raises:
        UserError: discrete actions, data that does not fit the agent, or a single episode.
    """
    sizes = (agent.config.model.observation_dim, agent.config.model.action_dim)
    if dataset.action_choices or sizes != (dataset.observation_dim, dataset.action_dim):
        raise UserError(
            f"{dataset.dataset_id}: estimates need continuous actions and the agent's observations of "
            f"{sizes[0]} and actions of {sizes[1]} numbers"
        )
    shuffled = np.random.default_rng(seed).permutation(dataset.num_episodes)
    fitting = np.searchsorted(np.cumsum(dataset.episode_lengths[shuffled]), timesteps, side="right")
    dataset = select_episodes(dataset, np.sort(shuffled[: max(int(fitting), 2)]))
    known, unseen = held_out(dataset, share)
    assert unseen is not None
    chosen, tested = (agent_actions(agent, part, target) for part in (known, unseen))
    returns = observed_returns(known, known.rewards)
    model = copy.deepcopy(agent.model).cpu()
    learner = CriticLearner(known, model, returns, MEMBERS, updates, seed)

    def with_agent() -> np.ndarray:
        added = _values(learner, unseen.observations, tested)
        added -= _values(learner, unseen.observations, unseen.actions)
        return unseen.episode_returns + np.add.reduceat(added, unseen.episode_starts)

    _fit(learner, returns, updates // 2)
    first_order = with_agent()
    for _ in range(ROUNDS):
        of_taken, of_chosen = (_values(learner, known.observations, a) for a in (known.actions, chosen))
        targets = lambda_returns(known, known.rewards, of_taken, of_chosen, TRACE)
        _fit(learner, targets, updates // (2 * ROUNDS))
    return Estimates(unseen.episode_returns, first_order, with_agent())


def agent_actions(agent: Agent, dataset: EpisodeDataset, target: float) -> np.ndarray:
    """What the agent does at every timestep of the data's episodes, (transitions, action_dim).

    It aims at ``target``, and remembers the data's observations, actions and rewards up to there.
    """
    longest_first = np.argsort(-dataset.episode_lengths, kind="stable")
    starts, lengths = dataset.episode_starts[longest_first], dataset.episode_lengths[longest_first]
    actions = np.empty_like(dataset.actions)
    agent.reset(len(starts), target)
    rewards = None
    for step in range(dataset.max_episode_length):
        running = int((lengths > step).sum())
        if running < len(starts):
            agent.keep(np.arange(running))
            starts, lengths = starts[:running], lengths[:running]
            rewards = None if rewards is None else rewards[:running]
        rows = starts + step
        actions[rows] = agent.act(dataset.observations[rows], rewards)
        agent.took(dataset.actions[rows])
        rewards = dataset.rewards[rows]
    return actions


def _fit(learner: CriticLearner, targets: np.ndarray, updates: int) -> None:
    """Regress on ``targets``, (transitions,), at the data's actions."""
    for _ in range(updates):
        _, observations, actions, wanted = learner.draw(targets)
        values = learner.critics.action_values(observations, actions)
        learner.update((values - wanted).square().mean(dim=1).sum())


def _values(learner: CriticLearner, observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The members' mean, in units of returns, (transitions,)."""
    states = learner.model.normalize_observations(torch.from_numpy(observations))
    choices = learner.model.normalize_actions(torch.from_numpy(actions))
    pairs = zip(states.split(8192), choices.split(8192), strict=True)
    members = torch.cat([learner.averaged.action_values(*pair) for pair in pairs], dim=1)
    return (members.mean(dim=0) * learner.scale + learner.mean).numpy()
