"""The state of a run: all that a checkpoint holds, and that a resumed run continues from."""

import copy
import math
from reprlib import repr as short_repr
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.data.sampler import Batch, WindowSampler
from flowrl.errors import UserError
from flowrl.model.agent import Agent
from flowrl.model.checkpoint import TRAINING_TENSORS, Checkpoint
from flowrl.model.loading import agent_config_from_dict, build_model
from flowrl.model.transformer import TOKENS_PER_TIMESTEP
from flowrl.ranks import Ranks
from flowrl.training.config import TrainConfig
from flowrl.training.guidance import Guidance

_GUIDANCE = "guidance."


class RunState:
    """Weights, optimizer, random states and counters of a run, and the figures that are not logged yet.

    Updates change ``model``. The agent acts with an average of its weights where there is an ``ema_decay``,
    otherwise with the very same model.
    """

    def __init__(
        self,
        config: TrainConfig,
        agent: Agent,
        sampler: WindowSampler,
        device: torch.device,
        ranks: Ranks,
        guidance: Guidance | None = None,
    ) -> None:
        self.agent, self.sampler, self.device, self.ranks = agent, sampler, device, ranks
        self.guidance = guidance
        self.averaged = config.ema_decay > 0
        self.model = agent.model.to(device)
        if self.averaged:
            self.model = copy.deepcopy(agent.model)
            agent.model.requires_grad_(False)
        on_cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(config.learning_rate, device=device) if on_cuda else config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=on_cuda and ranks.size == 1,  # as only then steps are recorded
        )
        self.step = 0  # updates so far
        self.evaluated_step = -1
        self.best_scores: dict[str, float] = {}  # of --keep-best, by metric, target and episodes
        self.pending: list[Tensor] = []  # (loss, gradient norm) of each update since the last line of metrics
        self.timed_updates = self.timed_tokens = 0  # since that line, or since this process started
        self._unchecked: list[Tensor] = []  # spans of the batches whose loss is not known to be finite yet

    def record(self, figures: Tensor, batch: Batch) -> None:
        """Count an update with its (loss, gradient norm), (2,), which stays on its device."""
        self.pending.append(figures)
        self.timed_updates += 1
        self.timed_tokens += batch.num_timesteps * TOKENS_PER_TIMESTEP[self.agent.config.model.token_layout]
        self._unchecked.append(batch.spans)
        self.step += 1

    def first_not_finite(self) -> dict[str, Any] | None:
        """The first update since the last call whose loss or gradient is not finite: step, loss, windows.

        All ranks must call it together; each waits for its device once.
        """
        recent = self.pending[-len(self._unchecked) :] if self._unchecked else []
        finite = torch.stack(recent).isfinite().all(dim=1).tolist() if recent else []
        if all(finite):
            self._unchecked = []
            return None
        index = finite.index(False)
        spans = torch.cat(self.ranks.gather(self._unchecked[index])).tolist()
        step, loss = self.step - len(finite) + index + 1, str(recent[index][0].item())
        return {"step": step, "loss": loss, "windows": spans}

    def checkpoint(self) -> Checkpoint:
        """This very moment; all ranks must call it together."""
        tensors = {f"optimizer.{name}": value for name, value in self._optimizer_tensors().items()}
        tensors["random.sampler"] = self.sampler.generator.get_state()
        tensors["random.torch"] = torch.stack(self.ranks.gather(torch.get_rng_state()))
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.stack(self.ranks.gather(torch.cuda.get_rng_state(self.device)))
        if self.pending:
            tensors["pending"] = torch.stack(self.pending)
        if self.averaged:
            weights = self.model.named_parameters()
            tensors |= {f"model.{name}": value.detach().contiguous() for name, value in weights}
        if self.guidance is not None:
            tensors |= {f"{_GUIDANCE}{name}": value for name, value in self.guidance.state_dict().items()}
        training = {"evaluated_step": self.evaluated_step, "best_scores": self.best_scores}
        model = {name: value.contiguous() for name, value in self.agent.model.state_dict().items()}
        return Checkpoint(self.step, self.agent.config.to_dict(), model, training, tensors)

    def restore(self, saved: Checkpoint, where: str) -> None:
        """Continue from a checkpoint; ``where`` begins messages.

        Raises:
            UserError: it is of other data, or does not fit this run.
        """
        now, then = self.agent.config, agent_config_from_dict(saved.agent, where=f"{where}: agent.json")
        if then.dataset_sha256 != now.dataset_sha256:
            raise UserError(
                f"--resume {where}: trained on {then.dataset_id} (sha256 {then.dataset_sha256[:12]}), but "
                f"{now.dataset_id} now holds other data (sha256 {now.dataset_sha256[:12]})"
            )
        _load(self.agent, self.agent.model, saved.model, f"{where}: model")
        if self.averaged:  # checkpoints of runs without an average hold no other weights
            names = [name for name in saved.training_tensors if name.startswith("model.")]
            weights = {name.removeprefix("model."): saved.training_tensors[name] for name in names}
            _load(self.agent, self.model, {**saved.model, **weights}, f"{where}: {TRAINING_TENSORS}")
        states = saved.training_tensors.get("random.torch")
        if states is not None and states.ndim == 2 and len(states) != self.ranks.size:
            raise UserError(
                f"--resume {where}: was trained by {len(states)} processes and has to be resumed by as many, "
                f"not by {self.ranks.size}"
            )
        try:
            self._restore_training(saved)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"{where}: {TRAINING_TENSORS}: not the state of this training: {error}"
            ) from error

    def _restore_training(self, saved: Checkpoint) -> None:
        tensors = saved.training_tensors
        # Clones, as torch ignores where a view begins.
        torch.set_rng_state(tensors["random.torch"][self.ranks.rank].clone())
        self.sampler.generator.set_state(tensors["random.sampler"])
        if "random.cuda" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"][self.ranks.rank].clone(), self.device)
        pending = tensors.get("pending", torch.empty(0, 2))
        if pending.shape[1:] != (2,) or pending.dtype != torch.float32 or not pending.isfinite().all():
            raise ValueError("'pending' must hold pairs of finite numbers")
        self.pending = list(pending.to(self.device))
        state = _optimizer_state(tensors, self.model, started=saved.step > 0)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = saved.step
        self.evaluated_step = saved.training["evaluated_step"]
        if type(self.evaluated_step) is not int or not -1 <= self.evaluated_step <= self.step:
            raise ValueError(f"'evaluated_step' cannot be {short_repr(self.evaluated_step)}")
        self.best_scores = _scores(saved.training.get("best_scores", {}))

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def guidance_tensors(saved: Checkpoint) -> dict[str, Tensor]:
    """The state of value guidance in a checkpoint."""
    tensors = saved.training_tensors.items()
    return {name.removeprefix(_GUIDANCE): value for name, value in tensors if name.startswith(_GUIDANCE)}


def _load(agent: Agent, model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy a file's tensors, once they are checked, into a model of the agent's shape."""
    model.load_state_dict(build_model(agent.config.model, tensors, where).state_dict())


def _scores(values: object) -> dict[str, float]:
    if isinstance(values, dict) and all(isinstance(x, float) and math.isfinite(x) for x in values.values()):
        return values
    raise ValueError(f"'best_scores' cannot be {short_repr(values)}")


def _optimizer_state(
    tensors: dict[str, Tensor], model: nn.Module, started: bool
) -> dict[int, dict[str, Tensor]]:
    """AdamW's state from the ``optimizer.<parameter>.<name>`` tensors of a checkpoint.

    Raises:
        ValueError: it is not that of this model's parameters, which torch itself does not check.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith("optimizer."):
            _, index, name = full_name.split(".")
            state.setdefault(int(index), {})[name] = value
    shapes = {
        index: {name: x.shape for name, x in entry.items() if x.dtype == torch.float32}
        for index, entry in state.items()
    }
    fitting = {
        index: {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        for index, parameter in enumerate(model.parameters())
    }
    if shapes != (fitting if started else {}):
        raise ValueError("the optimizer's tensors do not fit the model")
    return state
