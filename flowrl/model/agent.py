"""The agent: a trained model, what it must know to act, and its memory of the episodes under way."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowrl.attention.kinds import clear_rows, select_rows
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.model.behavior_cloning import BehaviorCloningConfig, BehaviorCloningModel
from flowrl.model.transformer import ModelConfig, SequenceModel, Window

Acting = Literal["recurrent", "window"]


@dataclass(frozen=True)
class AgentConfig:
    """What travels with the weights, so that an agent acts without its dataset."""

    model: ModelConfig | BehaviorCloningConfig
    context_length: int
    """Timesteps of the longest window seen in training."""
    full_episodes: bool
    """Whether windows were whole episodes; decides how the agent acts by default."""
    targets: tuple[float, ...]
    """Target returns to evaluate at."""
    reward_mode: Literal["dense", "delayed"] = "dense"
    dataset_id: str = ""
    dataset_sha256: str = ""
    environment: EnvironmentSpec | None = None
    reference: ReferenceScores | None = None

    @property
    def default_acting(self) -> Acting:
        no_memory = isinstance(self.model, BehaviorCloningConfig)  # a window would only repeat work
        return "recurrent" if self.full_episodes or no_memory else "window"


@dataclass
class _History:
    """The last ``context_length`` timesteps of each slot, filled from the left."""

    window: Window
    count: Tensor  # (slots,) int64, timesteps held

    def append(
        self, observations: Tensor, previous: Tensor, returns_to_go: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Write a timestep into each slot, dropping the oldest of full ones; return its place (slots,)."""
        full = self.count == self.window.timesteps.shape[1]
        if full.any():
            for tensor in self.window:
                tensor[full] = tensor[full].roll(-1, dims=1)
        place = self.count - full.long()
        row = torch.arange(len(place), device=place.device)
        entries = (observations, torch.zeros_like(previous), previous, returns_to_go, timesteps)
        for tensor, entry in zip(self.window, entries, strict=True):
            tensor[row, place] = entry
        self.count = place + 1
        return place


class Agent:
    """Acts in many environments at once, one slot each.

    ``recurrent`` acting carries the attention state: constant time and memory per step under Flow-Attention,
    exact over the whole episode so far. ``window`` acting recomputes the last ``context_length`` timesteps.
    """

    def __init__(
        self,
        model: SequenceModel | BehaviorCloningModel,
        config: AgentConfig,
        *,
        acting: Acting | None = None,
        checkpoint_step: int | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.acting: Acting = acting or config.default_acting
        self.checkpoint_step = checkpoint_step

    @property
    def device(self) -> torch.device:
        return self.model.observation_mean.device

    @property
    def observation_dim(self) -> int:
        return self.config.model.observation_dim

    @property
    def action_dim(self) -> int:
        return self.config.model.action_dim

    @property
    def environment(self) -> EnvironmentSpec | None:
        return self.config.environment

    @property
    def reference(self) -> ReferenceScores | None:
        return self.config.reference

    @property
    def dataset_id(self) -> str:
        return self.config.dataset_id

    @property
    def dataset_sha256(self) -> str:
        return self.config.dataset_sha256

    @property
    def default_targets(self) -> tuple[float, ...]:
        return self.config.targets

    @torch.inference_mode()
    def reset(self, num_envs: int, target_return: float | np.ndarray) -> None:
        """Start ``num_envs`` episodes that aim at ``target_return``, one finite number or one per slot."""
        config, device = self.config.model, self.device
        targets = np.broadcast_to(np.asarray(target_return, dtype=np.float32), (num_envs,))
        if not np.isfinite(targets).all():
            raise ValueError(f"target_return {target_return}: must be finite")
        self.model.eval()
        if self.acting == "recurrent" and isinstance(self.model, SequenceModel):
            self.model.prepare_to_act()
        self._target_return = torch.tensor(targets, device=device)
        self._returns_to_go = self._target_return.clone()
        self._timesteps = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._previous_actions = torch.zeros(num_envs, config.action_dim, device=device)
        self._states: list = [None] * config.num_layers
        self._all_told = True  # the states know the previous actions of all slots
        self._history = self._empty_history(num_envs) if self.acting == "window" else None

    @torch.inference_mode()
    def act(self, observations: np.ndarray, rewards_since_last_act: np.ndarray | None = None) -> np.ndarray:
        """Return float32 actions (num_envs, action_dim) within the action bounds.

        Args:
            observations: (num_envs, observation_dim).
            rewards_since_last_act: (num_envs,) rewards that the last actions earned; ignored at an episode's
                first step, where it may be None.

        Raises:
            ValueError: a shape that does not fit, or a NaN or infinity (the message names the slot).
        """
        observed = self._checked("observations", observations, (self.config.model.observation_dim,))
        if rewards_since_last_act is not None and self.config.reward_mode == "dense":
            rewards = self._checked("rewards_since_last_act", rewards_since_last_act, ())
            self._returns_to_go -= torch.where(self._timesteps > 0, rewards, 0)
        if self._history is None:
            actions = self._act_recurrent(observed)
        else:
            actions = self._act_window(observed, self._history)
        self._timesteps += 1
        self._previous_actions = actions
        return actions.cpu().numpy().copy()  # the agent remembers its own: the caller may change these

    @torch.inference_mode()
    def restart(self, finished: np.ndarray) -> None:
        """Forget the episodes of the slots where the (num_envs,) bool mask holds; they start anew."""
        rows = torch.as_tensor(np.asarray(finished, dtype=bool), device=self.device)
        if not self._all_told:  # those of other slots; no next timestep of these will bring theirs
            self._states = self.model.step_action(self._previous_actions, self._timesteps - 1, self._states)
            self._all_told = True
        self._returns_to_go = torch.where(rows, self._target_return, self._returns_to_go)
        self._timesteps.masked_fill_(rows, 0)
        self._states = [state and clear_rows(state, rows) for state in self._states]
        if self._history is not None:
            self._history.count.masked_fill_(rows, 0)

    @torch.inference_mode()
    def keep(self, indices: np.ndarray) -> None:
        """Go on with only these slots, in this order."""
        rows = torch.as_tensor(np.asarray(indices, dtype=np.int64), device=self.device)
        self._target_return = self._target_return[rows]
        self._returns_to_go = self._returns_to_go[rows]
        self._timesteps = self._timesteps[rows]
        self._previous_actions = self._previous_actions[rows]
        self._states = [state and select_rows(state, rows) for state in self._states]
        if self._history is not None:
            window = Window(*(tensor[rows] for tensor in self._history.window))
            self._history = _History(window, self._history.count[rows])

    def _act_recurrent(self, observations: Tensor) -> Tensor:
        interleaved = self.config.model.token_layout == "interleaved"
        previous = None if interleaved and self._all_told else self._previous_actions
        predicted, self._states = self.model.step(
            self._returns_to_go, observations, previous, self._timesteps, self._states
        )
        self._all_told = not interleaved  # told in one go with the next timestep
        return self._bounded(predicted)

    def _act_window(self, observations: Tensor, history: _History) -> Tensor:
        place = history.append(observations, self._previous_actions, self._returns_to_go, self._timesteps)
        longest = int(history.count.max())
        predicted = self.model(Window(*(tensor[:, :longest] for tensor in history.window)))
        row = torch.arange(len(place), device=place.device)
        actions = self._bounded(predicted[row, place])
        history.window.actions[row, place] = actions
        return actions

    def _bounded(self, predicted: Tensor) -> Tensor:
        actions = self.model.denormalize_actions(predicted.float())
        return torch.clamp(actions, self.model.action_low, self.model.action_high)

    def _empty_history(self, num_envs: int) -> _History:
        config, shape = self.config.model, (num_envs, self.config.context_length)

        def zeros(*width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, *width, dtype=dtype, device=self.device)

        actions, previous = zeros(config.action_dim), zeros(config.action_dim)
        window = Window(zeros(config.observation_dim), actions, previous, zeros(), zeros(dtype=torch.int64))
        return _History(window, torch.zeros(num_envs, dtype=torch.int64, device=self.device))

    def _checked(self, name: str, array: np.ndarray, width: tuple[int, ...]) -> Tensor:
        values = np.asarray(array, dtype=np.float32)
        expected = (len(self._timesteps), *width)
        if values.shape != expected:
            raise ValueError(f"{name} has shape {values.shape}, this agent was reset for {expected}")
        finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if not finite.all():
            raise ValueError(f"{name} of environment {int(np.argmin(finite))} is not finite")
        return torch.from_numpy(values).to(self.device)
