"""Critics: how much return an action brings, by the data alone."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from flowrl.data import EpisodeDataset
from flowrl.data.arrays import release
from flowrl.data.returns import with_known_return
from flowrl.model.action_model import ActionModel

WIDTH, HIDDEN_LAYERS = 256, 2
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
AVERAGING = 0.005  # share of the current weights that the averaged ones take up at each update


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

    def slopes(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The gradient of each member by the action: (members, ..., action_dim)."""
        actions = actions.expand(len(self.members), *actions.shape).clone().requires_grad_()
        with torch.enable_grad():
            pairs = zip(self.members, actions, strict=True)
            total = sum(member(torch.cat((observations, taken), dim=-1)).sum() for member, taken in pairs)
            assert isinstance(total, Tensor)
            return torch.autograd.grad(total, actions)[0]


class CriticLearner:
    """Critics that learn from a dataset, and the average of their weights, which is what to use."""

    def __init__(
        self,
        dataset: EpisodeDataset,
        model: ActionModel,
        returns: np.ndarray,
        members: int,
        updates: int,
        seed: int,
    ) -> None:
        """``model`` normalises, on the CPU; ``returns``, (transitions,), have the unit of targets.

        ``updates`` is how many there will be: the learning rate falls to a twentieth along a cosine.
        """
        self.dataset, self.model = dataset, model
        self.mean, self.scale = float(returns.mean()), max(float(returns.std()), 1e-12)
        self._choices = with_known_return(dataset)
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.critics = Critics(dataset.observation_dim, dataset.action_dim, members)
        self.averaged = copy.deepcopy(self.critics).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            self.critics.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self._optimizer, updates, LEARNING_RATE / 20
        )

    def draw(self, targets: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """Random transitions, (batch,): their observations, actions and ``targets``, normalised."""
        drawn = torch.randint(len(self._choices), (BATCH_SIZE,), generator=self._generator)
        batch = self._choices[drawn.numpy()]
        wanted = torch.from_numpy((targets[batch] - self.mean) / self.scale)
        return batch, *transitions(self.dataset, self.model, batch), wanted

    def update(self, loss: Tensor) -> None:
        """One step down the gradient of a loss of :attr:`critics`."""
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        share = max(AVERAGING, 1 / self._schedule.last_epoch)  # by the updates so far
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.critics.parameters()), share)


def transitions(
    dataset: EpisodeDataset, model: ActionModel, index: np.ndarray | slice
) -> tuple[Tensor, Tensor]:
    """Normalised observations and actions, (transitions, ...), of the data at ``index``."""
    observations = torch.tensor(dataset.observations[index])
    actions = torch.tensor(dataset.actions[index])
    for array in (dataset.observations, dataset.actions):
        release(array)
    return model.normalize_observations(observations), model.normalize_actions(actions)


def _perceptron(inputs: int) -> nn.Sequential:
    widths = [inputs, *[WIDTH] * HIDDEN_LAYERS]
    hidden = [nn.Sequential(nn.Linear(size, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()) for size in widths[:-1]]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
