"""Learning curves of runs, drawn from their ``metrics.jsonl``."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from flowrl.atomic import atomic_path
from flowrl.errors import UserError
from flowrl.training.metrics import read_metrics


@dataclass(frozen=True)
class CurvesConfig:
    """Draw the training loss and the evaluated scores of runs over their updates.

    Returns take the place of normalised scores where an environment has no reference scores.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders that scripts/train.py wrote."""
    output: Path
    """Picture to write: .png or .svg."""


def draw_curves(config: CurvesConfig) -> None:
    """Draw what the configuration asks for; one line per run, one more per target return."""
    try:
        from matplotlib.figure import Figure  # an extra: only drawing needs it
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install -e '.[plots]'") from error
    if not config.runs:
        raise UserError("give at least one run folder")
    if config.output.suffix not in (".png", ".svg"):
        raise UserError(f"--output {config.output}: must end in .png or .svg")
    figure = Figure(figsize=(11, 4), layout="constrained")
    loss_axes, score_axes = figure.subplots(1, 2)
    figure_name = _evaluated_figure(config.runs)
    for run in config.runs:
        train = read_metrics(run, "train", ("loss",))
        loss_axes.plot([entry["step"] for entry in train], [entry["loss"] for entry in train], label=run.name)
        evaluations = read_metrics(run, "evaluation", ("target_return", f"{figure_name}_mean"))
        for target in sorted({entry["target_return"] for entry in evaluations}, reverse=True):
            points = [entry for entry in evaluations if entry["target_return"] == target]
            score_axes.errorbar(
                [point["step"] for point in points],
                [point[f"{figure_name}_mean"] for point in points],
                [point.get(f"{figure_name}_standard_error", 0.0) for point in points],
                marker="o",
                capsize=3,
                label=f"{run.name}, target {target:g}",
            )
    loss_axes.set(xlabel="update", ylabel="loss", yscale="log", title="training loss")
    score_axes.set(xlabel="update", ylabel=figure_name, title="evaluation (mean ± standard error)")
    for axes in (loss_axes, score_axes):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
    with atomic_path(config.output) as temporary:
        figure.savefig(temporary, format=config.output.suffix[1:], dpi=120)
    print(f"curves in {config.output}")


def _evaluated_figure(runs: tuple[Path, ...]) -> str:
    """What all evaluations of all runs have: normalised scores if possible, else returns."""
    lines = [line for run in runs for line in read_metrics(run, "evaluation")]
    return "normalized_score" if all("normalized_score_mean" in line for line in lines) else "return"
