"""The process that trains a planned run, and whether the run is finished."""

import os
import subprocess
import sys
from collections.abc import Mapping
from ctypes import CDLL
from functools import partial
from pathlib import Path
from signal import SIGTERM

from flowrl.errors import UserError
from flowrl.model.checkpoint import has_checkpoint, load_checkpoint
from flowrl.sweeps.plan import PlannedRun
from flowrl.training.config import to_arguments

# The folder that this package was imported from: training processes import the same code.
PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


def train_arguments(run: PlannedRun) -> list[str]:
    """Return the arguments of ``flowrl train`` that start the run, or resume it where it has begun."""
    started = (run.run_dir / "config.yaml").is_file()
    return ["--resume" if started else "--run-dir", str(run.run_dir), *to_arguments(run.config)]


def is_finished(run: PlannedRun) -> bool:
    """Whether there is a whole checkpoint of the last update, evaluated where the run has evaluations."""
    if not has_checkpoint(run.run_dir):
        return False
    try:
        checkpoint = load_checkpoint(run.run_dir, for_training=True)
    except UserError:
        return False  # damaged: resuming reports what is wrong
    evaluated = run.config.eval_episodes == 0 or checkpoint.training.get("evaluated_step") == checkpoint.step
    return checkpoint.step == run.config.steps and evaluated


def log_path(run: PlannedRun) -> Path:
    """The file of a run's output: beside its folder, which must be empty when training starts."""
    return run.run_dir.with_name(f"{run.run_dir.name}.log")


def start_training(run: PlannedRun, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start or resume the run in a process of its own, with ``environment`` over this process's variables.

    The process is in a session of its own, so that the terminal's Ctrl-C reaches the sweep alone. On Linux
    it receives SIGTERM, upon which it saves and stops, when this process dies.
    """
    log = log_path(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    stop_with_parent = None
    if sys.platform == "linux":
        stop_with_parent = partial(CDLL(None).prctl, _PR_SET_PDEATHSIG, SIGTERM)
    with log.open("ab") as output:
        return subprocess.Popen(
            # -P: a folder called flowrl in the working directory must not come before the package.
            [sys.executable, "-P", "-m", "flowrl", "train", *train_arguments(run)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": python_path(), **environment},
            start_new_session=True,
            preexec_fn=stop_with_parent,
        )


def failure_of(run: PlannedRun, exit_code: int) -> str | None:
    """Return one line on why the run is not finished after its process ended, None when it is finished."""
    if exit_code == 0 and is_finished(run):
        return None
    log = log_path(run)
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{run.name}: exit code {exit_code}: {last} (log: {log})"


def python_path() -> str:
    """PYTHONPATH with this package's folder first."""
    return os.pathsep.join(filter(None, (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
