"""The training loop: updates, metrics, evaluations, checkpoints, and continuing exactly after a stop."""

import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flowrl.atomic import write_text
from flowrl.data import EpisodeDataset
from flowrl.data.sampler import WindowSampler
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import TargetResult, evaluate, format_table
from flowrl.model.agent import Agent
from flowrl.model.behavior_cloning import BehaviorCloningModel
from flowrl.model.checkpoint import (
    TRAINING_TENSORS,
    Checkpoint,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from flowrl.model.loading import agent_config_from_dict, agent_config_to_dict, build_model
from flowrl.model.transformer import TOKENS_PER_TIMESTEP, SequenceModel
from flowrl.native.accelerate import accelerate_training
from flowrl.ranks import ALONE, Ranks
from flowrl.signals import Stopped, StopSignals
from flowrl.training.config import TrainConfig, to_yaml
from flowrl.training.cuda_graph import CapturedStep
from flowrl.training.metrics import MetricsLog, has_figures, rewind
from flowrl.training.setup import build_agent, keep_freed_memory
from flowrl.window import Window

FINAL_LEARNING_RATE = 0.1  # of the peak, at the end of the cosine


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; the run folder holds the batch that did it."""


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """The learning rate of update ``step`` (from 0): linear warm-up, then the configured schedule."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


class Trainer:
    """One run: everything that a checkpoint must hold, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: EpisodeDataset,
        device: torch.device,
        signals: StopSignals,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.run_dir, self.device = config, run_dir, device
        self.signals, self.ranks = signals, ranks
        torch.manual_seed(config.seed)
        self.agent: Agent = build_agent(config, dataset)
        self.step = 0
        self.evaluated_step = -1
        self.results: list[TargetResult] = []
        self._pending: list[
            Tensor
        ] = []  # (loss, gradient norm) of each update since the last line of metrics
        self._pending_tokens = 0
        self._recent: list[Tensor] = []  # windows of batches not yet known to give a finite loss
        resumed = None
        if config.resume and (has_checkpoint(run_dir) or has_figures(run_dir)):
            resumed = load_checkpoint(run_dir, for_training=True)
        if resumed is not None:
            self._check_same_data(resumed, dataset)
            self.agent.model = build_model(self.agent.config.model, resumed.model, where=f"{run_dir}: model")
        self.model = self.agent.model.to(device)
        if config.ema_decay > 0:  # the agent acts with the average, updates change the model
            if resumed is not None:
                self.model = _weights_of_updates(resumed, self.agent).to(device)
            else:
                self.model = copy.deepcopy(self.agent.model)
            self.agent.model.requires_grad_(False)
        accelerate_training(self.model)
        on_cuda = device.type == "cuda"
        if not on_cuda:
            keep_freed_memory()
        self._in_bfloat16 = {"auto": on_cuda, "float32": False, "bfloat16": True}[config.precision]
        if on_cuda:
            if device.index is not None:
                torch.cuda.set_device(device)  # its streams are the current ones
            # The first updates are not captured; afterwards the optimiser is part of a graph.
            warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=torch.tensor(config.learning_rate, device=device) if on_cuda else config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=on_cuda,
        )
        self.sampler = WindowSampler(
            dataset, self.agent.config.context_length, config.batch_size, config.seed, device, ranks
        )
        if ranks.rank > 0:  # each process draws its own dropout
            torch.manual_seed(config.seed + ranks.rank)
        if resumed is not None:
            self._restore(resumed)
        self.metrics = self._open_metrics(dataset, started=resumed is not None) if ranks.is_first else None
        self._loss: Callable[[Window], Tensor] = _Loss(self.model)
        if ranks.size > 1:
            self._loss = DistributedDataParallel(_Loss(self.model))
        if config.compile:
            self._loss = torch.compile(self._loss)
        self._gradient_step: Callable[..., Tensor] = self._step_eagerly
        if on_cuda and ranks.size == 1:
            self._gradient_step = CapturedStep(self._step_eagerly, self.agent.config.context_length)
        self._last_log = time.perf_counter()

    def _open_metrics(self, dataset: EpisodeDataset, started: bool) -> MetricsLog:
        """Write the configuration and make the figures on disk those of updates before this moment."""
        config, run_dir = self.config, self.run_dir
        if started:
            rewind(run_dir, self.step, self.evaluated_step)
            print(f"resuming {run_dir} at step {self.step}")
        elif config.resume:
            rewind(run_dir, -1, -1)
            print(f"resuming {run_dir} at its beginning: it was stopped before its first checkpoint")
        write_text(run_dir / "config.yaml", to_yaml(replace(config, run_dir=run_dir)))
        metrics = MetricsLog(run_dir, purge_step=self.step + 1 if config.resume else None)
        if not started:
            identity = {"dataset_id": dataset.dataset_id, "dataset_sha256": dataset.sha256}
            environment = {"environment": dataset.environment and dataset.environment.to_dict()}
            metrics.write("run", 0, {**identity, **environment})
            metrics.write_text("config", f"```\n{to_yaml(config)}```")
            metrics.write_text("dataset", f"{dataset.dataset_id} sha256 {dataset.sha256}")
        return metrics

    def run(self) -> list[TargetResult]:
        """Train to the last step, evaluating, logging and saving on the way."""
        config = self.config
        print(f"run folder {self.run_dir}, device {self.device}")
        quiet = None if self.ranks.is_first else True
        with tqdm(total=config.steps, initial=self.step, unit="update", disable=quiet) as progress:
            while True:
                if self._evaluation_due():
                    self._evaluate(progress)
                at_end = self.step >= config.steps
                if at_end or self.step % config.checkpoint_every == 0:
                    self.save()
                if received := self.ranks.largest(self.signals.received or 0):
                    self.save()
                    print(f"stopped at step {self.step}; continue with --resume {self.run_dir}")
                    raise Stopped(128 + received)  # of whichever rank got it
                if at_end:
                    return self.results
                self.update()
                progress.update()
                if self.step % config.log_every == 0 or self.step >= config.steps:
                    progress.set_postfix(loss=f"{self.log():.4f}", refresh=False)

    def update(self) -> None:
        """One gradient step. Nothing here waits for the device."""
        self.model.train()
        batch = self.sampler.sample()
        learning_rate = learning_rate_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if self.ranks.size == 1:
            figures = self._gradient_step(*batch.window)
        else:
            figures = self._step_eagerly(*batch.window, share=batch.share)
        if self.config.ema_decay > 0:
            self._average_weights()
        self._pending.append(figures)
        layout = self.agent.config.model.token_layout
        self._pending_tokens += batch.num_timesteps * TOKENS_PER_TIMESTEP[layout]
        self._recent.append(batch.spans)
        self.step += 1

    def _step_eagerly(self, *window: Tensor, share: float = 1.0) -> Tensor:
        """Learn from a window's tensors; return (loss, gradient norm) of all ranks."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._in_bfloat16):
            loss = self._loss(Window(*window)) * share
        (loss * self.ranks.size).backward()  # DistributedDataParallel averages over ranks
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack((self.ranks.sum(loss.detach()), norm))

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Move the averaged weights towards those of this update. Source: arXiv 2310.11428."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.agent.model.parameters()), list(self.model.parameters()), 1 - decay)

    def log(self) -> float:
        """Write a line of metrics about the updates since the last one; return their mean loss."""
        self._check_finite()
        now = time.perf_counter()
        elapsed, updates = now - self._last_log, len(self._pending)
        loss, norm = torch.stack(self._pending).mean(dim=0).tolist()
        figures = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": learning_rate_at(self.step - 1, self.config),
            "tokens_per_second": self._pending_tokens / elapsed,
            "updates_per_second": updates / elapsed,
        }
        self._write("train", figures)
        self._pending, self._pending_tokens, self._last_log = [], 0, now
        return loss

    def save(self) -> None:
        """Write a checkpoint of this very moment."""
        self._check_finite()
        tensors = {f"optimizer.{name}": value for name, value in self._optimizer_tensors().items()}
        tensors["random.sampler"] = self.sampler.generator_state
        tensors["random.torch"] = torch.stack(self.ranks.gather(torch.get_rng_state()))
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.stack(self.ranks.gather(torch.cuda.get_rng_state(self.device)))
        if self.metrics is None:
            return
        self.metrics.sync()
        if self._pending:
            tensors["pending"] = torch.stack(self._pending)
        training = {"evaluated_step": self.evaluated_step, "pending_tokens": self._pending_tokens}
        model = {name: value.contiguous() for name, value in self.agent.model.state_dict().items()}
        if self.config.ema_decay > 0:
            weights = {f"model.{name}": value.detach() for name, value in self.model.named_parameters()}
            tensors |= {name: value.contiguous() for name, value in weights.items()}
        agent = agent_config_to_dict(self.agent.config)
        save_checkpoint(
            self.run_dir, Checkpoint(self.step, agent, model, training, tensors), self.config.keep_checkpoints
        )

    def close(self) -> None:
        """Close the files of figures, and let go of what must not outlive the process group."""
        del self._loss, self._gradient_step  # bound to this object in a circle, it would stay until the exit
        if self.metrics is not None:
            self.metrics.close()

    def _write(self, kind: str, figures: dict[str, Any], group: str | None = None) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, self.step, figures, group)

    def _evaluation_due(self) -> bool:
        every, at_end = self.config.eval_every, self.step >= self.config.steps
        due = at_end or (every > 0 and self.step > 0 and self.step % every == 0)
        return due and self.config.eval_episodes > 0 and (self.evaluated_step < self.step or at_end)

    def _evaluate(self, progress: tqdm) -> None:
        """Roll out the agent as it is now; a signal interrupts at once, after a checkpoint."""
        environment, started = self.agent.environment, time.perf_counter()
        assert environment is not None  # load_dataset saw to it
        self._check_finite()
        targets, reference = self.agent.config.targets, self.agent.config.reference
        try:
            # Several processes finish an evaluation together, and stop after it.
            with self.signals.interruptible() if self.ranks.size == 1 else nullcontext():
                results = evaluate(
                    self.agent,
                    environment,
                    targets,
                    self.config.eval_episodes,
                    self.config.seed,
                    reference,
                    self.ranks,
                )
        except BaseException:  # stopped, or an environment that fails: neither may cost any update
            if self.ranks.size == 1:  # several cannot meet any more
                self.save()
            raise
        seconds = time.perf_counter() - started
        if self.evaluated_step < self.step:
            for result in results:
                figures = {"target_return": result.target_return, "seconds": seconds, **result.summary()}
                finite = {name: value for name, value in figures.items() if math.isfinite(value)}
                group = f"evaluation/target-{result.target_return:g}"
                self._write("evaluation", finite, group)
        self.evaluated_step, self.results = self.step, results
        where = f"step {self.step}, {environment.env_id}, acting {self.agent.acting}, {seconds:.1f} s"
        progress.write(f"{where}\n{format_table(results)}")
        self._last_log += time.perf_counter() - started  # speeds count training alone

    def _check_finite(self) -> None:
        """Raise if an update since the last call had a non-finite loss; one wait for the device."""
        unchecked = self._pending[-len(self._recent) :] if self._recent else []
        finite = torch.stack(unchecked).isfinite().all(dim=1).tolist() if unchecked else []
        if not all(finite):
            index = finite.index(False)
            step, loss = self.step - len(finite) + index + 1, str(unchecked[index][0].item())
            # All ranks come here together, as the loss is of all.
            spans = torch.cat(self.ranks.gather(self._recent[index]))
            path = self.run_dir / "nonfinite.json"
            if self.ranks.is_first:
                record = {"step": step, "loss": loss, "windows": spans.tolist()}
                write_text(path, json.dumps(record) + "\n")
            raise NonFiniteLossError(
                f"step {step}: the loss or its gradient is not finite; the batch is in {path}"
            )
        self._recent = []

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state = self.optimizer.state_dict()["state"]
        return {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}

    def _check_same_data(self, resumed: Checkpoint, dataset: EpisodeDataset) -> None:
        saved = agent_config_from_dict(resumed.agent, where=f"{self.run_dir}: agent.json")
        if saved.dataset_sha256 != dataset.sha256:
            raise UserError(
                f"--resume {self.run_dir}: trained on {saved.dataset_id} "
                f"(sha256 {saved.dataset_sha256[:12]}), but {dataset.dataset_id} now holds other data "
                f"(sha256 {dataset.sha256[:12]})"
            )

    def _restore(self, resumed: Checkpoint) -> None:
        where = f"{self.run_dir}: {TRAINING_TENSORS}"
        tensors = dict(resumed.training_tensors)
        try:
            states = tensors.pop("random.torch")
            if len(states) != self.ranks.size:
                raise ValueError(f"{len(states)} processes trained it, these are {self.ranks.size}")
            torch.set_rng_state(states[self.ranks.rank].clone())  # it ignores where a view begins
            self.sampler.generator_state = tensors.pop("random.sampler")
            if "random.cuda" in tensors and self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["random.cuda"][self.ranks.rank].clone(), self.device)
            pending = tensors.pop("pending", torch.empty(0, 2))
            if pending.shape[1:] != (2,) or pending.dtype != torch.float32 or not pending.isfinite().all():
                raise ValueError("'pending' must hold pairs of finite numbers")
            self._pending = list(pending.to(self.device))
            state = _optimizer_state(tensors, self.model, started=resumed.step > 0)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.step = resumed.step
            self.evaluated_step = _count(resumed.training, "evaluated_step", lowest=-1, highest=self.step)
            self._pending_tokens = _count(resumed.training, "pending_tokens", lowest=0, highest=1 << 53)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{where}: not the state of this training: {error}") from error


def _weights_of_updates(resumed: Checkpoint, agent: Agent) -> SequenceModel | BehaviorCloningModel:
    """A model of the weights that updates change; checkpoints without an average hold no others."""
    saved = resumed.training_tensors
    weights = {name.removeprefix("model."): value for name, value in saved.items() if name[:6] == "model."}
    return build_model(agent.config.model, {**resumed.model, **weights}, where=f"{TRAINING_TENSORS}: model")


def _count(training: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    value = training[name]
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"'{name}' cannot be {short_repr(value)}")
    return value


class _Loss(nn.Module):
    """A model's loss as a module's forward, which is what DistributedDataParallel hooks into."""

    def __init__(self, model: SequenceModel | BehaviorCloningModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: Window) -> Tensor:
        return self.model.loss(window)


def _optimizer_state(
    tensors: dict[str, Tensor], model: nn.Module, started: bool
) -> dict[int, dict[str, Tensor]]:
    """AdamW's state from the ``optimizer.<parameter>.<name>`` tensors of a checkpoint.

    Raises:
        ValueError: it is not that of this model's parameters; torch itself would not look.
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
        raise ValueError("the optimiser's tensors do not fit the model")
    return state
