"""Trainings that take a second: in this process, or in real ones that can be killed; and their comparison."""

import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from flowrl.__main__ import main
from flowrl.evaluation.evaluate import TargetResult
from flowrl.training.metrics import METRICS_FILE
from flowrl.training.run import run_train
from flowrl.training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[1]
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

# New processes are forked from one that has imported what a command needs.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("flowrl.training.run", "flowrl.evaluation.command", "flowrl.data.command"),
        "torch._dynamo",  # of DistributedDataParallel
        "gymnasium.envs.mujoco.mujoco_rendering",  # starts a program of its own while it is imported
    ]
)


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


def train_here(dataset: Path, run: Path, **options: Any) -> list[TargetResult]:
    """Train in this process."""
    return run_train(arguments(dataset, run, **options)).results


def resume_here(run: Path, **options: Any) -> list[TargetResult]:
    """Continue a run in this process."""
    return run_train(["--resume", str(run), *flags(options)]).results


def stop_after(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal inside update ``step``."""
    update = Trainer.update

    def interrupted(self: Trainer) -> None:
        update(self)
        if self.step == step:
            signal.raise_signal(number)

    patch.setattr(Trainer, "update", interrupted)


class Command:
    """``flowrl WORDS`` in a process of its own, after ``hook``, which may replace parts of the program."""

    def __init__(self, words: list[str], hook: str = "", limit: int | None = None) -> None:
        readers, writers = zip(*(PROCESSES.Pipe(duplex=False) for _ in range(2)), strict=True)
        started = (words, hook, limit, dict(os.environ), os.getcwd(), *writers)
        self.process = PROCESSES.Process(target=_run, args=started)
        self.process.start()
        self.output, self.errors = "", ""
        self.threads = [
            Thread(target=self._read, args=(name, reader))
            for name, reader in zip(("output", "errors"), readers, strict=True)
        ]
        for writer, thread in zip(writers, self.threads, strict=True):
            writer.close()
            thread.start()

    def _read(self, name: str, reader: Any) -> None:
        with open(os.dup(reader.fileno())) as file:
            for line in file:
                setattr(self, name, getattr(self, name) + line)

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it did not end"
        for thread in self.threads:
            thread.join()
        return self.output, self.errors


def _run(
    words: list[str], hook: str, limit: int | None, environment: dict[str, str], folder: str, *outputs: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True))
    if limit is not None:  # bytes, of any file that is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    exec(hook, {})
    sys.exit(main(words))


def finish(process: Command, timeout: float = 200) -> tuple[int | None, str, str]:
    """Wait for the end of a process; its exit code, output and errors. Never a traceback."""
    output, errors = process.communicate(timeout=timeout)
    assert "Traceback" not in errors, errors
    return process.returncode, output, errors


def wait_for(condition: Callable[[], bool], process: Command, timeout: float = 200) -> None:
    """Wait until the condition holds while the process runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.returncode is None, process.communicate()
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


def assert_same_end(run: Path, reference: Path, part: str = "") -> None:
    """Bit for bit: weights, optimiser, random states, counters (through their hashes), and all metrics."""
    assert figures(run) == figures(reference)
    last = steps_on_disk(reference / part)[-1]
    assert steps_on_disk(run / part)[-1] == last
    path = Path(part, "checkpoints", last, "manifest.json")
    assert (run / path).read_text() == (reference / path).read_text()
