"""Critics: how much return an action brings, by the data alone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HIDDEN_LAYERS = 256, 2


class Critics(nn.Module):
    """Several Q(s, a), which differ in their initial weights, and one V(s).

    Observations and actions enter normalised, values are in standard deviations of returns. Layer
    normalisation bounds what a critic makes of actions that the data lacks (Ball et al., arXiv 2302.02948).
    """

    def __init__(self, observation_dim: int, action_dim: int, members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(_perceptron(observation_dim + action_dim) for _ in range(members))
        self.state_value = _perceptron(observation_dim)

    def action_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Of (..., observation_dim) and (..., action_dim): (members, ...)."""
        inputs = torch.cat((observations, actions), dim=-1)
        return torch.stack([member(inputs).squeeze(-1) for member in self.members])

    def state_values(self, observations: Tensor) -> Tensor:
        """Of (..., observation_dim): (...)."""
        return self.state_value(observations).squeeze(-1)

    def directions(self, observations: Tensor, actions: Tensor) -> "Directions":
        """Where actions (transitions, action_dim) are to move for more return, and how far that is sure."""
        slopes = self.slopes(observations, actions)
        members = len(slopes)
        together = F.normalize(slopes, dim=-1).sum(dim=0).square().sum(dim=-1)
        agreement = (together - members) / (members * (members - 1))
        moves = 2 * agreement.clamp(min=0)[:, None] * slopes.mean(dim=0)
        return Directions(moves, agreement, slopes.norm(dim=-1).mean(dim=0))

    def slopes(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The gradient of each member by the action: (members, ..., action_dim)."""
        actions = actions.expand(len(self.members), *actions.shape).clone().requires_grad_()
        with torch.enable_grad():
            pairs = zip(self.members, actions, strict=True)
            total = sum(member(torch.cat((observations, taken), dim=-1)).sum() for member, taken in pairs)
            assert isinstance(total, Tensor)
            return torch.autograd.grad(total, actions)[0]


class Directions(NamedTuple):
    """By how much transitions' actions are to move, up to a factor, and what that comes from."""

    moves: Tensor  # (transitions, action_dim) the mean gradient times 2 max(agreement, 0)
    agreement: Tensor  # (transitions,) mean cosine between the gradients of two members
    norms: Tensor  # (transitions,) mean norm of a member's gradient


def _perceptron(inputs: int) -> nn.Sequential:
    widths = [inputs, *[WIDTH] * HIDDEN_LAYERS]
    hidden = [nn.Sequential(nn.Linear(size, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()) for size in widths[:-1]]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
