"""The cells of a report and its tables in Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flowrl.data.embedded import EMBEDDED
from flowrl.report.runs import RunResult
from flowrl.report.statistics import (
    CONFIDENCE,
    improvement_interval,
    interquartile_mean,
    interquartile_mean_interval,
    probability_of_improvement,
    standard_error,
)

# Averages over the nine D4RL v2 Gym-MuJoCo datasets as published, each by its source's own protocol.
PUBLISHED_AVERAGES = {
    "Decision Transformer, in Wu et al. 2022": 72.2,
    "Flowformer, in Wu et al. 2022": 73.5,
    "CORL's Decision Transformer, last checkpoint": 73.84,
}
D4RL_DATASETS = frozenset(f"d4rl/{name}-v2" for name in EMBEDDED)  # the same nine names


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

    def of_method(self, method: str) -> list[RunResult]:
        return [run for run in self.runs if run.method == method]

    def shared_scores(self) -> tuple[list[str], dict[str, list[np.ndarray]]]:
        """Datasets, and per method one array of scores (seeds,) each, of what every method has finished.

        Only pairs of dataset and seed count that all methods have, and only normalised scores.
        """
        datasets, scores = [], {method: [] for method in self.methods}  # type: ignore[var-annotated]
        for dataset in self.datasets:
            cells = {method: self.cell(dataset, method) for method in self.methods}
            seeds = set.intersection(*({run.seed for run in cell} for cell in cells.values()))
            normalized = all(run.metric == "normalized_score_mean" for cell in cells.values() for run in cell)
            if seeds and normalized:
                datasets.append(dataset)
                for method, cell in cells.items():
                    scores[method].append(np.array([run.last_score for run in cell if run.seed in seeds]))
        return datasets, scores


def score_table(results: Results, score: Callable[[RunResult], float], last: bool = True) -> str:
    """Datasets x methods: mean ± standard error over seeds (number of seeds); the highest mean in bold.

    Published averages follow where rows are D4RL's nine datasets and scores the ``last`` checkpoint's.
    """
    header = ["dataset", "environment", *results.methods]
    rows, means, errors = [], {}, {}
    for dataset in results.datasets:
        cells = {method: results.cell(dataset, method) for method in results.methods}
        values = {method: np.array([score(run) for run in cell]) for method, cell in cells.items() if cell}
        highest = max(value.mean() for value in values.values())
        first = next(run for cell in cells.values() for run in cell)
        unit = "" if first.metric == "normalized_score_mean" else " (return)"
        row = [f"`{dataset}`{unit}", first.environment]
        for method in results.methods:
            if method not in values:
                row.append("—")
                continue
            mean, error = values[method].mean(), standard_error(values[method])
            if not unit:
                means[dataset, method], errors[dataset, method] = mean, error
            row.append(format_mean(mean, error, len(values[method]), bold=mean == highest))
        rows.append(row)
    rows.append(_average_row(results, means, errors))
    if last and set(results.datasets) == D4RL_DATASETS:
        for name, average in PUBLISHED_AVERAGES.items():
            rows.append([f"*published: {name}*", "", f"*{average:g}*", *[""] * (len(results.methods) - 1)])
    return markdown_table(header, rows)


def aggregate_table(results: Results) -> str:
    """Interquartile mean per method with its interval, over what all methods have finished."""
    datasets, scores = results.shared_scores()
    if not datasets:
        return "No dataset has a finished run of every method."
    rows = []
    for method in results.methods:
        values = np.concatenate(scores[method])
        low, high = interquartile_mean_interval(scores[method])
        interval = f"{low:.1f} to {high:.1f}" if _resampled(scores[method]) else "needs two seeds"
        rows.append([method, f"{interquartile_mean(values):.1f}", interval, str(len(values))])
    header = ["method", "interquartile mean", f"{CONFIDENCE:.0%} interval", "runs"]
    return markdown_table(header, rows) + f"\n\nOver {_listed(datasets, results.datasets)}."


def improvement_table(results: Results) -> str:
    """Probability that the row's method scores higher than the column's, with intervals."""
    datasets, scores = results.shared_scores()
    if not datasets or len(results.methods) < 2:
        return "Needs two methods with a dataset in common."
    rows = []
    for method in results.methods:
        row = [method]
        for other in results.methods:
            if method == other:
                row.append("")
                continue
            probability = probability_of_improvement(scores[method], scores[other])
            low, high = improvement_interval(scores[method], scores[other])
            interval = f" ({low:.2f} to {high:.2f})" if _resampled(scores[method]) else ""
            row.append(f"{probability:.2f}{interval}")
        rows.append(row)
    return markdown_table(["higher than ...", *results.methods], rows)


def speed_table(results: Results) -> str:
    """Training and acting speed per method: medians over its runs."""
    rows = []
    for method in results.methods:
        runs = results.of_method(method)
        updates = [float(np.median([line["updates_per_second"] for line in run.train])) for run in runs]
        tokens = [float(np.median([line["tokens_per_second"] for line in run.train])) for run in runs]
        acting = [acting_speed(run) for run in runs]
        figures = [f"{np.median(values):,.3g}" for values in (updates, tokens, acting)]
        rows.append([method, *figures])
    return markdown_table(
        ["method", "updates per second", "tokens per second", "acting: steps per second"], rows
    )


def acting_speed(run: RunResult) -> float:
    """Environment steps per second of the last evaluation, all episodes of all targets in one batch."""
    last = [line for line in run.evaluations if line["step"] == run.steps]
    steps = sum(line["length_mean"] for line in last) * run.config["eval_episodes"]
    return steps / last[0]["seconds"]


def format_mean(mean: float, error: float, count: int, bold: bool = False) -> str:
    """``76.6 ± 3.2 (2)``; a single seed has no standard error."""
    text = f"{mean:.1f}" if np.isnan(error) else f"{mean:.1f} ± {error:.1f}"
    return f"**{text}** ({count})" if bold else f"{text} ({count})"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table, the first column to the left, the others to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _average_row(
    results: Results, means: dict[tuple[str, str], float], errors: dict[tuple[str, str], float]
) -> list[str]:
    """The plain average over datasets, only of methods that have all of them."""
    datasets = [d for d in results.datasets if any((d, method) in means for method in results.methods)]
    row = [f"average of {len(datasets)}", ""]
    for method in results.methods:
        keys = [(dataset, method) for dataset in datasets]
        if not keys or any(key not in means for key in keys):
            row.append("—")
            continue
        average = float(np.mean([means[key] for key in keys]))
        error = float(np.sqrt(np.sum(np.square([errors[key] for key in keys]))) / len(keys))
        row.append(f"{average:.1f}" if np.isnan(error) else f"{average:.1f} ± {error:.1f}")
    return row


def _resampled(scores: Sequence[np.ndarray]) -> bool:
    """Whether resampling within tasks can vary at all."""
    return any(len(task) > 1 for task in scores)


def _listed(datasets: list[str], all_datasets: list[str]) -> str:
    if len(datasets) == len(all_datasets):
        return f"all {len(datasets)} datasets" if len(datasets) > 1 else f"`{datasets[0]}`"
    return f"{len(datasets)} of {len(all_datasets)} datasets, those that every method has: " + ", ".join(
        f"`{dataset}`" for dataset in datasets
    )
