"""Value guidance: the policy's actions move to where critics predict more return.

Several critics are learned from the data first, in about a minute. Then the targets of the policy's loss move
along the critics' mean gradient at the policy's own actions, far where the critics agree on its direction and
not at all where they do not. Acting remains as it is. What was measured: ``results/guidance.md``.
"""

import copy
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.data import EpisodeDataset
from flowrl.data.arrays import chunks
from flowrl.data.returns import DISCOUNT, lambda_returns, observed_returns
from flowrl.errors import UserError, one_line
from flowrl.model.action_model import ActionModel
from flowrl.model.critic import CriticLearner, Critics, transitions

MEMBERS = 4
UPDATES = 3_000
TRACE = 0.9  # lambda: 1 for the returns in the data, 0 for one reward and the value of the next state
EXPECTILE = 0.7  # of the smallest Q, for V: above 0.5, nearer to the data's better actions
UPDATES_PER_TARGET = 250


class Guidance(nn.Module):
    """Where actions are to move, by critics that no longer learn."""

    mean_slope: Tensor  # () float64: mean norm of a critic's gradient by the data's actions
    agreement: Tensor  # () float64: mean cosine between the gradients of two critics there

    def __init__(self, critics: Critics, q_weight: float) -> None:
        super().__init__()
        self.critics, self.q_weight = critics.requires_grad_(False), q_weight
        for name in ("mean_slope", "agreement"):
            self.register_buffer(name, torch.ones((), dtype=torch.float64))

    @torch.compiler.disable
    def forward(self, observations: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """By how much actions (batch, length, action_dim) are to move, for observations as many, where valid.

        Both are normalised. An action moves by q_weight * 2 max(c, 0) * g / n: g is the critics' mean
        gradient by the action, n its mean norm over the data, c the mean cosine between the gradients of two
        critics. It stays within its bounds. In the squared error a target that moves so adds, up to a
        constant factor, the gradient of -q_weight * Q / n (TD3+BC, arXiv 2106.06860, Eq. 3), as far as
        critics agree on it.
        """
        actions, moves = actions.clamp(-1, 1), torch.zeros_like(actions)
        rows = valid if actions.device.type == "cpu" else ...  # a CUDA graph has fixed shapes
        with torch.autocast(actions.device.type, enabled=False):
            slopes = self.critics.slopes(observations[rows], actions[rows])
            moves[rows] = 2 * mean_cosine(slopes).clamp(min=0)[..., None] * slopes.mean(dim=0)
        moves *= self.q_weight / self.mean_slope
        return (actions + moves).clamp(-1, 1) - actions


def mean_cosine(slopes: Tensor) -> Tensor:
    """Of two members' gradients, over all pairs: (members, ..., action_dim) -> (...)."""
    members = len(slopes)
    together = F.normalize(slopes, dim=-1).sum(dim=0).square().sum(dim=-1)
    return (together - members) / (members * (members - 1))


def learn_guidance(
    dataset: EpisodeDataset,
    model: ActionModel,
    q_weight: float,
    seed: int,
    saved: Mapping[str, Tensor] | None = None,
) -> Guidance:
    """Learn critics of the data, or take the ones in ``saved``; ``model`` normalises.

    Raises:
        UserError: discrete actions, or weights that do not fit.
    """
    if dataset.action_choices:
        raise UserError(
            f"--q-weight {q_weight:g}: needs continuous actions, those of {dataset.dataset_id} are discrete"
        )
    if saved is not None:
        guidance = Guidance(Critics(dataset.observation_dim, dataset.action_dim, MEMBERS), q_weight)
        try:
            guidance.load_state_dict(saved)
        except RuntimeError as error:
            raise UserError(
                f"--resume: the checkpoint's critics are damaged, or of an earlier version: {one_line(error)}"
            ) from error
        return guidance
    model = copy.deepcopy(model).cpu()
    guidance = Guidance(learn_critics(dataset, model, seed), q_weight)
    norms = agreement = 0.0  # sums over transitions
    for rows in chunks(dataset.num_transitions):
        slopes = guidance.critics.slopes(*transitions(dataset, model, rows))
        norms += float(slopes.norm(dim=-1).mean(dim=0).sum())
        agreement += float(mean_cosine(slopes).sum())
    guidance.mean_slope.fill_(max(norms / dataset.num_transitions, 1e-12))
    guidance.agreement.fill_(agreement / dataset.num_transitions)
    return guidance


def learn_critics(dataset: EpisodeDataset, model: ActionModel, seed: int) -> Critics:
    """Learn Q and V of the policy that made the data, and a little better; return their averaged weights.

    Q learns lambda-returns of the data's own episodes, V an expectile of the smallest Q, which the
    lambda-returns bootstrap from. A terminal state ends a return, a truncated one does not. Lambda-returns
    have the scale of returns from the start, where one-step targets take many more updates to get there.
    Source: the expectile is IQL's (arXiv 2110.06169, Eq. 5).
    """
    rewards = dataset.rewards * ((1 - DISCOUNT) / max(float(np.abs(dataset.rewards).mean()), 1e-12))
    targets = observed_returns(dataset, rewards)
    learner = CriticLearner(dataset, model, targets, MEMBERS, UPDATES, seed)
    critics = learner.critics
    episodes = np.repeat(np.arange(dataset.num_episodes), dataset.episode_lengths)  # of each transition
    learns = torch.from_numpy(halves(dataset, seed))
    for update in range(UPDATES):
        if update > 0 and update % UPDATES_PER_TARGET == 0:
            parts = (transitions(dataset, model, rows)[0] for rows in chunks(dataset.num_transitions))
            values = np.concatenate([learner.averaged.state_values(part).numpy() for part in parts])
            values = values * learner.scale + learner.mean
            targets = lambda_returns(dataset, rewards, values, values, TRACE)
        batch, observations, actions, target = learner.draw(targets)
        action_values = critics.action_values(observations, actions)
        error = action_values.detach().amin(dim=0) - critics.state_values(observations)
        weight = torch.where(error < 0, 1 - EXPECTILE, EXPECTILE)
        own = learns[:, torch.from_numpy(episodes[batch])]  # (members, batch) bool
        loss = ((action_values - target).square() * own).mean(dim=1).sum() + (weight * error.square()).mean()
        learner.update(loss)
    return learner.averaged


def halves(dataset: EpisodeDataset, seed: int) -> np.ndarray:
    """Which episodes each critic learns from, (members, episodes) bool: a random half of its own.

    What chance put into the data is different in each, so that critics agree on what is in all of it.
    """
    ranks = np.random.default_rng(seed).random((MEMBERS, dataset.num_episodes)).argsort(axis=1)
    return ranks < (dataset.num_episodes + 1) // 2
