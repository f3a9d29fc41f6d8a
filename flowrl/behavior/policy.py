"""Behaviour policies: small tanh-Gaussian actors that act with numpy alone, the same on every machine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

# The range in which a soft actor-critic actor clips its log standard deviation (Haarnoja et al., 2018).
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0

# Actions are rounded to a multiple of this. Linear-algebra and tanh routines differ in the last bits between
# processors, and a chaotic simulator would amplify that; in float64 those bits lie far below the grid, so the
# same seed gives the same actions everywhere. The actions it moves are moved by less than 8e-6.
ACTION_GRID = 2.0**-16

Float64 = NDArray[np.float64]
Layer = tuple[Float64, Float64]  # weights (inputs, outputs), bias (outputs,)


@dataclass(frozen=True)
class BehaviorPolicy:
    """A multilayer perceptron with ReLU whose two heads give a Gaussian that tanh squashes into [-1, 1].

    ``env_id`` is the environment that it was trained in and ``steps`` the environment steps that it had seen.
    """

    env_id: str
    steps: int
    hidden: tuple[Layer, ...]
    mean: Layer
    log_std: Layer

    @property
    def observation_dim(self) -> int:
        return (self.hidden[0] if self.hidden else self.mean)[0].shape[0]

    @property
    def action_dim(self) -> int:
        return self.mean[1].shape[0]

    def distribution(self, observations: np.ndarray) -> tuple[Float64, Float64]:
        """Return mean and log standard deviation before tanh, each (batch, action_dim)."""
        features = np.asarray(observations, dtype=np.float64)
        for weights, bias in self.hidden:
            features = np.maximum(features @ weights + bias, 0.0)  # (batch, width)
        mean = features @ self.mean[0] + self.mean[1]  # (batch, action_dim)
        log_std = features @ self.log_std[0] + self.log_std[1]  # (batch, action_dim)
        return mean, np.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)

    def act(
        self, observations: np.ndarray, normals: np.ndarray | float, noise: np.ndarray | float = 0.0
    ) -> NDArray[np.float32]:
        """Return float32 actions (batch, action_dim) in [-1, 1] for (batch, observation_dim) observations.

        ``normals``, (batch, action_dim) standard normals, choose from the distribution; 0 takes tanh of the
        mean. ``noise``, of the same shape, is added to the actions, which are then clipped to [-1, 1].
        """
        mean, log_std = self.distribution(observations)
        actions = np.clip(np.tanh(mean + np.exp(log_std) * normals) + noise, -1.0, 1.0)
        return (np.round(actions / ACTION_GRID) * ACTION_GRID).astype(np.float32)


def load_policy(path: Path) -> BehaviorPolicy:
    """Read a safetensors snapshot of any depth, width and floating-point type.

    Its tensors are ``hidden.0.weight`` (inputs, outputs), ``hidden.0.bias``, ..., ``mean.weight``,
    ``mean.bias``, ``log_std.weight`` and ``log_std.bias``; its metadata give ``env_id`` and ``steps``.
    """
    with safe_open(path, framework="numpy") as file:
        metadata, names = file.metadata(), file.keys()
        tensors = {name: file.get_tensor(name).astype(np.float64) for name in names}
    depth = sum(name.startswith("hidden.") for name in tensors) // 2
    *hidden, mean, log_std = [
        (tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        for name in (*(f"hidden.{index}" for index in range(depth)), "mean", "log_std")
    ]
    return BehaviorPolicy(metadata["env_id"], int(metadata["steps"]), tuple(hidden), mean, log_std)
