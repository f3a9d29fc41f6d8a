"""Reports: statistics against values worked out otherwise, tables of run folders written by hand."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure

from flowrl.errors import UserError
from flowrl.report.command import ReportConfig, write_report
from flowrl.report.runs import load_runs
from flowrl.report.statistics import (
    PULLS,
    bandit_scores,
    improvement,
    interquartile_mean_interval,
    probability_of_improvement,
)
from flowrl.training.config import TrainConfig, to_yaml

BASE = TrainConfig(env="hopper-medium", steps=100, eval_episodes=2, targets=(100.0, 50.0), embed_dim=16)


def figures(target: float | None, value: float, unit: str = "normalized_score") -> dict[str, Any]:
    """Two episodes, 1 above and 1 below ``value``; returns are ten times the scores, 50 steps long."""
    episodes = [value - 1, value + 1]
    lines: dict[str, Any] = {"target_return": target, "seconds": 4.0, "length_mean": 50.0, "episodes": 2}
    lines |= {"return_mean": value * 10, "returns": [10 * score for score in episodes]}
    if unit == "normalized_score":
        lines |= {"normalized_score_mean": value, "normalized_scores": episodes}
    elif unit == "success":
        lines |= {"success_rate": value / 100, "successes": [score / 100 for score in episodes]}
    return lines


def write_run(
    folder: Path,
    score: float,
    *,
    config: TrainConfig = BASE,
    dataset: str = "flowrl/hopper/medium-v0",
    sha256: str = "ab" * 32,
    last_step: int | None = None,
    unit: str = "normalized_score",
) -> Path:
    """A run folder with evaluations at half of the updates (score + 5) and at ``last_step`` (score).

    The second target return scores 1 less.
    """
    last_step = config.steps if last_step is None else last_step
    folder.mkdir(parents=True)
    environment = {"env_id": "Hopper-v5", "kwargs": {}, "max_episode_steps": None}
    identity = {"dataset_id": dataset, "dataset_sha256": sha256, "environment": environment}
    lines: list[dict[str, Any]] = [{"kind": "run", "step": 0, **identity}]
    for step in dict.fromkeys((config.steps // 2, last_step)):
        speeds = {"tokens_per_second": 300.0, "updates_per_second": 5.0}
        lines.append({"kind": "train", "step": step, "loss": 0.5, **speeds})
        for index, target in enumerate(config.targets):
            value = score - index + 5 * (step < config.steps)
            lines.append({"kind": "evaluation", "step": step, **figures(target, value, unit)})
    (folder / "config.yaml").write_text(to_yaml(replace(config, run_dir=folder)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_evaluation(path: Path, *targets: dict[str, Any], sha256: str = "ab" * 32, **document: Any) -> Path:
    environment = {"env_id": "Hopper-v5"}
    identity = {"dataset_id": "flowrl/hopper/medium-v0", "dataset_sha256": sha256, "environment": environment}
    document = {"config": {"seed": 0}, "checkpoint_step": None, **identity, **document}
    path.write_text(json.dumps({**document, "targets": targets}))
    return path


def seeded(seed: int, **changes: Any) -> TrainConfig:
    return replace(BASE, seed=seed, **changes)


def row_of(text: str, name: str) -> list[str]:
    """The cells of the first table row that begins with ``name``."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def no_pictures(monkeypatch):
    """Which take most of a report's time."""
    monkeypatch.setattr("flowrl.report.command.draw_report", lambda *_: None)


def test_interval_of_the_interquartile_mean_is_that_of_all_resamples():
    tasks = [np.array([1.0, 4.0, 9.0]), np.array([20.0, 35.0, 60.0])]
    outcomes = []  # every way to draw three of three, in both tasks: 729, all equally likely
    for first, second in product(product(tasks[0], repeat=3), product(tasks[1], repeat=3)):
        outcomes.append(sum(sorted([*first, *second])[1:-1]) / 4)
    expected = np.quantile(outcomes, [0.025, 0.975])
    np.testing.assert_allclose(interquartile_mean_interval(tasks), expected, atol=1.0)
    assert interquartile_mean_interval(tasks) == interquartile_mean_interval(tasks)  # a seed is a seed


def test_probability_of_improvement_counts_pairs_and_halves_ties():
    first, second = np.array([3.0, 1.0]), np.array([2.0, 1.0, 0.0])
    # 3 beats all three; 1 loses to 2, ties with 1, beats 0: (3 + 1.5) / 6
    assert improvement(first, second) == 4.5 / 6
    other = (np.array([0.0]), np.array([1.0]))
    assert probability_of_improvement([first, other[0]], [second, other[1]]) == (4.5 / 6 + 0) / 2
    assert probability_of_improvement([second], [first]) == 1 - 4.5 / 6


def test_report_of_two_methods_on_two_datasets(tmp_path):
    scores = {("hopper", "flow"): (10, 14), ("hopper", "softmax"): (20, 20)}
    scores |= {("walker2d", "flow"): (40, 60), ("walker2d", "softmax"): (30, 34)}
    for (dataset, attention), values in scores.items():
        for seed, score in enumerate(values):
            write_run(
                tmp_path / "runs" / f"{dataset}-{attention}-{seed}",
                score,
                config=seeded(seed, attention=attention),
                dataset=f"flowrl/{dataset}/medium-v0",
                sha256=dataset.ljust(64, "0"),
            )
    text = write_report(ReportConfig((tmp_path / "runs",), tmp_path / "out"))
    assert (tmp_path / "out" / "report.md").read_text() == text
    flow, softmax = "flow-interleaved-20", "softmax-interleaved-20"
    assert row_of(text, "dataset") == ["dataset", "environment", flow, softmax]
    assert row_of(text, "`flowrl/hopper")[1:] == ["Hopper-v5", "12.0 ± 2.0 (2)", "**20.0 ± 0.0** (2)"]
    assert row_of(text, "`flowrl/walker2d")[1:] == ["Hopper-v5", "**50.0 ± 10.0** (2)", "32.0 ± 2.0 (2)"]
    # errors of independent means: sqrt(2² + 10²) / 2 and sqrt(0² + 2²) / 2
    assert row_of(text, "average of 2")[2:] == ["31.0 ± 5.1", "26.0 ± 1.0"]
    assert row_of(text, flow)[1] == f"{(14 + 40) / 2:.1f}"  # interquartile: 10 and 60 are cut
    assert row_of(text, softmax)[1] == f"{(20 + 30) / 2:.1f}"
    best = text.split("## Last against best")[1]
    assert row_of(best, "`flowrl/hopper")[1] == "12.0 → 17.0"  # at half of the updates
    assert row_of(best, "average difference")[1:] == ["5.0", "5.0"]
    assert row_of(text, flow)[5].startswith("0.50 (")  # loses every hopper pair, wins every walker one
    speeds = row_of(text.split("## Speed")[1], flow)
    assert speeds[1:] == ["5", "300", "50"]  # 2 targets x 2 episodes x 50 steps in 4 seconds
    assert "seeds 0, 1; all with steps 100, embed_dim 16" in text
    assert "Every run is finished" in text
    for name in ("learning-curves", "achieved-returns", "online-episodes"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in text


def test_missing_and_partial_runs_are_listed_not_averaged(tmp_path):
    sweep = tmp_path / "sweep"
    runs = [
        {"run": f"h/{method}/seed{seed}", "dataset": "h", "method": method, "seed": seed, "steps": 100}
        for method, seed in (("flow", 0), ("flow", 1), ("flow", 2), ("softmax", 0), ("softmax", 1))
    ]
    sweep.mkdir()
    (sweep / "sweep.json").write_text(json.dumps({"runs": runs}))
    write_run(sweep / "h" / "flow" / "seed0", 10)
    write_run(sweep / "h" / "flow" / "seed1", 99, config=seeded(1), last_step=60)
    write_run(sweep / "h" / "softmax" / "seed0", 30, config=seeded(0, attention="softmax"))
    write_run(sweep / "h" / "softmax" / "seed1", 40, config=seeded(1, attention="softmax"))
    text = write_report(ReportConfig((tmp_path,), tmp_path / "out", plots="svg"))
    assert row_of(text, "`flowrl/hopper")[2:] == ["10.0 (1)", "**35.0 ± 5.0** (2)"]
    listed = text.split("## Not in the tables")[1]
    assert "seed1: partial, 60 of 100 updates" in listed
    assert "seed2: missing" in listed
    # all methods together: only the seed that both have finished
    assert row_of(text, "softmax")[1:] == ["30.0", "needs two seeds", "1", "1.00", ""]
    assert (tmp_path / "out" / "learning-curves.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("options", "changes", "message", "label"),
    [
        ({"sha256": "cd" * 32}, {}, "dataset sha256 abababababab", "medium-v0 (cdcdcdcd, Hopper-v5)"),
        ({}, {"steps": 200}, "steps 100 against 200", "20 (steps 200)"),
        ({}, {"embed_dim": 32}, "embed_dim 16 against 32", "20 (embed_dim 32)"),
        ({}, {"targets": (90.0,)}, "targets", "(targets [90.0])"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_runs_that_differ_share_a_table_only_labelled(options, changes, message, label, tmp_path):
    paths = (
        write_run(tmp_path / "a", 10),
        write_run(tmp_path / "b", 30, config=seeded(1, **changes), **options),
    )
    with pytest.raises(UserError, match=message) as raised:
        write_report(ReportConfig(paths, tmp_path / "out"))
    assert "--mixed" in str(raised.value)
    assert not (tmp_path / "out").exists()
    text = write_report(ReportConfig(paths, tmp_path / "out", mixed=True))
    table = text.split("## All methods")[0].replace("*", "")
    assert label in table
    assert "10.0 (1)" in table
    assert "30.0 (1)" in table
    assert "20.0" not in table.replace("average of 2 |  | 20.0", "")  # not the mean of a cell


def test_scores_of_different_units_are_never_averaged(tmp_path, monkeypatch):
    drawn = {}

    def savefig(figure, path, **options):
        drawn[path.name.strip(".").split(".")[0]] = figure
        path.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    for method, seed, add in (("flow", 0, 0), ("flow", 1, 4), ("softmax", 0, 2), ("softmax", 1, 2)):
        folder, config = tmp_path / "runs" / f"{method}{seed}", seeded(seed, attention=method)
        write_run(folder / "a", 10 + add, config=config)
        for name, value in (("b", 50), ("c", 70)):
            data = {"dataset": f"maze/{name}", "sha256": name * 64, "unit": "success"}
            write_run(folder / name, value + add, config=config, **data)
        for name, value in (("d", 7), ("e", 9)):
            data = {"dataset": f"robot/{name}", "sha256": name * 64, "unit": "return"}
            write_run(folder / name, value + add, config=config, **data)
    text = write_report(ReportConfig((tmp_path / "runs",), tmp_path / "out"))
    flow, softmax = "flow-interleaved-20", "softmax-interleaved-20"
    assert row_of(text, "`maze/b`")[::2] == ["`maze/b` (success rate, %)", "**52.0 ± 2.0** (2)"]
    assert row_of(text, "`robot/d`")[::2] == ["`robot/d` (return)", "**90.0 ± 20.0** (2)"]
    assert row_of(text, "average of")[::2] == ["average of 2 (success rate, %)", "62.0 ± 1.4"]
    assert "average of 5" not in text
    aggregates = text.split("## All methods together")[1].split("## Last")[0].split("| method |")[1:]
    headers = [part.split("|")[0].strip().removeprefix("interquartile mean, ") for part in aggregates]
    assert headers == ["normalised score", "success rate, %", "return", "return"]
    assert row_of(aggregates[1], flow)[1] == f"{(54 + 70) / 2:.1f}"  # of 50, 54, 70, 74
    assert row_of(aggregates[3], flow)[1] == "110.0"
    assert "Over `maze/b`, `maze/c`." in aggregates[1]
    assert row_of(aggregates[1], softmax)[4].startswith("0.50 (")  # a win and a loss in each dataset
    curve = drawn["learning-curves"].axes[0].containers[0].lines[0]
    assert curve.get_xydata().tolist() == [[50, 17], [100, 12]]
    assert [axes.get_ylabel() for axes in drawn["learning-curves"].axes][:5] == [
        "normalised score", "success rate, %", "success rate, %", "return", "return",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_pictures")
def test_an_evaluation_in_the_run_folder_gives_its_score(tmp_path):
    run = write_run(tmp_path / "run", 10)
    targets = figures(50.0, 30), figures(100.0, 40)  # the run's first target is 100
    write_evaluation(run / "evaluation.json", *targets, checkpoint_step=100, config={"seed": 0, "steps": 100})
    text = write_report(ReportConfig((run,), tmp_path / "out"))
    assert row_of(text, "`flowrl/hopper")[2] == "**40.0** (1)"
    assert row_of(text.split("## Last against best")[1], "`flowrl/hopper")[1] == "10.0 → 15.0"
    for given, steps, changes, message in (
        (targets, 100, {"sha256": "cd" * 32}, "not an evaluation of this run"),
        (targets, 100, {"checkpoint_step": 50}, "of checkpoint 50, not of the last one"),
        (targets, 50, {"checkpoint_step": 50}, "of another number of updates than the run's: evaluate it"),
        (targets[:1], 100, {}, "not at the run's first target return 100: evaluate it again"),
    ):
        write_evaluation(run / "evaluation.json", *given, config={"seed": 0, "steps": steps}, **changes)
        with pytest.raises(UserError, match=message):
            load_runs([run])


@pytest.mark.usefixtures("no_pictures")
def test_a_run_resumed_with_other_targets_or_with_its_data_elsewhere_is_reported(tmp_path):
    run = write_run(tmp_path / "a", 10)
    metrics = (run / "metrics.jsonl").read_text()
    line = json.dumps({"kind": "evaluation", "step": 200, **figures(70.0, 20)})
    (run / "metrics.jsonl").write_text(f"{metrics}{line}\n")
    (run / "config.yaml").write_text(to_yaml(replace(BASE, steps=200, targets=(70.0,), run_dir=run)))
    moved = seeded(1, steps=200, targets=(70.0,), memory_map=Path("map"), dataset=("x.hdf5",))
    text = write_report(ReportConfig((run, write_run(tmp_path / "b", 30, config=moved)), tmp_path / "out"))
    assert row_of(text, "`flowrl/hopper")[2] == "**25.0 ± 5.0** (2)"


@pytest.mark.usefixtures("no_pictures")
def test_other_time_limits_and_reference_scores_do_not_share_a_row(tmp_path):
    run = write_run(tmp_path / "run", 10)
    registered = {"env_id": "Hopper-v5", "max_episode_steps": 1000}
    write_evaluation(tmp_path / "a.json", figures(None, 22), method="IQL", environment=registered)
    assert load_runs([tmp_path / "a.json"])[0][0].environment == "Hopper-v5"
    limited = {"env_id": "Hopper-v5", "max_episode_steps": 50}
    other = write_evaluation(tmp_path / "a.json", figures(None, 22), method="IQL", environment=limited)
    with pytest.raises(UserError, match=r"dataset .* in Hopper-v5 against .*max_episode_steps=50"):
        write_report(ReportConfig((run, other), tmp_path / "out"))
    write_evaluation(run / "evaluation.json", figures(100.0, 40), environment=limited, config={"steps": 100})
    with pytest.raises(UserError, match="not an evaluation of this run"):
        load_runs([run])
    scored = replace(BASE, attention="softmax", reference_scores=(0.0, 20.0))
    scored_run = write_run(tmp_path / "scored", 30, config=scored)
    (run / "evaluation.json").unlink()
    with pytest.raises(UserError, match="reference_scores"):
        write_report(ReportConfig((run, scored_run), tmp_path / "out"))


@pytest.mark.usefixtures("no_pictures")
def test_evaluations_stand_beside_runs(tmp_path):
    """Those of other runs, and of methods from outside, which have no target and no curve."""
    run = write_run(tmp_path / "run", 10)
    other = write_evaluation(tmp_path / "a.json", figures(None, 22), method="TD3+BC, 20 minutes")
    config = {"seed": 1, "steps": 100, "token_layout": "fused", "targets": (70.0,)}  # at 100 in fact
    elsewhere = write_evaluation(tmp_path / "b.json", figures(100.0, 23), config=config)
    text = write_report(ReportConfig((run, other, elsewhere), tmp_path / "out"))
    assert row_of(text, "dataset")[2:] == ["flow-interleaved-20", "TD3+BC, 20 minutes", "flow-fused-20"]
    assert "; all with steps 100" in text
    assert row_of(text, "`flowrl/hopper")[2:] == ["10.0 (1)", "22.0 (1)", "**23.0** (1)"]
    assert row_of(text.split("## Last against best")[1], "`flowrl")[1:] == ["10.0 → 15.0", "—", "—"]
    assert row_of(text.split("## Achieved")[1], "`flowrl")[1:] == ["0.45 (1)", "—", "—"]
    with pytest.raises(UserError, match="give one of them"):
        write_report(ReportConfig((other, other), tmp_path / "out"))
    write_evaluation(other, figures(3600.0, 22), config={}, chosen_by="its own evaluation")
    with pytest.raises(UserError, match="names no options, as the agent was evaluated apart from its run"):
        load_runs([other])
    write_evaluation(other, figures(100.0, 23), config=config | {"seed": 2}, conditioning="target")
    with pytest.raises(UserError, match="table: conditioning return-to-go against target"):
        write_report(ReportConfig((elsewhere, other), tmp_path / "out"))
    for damaged in ({"targets": []}, json.loads(elsewhere.read_text()) | {"dataset_id": 5}):
        other.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="not the results of an evaluation"):
            load_runs([other])


def test_a_bandit_is_that_of_a_plain_loop():
    """Three noisy policies: the mean score after each number of pulls, against one trial at a time."""
    random = np.random.default_rng(5)
    policies = [random.normal(mean, 30, size=20) for mean in (40, 50, 60)]
    chosen = np.zeros((300, len(PULLS)))
    for trial in range(len(chosen)):
        pulls, means = [0, 0, 0], [-math.inf] * 3
        order = random.permutation(3).tolist()  # each is pulled once before any is pulled again
        for t in range(1, max(PULLS) + 1):
            bounds = [m + math.sqrt(2 * math.log(t) / max(n, 1)) for m, n in zip(means, pulls, strict=True)]
            arm = order[t - 1] if t <= 3 else bounds.index(max(bounds))
            score = float(policies[arm][random.integers(20)])
            means[arm] = (means[arm] * pulls[arm] + score) / (pulls[arm] + 1) if pulls[arm] else score
            pulls[arm] += 1
            if t in PULLS:
                chosen[trial, PULLS.index(t)] = policies[means.index(max(means))].mean()
    scores = bandit_scores(policies)
    error = (chosen.var(axis=0) / len(chosen) + scores.var(axis=0) / len(scores)) ** 0.5
    np.testing.assert_array_less(np.abs(scores.mean(axis=0) - chosen.mean(axis=0)), 4 * error + 1e-9)


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="no runs in it"):
        load_runs([tmp_path])
    partial = write_run(tmp_path / "partial", 1, last_step=20)
    with pytest.raises(UserError, match=r"no finished run to report on: .*partial, 50 of 100"):
        write_report(ReportConfig((partial,), tmp_path / "out"))
    resumed = write_run(tmp_path / "resumed", 1, config=replace(BASE, eval_episodes=0))
    assert len(load_runs([resumed])[0]) == 1  # evaluated before it was resumed without
    twins = (write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2))
    with pytest.raises(UserError, match="give one of them"):
        write_report(ReportConfig(twins, tmp_path / "out", mixed=True))
    config = yaml.safe_load((twins[0] / "config.yaml").read_text())
    config["steps"] = "many"
    (twins[0] / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="not those of a run"):
        load_runs([twins[0]])
    metrics = (twins[1] / "metrics.jsonl").read_text().replace("updates_per_second", "speed")
    for text, line in (("{}\n", 1), (metrics, 2)):
        (twins[1] / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=f"line {line} is not a line of metrics"):
            load_runs([twins[1]])
    (tmp_path / "sweep.json").write_text('{"runs": [{"run": 3}]}')
    with pytest.raises(UserError, match="not the record of a sweep"):
        load_runs([tmp_path])
