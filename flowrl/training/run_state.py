"""The state of a run: all that a checkpoint holds, and that a resumed run continues from."""

import copy
import math
from collections import defaultdict
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

GUIDANCE = "guidance."  # begins the names of its tensors in a checkpoint


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
        tensors = {
            "random.sampler": self.sampler.generator.get_state(),
            "random.torch": torch.stack(self.ranks.gather(torch.get_rng_state())),
        }
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in entry.items()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.stack(self.ranks.gather(torch.cuda.get_rng_state(self.device)))
        if self.pending:
            tensors["pending"] = torch.stack(self.pending)
        if self.averaged:
            weights = self.model.named_parameters()
            tensors |= {f"model.{name}": value.detach().contiguous() for name, value in weights}
        if self.guidance is not None:
            tensors |= {f"{GUIDANCE}{name}": value for name, value in self.guidance.state_dict().items()}
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
            weights = saved.model | saved.part("model.")
            _load(self.agent, self.model, weights, f"{where}: {TRAINING_TENSORS}")
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
        state = _optimizer_state(saved, self.model)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step = saved.step
        self.evaluated_step = saved.training["evaluated_step"]
        if type(self.evaluated_step) is not int or not -1 <= self.evaluated_step <= self.step:
            raise ValueError(f"'evaluated_step' cannot be {short_repr(self.evaluated_step)}")
        scores = saved.training.get("best_scores", {})
        if not isinstance(scores, dict) or not all(
            isinstance(score, float) and math.isfinite(score) for score in scores.values()
        ):
            raise ValueError(f"'best_scores' cannot be {short_repr(scores)}")
        self.best_scores = scores


def _load(agent: Agent, model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy a file's tensors, once they are checked, into a model of the agent's shape."""
    model.load_state_dict(build_model(agent.config.model, tensors, where).state_dict())


def _optimizer_state(saved: Checkpoint, model: nn.Module) -> dict[int, dict[str, Tensor]]:
    """AdamW's state in a checkpoint.

    Raises:
        ValueError: it is not that of this model's parameters, which torch itself does not check.
    """
    tensors, state = saved.part("optimizer."), defaultdict[int, dict[str, Tensor]](dict)
    for index, parameter in enumerate(model.parameters() if saved.step > 0 else ()):
        for name, shape in (("step", ()), ("exp_avg", parameter.shape), ("exp_avg_sq", parameter.shape)):
            value = tensors.pop(f"{index}.{name}", None)
            if value is None or value.shape != shape or value.dtype != torch.float32:
                raise ValueError("the optimizer's tensors do not fit the model")
            state[index][name] = value
    if tensors:
        raise ValueError("the optimizer's tensors do not fit the model")
    return state
