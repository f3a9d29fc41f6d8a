"""What every model of actions has: the data's units, the loss, and its state while it acts."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowrl.attention.kinds import clear_rows, select_rows
from flowrl.window import Window


class ActingState(NamedTuple):
    """All that a model remembers of the episodes in which it acts, one row per environment."""

    layers: tuple[Any, ...]  # an attention state per layer, None before the first token
    previous_actions: Tensor  # (batch, action_dim) taken at the last timestep, in the data's units
    pending: bool  # whether the previous actions are still to be read, with the next timestep's tokens

    def keep(self, rows: Tensor) -> Self:
        """Only these rows, (kept,) int64, in this order."""
        layers = tuple(layer and select_rows(layer, rows) for layer in self.layers)
        return self._replace(layers=layers, previous_actions=self.previous_actions[rows])

    def clear(self, rows: Tensor) -> Self:
        """The rows where the (batch,) bool mask holds as before their first token."""
        return self._replace(layers=tuple(layer and clear_rows(layer, rows) for layer in self.layers))


class ActionModel(nn.Module):
    """Predicts actions: continuous ones in [-1, 1], where -1 and 1 stand for the action bounds, or logits.

    Discrete actions are one-hot vectors, with ``action_choices`` numbers of choices side by side; for
    continuous ones it is empty. Observation normalisation and action bounds are buffers, so they travel with
    the weights and everything enters and leaves in the data's own units.
    """

    has_memory: bool  # whether actions depend on earlier timesteps
    observation_mean: Tensor  # (observation_dim,)
    observation_std: Tensor
    action_low: Tensor  # (action_dim,)
    action_high: Tensor

    def __init__(self, observation_dim: int, action_dim: int, action_choices: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.action_choices = action_choices
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_low", -torch.ones(action_dim))
        self.register_buffer("action_high", torch.ones(action_dim))

    def loss(
        self, window: Window, guidance: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Mean over the components of valid timesteps' actions, to which padding adds nothing.

        Of continuous actions it is the squared error in bounds-normalised units, of discrete ones the
        cross-entropy. ``guidance`` moves the targets of the former, see
        :class:`flowrl.training.guidance.Guidance`.
        """
        outputs = self(window).float()
        if self.action_choices:
            taken = self.action_indices(window.actions)  # (batch, length, len(action_choices))
            logits = outputs.split(self.action_choices, dim=-1)
            pairs = zip(logits, taken.unbind(-1), strict=True)
            errors = torch.stack(
                [F.cross_entropy(x.mT, index, reduction="none") for x, index in pairs], dim=-1
            )
        else:
            targets = self.normalize_actions(window.actions)
            if guidance is not None:
                observations = self.normalize_observations(window.observations)
                targets += guidance(observations, outputs.detach(), window.valid)
            errors = (outputs - targets).square()
        return (errors.sum(-1) * window.valid).sum() / (window.valid.sum() * errors.shape[-1])

    def to_actions(self, outputs: Tensor, temperature: float = 0.0) -> Tensor:
        """Turn what the model returns, (batch, action_dim), into actions in the data's units.

        Continuous actions end within the bounds. Of discrete ones the likeliest is taken, or with a
        ``temperature`` above 0 one is drawn from the distribution of the logits divided by it.
        """
        if not self.action_choices:
            actions = self.denormalize_actions(outputs.float())
            return torch.clamp(actions, self.action_low, self.action_high)
        if temperature > 0:  # the largest of logits with Gumbel noise is distributed as their softmax
            outputs = outputs / temperature - torch.empty_like(outputs).exponential_().log()
        parts = outputs.split(self.action_choices, dim=-1)
        one_hot = [F.one_hot(part.argmax(-1), part.shape[-1]) for part in parts]
        return torch.cat(one_hot, dim=-1).float()

    def action_indices(self, actions: Tensor) -> Tensor:
        """One-hot vectors (..., action_dim) -> the chosen numbers (..., len(action_choices)) int64."""
        return torch.stack([part.argmax(-1) for part in actions.split(self.action_choices, dim=-1)], dim=-1)

    def start(self, batch: int) -> ActingState:
        """The state before the first timestep of ``batch`` episodes."""
        return ActingState((), self.action_low.new_zeros(batch, len(self.action_low)), pending=False)

    def step(
        self, observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, state: ActingState
    ) -> tuple[Tensor, ActingState]:
        """The recurrent form of :meth:`forward`: one timestep of every episode.

        Args:
            observations: (batch, observation_dim).
            returns_to_go: (batch,).
            timesteps: (batch,) int64, counted from each episode's start.
            state: of the timesteps before; it must not be used again. ``previous_actions`` are those taken
                since, which the caller has put there.

        Returns the outputs (batch, action_dim), for :meth:`to_actions`, and the state after this timestep.
        """
        raise NotImplementedError

    def restart(self, state: ActingState, rows: Tensor, timesteps: Tensor) -> ActingState:
        """Forget the episodes of the rows where the (batch,) bool mask holds; ``timesteps`` come next."""
        return state.clear(rows)

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Map the bounds to -1 and 1."""
        return (2 * actions - (self.action_high + self.action_low)) / (self.action_high - self.action_low)

    def denormalize_actions(self, actions: Tensor) -> Tensor:
        """Map -1 and 1 back to the bounds."""
        return (actions * (self.action_high - self.action_low) + (self.action_high + self.action_low)) / 2

    def normalize_observations(self, observations: Tensor) -> Tensor:
        """Map the data to mean 0 and standard deviation 1."""
        return (observations - self.observation_mean) / self.observation_std
