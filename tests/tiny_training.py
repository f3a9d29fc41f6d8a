"""Trainings that take a second, in this process, and their comparison."""

import json
from pathlib import Path
from typing import Any

from flowrl.training.metrics import METRICS_FILE
from flowrl.training.run import Run, run_train

OPTIONS: dict[str, Any] = {
    "env": "Hopper-v4",
    "max_episode_steps": 15,
    "device": "cpu",
    "embed_dim": 8,
    "num_heads": 2,
    "num_layers": 2,
    "context_length": 6,
    "batch_size": 4,
    "steps": 60,
    "checkpoint_every": 10,
    "log_every": 7,
    "eval_every": 25,
    "eval_episodes": 2,
    "targets": "30 5",
}
TIMES = ("tokens_per_second", "updates_per_second", "seconds")  # all that may differ between equal runs


def flags(options: dict[str, Any]) -> list[str]:
    """Words of a command line; the values of an option are a list or separated by spaces."""
    words: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else str(value).split()
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def arguments(dataset: Path, run: Path, **options: Any) -> list[str]:
    """Command-line arguments of a tiny training; ``options`` win."""
    return ["--dataset", str(dataset), "--run-dir", str(run), *flags({**OPTIONS, **options})]


def train_here(dataset: Path, run: Path, **options: Any) -> Run:
    """Train in this process."""
    return run_train(arguments(dataset, run, **options))


def resume_here(run: Path, **options: Any) -> Run:
    """Continue a run in this process."""
    return run_train(["--resume", str(run), *flags(options)])


def figures(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all, without the times."""
    entries = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [
        {name: value for name, value in entry.items() if name not in TIMES}
        for entry in entries
        if kind in (None, entry["kind"])
    ]


def steps_on_disk(run: Path) -> list[str]:
    """Names of everything in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_same_end(run: Path, reference: Path, part: str = "") -> None:
    """Bit for bit: weights, optimiser, random states, counters (through their hashes), and all metrics."""
    assert figures(run) == figures(reference)
    last = steps_on_disk(reference / part)[-1]
    assert steps_on_disk(run / part)[-1] == last
    path = Path(part, "checkpoints", last, "manifest.json")
    assert (run / path).read_text() == (reference / path).read_text()
