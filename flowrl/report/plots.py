"""Pictures of a report: scores, learning curves, achieved against target return, speed."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowrl.atomic import atomic_path
from flowrl.errors import UserError
from flowrl.report.statistics import interquartile_mean, interquartile_mean_interval, standard_error
from flowrl.report.table import Results, acting_speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3  # of panels, one panel per dataset


def draw_report(results: Results, folder: Path, file_format: str) -> list[Path]:
    """Write every picture into ``folder``; return the files.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install -e '.[plots]'") from error
    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    colors = {method: cycle[index % len(cycle)] for index, method in enumerate(results.methods)}
    rows = -(-len(results.datasets) // _COLUMNS)
    columns = min(_COLUMNS, len(results.datasets))
    pictures = []
    for name, draw in (("learning-curves", _draw_curves), ("achieved-returns", _draw_achieved)):
        figure = Figure(figsize=(max(1 + 3.6 * columns, 7), 0.8 + 2.8 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for dataset, axes in zip(results.datasets, panels, strict=False):
            draw(axes, results, dataset, colors)
            environment = next(run.environment for run in results.runs if run.dataset == dataset)
            axes.set_title(f"{dataset}\nin {environment}", fontsize="small")
            axes.grid(alpha=0.3)
        for axes in panels[len(results.datasets) :]:
            axes.set_visible(False)
        _add_legend(figure, colors)
        pictures.append(_save(figure, folder / f"{name}.{file_format}"))
    height = 1.6 + 0.25 * (len(results.datasets) + 1) * (1 + len(results.methods) / 3)
    figure = Figure(figsize=(9, height), layout="constrained")
    _draw_scores(figure.subplots(), results, colors)
    _add_legend(figure, colors)
    pictures.append(_save(figure, folder / f"scores.{file_format}"))
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(colors)), layout="constrained")
    train_axes, act_axes = figure.subplots(1, 2, sharey=True)
    _draw_speeds(train_axes, act_axes, results, colors)
    pictures.append(_save(figure, folder / f"speed.{file_format}"))
    return pictures


def _draw_curves(axes: "Axes", results: Results, dataset: str, colors: dict[str, str]) -> None:
    """Mean ± standard error over seeds after each update that all seeds were evaluated at."""
    for method, color in colors.items():
        runs = results.cell(dataset, method)
        if not runs:
            continue
        steps = sorted(set.intersection(*({*run.curve} for run in runs)))
        scores = np.array([[run.curve[step] for step in steps] for run in runs])  # (seeds, steps)
        errors = np.nan_to_num([standard_error(column) for column in scores.T])
        axes.errorbar(steps, scores.mean(axis=0), errors, color=color, marker="o", ms=4, capsize=3)
        axes.set_ylabel(run_unit(results, dataset))
    axes.set_xlabel("update")
    axes.set_xlim(left=0)


def _draw_achieved(axes: "Axes", results: Results, dataset: str, colors: dict[str, str]) -> None:
    """Achieved return of the last checkpoint against the target return; on the dashed line both are equal."""
    for method, color in colors.items():
        runs = results.cell(dataset, method)
        if not runs:
            continue
        targets = sorted(set.intersection(*({*run.achieved} for run in runs)))
        returns = np.array([[run.achieved[target] for target in targets] for run in runs])
        errors = np.nan_to_num([standard_error(column) for column in returns.T])
        axes.errorbar(targets, returns.mean(axis=0), errors, color=color, marker="o", ms=4, capsize=3)
    highest = max(max(run.achieved) for run in results.runs if run.dataset == dataset)
    axes.axline((0, 0), (1, 1), color="gray", ls="--", lw=1)
    axes.set(xlabel="target return", ylabel="achieved return")
    axes.set_xlim(0 if highest > 0 else None, None)


def _draw_scores(axes: "Axes", results: Results, colors: dict[str, str]) -> None:
    """A row per dataset, a dot per method; below them the interquartile mean with its interval."""
    offsets = np.linspace(-0.3, 0.3, len(colors)) if len(colors) > 1 else [0.0]
    labels = []
    for row, dataset in enumerate(results.datasets):
        environment = next(run.environment for run in results.runs if run.dataset == dataset)
        unit = "" if run_unit(results, dataset) == "normalised score" else " (return)"
        labels.append(f"{dataset}\nin {environment}{unit}")
        for (method, color), offset in zip(colors.items(), offsets, strict=True):
            scores = np.array([run.last_score for run in results.cell(dataset, method)])
            if len(scores):
                error = np.nan_to_num(standard_error(scores))
                axes.errorbar(
                    scores.mean(), row + offset, xerr=error, color=color, marker="o", ms=4, capsize=2
                )
    shared, scores_of = results.shared_scores()
    if shared:
        row = len(labels)
        labels.append(f"interquartile mean\nof {len(shared)} datasets, 95% interval")
        for (method, color), offset in zip(colors.items(), offsets, strict=True):
            center = float(interquartile_mean(np.concatenate(scores_of[method])))
            low, high = interquartile_mean_interval(scores_of[method])
            error = [[max(center - low, 0.0)], [max(high - center, 0.0)]]
            axes.errorbar(center, row + offset, xerr=error, color=color, marker="D", ms=5, capsize=2)
        axes.axhline(row - 0.5, color="gray", lw=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("normalised score of the last checkpoint")
    axes.set_title("mean ± standard error over seeds", fontsize="medium")
    axes.grid(alpha=0.3, axis="x")


def _draw_speeds(train_axes: "Axes", act_axes: "Axes", results: Results, colors: dict[str, str]) -> None:
    for method, color in colors.items():
        runs = results.of_method(method)
        updates = [float(np.median([line["updates_per_second"] for line in run.train])) for run in runs]
        train_axes.barh(method, float(np.median(updates)), color=color)
        act_axes.barh(method, float(np.median([acting_speed(run) for run in runs])), color=color)
    train_axes.set(xlabel="updates per second", title="training")
    act_axes.set(xlabel="environment steps per second", title="acting")
    train_axes.invert_yaxis()  # shared: the first method on top
    for axes in (train_axes, act_axes):
        axes.grid(alpha=0.3, axis="x")


def run_unit(results: Results, dataset: str) -> str:
    """What the scores on a dataset are."""
    metric = next(run.metric for run in results.runs if run.dataset == dataset)
    return "normalised score" if metric == "normalized_score_mean" else "return"


def _add_legend(figure: "Figure", colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, marker="o", label=method) for method, color in colors.items()]
    inches = 0.7 + 0.09 * max(map(len, colors))  # of an entry
    columns = min(len(colors), max(1, int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: "Figure", path: Path) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=110)
    return path
