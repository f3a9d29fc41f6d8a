"""The training loop: sample, loss, backward, clip, step, average, log, evaluate, save."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flowrl.atomic import write_text
from flowrl.data import EpisodeDataset
from flowrl.data.dataset import held_out
from flowrl.data.sampler import WindowSampler
from flowrl.envs.failures import failures_kept
from flowrl.errors import UserError, one_line
from flowrl.evaluation.evaluate import TargetResult, evaluate, format_table
from flowrl.model.action_model import ActionModel
from flowrl.model.agent import Agent
from flowrl.model.checkpoint import (
    BEST,
    Checkpoint,
    delete_later_checkpoints,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from flowrl.native.accelerate import accelerate_training
from flowrl.ranks import ALONE, Ranks
from flowrl.signals import Stopped, StopSignals
from flowrl.training.callbacks import Callback
from flowrl.training.config import TrainConfig, to_yaml
from flowrl.training.cuda_graph import CapturedStep
from flowrl.training.guidance import Guidance, learn_guidance
from flowrl.training.metrics import METRICS_FILE, MetricsLog, has_figures, rewind
from flowrl.training.run_state import GUIDANCE, RunState
from flowrl.training.setup import Stream, batch_size, build_agent, evaluation_seed, resolve, stream_seed
from flowrl.window import Window

FINAL_LEARNING_RATE = 0.1  # of the peak, at the end of the cosine
VALIDATION_BATCHES = 10  # of the size of an update's


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
    """One run: its state, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: EpisodeDataset,
        device: torch.device,
        signals: StopSignals,
        ranks: Ranks = ALONE,
        callbacks: Sequence[Callback] = (),
        say: Callable[[str], None] = tqdm.write,
        no_bar: bool | None = None,  # None: a bar only on a terminal
        agent: Agent | None = None,  # trained before; None: a new one for the data
    ) -> None:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # its streams are the current ones
        self.config = config = resolve(config, device)
        self.run_dir, self.device = run_dir, device
        self.signals, self.ranks = signals, ranks
        self.callbacks, self.stop_wanted = callbacks, False
        self._new_best = False  # kept since the last checkpoint
        self._say = say
        self._no_bar = no_bar if ranks.is_first else True
        self.results: list[TargetResult] = []
        dataset, validation = held_out(dataset, config.validation_fraction)
        torch.manual_seed(stream_seed(config.seed, Stream.WEIGHTS))
        agent = agent or build_agent(config, dataset, device)
        started = config.resume is not None and (has_checkpoint(run_dir) or has_figures(run_dir))
        saved = load_checkpoint(run_dir, for_training=True) if started else None
        guidance = self._learn_guidance(dataset, agent, saved) if config.q_weight > 0 else None
        context, seed = agent.config.context_length, stream_seed(config.seed, Stream.BATCHES)
        sampler = WindowSampler(dataset, context, batch_size(config, dataset), seed, device, ranks)
        self.validation: WindowSampler | None = None
        if validation is not None:
            self.validation = WindowSampler(validation, context, sampler.batch_size, seed=0, device=device)
        self.state = RunState(config, agent, sampler, device, ranks, guidance)
        accelerate_training(self.state.model)
        torch.manual_seed(stream_seed(config.seed, Stream.DROPOUT, ranks.rank))
        if saved is not None:
            self.state.restore(saved, where=str(run_dir))
            if self.step > config.steps:
                raise UserError(f"--steps {config.steps}: {run_dir} has {self.step} updates already")
        self.metrics = self._open_metrics(dataset, started) if ranks.is_first else None
        self._loss: nn.Module | Callable[[Window], Tensor] = _Loss(self.state.model, guidance)
        if ranks.size > 1:
            self._loss = DistributedDataParallel(self._loss)
        if config.compile:
            self._loss = torch.compile(self._loss)
        self._captured: CapturedStep | None = None
        if device.type == "cuda" and ranks.size == 1:
            # The first updates are not captured; afterwards the optimizer is part of a graph.
            warnings.filterwarnings("ignore", message=".*constructed with capturable=True")
            self._captured = CapturedStep(self._gradient_step)
        self._last_log = time.perf_counter()

    def _learn_guidance(self, dataset: EpisodeDataset, agent: Agent, saved: Checkpoint | None) -> Guidance:
        """Learn critics, or take those of the checkpoint."""
        seed = stream_seed(self.config.seed, Stream.CRITICS)
        weights = None if saved is None else saved.part(GUIDANCE)
        if weights is None:
            self._say("value guidance: learning critics first")
        with self.signals.interruptible():
            guidance = learn_guidance(dataset, agent.model, self.config.q_weight, seed, weights)
        self._say(
            f"value guidance: mean cosine between the gradients of two critics {guidance.agreement:.2f}"
        )
        return guidance.to(self.device)

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def at_end(self) -> bool:
        return self.step >= self.config.steps

    def run(self) -> list[TargetResult]:
        """Train to the last update, or until a callback returns True, then close; return the last evaluation.

        Raises:
            Stopped: after SIGINT or SIGTERM, once a checkpoint is saved.
        """
        progress = tqdm(total=self.config.steps, initial=self.step, unit="update", disable=self._no_bar)
        with closing(self), progress:
            self._call("on_start", self.run_dir, asdict(self.config))
            self._evaluate_if_due()  # as it was when the run was stopped
            stopped = self._save_if_due()  # a new run's first checkpoint
            while not self.at_end and not stopped:
                self.update()
                progress.update()
                self._log_if_due(progress)
                self._validate_if_due()
                self._evaluate_if_due()
                stopped = self._save_if_due()
        return self.results

    def update(self) -> None:
        """Sample, learn from the batch, average the weights.

        No tensor's value is read, so that a GPU computes while the next update is prepared.
        """
        config, state = self.config, self.state
        state.model.train()
        batch = state.sampler.sample()
        _set_learning_rate(state.optimizer, learning_rate_at(self.step, config))
        if self._captured is not None:
            figures = self._captured(batch.window)
        else:
            figures = self._gradient_step(batch.window, batch.share)
        if config.ema_decay > 0:
            self._average_weights()
        state.record(figures, batch)

    def _gradient_step(self, window: Window, share: float = 1.0) -> Tensor:
        """Loss, backward, clip, step; return (loss, gradient norm) of all ranks, (2,).

        ``share`` is that of the update's timesteps which are in this rank's window.
        """
        in_bfloat16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bfloat16):
            loss = self._loss(window) * share
        (loss * self.ranks.size).backward()  # DistributedDataParallel averages over ranks
        norm = nn.utils.clip_grad_norm_(self.state.model.parameters(), self.config.gradient_clip)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        return torch.stack((self.ranks.sum(loss.detach()), norm))

    @torch.no_grad()
    def _average_weights(self) -> None:
        """Move the averaged weights towards those of this update. Source: arXiv 2310.11428."""
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        averaged, current = self.state.agent.model.parameters(), self.state.model.parameters()
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)

    def _log_if_due(self, progress: tqdm) -> None:
        """Write a line of metrics about the updates since the last one."""
        if self.step % self.config.log_every != 0 and not self.at_end:
            return
        self._check_finite()
        state, now = self.state, time.perf_counter()
        elapsed = now - self._last_log
        loss, norm = torch.stack(state.pending).mean(dim=0).tolist()
        figures = {
            "loss": loss,
            "gradient_norm": norm,
            "learning_rate": learning_rate_at(self.step - 1, self.config),
            "tokens_per_second": state.timed_tokens / elapsed,
            "updates_per_second": state.timed_updates / elapsed,
        }
        self._write("train", figures)
        self._call("on_log", self.step, figures)
        progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        state.pending, state.timed_updates, state.timed_tokens, self._last_log = [], 0, 0, now

    @torch.no_grad()
    def _validate_if_due(self) -> None:
        """Write the loss of the agent as it is now on windows spaced evenly over the held-out episodes."""
        if self.validation is None or not self._evaluation_due:
            return
        self._check_finite()
        model, windows = self.state.agent.model.eval(), VALIDATION_BATCHES * self.validation.batch_size
        numbers = np.linspace(0, self.validation.num_windows - 1, windows).astype(np.int64)
        total, timesteps = 0.0, 0
        for some in np.split(numbers, VALIDATION_BATCHES):
            batch = self.validation.gather(some)
            total += float(model.loss(batch.window)) * batch.num_timesteps
            timesteps += batch.num_timesteps
        self._write("validation", {"loss": total / timesteps})
        self._call("on_validation", self.step, total / timesteps)

    @property
    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        return self.at_end or (every > 0 and self.step > 0 and self.step % every == 0)

    def _evaluate_if_due(self) -> None:
        """Roll out the agent as it is now; a signal interrupts at once, after a checkpoint."""
        agent, config = self.state.agent, self.config
        done = self.state.evaluated_step == self.step and not self.at_end
        if not self._evaluation_due or done or config.eval_episodes == 0:
            return
        assert agent.environment is not None  # checked by load_dataset
        self._check_finite()
        seed, started = evaluation_seed(config), time.perf_counter()
        # Several processes finish an evaluation together, and stop after it.
        interruptible = self.signals.interruptible() if self.ranks.size == 1 else nullcontext()
        with self._saved_at_a_failure():
            with interruptible:
                results = evaluate(
                    agent,
                    agent.environment,
                    agent.config.targets,
                    config.eval_episodes,
                    seed,
                    agent.config.reference,
                    self.ranks,
                )
            seconds = time.perf_counter() - started
            new = self.state.evaluated_step < self.step
            if new:
                for number, result in enumerate(results, start=1):
                    figures = {**result.to_dict(), "seed": seed, "seconds": seconds}
                    self._write("evaluation", figures, f"evaluation/target{number}")
                self._keep_if_best(results[0])
            self.state.evaluated_step, self.results = self.step, results
            where = f"step {self.step}, {agent.environment.env_id}, acting {agent.acting}, {seconds:.1f} s"
            where += "" if new else f"; {METRICS_FILE} keeps its first evaluation"
            self._say(f"{where}\n{format_table(results)}")
        if new:
            self._call("on_evaluation", self.step, results)
        self._last_log += time.perf_counter() - started  # speeds count training alone

    @contextmanager
    def _saved_at_a_failure(self) -> Iterator[None]:
        """Lose no update where the process is stopped, an environment fails, or a pipe is closed."""
        try:
            with failures_kept(self.run_dir):
                yield
        except BaseException as error:
            if self.ranks.size == 1:  # several cannot meet any more
                self.save()
            self._say_if_stopped(error)
            raise

    def _keep_if_best(self, result: TargetResult) -> None:
        """Save a checkpoint to the folder of the best one, labelled, if no earlier evaluation was as high."""
        metric = self.config.keep_best
        if metric is None:
            return
        kind = f"{metric} at target {result.target_return:g}, {len(result.returns)} episodes"
        score, best = result.to_dict().get(metric), self.state.best_scores.get(kind)
        if score is None:
            raise UserError(
                f"--keep-best {metric}: evaluations of this environment have none; continue with "
                f"--resume {self.run_dir} --keep-best None"
            )
        if best is not None and score <= best:
            return
        checkpoint = self.checkpoint()
        chosen_by = (
            f"{metric} {score:.4g} of {len(result.returns)} episodes in training's own evaluations, "
            f"the highest of those compared up to update {self.step}"
        )
        agent = {**checkpoint.agent, "chosen_by": chosen_by}
        if self.ranks.is_first:  # an agent to act with; training continues from the last checkpoint
            alone = replace(checkpoint, agent=agent, training={}, training_tensors={})
            save_checkpoint(self.run_dir / BEST, alone, keep=2)  # until the run has its score
        self.state.best_scores[kind] = score  # once it is saved
        self._new_best = True

    def _save_if_due(self) -> bool:
        """Save where a checkpoint is due, or before stopping; return whether a callback stops training."""
        due = self.at_end or self.step % self.config.checkpoint_every == 0 or self._new_best
        if due:
            self.save()
            self._new_best = False
        wanted = self.signals.received or int(self.stop_wanted)  # no signal that is handled has number 1
        wanted = self.ranks.largest(wanted)  # of whichever rank has one
        if wanted and not due:
            self.save()
        if wanted > 1:
            stopped = Stopped(128 + wanted)
            self._say_if_stopped(stopped)
            raise stopped
        return wanted == 1

    def _say_if_stopped(self, error: BaseException) -> None:
        if isinstance(error, Stopped):
            self._say(f"stopped at step {self.step}; continue with --resume {self.run_dir}")

    def checkpoint(self) -> Checkpoint:
        """All that a resumed run continues from; all ranks must call it together."""
        return self.state.checkpoint()

    def save(self) -> None:
        """Write a checkpoint of this very moment."""
        self._check_finite()
        checkpoint = self.checkpoint()
        if self.metrics is not None:
            self.metrics.sync()
            folder = save_checkpoint(self.run_dir, checkpoint, self.config.keep_checkpoints)
            self._call("on_checkpoint", self.step, folder)

    def close(self) -> None:
        """Close the files of figures, and drop what must not outlive the process group."""
        self._captured = None  # refers to this object in a circle
        del self._loss
        if self.metrics is not None:
            self.metrics.close()

    def _check_finite(self) -> None:
        """Raise if an update since the last call had a non-finite loss; one wait for the device."""
        record = self.state.first_not_finite()
        if record is None:
            return
        path = self.run_dir / "nonfinite.json"
        if self.ranks.is_first:
            write_text(path, json.dumps(record) + "\n")
        raise NonFiniteLossError(
            f"step {record['step']}: the loss or its gradient is not finite; the batch is in {path}"
        )

    def _call(self, event: str, *arguments: Any) -> None:
        """Call every callback; one that returns True stops the training after this update's checkpoint."""
        for callback in self.callbacks if self.ranks.is_first else ():
            try:
                answer = getattr(callback, event)(*arguments)
            except BrokenPipeError:  # of the output
                raise
            except OSError as error:  # its own file or connection, not the run folder
                where = f"{type(callback).__name__}.{event}"
                raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
            if isinstance(answer, bool | np.bool_) and answer:  # NumPy's is what comparing a mean gives
                self.stop_wanted = True

    def _write(self, kind: str, figures: dict[str, Any], group: str | None = None) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, self.step, figures, group)

    def _open_metrics(self, dataset: EpisodeDataset, started: bool) -> MetricsLog:
        """Write the configuration and make the figures on disk those of updates before this moment."""
        config, run_dir = self.config, self.run_dir
        self._say(f"run folder {run_dir}, device {self.device}")
        if config.resume:
            step, evaluated_step = (self.step, self.state.evaluated_step) if started else (-1, -1)
            rewind(run_dir, step, evaluated_step)
            delete_later_checkpoints(run_dir / BEST, evaluated_step)
            beginning = "its beginning: it was stopped before its first checkpoint"
            self._say(f"resuming {run_dir} at {f'step {step}' if started else beginning}")
        write_text(run_dir / "config.yaml", to_yaml(replace(config, run_dir=run_dir)))
        metrics = MetricsLog(run_dir, purge_step=self.step + 1 if config.resume else None)
        if not started:
            identity = {"dataset_id": dataset.dataset_id, "dataset_sha256": dataset.sha256}
            environment = {"environment": dataset.environment and asdict(dataset.environment)}
            metrics.write("run", 0, {**identity, **environment})
            compared = ("train/loss", f"evaluation/target1/{config.keep_best or 'return_mean'}")
            metrics.write_options(asdict(config), compared)
        return metrics


class _Loss(nn.Module):
    """A model's loss as a module's forward, which is what DistributedDataParallel hooks into."""

    def __init__(self, model: ActionModel, guidance: Guidance | None) -> None:
        super().__init__()
        self.model, self.guidance = model, guidance

    def forward(self, window: Window) -> Tensor:
        return self.model.loss(window, self.guidance)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # which a CUDA graph reads
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
