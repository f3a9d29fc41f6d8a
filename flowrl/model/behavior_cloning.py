"""Behaviour cloning: a multi-layer perceptron from the observation to the action, blind to returns and past.

Trained on the best episodes alone (``--top-fraction 0.1``) it is the 10%-BC of Chen et al., "Decision
Transformer" (arXiv 2106.01345). It has the sequence model's interface, so the same trainer, agent, evaluator
and files serve it.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from flowrl.model.action_model import ActionModel
from flowrl.model.transformer import Window
from flowrl.native.pointwise import Dropout
from flowrl.native.products import Linear


@dataclass(frozen=True)
class BehaviorCloningConfig:
    """The shape of the perceptron."""

    observation_dim: int
    action_dim: int
    max_timesteps: int
    """Longest episode of its data and environment; the perceptron itself does not see the time."""
    num_layers: int = 3
    """Hidden layers."""
    embed_dim: int = 256
    """Width of each."""
    dropout: float = 0.1

    token_layout: ClassVar[Literal["fused"]] = "fused"  # one input a timestep


class BehaviorCloningModel(ActionModel):
    """Predicts the action of every timestep from its observation."""

    def __init__(self, config: BehaviorCloningConfig) -> None:
        super().__init__(config.observation_dim, config.action_dim)
        self.config = config
        layers: list[nn.Module] = []
        width = config.observation_dim
        for _ in range(config.num_layers):
            layers += [Linear(width, config.embed_dim), nn.ReLU(), Dropout(config.dropout)]
            width = config.embed_dim
        self.mlp = nn.Sequential(*layers, Linear(width, config.action_dim))

    def forward(self, window: Window) -> Tensor:
        """Return the actions (batch, length, action_dim) in [-1, 1], where -1 and 1 stand for the bounds."""
        return self._predict(window.observations)

    def loss(self, window: Window, valid: Tensor) -> Tensor:
        """Mean squared error over the valid timesteps, (batch, length) bool."""
        return self.mean_squared_error(self(window), window.actions, valid)

    def step(
        self,
        returns_to_go: Tensor,
        observations: Tensor,
        previous_actions: Tensor | None,
        timesteps: Tensor,
        states: list,
    ) -> tuple[Tensor, list]:
        """The actions (batch, action_dim) of one timestep; ``states`` come back as they are: no memory."""
        return self._predict(observations), states

    def step_action(self, actions: Tensor, timesteps: Tensor, states: list) -> list:
        """Nothing to remember."""
        return states

    def _predict(self, observations: Tensor) -> Tensor:
        return torch.tanh(self.mlp(self.normalize_observations(observations)))
