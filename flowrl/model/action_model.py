"""What every model of actions has: the data's units, and the loss."""

import torch
from torch import Tensor, nn


class ActionModel(nn.Module):
    """Predicts actions in [-1, 1], where -1 and 1 stand for the action bounds.

    Observation normalisation and action bounds are buffers, so they travel with the weights and everything
    enters and leaves in the data's own units.
    """

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

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """Map the bounds to -1 and 1."""
        return (2 * actions - (self.action_high + self.action_low)) / (self.action_high - self.action_low)

    def denormalize_actions(self, actions: Tensor) -> Tensor:
        """Map -1 and 1 back to the bounds."""
        return (actions * (self.action_high - self.action_low) + (self.action_high + self.action_low)) / 2

    def normalize_observations(self, observations: Tensor) -> Tensor:
        """Map the data to mean 0 and standard deviation 1."""
        return (observations - self.observation_mean) / self.observation_std

    def mean_squared_error(self, predicted: Tensor, actions: Tensor, valid: Tensor) -> Tensor:
        """Mean over the components of valid timesteps' actions, in bounds-normalised units.

        ``predicted`` and ``actions`` are (batch, length, action_dim), the latter in the data's units.
        ``valid`` is (batch, length) bool: padding adds neither to the sum nor to the number it is divided by.
        """
        errors = (predicted.float() - self.normalize_actions(actions)).square()
        return (errors.sum(-1) * valid).sum() / (valid.sum() * actions.shape[-1])
