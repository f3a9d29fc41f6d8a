"""How far a planned run has come, read from its folder, and the process that brings it further."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from ctypes import CDLL
from pathlib import Path
from signal import SIGTERM

from flowrl.errors import UserError
from flowrl.model.checkpoint import has_checkpoint, load_checkpoint
from flowrl.sweeps.plan import PlannedRun
from flowrl.training.config import parse_train_config, to_arguments
from flowrl.training.metrics import METRICS_FILE

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
_TAIL = 1 << 14  # bytes; several lines of metrics
_PR_SET_PDEATHSIG = 1


def train_arguments(run: PlannedRun) -> list[str]:
    """Return the arguments of scripts/train.py that start the run, or go on with what its folder holds."""
    started = (run.run_dir / "config.yaml").is_file()
    return ["--resume" if started else "--run-dir", str(run.run_dir), *to_arguments(run.config)]


def check_startable(run: PlannedRun) -> None:
    """Raise a UserError when the run's folder holds a run with other options than the planned ones."""
    parse_train_config(train_arguments(run))


def is_finished(run: PlannedRun) -> bool:
    """Whether a whole checkpoint of the last update is there, evaluated if that was asked for."""
    if not has_checkpoint(run.run_dir):
        return False
    try:
        checkpoint = load_checkpoint(run.run_dir, for_training=True)
    except UserError:
        return False  # damaged; going on with it says what is wrong
    evaluated = run.config.eval_episodes == 0 or checkpoint.training.get("evaluated_step") == checkpoint.step
    return checkpoint.step >= run.config.steps and evaluated


def last_step(run_dir: Path) -> int:
    """The last update in the run's metrics; 0 when there is none yet. Cheap enough to ask every second."""
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # being written, or cut by the limit
    return 0


def log_path(run: PlannedRun) -> Path:
    """Where a run's output goes: beside its folder, which must be empty when training starts."""
    return run.run_dir.with_name(f"{run.run_dir.name}.log")


def start_training(run: PlannedRun, environment: Mapping[str, str]) -> subprocess.Popen:
    """Start or continue the run in a process of its own, with ``environment`` over this process's variables.

    The process is out of the terminal's reach (one signal is enough, a second would kill it), and is asked
    to save and stop when this one dies.
    """
    log = log_path(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    libc = CDLL(None) if sys.platform == "linux" else None

    def stop_with_parent() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, SIGTERM)

    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(TRAIN_SCRIPT), *train_arguments(run)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": _python_path(), **environment},
            start_new_session=True,
            preexec_fn=stop_with_parent,
        )


def failure_of(run: PlannedRun, exit_code: int) -> str | None:
    """Return one line on why the run is not finished after its process ended, None when it is."""
    if exit_code == 0 and is_finished(run):
        return None
    log = log_path(run)
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"{run.name}: exit code {exit_code}: {last} (log: {log})"


def _python_path() -> str:
    """The package's own folder first, so that a child runs this very code."""
    paths = [str(TRAIN_SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)
