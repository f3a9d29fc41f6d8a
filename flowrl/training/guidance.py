"""Value guidance: the agent learns the data's actions, moved to where critics predict more return.

Several critics are learned from the data first, in about a minute. Then each action moves along their mean
gradient, far where they agree on its direction and not at all where they do not. The policy's loss, the cost
of an update and acting remain as they are. What was measured: ``results/guidance.md``.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flowrl.data import EpisodeDataset
from flowrl.data.arrays import chunks, release
from flowrl.data.returns import DISCOUNT, lambda_returns, with_known_return
from flowrl.errors import UserError
from flowrl.model.action_model import ActionModel
from flowrl.model.critic import CriticLearner, Critics

MEMBERS = 4
UPDATES, BATCH_SIZE = 3_000, 256
TRACE = 0.9  # lambda: 1 for the returns in the data, 0 for one reward and the value of the next state
EXPECTILE = 0.7  # of the smallest Q, for V: above 0.5, nearer to the data's better actions
UPDATES_PER_TARGET = 250


def guide(
    dataset: EpisodeDataset,
    model: ActionModel,
    q_weight: float,
    seed: int,
    saved: Mapping[str, Tensor] | None = None,
) -> tuple[EpisodeDataset, Critics, float]:
    """Return the data with its actions moved by about ``q_weight``, on a scale from -1 to 1.

    ``model`` normalises; ``saved`` holds the weights of critics learned before. Returns the critics as
    well, and how far they agree (see :func:`move_actions`).

    Raises:
        UserError: discrete actions, or weights that do not fit.
    """
    if dataset.action_choices:
        raise UserError(
            f"--q-weight {q_weight:g}: needs continuous actions, those of {dataset.dataset_id} are discrete"
        )
    model = copy.deepcopy(model).cpu()
    if saved is None:
        critics = learn_critics(dataset, model, seed)
    else:
        critics = Critics(dataset.observation_dim, dataset.action_dim, MEMBERS)
        try:
            critics.load_state_dict(saved)
        except RuntimeError as error:
            raise UserError(f"--resume: the saved critics do not fit this data: {error}") from error
    moved, agreement = move_actions(dataset, model, critics, q_weight)
    return moved, critics, agreement


def learn_critics(dataset: EpisodeDataset, model: ActionModel, seed: int) -> Critics:
    """Learn Q and V of the policy that made the data, and a little better; return their averaged weights.

    Q learns lambda-returns of the data's own episodes, V an expectile of the smallest Q, which the
    lambda-returns bootstrap from. A terminal state ends a return, a truncated one does not. Lambda-returns
    have the scale of returns from the start, where one-step targets take many more updates to get there.
    Source: the expectile is IQL's (arXiv 2110.06169, Eq. 5).
    """
    generator = torch.Generator().manual_seed(seed)
    learner = CriticLearner(dataset.observation_dim, dataset.action_dim, MEMBERS, UPDATES, seed)
    critics = learner.critics
    rewards = dataset.rewards * ((1 - DISCOUNT) / max(float(np.abs(dataset.rewards).mean()), 1e-12))
    choices = torch.from_numpy(with_known_return(dataset))
    episodes = np.repeat(np.arange(dataset.num_episodes), dataset.episode_lengths)  # of each transition
    learns = torch.from_numpy(_halves(dataset, seed))
    values = np.full_like(rewards, rewards.mean() / (1 - DISCOUNT))  # of a mean reward forever
    targets = lambda_returns(dataset, rewards, values, values, 1.0)
    mean, scale = float(targets.mean()), max(float(targets.std()), 1e-12)
    for update in range(UPDATES):
        if update > 0 and update % UPDATES_PER_TARGET == 0:
            values = _state_values(dataset, model, learner.averaged) * scale + mean
            targets = lambda_returns(dataset, rewards, values, values, TRACE)
        drawn = torch.randint(len(choices), (BATCH_SIZE,), generator=generator)
        batch = choices[drawn].numpy()
        observations, actions = _transitions(dataset, model, batch)
        target = torch.from_numpy((targets[batch] - mean) / scale)
        action_values = critics.action_values(observations, actions)
        error = action_values.detach().amin(dim=0) - critics.state_values(observations)
        weight = torch.where(error < 0, 1 - EXPECTILE, EXPECTILE)
        own = learns[:, torch.from_numpy(episodes[batch])]  # (members, batch) bool
        loss = ((action_values - target).square() * own).mean(dim=1).sum() + (weight * error.square()).mean()
        learner.update(loss)
    return learner.averaged


def _halves(dataset: EpisodeDataset, seed: int) -> np.ndarray:
    """Which episodes each critic learns from, (members, episodes) bool: a random half of its own.

    What chance put into the data is different in each, so that critics agree on what is in all of it.
    """
    ranks = np.random.default_rng(seed).random((MEMBERS, dataset.num_episodes)).argsort(axis=1)
    return ranks < (dataset.num_episodes + 1) // 2


@torch.no_grad()
def move_actions(
    dataset: EpisodeDataset, model: ActionModel, critics: Critics, q_weight: float
) -> tuple[EpisodeDataset, float]:
    """Return the data with moved actions, and the critics' agreement over all of it.

    An action moves by q_weight * 2 max(c, 0) * g / n: g is the critics' mean gradient by the action, n the
    mean norm of single gradients over the data, and c, the agreement, the mean cosine between the gradients
    of two critics for this transition. Actions stay within their bounds.
    """
    norm = agreement = 0.0  # sums over transitions
    moves = np.empty_like(dataset.actions)
    for rows in chunks(dataset.num_transitions):
        directions = critics.directions(*_transitions(dataset, model, rows))
        moves[rows] = directions.moves
        norm += float(directions.norms.sum())
        agreement += float(directions.agreement.sum())
    moves *= q_weight * dataset.num_transitions / max(norm, 1e-12)
    for rows in chunks(dataset.num_transitions):
        actions = _transitions(dataset, model, rows)[1] + torch.from_numpy(moves[rows])
        moves[rows] = model.denormalize_actions(actions.clamp(-1, 1)).numpy()
    return replace(dataset, actions=moves), agreement / dataset.num_transitions


def _transitions(
    dataset: EpisodeDataset, model: ActionModel, index: np.ndarray | slice
) -> tuple[Tensor, Tensor]:
    """Normalised observations and actions, (transitions, ...), of the data at ``index``."""
    observations = torch.from_numpy(dataset.observations[index])
    actions = torch.from_numpy(dataset.actions[index])
    for array in (dataset.observations, dataset.actions):
        release(array)
    return model.normalize_observations(observations), model.normalize_actions(actions)


@torch.no_grad()
def _state_values(dataset: EpisodeDataset, model: ActionModel, critics: Critics) -> np.ndarray:
    """Of all transitions, (transitions,)."""
    values = np.empty(dataset.num_transitions, dtype=np.float32)
    for rows in chunks(dataset.num_transitions):
        values[rows] = critics.state_values(_transitions(dataset, model, rows)[0])
    return values
