"""What every model of actions has: the data's units, the loss, and its state while it acts."""

from typing import Any, NamedTuple, Self

import torch
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
    """Predicts actions in [-1, 1], where -1 and 1 stand for the action bounds.

    Observation normalisation and action bounds are buffers, so they travel with the weights and everything
    enters and leaves in the data's own units.
    """

    has_memory: bool  # whether actions depend on earlier timesteps
    observation_mean: Tensor  # (observation_dim,)
    observation_std: Tensor
    action_low: Tensor  # (action_dim,)
    action_high: Tensor

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.register_buffer("observation_mean", torch.zeros(observation_dim))
        self.register_buffer("observation_std", torch.ones(observation_dim))
        self.register_buffer("action_low", -torch.ones(action_dim))
        self.register_buffer("action_high", torch.ones(action_dim))

    def loss(self, window: Window) -> Tensor:
        """Mean squared error over the components of valid timesteps' actions, in bounds-normalised units.

        Padding adds neither to the sum nor to the number it is divided by.
        """
        errors = (self(window).float() - self.normalize_actions(window.actions)).square()
        return (errors.sum(-1) * window.valid).sum() / (window.valid.sum() * errors.shape[-1])

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

        Returns the actions (batch, action_dim) in [-1, 1] and the state after this timestep.
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
