"""Figures of a run, under the same names in ``metrics.jsonl`` and in TensorBoard."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flowrl.atomic import write_text
from flowrl.errors import UserError

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Appends JSON lines and TensorBoard events to a run folder.

    Each line holds ``kind`` (run, train, validation, evaluation or round), ``step``, and the figures.
    """

    def __init__(self, run_dir: Path, purge_step: int | None = None) -> None:
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir), purge_step=purge_step)
        self._report_thread = threading.excepthook
        threading.excepthook = self._thread_failed

    def write(self, kind: str, step: int, figures: Mapping[str, Any], group: str | None = None) -> None:
        """Append one line; numbers also go to TensorBoard as ``<group or kind>/<name>``."""
        line = json.dumps({"kind": kind, "step": step, **figures}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        for tag, value in tags(group or kind, figures).items():
            self._events.add_scalar(tag, value, step)

    def write_options(self, options: Mapping[str, Any], compared_by: Sequence[str]) -> None:
        """Show the options of the run in TensorBoard's HPARAMS beside its figures of these tags."""
        shown = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in options.items()
        }
        for summary in hparams(shown, dict.fromkeys(compared_by, 0.0)):
            self._events._get_file_writer().add_summary(summary)

    def sync(self) -> None:
        """Put everything written so far on disk."""
        os.fsync(self._file.fileno())
        self._events.flush()

    def close(self) -> None:
        try:
            self._file.close()
            self._events.close()
        finally:
            threading.excepthook = self._report_thread

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's writing thread: the next write raises the same error."""
        if not isinstance(failure.exc_value, OSError):
            self._report_thread(failure)


def tags(group: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the figures by their names in TensorBoard and other trackers, ``<group>/<name>``."""
    return {
        f"{group}/{name}": value
        for name, value in figures.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def read_metrics(run: Path, kind: str, figures: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return the lines of one kind of a run, in the order they were written.

    Each line has a step and these ``figures``, which are numbers. A last line cut off by a crash is left out.

    Raises:
        UserError: no such run, or a line that is not one of metrics.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run folder, it has no {METRICS_FILE}")
    lines = _lines(run, kind, figures)
    if not lines and path.stat().st_size > 0:
        raise UserError(f"{path}: line 1 is not a line of metrics")
    return [entry for _, entry in lines if entry["kind"] == kind]


def has_figures(run_dir: Path) -> bool:
    """Whether any update or evaluation was logged: anything after the first line, which describes the run."""
    return len(_lines(run_dir)) > 1


def rewind(run_dir: Path, step: int, evaluated_step: int) -> None:
    """Drop the lines that were written after a checkpoint: they will be written again.

    ``evaluated_step`` is the last step whose evaluation the checkpoint contains. A last line cut off by a
    crash is dropped too.

    Raises:
        UserError: a line that is not one of metrics.
    """
    last = {"evaluation": evaluated_step}
    kept = [line for line, entry in _lines(run_dir) if entry["step"] <= last.get(entry["kind"], step)]
    write_text(run_dir / METRICS_FILE, "".join(kept))


def _lines(run_dir: Path, kind: str = "", figures: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a run's metrics and what they hold; those of this kind have these figures."""
    path = run_dir / METRICS_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    *whole, _ = text.split("\n")  # what follows the last line's end was cut off
    found = []
    for number, line in enumerate(whole, start=1):
        try:
            entry = json.loads(line)
            names = ("step", *(figures if entry["kind"] == kind else ()))
            if not all(isinstance(entry[name], int | float) for name in names):
                raise TypeError("not a number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not a line of metrics") from error
        found.append((f"{line}\n", entry))
    return found
