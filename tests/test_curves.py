"""Learning curves: what is drawn is what the metrics say."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flowrl.report.plots import CurvesConfig, draw_curves


def write_metrics(run: Path, scored: bool) -> Path:
    """Losses at two updates, evaluations of two targets at both; returns are ten times the scores."""
    run.mkdir()
    lines: list[dict[str, Any]] = [{"kind": "run", "step": 0}]
    for step in (50, 100):
        lines.append({"kind": "train", "step": step, "loss": 1 / step})
        for target in (30.0, 60.0):
            score = step / 10 + target / 30
            figures = {"return_mean": 10 * score, "return_standard_error": 1.0}
            scores = {"normalized_score_mean": score, "normalized_score_standard_error": 0.1}
            figures |= scores if scored else {}
            lines.append({"kind": "evaluation", "step": step, "target_return": target, **figures})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures, save = [], Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


@pytest.mark.parametrize(
    ("scored", "name", "points"),
    [
        ((True,), "normalised score", [[7, 12], [6, 11]]),
        ((False,), "return", [[70, 120], [60, 110]]),  # an environment without reference scores
        ((True, False), "return", [[70, 120], [60, 110]] * 2),  # never two units on one axis
    ],
)
def test_scores_are_drawn_and_returns_where_a_run_has_none(
    scored: tuple[bool, ...], name: str, points: list[list[float]], drawn: list[Figure], tmp_path: Path
) -> None:
    runs = tuple(write_metrics(tmp_path / f"run{index}", has) for index, has in enumerate(scored))
    draw_curves(CurvesConfig(runs, tmp_path / "curves.png"))
    loss_axes, score_axes = drawn[0].axes
    assert [list(line.get_ydata()) for line in loss_axes.lines] == [[1 / 50, 1 / 100]] * len(runs)
    means = [container.lines[0] for container in score_axes.containers]
    assert [list(line.get_ydata()) for line in means] == points
    assert [list(line.get_xdata()) for line in means] == [[50, 100]] * len(points)
    assert score_axes.get_ylabel() == name
    labels = [text.get_text() for text in score_axes.get_legend().get_texts()]
    assert labels[:2] == ["run0, target 60", "run0, target 30"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
