"""What the embedded datasets hold: one table of all of them, and their returns drawn as histograms."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from flowrl.atomic import atomic_path, write_text
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.embedded import EMBEDDED, load_embedded
from flowrl.errors import UserError, exit_on_user_error
from flowrl.report.plots import new_figure
from flowrl.report.table import markdown_table

BINS = 40


@dataclass(frozen=True)
class DataSummary:
    """Where to write the table and the picture."""

    results_dir: Path = Path("results")
    names: tuple[str, ...] = tuple(EMBEDDED)


def summarize_data(summary: DataSummary) -> str:
    """Write ``data.md`` and ``data_returns.png``; return the table.

    Datasets that are not here yet are collected.

    Raises:
        UserError: an unknown name, and see :func:`flowrl.data.embedded.load_embedded`.
    """
    rows = []
    scores = {}
    for name in summary.names:
        dataset = load_embedded(name)
        scores[dataset.dataset_id] = normalized_scores(dataset)
        rows.append(table_row(dataset, scores[dataset.dataset_id]))
    header = ["dataset", "episodes", "timesteps", "mean return", "mean", "std", "best", "SHA-256"]
    table = markdown_table(header, rows)
    text = (
        "# The embedded datasets, as collected\n\nMean, std and best are normalised scores of whole "
        f"episodes (100 is D4RL's expert).\n\n{table}\n\n![Returns](data_returns.png)\n"
    )
    draw_histograms(summary.results_dir / "data_returns.png", scores)
    write_text(summary.results_dir / "data.md", text)
    return table


def draw_histograms(path: Path, scores: dict[str, np.ndarray]) -> None:
    """Draw each dataset's normalised scores into ``path``."""
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure = new_figure(4 * columns, 2.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (dataset_id, values) in zip(axes.flat, scores.items(), strict=False):
        axis.hist(values, bins=BINS, color="#4477aa")
        axis.set_title(dataset_id.removeprefix("flowrl/"), fontsize=9)
        axis.set_xlabel("normalised score", fontsize=8)
        axis.set_ylabel("episodes", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def normalized_scores(dataset: EpisodeDataset) -> np.ndarray:
    """Return the normalised score of each episode, (E,) float64."""
    if dataset.reference is None:
        raise UserError(f"{dataset.dataset_id} has no reference scores")
    return dataset.reference.normalized_score(dataset.episode_returns)


def table_row(dataset: EpisodeDataset, scores: np.ndarray) -> list[str]:
    """Return a dataset's cells of the table; ``scores`` are its episodes' normalised scores."""
    figures = (dataset.episode_returns.mean(), "0f"), (scores.mean(), "1f"), (scores.std(), "1f")
    return [
        f"`{dataset.dataset_id}`",
        f"{dataset.num_episodes}",
        f"{dataset.num_transitions}",
        *(f"{figure:.{digits}}" for figure, digits in (*figures, (scores.max(), "1f"))),
        f"`{dataset.sha256[:16]}`",
    ]


def main() -> None:
    """Parse the command line, run, print the figures; exits with 2 on bad input."""
    config = tyro.cli(DataSummary, description=__doc__)
    with exit_on_user_error():
        print(summarize_data(config))


if __name__ == "__main__":
    main()
