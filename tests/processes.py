"""Commands of flowrl in real processes, which can be killed; and signals to this one."""

import io
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from flowrl.__main__ import main
from flowrl.signals import Stopped
from flowrl.training.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[1]

# New processes are forked from one that has imported what a command needs.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("flowrl.training.run", "flowrl.evaluation.command", "flowrl.data.command"),
        "torch._dynamo",  # of DistributedDataParallel
        "gymnasium.envs.mujoco.mujoco_rendering",  # starts a program of its own while it is imported
    ]
)


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


@contextmanager
def stopped_after(step: int, number: int = signal.SIGTERM) -> Iterator[pytest.ExceptionInfo[Stopped]]:
    """Send this process a signal inside update ``step``, which must stop the training."""
    update = Trainer.update

    def interrupted(self: Trainer) -> None:
        update(self)
        if self.step == step:
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        with pytest.raises(Stopped) as caught:
            yield caught
