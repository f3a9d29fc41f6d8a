"""Real trainings killed at random moments, resumed each time, end where an untouched one ends."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import Command, finish, wait_for
from tiny_training import arguments, assert_same_end, figures, steps_on_disk, train_here

UPDATES_PER_LIFE = 60  # more than a life of LONGEST_LIFE can do with slow writes: no life reaches the end
LONGEST_LIFE = 1.0  # seconds after the first output
OPTIONS = {
    "checkpoint_every": 5,
    "log_every": 3,
    "eval_every": 20,
    "eval_episodes": 1,
    "targets": 30,
    "schedule": "constant",
    "warmup_steps": 9,
}

# Every sync takes a while, as on a busy disk: a checkpoint's write becomes most of the time.
SLOW_WRITES = """
import os, time
fsync = os.fsync
def slow_fsync(descriptor):
    time.sleep(0.05)
    fsync(descriptor)
os.fsync = slow_fsync
"""

# The process kills itself just before or just after it changes the disk for the n-th time.
KILLED_AT_CHANGE = """
import os, signal
changes = {changes}
def counted(function):
    def call(*arguments, **options):
        global changes
        changes -= 1
        if changes == 0 and {before}:
            os.kill(os.getpid(), signal.SIGKILL)
        last = changes == 0
        try:
            return function(*arguments, **options)
        finally:  # a change that fails, such as making a folder that is there, counts as well
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
    return call
for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
"""


def kill_at_a_change(words: list[str], random: np.random.Generator) -> Command:
    """One process that kills itself in the middle of a write."""
    hook = KILLED_AT_CHANGE.format(changes=random.integers(1, 80), before=bool(random.integers(2)))
    return Command(words, hook)


def kill_from_outside(words: list[str], random: np.random.Generator) -> Command:
    """One process, killed at a random time after its first output, or before any."""
    process = Command(words, SLOW_WRITES)
    if random.random() < 0.8:
        wait_for(lambda: bool(process.output), process)
    time.sleep(random.uniform(0, LONGEST_LIFE))
    process.send_signal(signal.SIGKILL)
    return process


def train_through_kills(dataset: Path, folder: Path, kills: int, seed: int) -> int:
    """Compare the run that is killed so often with an untouched one; the number of kills inside a save."""
    steps = UPDATES_PER_LIFE * kills
    reference, run = folder / "reference", folder / "run"
    train_here(dataset, reference, steps=steps, **OPTIONS)
    first, random = ["train", *arguments(dataset, run, steps=steps, **OPTIONS)], np.random.default_rng(seed)
    inside_a_save = 0
    for life in range(kills):
        words = ["train", "--resume", str(run)] if (run / "config.yaml").exists() else first
        code, output, errors = finish((kill_at_a_change, kill_from_outside)[life % 2](words, random))
        assert code == -signal.SIGKILL, (output + errors)[-2000:]
        inside_a_save += any((run / "checkpoints").glob(".step-*.tmp"))
    code, output, errors = finish(Command(["train", "--resume", str(run)]))
    assert code == 0, (output + errors)[-2000:]
    assert_same_end(run, reference)
    assert steps_on_disk(run) == steps_on_disk(reference)
    assert figures(run, "train")[-1]["step"] == steps
    assert not list(run.glob(".*.tmp"))
    return inside_a_save


def test_three_kills_change_nothing(tiny_dataset, tmp_path):
    train_through_kills(tiny_dataset, tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thirty_kills_change_nothing(tiny_dataset, tmp_path):
    assert train_through_kills(tiny_dataset, tmp_path, kills=30, seed=1) >= 5
