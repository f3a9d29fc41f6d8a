"""The training batch, from the sampler through the trainer to the model."""

from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """Consecutive timesteps of one episode per row, padded on the right; in the data's units."""

    observations: Tensor  # (batch, length, observation_dim)
    actions: Tensor  # (batch, length, action_dim)
    previous_actions: Tensor  # (batch, length, action_dim); its values where timesteps is 0 are never used
    returns_to_go: Tensor  # (batch, length)
    timesteps: Tensor  # (batch, length) int64, counted from the episode's start
    valid: Tensor  # (batch, length) bool, False on padding

    def rows(self, index: Tensor | slice) -> "Window":
        """Only these rows of the batch."""
        return Window(*(tensor[index] for tensor in self))
