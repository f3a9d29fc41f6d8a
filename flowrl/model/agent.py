"""The agent: a trained model, all that it needs to act, and its state in the episodes under way."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from pydantic.dataclasses import dataclass
from torch import Tensor

from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.model.action_model import ActingState
from flowrl.model.behavior_cloning import BehaviorCloningConfig, BehaviorCloningModel
from flowrl.model.checkpoint import save_agent
from flowrl.model.transformer import ModelConfig, SequenceModel
from flowrl.native.accelerate import accelerate_acting
from flowrl.options import STRICT, Size
from flowrl.window import Window

AgentName = Literal["transformer", "bc"]
Acting = Literal["recurrent", "window"]
Conditioning = Literal["return-to-go", "target"]


@dataclass(frozen=True, config=STRICT)
class AgentConfig:
    """What travels with the weights, so that an agent acts without its dataset."""

    model: ModelConfig | BehaviorCloningConfig
    context_length: Size
    """Timesteps of the longest window seen in training."""
    full_episodes: bool
    """Whether windows were whole episodes."""
    targets: tuple[float, ...]
    """Target returns to evaluate at."""
    reward_mode: Literal["dense", "delayed"] = "dense"
    conditioning: Conditioning = "return-to-go"
    """What actions are conditioned on while acting: the target less what was earned, or the target itself."""
    acting: Acting | None = None
    """How it acts by default; None: recurrently after whole episodes, else on windows."""
    dataset_id: str = ""
    dataset_sha256: str = ""
    environment: EnvironmentSpec | None = None
    reference: ReferenceScores | None = None
    chosen_by: str = ""
    """The evaluation that this checkpoint was chosen by, if it was: its score there is optimistic."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as in ``agent.json``."""
        agent: AgentName = "bc" if isinstance(self.model, BehaviorCloningConfig) else "transformer"
        return {"agent": agent, **asdict(self)}


class Agent:
    """Acts in many environments at once, one slot each, or in a single one.

    ``recurrent`` acting carries the attention state: constant time and memory per timestep under
    Flow-Attention, exact over the whole episode so far. ``window`` acting recomputes the last
    ``context_length`` timesteps.
    """

    def __init__(
        self,
        model: SequenceModel | BehaviorCloningModel,
        config: AgentConfig,
        *,
        acting: Acting | None = None,
        conditioning: Conditioning | None = None,
        temperature: float = 0.0,
        noise: float = 0.0,
        checkpoint_step: int | None = None,
    ) -> None:
        self.model = model
        by_default: Acting = "recurrent" if config.full_episodes or not model.has_memory else "window"
        self.config = replace(
            config, acting=acting or config.acting, conditioning=conditioning or config.conditioning
        )
        self.acting: Acting = self.config.acting or by_default
        self.conditioning = self.config.conditioning
        self.temperature = temperature  # of discrete actions, drawn; 0 takes the likeliest
        self.noise = noise  # standard deviation, on continuous actions of bounds -1 and 1
        self.checkpoint_step = checkpoint_step
        self._state: ActingState | None = None

    @property
    def environment(self) -> EnvironmentSpec | None:
        return self.config.environment

    @property
    def device(self) -> torch.device:
        return self.model.observation_mean.device

    def to(self, device: str | torch.device) -> Self:
        """Move to another device; :meth:`reset` comes next."""
        self.model.to(device)
        self._state = None
        return self

    def save(self, folder: str | Path) -> None:
        """Write what :func:`flowrl.load_agent` needs to a new folder: safetensors and JSON.

        The loaded agent acts as this one does, but for ``temperature`` and ``noise``.

        Raises:
            UserError: the folder is there already, or cannot be written.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_agent(Path(folder), self.checkpoint_step or 0, self.config.to_dict(), tensors)

    @torch.inference_mode()
    def reset(
        self,
        num_envs: int | None,
        target_return: float | np.ndarray,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.DISABLED,
    ) -> None:
        """Start an episode in each of ``num_envs`` environments; None: in a single one, without a batch axis.

        Args:
            num_envs: number of slots.
            target_return: one finite number, or one per slot.
            autoreset_mode: how the vector environment starts an episode after another, where :meth:`act` is
                given ``terminations`` and ``truncations``: Gymnasium's ``envs.metadata["autoreset_mode"]``
                or its value. NextStep: the step after an episode's last only resets; SameStep and Disabled:
                the observation that comes with the end is already the next episode's first.

        Raises:
            ValueError: a target that is not finite, or an unknown mode.
        """
        self._batched, slots = num_envs is not None, 1 if num_envs is None else num_envs
        try:
            self._resets_on_next_step = AutoresetMode(autoreset_mode) is AutoresetMode.NEXT_STEP
        except ValueError as error:
            modes = ", ".join(mode.value for mode in AutoresetMode)
            raise ValueError(f"autoreset_mode {autoreset_mode!r}: expected one of {modes}") from error
        self.model.eval()
        if self.acting == "recurrent":
            accelerate_acting(self.model)
        self._target_return = torch.zeros(slots, device=self.device)
        self._returns_to_go = torch.zeros(slots, device=self.device)
        self._timesteps = torch.zeros(slots, dtype=torch.int64, device=self.device)
        self._ended = np.zeros(slots, dtype=bool)  # and not restarted yet
        self._state = self.model.start(slots)
        self._history: Window | None = None  # in window acting, the last timesteps of each slot
        self.set_target(target_return)

    @torch.inference_mode()
    def set_target(self, target_return: float | np.ndarray) -> None:
        """Aim at ``target_return`` from now on, one finite number or one per slot, in mid-episode too.

        What an episode has earned already counts towards its target.
        """
        if not np.isfinite(target_return).all():
            raise ValueError(f"target_return {target_return}: must be finite")
        targets = np.broadcast_to(np.asarray(target_return, dtype=np.float32), len(self._target_return))
        target = torch.tensor(targets, device=self.device)
        self._returns_to_go += target - self._target_return
        self._target_return = target

    @torch.inference_mode()
    def act(
        self,
        observations: np.ndarray,
        rewards: np.ndarray | float | None = None,
        terminations: np.ndarray | bool | None = None,
        truncations: np.ndarray | bool | None = None,
    ) -> np.ndarray:
        """Return the actions of all slots.

        Continuous ones are float32 (num_envs, action_dim) within the action bounds. Discrete ones are int64
        (num_envs,), or (num_envs, components) for a MultiDiscrete space, counted from 0. Environments of
        :mod:`flowrl.envs.vector` take them as they are, others with spaces that begin elsewhere, hold whole
        numbers or have other shapes in :class:`flowrl.envs.vector.FlatActions`. Without a batch axis (see
        :meth:`reset`), every array lacks its first axis.

        Args:
            observations: (num_envs, observation_dim).
            rewards: (num_envs,) earned by the last actions; ignored at an episode's first timestep, where it
                may be None.
            terminations: (num_envs,) bool, of the environments' last step; slots whose episode ended start
                anew. Needed only where environments reset themselves.
            truncations: likewise.

        Raises:
            RuntimeError: before :meth:`reset`.
            ValueError: a shape that does not fit, a NaN or infinity (the message names the slot), or rewards
                missing where the return-to-go depends on them.
        """
        if self._state is None:
            raise RuntimeError("call reset(num_envs, target_return) before act")
        observed = self._checked("observations", observations, (self.config.model.observation_dim,))
        self._start_ended_episodes(terminations, truncations)
        subtracts = self.config.reward_mode == "dense" and self.conditioning == "return-to-go"
        if self.model.has_memory and subtracts:
            if rewards is not None:
                earned = self._checked("rewards", rewards, ())
                self._returns_to_go -= torch.where(self._timesteps > 0, earned, 0)
            elif bool((self._timesteps > 0).any()):
                raise ValueError("rewards of the last actions are needed after an episode's first timestep")
        if self.acting == "window":
            actions = self._act_window(observed, self._state.previous_actions)
        else:
            arguments = (observed, self._returns_to_go, self._timesteps)
            outputs, self._state = self.model.step(*arguments, self._state)
            actions = self._chosen(outputs)
        self._timesteps += 1
        self._state = self._state._replace(previous_actions=actions)
        if choices := self.model.action_choices:
            actions = self.model.action_indices(actions)
            actions = actions[:, 0] if len(choices) == 1 else actions
        answer = actions.cpu().numpy().copy()  # a copy, since the caller may change it
        return answer if self._batched else answer[0]

    @torch.inference_mode()
    def took(self, actions: np.ndarray) -> None:
        """State what was done instead of what :meth:`act` just returned, as where another controller acts.

        Args:
            actions: (num_envs, action_dim); of discrete ones the one-hot vectors.
        """
        assert self._state is not None
        taken = self._checked("actions", actions, (self.config.model.action_dim,)).clone()
        self._state = self._state._replace(previous_actions=taken)
        if self._history is not None:
            row = torch.arange(len(taken), device=self.device)
            self._history.actions[row, self._history.valid.sum(dim=1) - 1] = taken

    @torch.inference_mode()
    def restart(self, finished: np.ndarray) -> None:
        """Forget the episodes of the slots where the (num_envs,) bool mask holds; they start anew."""
        assert self._state is not None
        rows = torch.as_tensor(np.asarray(finished, dtype=bool), device=self.device)
        self._state = self.model.restart(self._state, rows, self._timesteps)
        self._returns_to_go = torch.where(rows, self._target_return, self._returns_to_go)
        self._timesteps.masked_fill_(rows, 0)
        if self._history is not None:
            self._history.valid.masked_fill_(rows[:, None], False)

    @torch.inference_mode()
    def keep(self, indices: np.ndarray) -> None:
        """Continue with only these slots: their indices, in this order, or a mask of all."""
        assert self._state is not None
        rows = torch.as_tensor(np.arange(len(self._ended))[indices], device=self.device)
        self._target_return = self._target_return[rows]
        self._returns_to_go = self._returns_to_go[rows]
        self._timesteps = self._timesteps[rows]
        self._ended = self._ended[indices]
        self._state = self._state.keep(rows)
        if self._history is not None:
            self._history = self._history.rows(rows)

    def _start_ended_episodes(self, terminations: object, truncations: object) -> None:
        ended = np.zeros_like(self._ended)
        for flags in (terminations, truncations):
            if flags is not None:
                ended |= np.asarray(flags, dtype=bool).reshape(-1)
        # In NEXT_STEP mode an end comes with its own last observation, the next step returns the first one.
        starting = self._ended if self._resets_on_next_step else ended
        if starting.any():
            self.restart(starting)
        self._ended = ended

    def _chosen(self, outputs: Tensor) -> Tensor:
        """Actions (batch, action_dim) from the model's outputs, explored around where there is noise."""
        if self.noise > 0 and not self.model.action_choices:
            outputs = outputs + self.noise * torch.randn_like(outputs)
        return self.model.to_actions(outputs, self.temperature)

    def _act_window(self, observed: Tensor, previous: Tensor) -> Tensor:
        """Append a timestep to each slot's window, dropping the oldest of a full one, and predict from it."""
        valid = torch.ones_like(self._timesteps, dtype=torch.bool)
        entry = Window(
            observed, torch.zeros_like(previous), previous, self._returns_to_go, self._timesteps, valid
        )
        if self._history is None:
            length = self.config.context_length
            self._history = Window(*(x.new_zeros(len(x), length, *x.shape[1:]) for x in entry))
        history = self._history
        full = history.valid.all(dim=1)
        for tensor in history:  # without a wait for the device
            rows = full.view(-1, *(1,) * (tensor.ndim - 1))
            tensor.copy_(torch.where(rows, tensor.roll(-1, dims=1), tensor))
        place = history.valid.sum(dim=1) - full.long()
        row = torch.arange(len(place), device=place.device)
        for tensor, value in zip(history, entry, strict=True):
            tensor[row, place] = value
        longest = int(place.max()) + 1
        outputs = self.model(Window(*(tensor[:, :longest] for tensor in history)))
        actions = self._chosen(outputs[row, place])
        history.actions[row, place] = actions
        return actions

    def _checked(self, name: str, array: np.ndarray | float, width: tuple[int, ...]) -> Tensor:
        values = np.asarray(array, dtype=np.float32)
        expected = (len(self._timesteps), *width) if self._batched else width
        if values.shape != expected:
            raise ValueError(f"{name} has shape {values.shape}, this agent was reset for {expected}")
        values = values.reshape(len(self._timesteps), *width)
        finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if not finite.all():
            raise ValueError(f"{name} of environment {int(np.argmin(finite))} is not finite")
        return torch.from_numpy(values).to(self.device)
