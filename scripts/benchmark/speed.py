"""The benchmark program: every section in one run, results written as each section ends."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as flowrl's commands do, before torch is imported

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from attention import measure_attention
from gpu import measure_gpu
from plots import draw_report
from profiling import measure_profile
from rollouts import measure_rollouts
from sampling import measure_sampling
from tables import Section, describe_machine, row_cells, write_report
from update import measure_update
from workload import Sizes

from flowrl.errors import UserError, exit_on_user_error
from flowrl.process import prepare_process
from flowrl.report.table import markdown_row

SectionName = Literal["attention", "update", "sampling", "rollouts", "profile", "gpu"]

MEASURES: dict[SectionName, Callable[[Sizes, int], Section]] = {
    "attention": measure_attention,
    "update": measure_update,
    "sampling": measure_sampling,
    "rollouts": measure_rollouts,
    "profile": measure_profile,
    "gpu": measure_gpu,
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Measure speed and memory against the baselines, side by side; write JSON, a table and plots."""

    only: tuple[SectionName, ...] = ()
    """Sections to run; all by default."""
    repetitions: int = 7
    """Rounds in which the contenders take turns; medians and quartiles are over rounds."""
    output: Path | None = None
    """Name of the results without an ending, .json, .md and .png are added; by default
    results/benchmarks/cpu (gpu where there is one), with the sections' names where --only is given."""
    sizes: Sizes = field(default_factory=Sizes)


def run_benchmarks(config: BenchmarkConfig) -> list[Section]:
    """Run the sections and write their results; a failure keeps those of the sections before it.

    Raises:
        UserError: no repetition, or a place that cannot be written to.
    """
    if config.repetitions < 1:
        raise UserError(f"--repetitions {config.repetitions}: must be at least 1")
    names = config.only or tuple(MEASURES)
    output = config.output or default_output(config.only)
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; give a name inside it, such as {output / 'cpu'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written there: {error.strerror}") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: cannot be written there; give a name in a writable folder")
    prepare_process()
    machine, sections = describe_machine(), []
    for name in names:
        started = time.perf_counter()
        section = MEASURES[name](config.sizes, config.repetitions)
        section.seconds = time.perf_counter() - started
        sections.append(section)
        print(f"{name}: {section.seconds:.0f} s", flush=True)
        for row in section.rows:
            print(markdown_row(row_cells(row)), flush=True)
        write_report(output, sections, machine, config.repetitions)
    drawn = draw_report(output, sections)
    print(f"results in {output}.json, {output}.md" + (f", {output}.png" if drawn else ""))
    if not drawn:
        print("no plots: they need matplotlib: pip install -e '.[plots]'")
    return sections


def default_output(only: tuple[str, ...]) -> Path:
    """results/benchmarks/cpu or gpu; a part of the benchmark never replaces the results of the whole."""
    device = "gpu" if torch.cuda.is_available() else "cpu"
    return Path("results/benchmarks") / "-".join((device, *only))


def parse_benchmark_config(arguments: list[str] | None = None) -> BenchmarkConfig:
    """Parse the command line, ``sys.argv`` by default."""
    return tyro.cli(BenchmarkConfig, args=arguments)


def main() -> None:
    """Parse the command line and measure; exits with 2 on bad input."""
    config = parse_benchmark_config()
    with exit_on_user_error():
        run_benchmarks(config)


if __name__ == "__main__":
    main()
