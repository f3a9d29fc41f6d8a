"""What a benchmark run found: rows against goals and the measurements behind them, as JSON and Markdown."""

import json
import platform
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from timing import Spread, Timing

from flowrl.atomic import write_text
from flowrl.report.table import markdown_table

Unit = Literal["x", "%", "ms"]


@dataclass(frozen=True)
class Goal:
    """A bound on the measured value, in the row's unit."""

    value: float
    at_least: bool = True

    def is_met(self, measured: float) -> bool:
        return measured >= self.value if self.at_least else measured <= self.value


@dataclass(frozen=True)
class Row:
    """One line of the table: ``measured`` is how ``what`` compares with ``against``."""

    what: str
    against: str
    unit: Unit
    measured: Spread | None
    """None where the row was skipped."""
    goal: Goal | None = None
    """None where the figure is for information."""
    skipped: str = ""
    """Why nothing was measured."""

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without a goal or a measurement."""
        return self.goal.is_met(self.measured.median) if self.goal and self.measured else None


@dataclass(frozen=True)
class Measurement:
    """One contender in one case: the seconds of a call, and the peak memory of a process that makes it."""

    contender: str
    case: str
    size: int
    """What the call processes: tokens of attention, timesteps of an update, windows, environment steps."""
    seconds: Timing
    peak_memory_bytes: int | None = None
    """None where it was not measured."""


@dataclass
class Section:
    """What one part of the benchmark found, filled while it runs."""

    name: str
    seconds: float = 0.0
    """Wall time of this section."""
    rows: list[Row] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Notes for reading the figures."""
    profiles: dict[str, str] = field(default_factory=dict)
    """Plain-text tables that say where the time goes, by title."""


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, threads, GPU, versions, date."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "numpy", "mujoco", "gymnasium")},
    }


def to_json(sections: list[Section], machine: dict[str, Any], repetitions: int) -> str:
    """Return everything, samples included, as a JSON document."""
    by_name = {}
    for section in sections:
        entry = asdict(section)
        by_name[entry.pop("name")] = entry
        for row, row_entry in zip(section.rows, entry["rows"], strict=True):
            row_entry["met"] = row.met
    document = {"machine": machine, "repetitions": repetitions, "sections": by_name}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


def to_markdown(sections: list[Section], machine: dict[str, Any], repetitions: int) -> str:
    """Return the table with goal and measured columns, then the measurements, notes and profiles."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, GPU {machine['gpu'] or 'none'}; "
        f"Python {machine['python']}, {versions}; {machine['date']}. "
        f"Medians over {repetitions} interleaved rounds, quartiles in parentheses.",
        "",
        markdown_table(
            ["what", "against", "goal", "measured", ""],
            [row_cells(row) for section in sections for row in section.rows],
        ),
    ]
    for section in sections:
        if section.measurements or section.profiles:
            lines += ["", f"## {section.name}"]
        if section.measurements:
            header = ["case", "contender", "time", "per second", "peak memory"]
            lines += ["", markdown_table(header, [_measurement_cells(m) for m in section.measurements])]
        if section.notes:
            lines += ["", *(f"- {note}" for note in section.notes)]
        for title, profile in section.profiles.items():
            lines += ["", f"{title}:", "", "```", profile.rstrip(), "```"]
    return "\n".join(lines).rstrip() + "\n"


def row_cells(row: Row) -> list[str]:
    """Return the row's cells of the Markdown table."""
    goal = ""
    if row.goal is not None:
        goal = f"{'≥' if row.goal.at_least else '≤'} {row.goal.value:g}{_suffix(row.unit)}"
    if row.measured is None:
        measured = f"skipped: {row.skipped}"
    else:
        value = row.measured
        measured = f"{_number(value.median)}{_suffix(row.unit)}"
        measured += f" ({_number(value.low)} to {_number(value.high)})"
    return [row.what, row.against, goal, measured, {None: "", True: "met", False: "missed"}[row.met]]


def write_report(path: Path, sections: list[Section], machine: dict[str, Any], repetitions: int) -> None:
    """Write ``path`` with .json and .md added to its name, each whole or not at all."""
    write_text(path.with_name(path.name + ".json"), to_json(sections, machine, repetitions))
    write_text(path.with_name(path.name + ".md"), to_markdown(sections, machine, repetitions))


def _measurement_cells(measurement: Measurement) -> list[str]:
    value, memory = measurement.seconds, measurement.peak_memory_bytes
    seconds = f"{_number(1e3 * value.median)} ms ({_number(1e3 * value.low)} to {_number(1e3 * value.high)})"
    return [
        measurement.case,
        measurement.contender,
        seconds,
        _rate(measurement.size / value.median),
        "" if memory is None else f"{memory / 2**20:,.1f} MiB",
    ]


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value / 1e9:,.1f} billion" if value >= 1e9 else f"{value:,.0f}"


def _suffix(unit: Unit) -> str:
    return {"x": "x", "%": "%", "ms": " ms"}[unit]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
