"""What a sweep would do and how long it would take, measured from a few updates of each kind of run."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flowrl.data import EpisodeDataset
from flowrl.model.agent import Agent
from flowrl.model.loading import pick_device
from flowrl.signals import StopSignals
from flowrl.sweeps.plan import PlannedRun
from flowrl.sweeps.state import last_step
from flowrl.training.config import TrainConfig
from flowrl.training.setup import load_dataset
from flowrl.training.trainer import Trainer

_UPDATES = 4  # measured, after one that is not
_ACTS = 8  # measured, after enough to fill a window


@dataclass(frozen=True)
class Cost:
    """Seconds of one update and of one evaluation that goes on to the time limit."""

    update: float
    evaluation: float


def measure_costs(runs: list[PlannedRun], threads: int, signals: StopSignals) -> dict[tuple[str, str], Cost]:
    """Time a few updates and acting steps for each (dataset, method) of the runs, on ``threads`` threads."""
    torch.set_num_threads(threads)
    costs: dict[tuple[str, str], Cost] = {}
    dataset: EpisodeDataset | None = None
    loaded_from = None
    for run in sorted(runs, key=lambda run: run.dataset):
        config = run.config
        source = (config.dataset, config.env, config.reward_mode, config.top_fraction)
        if (run.dataset, run.method) in costs:
            continue
        if dataset is None or source != loaded_from:
            dataset, loaded_from = load_dataset(run.config), source
        costs[run.dataset, run.method] = _measure(run.config, dataset, signals)
    return costs


def remaining_seconds(run: PlannedRun, cost: Cost) -> float:
    """Time that the run still needs: an upper bound for evaluations, whose episodes may end early."""
    config, done = run.config, min(last_step(run.run_dir), run.config.steps)
    every = config.eval_every or config.steps
    evaluations = -(-config.steps // every) - done // every if config.eval_episodes else 0
    return (config.steps - done) * cost.update + evaluations * cost.evaluation


def format_plan(
    runs: list[PlannedRun], finished: set[str], costs: dict[tuple[str, str], Cost], jobs: int
) -> str:
    """Return the plan as a table, one line per run, and the time that it needs with ``jobs`` at a time."""
    rows = [("run", "state", "updates left", "batch_size", "timesteps per update", "time")]
    total = 0.0
    for run in runs:
        done = min(last_step(run.run_dir), run.config.steps)
        seconds = 0.0
        if run.name not in finished:
            seconds = remaining_seconds(run, costs[run.dataset, run.method])
        total += seconds
        state = "finished" if run.name in finished else ("started" if run.run_dir.exists() else "new")
        left = 0 if run.name in finished else run.config.steps - done
        timesteps = str(run.timesteps) if run.timesteps else "-"
        rows.append((run.name, state, str(left), str(run.config.batch_size), timesteps, _duration(seconds)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    summary = (
        f"{len(runs)} runs, {len(finished)} finished, {len(runs) - len(finished)} to do: "
        f"about {_duration(total / jobs)} with {jobs} at a time ({_duration(total)} one after another), by "
        f"{_UPDATES} updates of each kind of run; evaluations as if all episodes went on to the time limit"
    )
    return "\n".join([*lines, summary])


def _measure(config: TrainConfig, dataset: EpisodeDataset, signals: StopSignals) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        trainer = Trainer(
            replace(config, run_dir=run_dir), run_dir, dataset, pick_device(config.device), signals
        )
        try:
            trainer.update()
            _wait(trainer.device)
            started = time.perf_counter()
            for _ in range(_UPDATES):
                trainer.update()
            _wait(trainer.device)
            update = (time.perf_counter() - started) / _UPDATES
            evaluation = 0.0
            if config.eval_episodes:
                acts = trainer.agent.config.model.max_timesteps
                evaluation = acts * _seconds_per_act(trainer.agent, config.eval_episodes)
        finally:
            trainer.close()
    return Cost(update, evaluation)


def _seconds_per_act(agent: Agent, episodes: int) -> float:
    """Seconds of one step of all episodes of all targets, once a window of context is full."""
    targets = np.repeat(agent.config.targets, episodes)
    agent.reset(len(targets), targets)
    observations = np.zeros((len(targets), agent.config.model.observation_dim), np.float32)
    rewards = np.zeros(len(targets), np.float32)
    filling = min(agent.config.context_length, 50) if agent.acting == "window" else 1
    for _ in range(filling):
        agent.act(observations, rewards)
    started = time.perf_counter()
    for _ in range(_ACTS):
        agent.act(observations, rewards)
    return (time.perf_counter() - started) / _ACTS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min"
