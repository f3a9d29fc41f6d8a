"""Behaviour cloning: a multi-layer perceptron from the observation to the action, without returns or history.

Trained on the best episodes alone (``--top-fraction 0.1``) it is the 10%-BC of Chen et al., "Decision
Transformer" (arXiv 2106.01345). It has the sequence model's interface, so the same trainer, agent, evaluator
and files serve it.
"""

from typing import ClassVar, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flowrl.model.action_model import ActingState, ActionModel
from flowrl.options import STRICT, NumLayers, Probability, Size
from flowrl.window import Window


@dataclass(frozen=True, config=STRICT)
class BehaviorCloningConfig:
    """The shape of the perceptron."""

    observation_dim: Size
    action_dim: Size
    max_timesteps: Size
    """Longest episode of its data and environment; the perceptron itself does not see the time."""
    num_layers: NumLayers = 3
    """Hidden layers."""
    embed_dim: Size = 256
    """Width of each."""
    dropout: Probability = 0.1
    action_choices: tuple[Size, ...] = ()
    """Numbers of choices of discrete actions, whose one-hot vectors make up ``action_dim``."""

    token_layout: ClassVar[Literal["fused"]] = "fused"  # one input a timestep


class BehaviorCloningModel(ActionModel):
    """Predicts the action of every timestep from its observation."""

    has_memory = False

    def __init__(self, config: BehaviorCloningConfig) -> None:
        super().__init__(config.observation_dim, config.action_dim, config.action_choices)
        self.config = config
        layers: list[nn.Module] = []
        width = config.observation_dim
        for _ in range(config.num_layers):
            layers += [nn.Linear(width, config.embed_dim), nn.ReLU(), nn.Dropout(config.dropout)]
            width = config.embed_dim
        self.mlp = nn.Sequential(*layers, nn.Linear(width, config.action_dim))

    def forward(self, window: Window) -> Tensor:
        """Return the actions (batch, length, action_dim) in [-1, 1], or the logits of discrete ones."""
        return self._predict(window.observations)

    def step(
        self, observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, state: ActingState
    ) -> tuple[Tensor, ActingState]:
        """See :meth:`ActionModel.step`; the state stays as it is."""
        return self._predict(observations), state

    def _predict(self, observations: Tensor) -> Tensor:
        outputs = self.mlp(self.normalize_observations(observations))
        return outputs if self.action_choices else torch.tanh(outputs)
