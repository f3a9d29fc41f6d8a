"""Trainings that take a second: in this process, or in real ones that can be killed; and their comparison."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowrl.evaluation.evaluate import TargetResult
from flowrl.training.config import parse_train_config
from flowrl.training.metrics import METRICS_FILE
from flowrl.training.run import train

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIONS: dict[str, Any] = {
    "env": "Hopper-v4",
    "device": "cpu",
    "embed-dim": 8,
    "num-heads": 2,
    "num-layers": 2,
    "context-length": 6,
    "batch-size": 4,
    "steps": 60,
    "checkpoint-every": 10,
    "log-every": 7,
    "eval-every": 25,
    "eval-episodes": 2,
    "targets": "30 5",
}
TIMES = ("tokens_per_second", "updates_per_second", "seconds")  # all that may differ between equal runs

# Runs scripts/train.py after some lines that may replace parts of the program.
PROGRAM = """
import runpy, sys
{hook}
sys.argv[0] = "train.py"
runpy.run_path({script!r}, run_name="__main__")
"""


def arguments(dataset: Path, run: Path, **options: Any) -> list[str]:
    """Command-line arguments of a tiny training; ``options`` win, with ``_`` for ``-``."""
    merged = {**OPTIONS, **{name.replace("_", "-"): value for name, value in options.items()}}
    flags = [word for name, value in merged.items() for word in (f"--{name}", *str(value).split())]
    return ["--dataset", str(dataset), "--run-dir", str(run), *flags]


def train_here(dataset: Path, run: Path, **options: Any) -> list[TargetResult]:
    """Train in this process."""
    return train(parse_train_config(arguments(dataset, run, **options)))


def resume_here(run: Path, **options: Any) -> list[TargetResult]:
    """Continue a run in this process."""
    flags = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", *str(value).split())
    ]
    return train(parse_train_config(["--resume", str(run), *flags]))


def start(words: list[str], hook: str = "", limit: Callable[[], None] | None = None) -> subprocess.Popen:
    """Start ``python scripts/train.py`` with these arguments in a process of its own."""
    program = PROGRAM.format(hook=hook, script=str(REPOSITORY / "scripts" / "train.py"))
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
    )


def finish(process: subprocess.Popen, timeout: float = 200) -> tuple[int, str, str]:
    """Wait for the end of a process; its exit code, output and errors. Never a traceback."""
    output, errors = process.communicate(timeout=timeout)
    assert "Traceback" not in errors, errors
    return process.returncode, output, errors


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 200) -> None:
    """Wait until the condition holds while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


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


def assert_same_end(run: Path, reference: Path) -> None:
    """Bit for bit: weights, optimiser, random states, counters (through their hashes), and all metrics."""
    assert figures(run) == figures(reference)
    last = steps_on_disk(reference)[-1]
    assert steps_on_disk(run)[-1] == last
    manifests = [(folder / "checkpoints" / last / "manifest.json").read_text() for folder in (run, reference)]
    assert manifests[0] == manifests[1]
