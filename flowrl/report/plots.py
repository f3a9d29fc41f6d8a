"""Pictures of a report."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl.atomic import atomic_path
from flowrl.errors import UserError
from flowrl.evaluation.evaluate import standard_error
from flowrl.report.statistics import PULLS, mean_interval
from flowrl.report.table import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Axes, Results, str, dict[str, str]], None]

_COLUMNS = 3  # of panels, one panel per dataset
_MARKED: dict[str, Any] = {"marker": "o", "ms": 4, "capsize": 3}


def draw_report(results: Results, folder: Path, file_format: str) -> None:
    """Write every picture into ``folder``.

    Raises:
        UserError: matplotlib is not installed.
    """
    new_figure(1, 1)  # before anything is computed
    from matplotlib import rcParams

    cycle = rcParams["axes.prop_cycle"].by_key()["color"]
    colors = {method: cycle[index % len(cycle)] for index, method in enumerate(results.methods)}
    figures = {
        "learning-curves": _draw_panels(results, colors, _draw_curves),
        "achieved-returns": _draw_panels(results, colors, _draw_achieved),
        "online-episodes": _draw_panels(results, colors, _draw_bandits),
    }
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.{file_format}") as temporary:
            figure.savefig(temporary, format=file_format, dpi=110)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # of an extra
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install 'flowrl[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _draw_panels(results: Results, colors: dict[str, str], draw: "Draw") -> "Figure":
    """One panel per dataset."""
    rows = -(-len(results.datasets) // _COLUMNS)
    columns = min(_COLUMNS, len(results.datasets))
    figure = new_figure(max(1 + 3.6 * columns, 7), 0.8 + 2.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for dataset, axes in zip(results.datasets, panels, strict=False):
        draw(axes, results, dataset, colors)
        axes.set_title(f"{dataset}\nin {results.environment(dataset)}", fontsize="small")
        axes.grid(alpha=0.3)
    for axes in panels[len(results.datasets) :]:
        axes.set_visible(False)
    _add_legend(figure, colors)
    return figure


def _draw_curves(axes: "Axes", results: Results, dataset: str, colors: dict[str, str]) -> None:
    """Mean ± standard error over seeds after each update that all seeds were evaluated at."""
    unit = results.unit(dataset)
    for method, color in colors.items():
        curves = [run.curve(unit) for run in results.cell(dataset, method) if run.evaluations]
        _draw_means(axes, curves, color)
    axes.set(xlabel="update", ylabel=unit.name)
    axes.set_xlim(left=0)


def _draw_achieved(axes: "Axes", results: Results, dataset: str, colors: dict[str, str]) -> None:
    """Achieved return of the last checkpoint against the target return; on the dashed line both are equal."""
    for method, color in colors.items():
        _draw_means(axes, [run.achieved for run in results.cell(dataset, method) if run.achieved], color)
    axes.axline((0, 0), (1, 1), color="gray", ls="--", lw=1)
    axes.set(xlabel="target return", ylabel="achieved return")


def _draw_bandits(axes: "Axes", results: Results, dataset: str, colors: dict[str, str]) -> None:
    for method, scores in results.bandits(dataset).items():
        axes.plot(PULLS, scores.mean(axis=0), color=colors[method])
        axes.fill_between(PULLS, *mean_interval(scores), color=colors[method], alpha=0.3)
    axes.set(xlabel="online evaluation episodes", ylabel=results.unit(dataset).name, xscale="log")


def _draw_means(axes: "Axes", curves: Sequence[dict], color: str) -> None:
    """Mean ± standard error over curves, at the points that all have."""
    points = sorted(set.intersection(*({*curve} for curve in curves))) if curves else []
    if points:
        values = np.array([[curve[point] for point in points] for curve in curves])
        errors = np.nan_to_num([standard_error(column) for column in values.T])
        axes.errorbar(points, values.mean(axis=0), errors, color=color, **_MARKED)


def _add_legend(figure: "Figure", colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, marker="o", label=method) for method, color in colors.items()]
    inches = 0.7 + 0.09 * max(map(len, colors))  # of an entry
    columns = min(len(colors), max(1, int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
