"""Draw scores of fine-tunings against timesteps of the environment: results/finetuning.md.

python scripts/maintain/finetuning.py results/finetuning.png runs/hopper-medium-online-seed0 ...
"""

from pathlib import Path

import tyro

from flowrl.atomic import atomic_path
from flowrl.errors import exit_on_user_error
from flowrl.report.plots import new_figure
from flowrl.training.metrics import read_metrics


def draw(picture: tyro.conf.Positional[Path], runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Evaluations (mean and standard error over episodes) as lines, means of collected rounds as crosses."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for number, run in enumerate(runs):
        rounds = read_metrics(run, "round", ("timesteps", "return_mean"))
        evaluations = read_metrics(run, "evaluation", ("normalized_score_mean", "return_mean"))
        first = [line for line in evaluations if line["target_return"] == evaluations[0]["target_return"]]
        # A round's line has the number of the update after it: an evaluation comes after those up to it.
        before = [[r["timesteps"] for r in rounds if r["step"] <= line["step"]] for line in first]
        axes.errorbar(
            [max(timesteps, default=0) for timesteps in before],
            [line["return_mean"] for line in first],
            [line.get("return_standard_error", 0.0) for line in first],
            color=f"C{number}",
            marker="o",
            capsize=3,
            label=run.name,
        )
        collected = [line["return_mean"] for line in rounds]
        axes.plot([r["timesteps"] for r in rounds], collected, "x", color=f"C{number}", alpha=0.6)
    axes.set(xlabel="timesteps of the environment", ylabel="return")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    with exit_on_user_error():
        tyro.cli(draw)
