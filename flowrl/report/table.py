"""The cells of a report and its tables in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowrl.evaluation.evaluate import short_number, standard_error
from flowrl.report.runs import NORMALIZED, RETURN, UNITS, RunResult, Unit
from flowrl.report.statistics import (
    CONFIDENCE,
    bandit_scores,
    correlation,
    improvement_interval,
    interquartile_mean,
    interquartile_mean_interval,
    probability_of_improvement,
)


@dataclass(frozen=True)
class Results:
    """Finished runs by dataset and method, both in the order in which they first came."""

    runs: tuple[RunResult, ...]

    @property
    def datasets(self) -> list[str]:
        return list(dict.fromkeys(run.dataset for run in self.runs))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.runs))

    def cell(self, dataset: str, method: str) -> list[RunResult]:
        """The runs of one cell, one per seed."""
        return [run for run in self.runs if (run.dataset, run.method) == (dataset, method)]

    def environment(self, dataset: str) -> str:
        return next(run.environment for run in self.runs if run.dataset == dataset)

    def unit(self, dataset: str) -> Unit:
        """The unit that all runs on a dataset have scores in."""
        runs = [run for run in self.runs if run.dataset == dataset]
        return next(unit for unit in UNITS if unit is RETURN or all(run.has(unit) for run in runs))

    def groups(self) -> list[tuple[Unit, list[str]]]:
        """Datasets whose scores may be averaged: those of one unit, but each dataset of returns alone."""
        groups: dict[tuple[Unit, str], list[str]] = {}
        for dataset in self.datasets:
            unit = self.unit(dataset)
            groups.setdefault((unit, dataset if unit is RETURN else ""), []).append(dataset)
        return [(unit, datasets) for (unit, _), datasets in groups.items()]

    def shared_scores(self, datasets: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
        """For each of the datasets that every method has finished: each method's scores (seeds,).

        Only seeds that all methods have on a dataset count.
        """
        scores: dict[str, dict[str, np.ndarray]] = {}
        for dataset in datasets:
            unit = self.unit(dataset)
            cells = {method: self.cell(dataset, method) for method in self.methods}
            seeds = set.intersection(*({run.seed for run in cell} for cell in cells.values()))
            if seeds:
                scores[dataset] = {
                    method: np.array([run.last_score(unit) for run in cell if run.seed in seeds])
                    for method, cell in cells.items()
                }
        return scores

    def bandits(self, dataset: str) -> dict[str, np.ndarray]:
        """:func:`flowrl.report.statistics.bandit_scores` by method, where episodes are known.

        A method's policies are its seeds at each of their target returns.
        """
        unit = self.unit(dataset)
        policies = {
            method: [scores for run in self.cell(dataset, method) for scores in run.policies(unit)]
            for method in self.methods
        }
        policies = {method: scores for method, scores in policies.items() if scores}
        low, scale = 0.0, 1.0
        if unit is RETURN and policies:  # to the scale of normalised scores, and back
            every = np.concatenate([scores for listed in policies.values() for scores in listed])
            low, scale = every.min(), (np.ptp(every) or 1.0) / 100
        return {
            method: low + scale * bandit_scores([(scores - low) / scale for scores in listed])
            for method, listed in policies.items()
        }


def score_table(results: Results) -> str:
    """Datasets x methods: mean ± standard error over seeds (number of seeds); the highest mean in bold.

    Averages over all datasets of a unit follow.
    """
    rows = []
    for dataset in results.datasets:
        scores = {method: _last_scores(results, dataset, method) for method in results.methods}
        highest = max(values.mean() for values in scores.values() if len(values))
        cells = [format_mean(v, bold=bool(len(v)) and v.mean() == highest) for v in scores.values()]
        rows.append([_row_name(results, dataset), results.environment(dataset), *cells])
    for unit, datasets in results.groups():
        if len(datasets) > 1:
            name = f"average of {len(datasets)}" + ("" if unit is NORMALIZED else f" ({unit.name})")
            rows.append([name, "", *(_average(results, datasets, method) for method in results.methods)])
    return markdown_table(["dataset", "environment", *results.methods], rows)


def aggregate_table(results: Results) -> str:
    """Per method, over the datasets that all have finished: interquartile mean, probabilities of improvement.

    All with their intervals; a table for each unit.
    """
    parts = []
    for unit, datasets in results.groups():
        shared = results.shared_scores(datasets)
        if not shared:
            continue
        scores = {method: [cells[method] for cells in shared.values()] for method in results.methods}
        varies = any(len(task) > 1 for task in scores[results.methods[0]])  # or resampling finds nothing
        rows = []
        for method, tasks in scores.items():
            values = np.concatenate(tasks)
            low, high = interquartile_mean_interval(tasks)
            interval = f"{short_number(low)} to {short_number(high)}" if varies else "needs two seeds"
            row = [method, short_number(float(interquartile_mean(values))), interval, str(len(values))]
            for other, other_tasks in scores.items():
                low, high = improvement_interval(tasks, other_tasks)
                interval = f" ({low:.2f} to {high:.2f})" if varies else ""
                probability = f"{probability_of_improvement(tasks, other_tasks):.2f}{interval}"
                row.append("" if other == method else probability)
            rows.append(row)
        header = ["method", f"interquartile mean, {unit.name}", f"{CONFIDENCE:.0%} interval", "runs"]
        table = markdown_table([*header, *(f"> {method}" for method in results.methods)], rows)
        parts += [table, f"Over {_listed(list(shared), results.datasets)}."]
    return "\n\n".join(parts) or "No dataset has a finished run of every method."


def best_table(results: Results) -> str:
    """Datasets x methods: last and best of the evaluated checkpoints, means over seeds; mean differences."""
    rows, gaps = [], {}
    for dataset in results.datasets:
        row, unit = [_row_name(results, dataset)], results.unit(dataset)
        for method in results.methods:
            curves = [list(run.curve(unit).values()) for run in results.cell(dataset, method)]
            curves = [curve for curve in curves if len(curve) > 1]
            if not curves:
                row.append("—")
                continue
            last, best = np.mean([(curve[-1], max(curve)) for curve in curves], axis=0)
            gaps[dataset, method] = best - last
            row.append(f"{short_number(last)} → {short_number(best)}")
        rows.append(row)
    for unit, datasets in results.groups():
        if len(datasets) > 1:
            row = [f"average difference, {unit.name}"]
            for method in results.methods:
                known = [gaps[dataset, method] for dataset in datasets if (dataset, method) in gaps]
                row.append(short_number(np.mean(known)) if len(known) == len(datasets) else "—")
            rows.append(row)
    return markdown_table(["dataset", *results.methods], rows)


def correlation_table(results: Results) -> str:
    """Datasets x methods: correlation of target and achieved return over episodes, mean over seeds."""
    rows = []
    for dataset in results.datasets:
        row = [f"`{dataset}`"]
        for method in results.methods:
            values = [_target_correlation(run) for run in results.cell(dataset, method)]
            known = [value for value in values if not np.isnan(value)]
            row.append(f"{np.mean(known):.2f} ({len(known)})" if known else "—")
        rows.append(row)
    return markdown_table(["dataset", *results.methods], rows)


def speed_table(results: Results) -> str:
    """Training and acting speed per method: medians over its runs."""
    rows = []
    for method in results.methods:
        speeds = [_speeds(run) for run in results.runs if run.method == method and run.train]
        if speeds:
            rows.append([method, *(f"{speed:,.3g}" for speed in np.median(speeds, axis=0))])
    return markdown_table(
        ["method", "updates per second", "tokens per second", "acting: timesteps per second"], rows
    )


def format_mean(values: np.ndarray, bold: bool = False) -> str:
    """``76.6 ± 3.2 (2)``; a single seed has no standard error, no seed no mean."""
    if not len(values):
        return "—"
    text = with_error(values.mean(), standard_error(values))
    return f"**{text}** ({len(values)})" if bold else f"{text} ({len(values)})"


def with_error(mean: float, error: float) -> str:
    """``76.6 ± 3.2``, without an error that is NaN."""
    return short_number(mean) if np.isnan(error) else f"{short_number(mean)} ± {short_number(error)}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(map(markdown_row, (header, rule, *rows)))


def markdown_row(cells: Sequence[str]) -> str:
    """Return one line of a table."""
    return f"| {' | '.join(cells)} |"


def _last_scores(results: Results, dataset: str, method: str) -> np.ndarray:
    unit = results.unit(dataset)
    return np.array([run.last_score(unit) for run in results.cell(dataset, method)])


def _row_name(results: Results, dataset: str) -> str:
    unit = results.unit(dataset)
    return f"`{dataset}`" if unit is NORMALIZED else f"`{dataset}` ({unit.name})"


def _average(results: Results, datasets: Sequence[str], method: str) -> str:
    """The plain average over datasets, of a method that has all of them; errors are independent."""
    scores = [_last_scores(results, dataset, method) for dataset in datasets]
    if not all(len(values) for values in scores):
        return "—"
    average = np.mean([values.mean() for values in scores])
    error = np.sqrt(np.sum([standard_error(values) ** 2 for values in scores])) / len(scores)
    return with_error(average, error)


def _speeds(run: RunResult) -> tuple[float, float, float]:
    """Medians of updates and tokens per second; timesteps per second of the last evaluation's episodes."""
    last = [line for line in run.evaluations if line["step"] == run.evaluations[-1]["step"]]
    timesteps = sum(line["length_mean"] * line["episodes"] for line in last)
    updates, tokens = (
        float(np.median([line[f"{unit}_per_second"] for line in run.train])) for unit in ("updates", "tokens")
    )
    return updates, tokens, timesteps / last[0]["seconds"]


def _target_correlation(run: RunResult) -> float:
    known = [f for f in run.final if "returns" in f and f["target_return"] is not None]
    if not known:
        return float("nan")
    targets = np.concatenate([np.full(len(f["returns"]), f["target_return"]) for f in known])
    return correlation(targets, np.concatenate([f["returns"] for f in known]))


def _listed(datasets: Sequence[str], all_datasets: Sequence[str]) -> str:
    if len(datasets) == len(all_datasets) > 1:
        return f"all {len(datasets)} datasets"
    return ", ".join(f"`{dataset}`" for dataset in datasets)
