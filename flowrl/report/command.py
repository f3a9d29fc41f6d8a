"""The command line of a report: which runs, what is compared, where the files go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flowrl.atomic import write_text
from flowrl.errors import UserError, did_you_mean
from flowrl.report.plots import draw_report
from flowrl.report.runs import RunResult, check_comparable, load_runs
from flowrl.report.statistics import RESAMPLES
from flowrl.report.table import (
    Results,
    aggregate_table,
    improvement_table,
    markdown_table,
    score_table,
    speed_table,
)

# Options of interest to a reader, named where all runs agree on them.
_SETTINGS = ("steps", "embed_dim", "num_layers", "num_heads", "learning_rate", "dropout", "eval_episodes")
_SCORES = (
    "Normalised scores (100 is D4RL's expert; returns where said so): mean ± standard error over seeds "
    "(number of seeds) of each run's mean over episodes, at the first of its targets. Bold: the highest mean."
)
_IMPROVEMENT = (
    "Probability that a run of the row's method scores higher than one of the column's, averaged over the "
    "same datasets:"
)
_STATISTICS = (
    f"Interquartile mean, stratified bootstrap ({RESAMPLES:,} resamples within datasets, percentiles) and "
    "probability of improvement as in Agarwal et al. 2021 (arXiv 2108.13264)."
)
_BEST = (
    "Chosen with hindsight, over all evaluated updates and target returns of a run: optimistic, not to be "
    "compared with the table above."
)


@dataclass(frozen=True)
class ReportConfig:
    """Write the tables and pictures of finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of sweeps, of runs, or of many runs."""
    output: Path = Path("results/report")
    """Folder to write report.md and the pictures to."""
    methods: tuple[str, ...] = ()
    """Only these methods, in this order."""
    mixed: bool = False
    """Take runs of different data, updates or options into one table, labelled."""
    plots: Literal["png", "svg"] = "png"
    """Format of the pictures."""


def write_report(config: ReportConfig) -> str:
    """Write what the configuration asks for; return the report's text.

    Raises:
        UserError: no finished run, runs that do not belong together (see
            :func:`flowrl.report.runs.check_comparable`), or a folder that cannot be written.
    """
    if not config.runs:
        raise UserError("give at least one folder of runs")
    runs, unfinished = load_runs(config.runs)
    known = {run.method for run in runs}
    for method in config.methods:
        if method not in known:
            raise UserError(f"--methods {method}: no finished run of it{did_you_mean(method, known)}")
    if config.methods:
        runs = [run for method in config.methods for run in runs if run.method == method]
    if not runs:
        listed = "; ".join(unfinished[:3])
        raise UserError(f"no finished run to report on: {listed}{' ...' if len(unfinished) > 3 else ''}")
    results = Results(tuple(check_comparable(runs, config.mixed)))
    try:
        pictures = draw_report(results, config.output, config.plots)
        text = format_report(results, unfinished, pictures, config.mixed)
        write_text(config.output / "report.md", text)
    except OSError as error:
        raise UserError(f"--output {config.output}: cannot be written: {error}") from error
    return text


def format_report(results: Results, unfinished: list[str], pictures: list[Path], mixed: bool) -> str:
    """Return the report in Markdown."""
    shown = {picture.stem: f"![{picture.stem}]({picture.name})" for picture in pictures}
    parts = [
        "# Results",
        _settings(results.runs),
        "Runs that differ in data, updates or options are mixed here; labels say in what." if mixed else "",
        "## Scores of the last checkpoint",
        score_table(results, lambda run: run.last_score),
        _SCORES,
        shown["scores"],
        "## All methods together",
        aggregate_table(results),
        _IMPROVEMENT,
        improvement_table(results),
        _STATISTICS,
        "## Best of all evaluations",
        _BEST,
        score_table(results, lambda run: run.best_score, last=False),
        "## Learning curves",
        shown["learning-curves"],
        "## Achieved against target return",
        shown["achieved-returns"],
        "## Speed",
        speed_table(results),
        shown["speed"],
        "Medians over runs, as measured while training; runs may have shared the machine with others.",
        "## Data",
        _data_table(results),
        "## Not in the tables",
        "\n".join(f"- {line}" for line in unfinished) or "Nothing is missing: every run is finished.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(runs: tuple[RunResult, ...]) -> str:
    agreed = [
        f"{name} {runs[0].config[name]}"
        for name in _SETTINGS
        if name in runs[0].config and len({run.config.get(name) for run in runs}) == 1
    ]
    seeds = sorted({run.seed for run in runs})
    return f"{len(runs)} finished runs, seeds {', '.join(map(str, seeds))}; all with {', '.join(agreed)}."


def _data_table(results: Results) -> str:
    rows = []
    for dataset in results.datasets:
        run = next(run for run in results.runs if run.dataset == dataset)
        targets = ", ".join(f"{target:.0f}" for target in run.achieved)
        rows.append([f"`{dataset}`", run.environment, f"`{run.sha256[:16]}`", targets])
    return markdown_table(["dataset", "environment", "SHA-256", "target returns"], rows)
