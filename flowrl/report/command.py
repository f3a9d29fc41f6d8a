"""The command line of a report and the text of one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flowrl.atomic import write_text
from flowrl.errors import UserError, did_you_mean
from flowrl.report.plots import draw_report
from flowrl.report.runs import EVALUATION_FILE, RunResult, check_comparable, load_runs
from flowrl.report.statistics import BANDIT_ALPHA, BANDIT_REPEATS, CONFIDENCE, RESAMPLES
from flowrl.report.table import (
    Results,
    aggregate_table,
    best_table,
    correlation_table,
    markdown_table,
    score_table,
    speed_table,
)

# Options of interest to a reader, named where all runs agree on them.
_SETTINGS = ("steps", "embed_dim", "num_layers", "num_heads", "learning_rate", "dropout", "eval_episodes")

_REPORT = """# Results

{settings}

## Scores of the last checkpoint

{scores}

Mean ± standard error over seeds (number of seeds) at the first of a run's target returns, after training or,
where the run's folder has one, from `{evaluation_file}`. Normalised so that 100 is D4RL's expert, unless
another unit is named. Bold: the highest mean.

## All methods together

{aggregates}

Columns with > hold the probability that a run of the row's method scores higher than one of the column's,
averaged over datasets. Interquartile mean, stratified bootstrap ({resamples:,} resamples within datasets,
percentiles) and probability of improvement as in Agarwal et al. 2021 (arXiv 2108.13264).

## Last against best evaluated checkpoint

{best}

Last → best of the evaluated checkpoints, at the first target return, mean over seeds. The best is chosen by
the scores that it is reported with: optimistic.

## Learning curves

![Learning curves](learning-curves.{plots})

## Achieved against target return

Correlation of target and achieved return over all episodes of the last checkpoint, mean over seeds (number of
seeds):

{correlations}

![Achieved returns](achieved-returns.{plots})

## Score against online evaluation episodes

Score of the policy that a bandit prefers after some online episodes, among a method's seeds at each of their
target returns (Jackson et al. 2025, arXiv 2504.11453: upper confidence bound with alpha {alpha:g}, mean and
bootstrapped {confidence:.0%} interval of {repeats:,} repeats):

![Online episodes](online-episodes.{plots})

## Speed

{speeds}

Medians over runs, as measured while training; runs may have shared the machine with others.

## Data

{data}

## Not in the tables

{unfinished}
"""


@dataclass(frozen=True)
class ReportConfig:
    """Write the tables and pictures of finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of sweeps, of runs, or of many runs; JSON files of evaluations."""
    output: Path = Path("results/report")
    """Folder to write report.md and the pictures to."""
    methods: tuple[str, ...] = ()
    """Only these methods, in this order."""
    mixed: bool = False
    """Put runs of different data, updates or options into one table, labelled."""
    plots: Literal["png", "svg"] = "png"
    """Format of the pictures."""


def write_report(config: ReportConfig) -> str:
    """Write tables and pictures; return the report's text.

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
    text = _REPORT.format(
        settings=_settings(results.runs, config.mixed),
        scores=score_table(results),
        evaluation_file=EVALUATION_FILE,
        aggregates=aggregate_table(results),
        resamples=RESAMPLES,
        best=best_table(results),
        correlations=correlation_table(results),
        alpha=BANDIT_ALPHA,
        confidence=CONFIDENCE,
        repeats=BANDIT_REPEATS,
        speeds=speed_table(results),
        data=_data_table(results),
        unfinished="\n".join(f"- {line}" for line in unfinished) or "Every run is finished.",
        plots=config.plots,
    )
    try:
        draw_report(results, config.output, config.plots)
        write_text(config.output / "report.md", text)
    except OSError as error:
        raise UserError(f"--output {config.output}: cannot be written: {error}") from error
    return text


def _settings(runs: tuple[RunResult, ...], mixed: bool) -> str:
    given = {name: {run.config[name] for run in runs if name in run.config} for name in _SETTINGS}
    agreed = [f"{name} {values.pop()}" for name, values in given.items() if len(values) == 1]
    seeds = sorted({run.seed for run in runs})
    text = f"{len(runs)} finished runs, seeds {', '.join(map(str, seeds))}"
    text += f"; all with {', '.join(agreed)}." if agreed else "."
    return f"{text} Runs that differ in data, updates or options are labelled." if mixed else text


def _data_table(results: Results) -> str:
    rows = []
    for dataset in results.datasets:
        run = next(run for run in results.runs if run.dataset == dataset)
        targets = ", ".join(f"{target:g}" for target in run.achieved)
        rows.append([f"`{dataset}`", run.environment, f"`{run.sha256[:16]}`", targets])
    return markdown_table(["dataset", "environment", "SHA-256", "target returns"], rows)
