"""Off-policy estimates of many trained agents beside their true scores: results/off-policy.md.

    python scripts/maintain/off_policy.py estimates.jsonl --runs pretrained:hopper-medium runs/seed0 ...

Agents are trained on flowrl's own data and act on the target itself, the first of theirs. Lines are appended
to the file, and runs that are in it already are not estimated again.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from flowrl import load_agent
from flowrl.data import load_episodes
from flowrl.errors import exit_on_user_error
from flowrl.evaluation.evaluate import evaluate
from flowrl.evaluation.off_policy import estimate
from flowrl.report.statistics import correlation
from flowrl.report.table import markdown_table

COLUMNS = ("data", "first_order", "fitted_q")
EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class Options:
    """Which agents, and how long the critics learn."""

    estimates: tyro.conf.Positional[Path]
    """A .jsonl file."""
    runs: tuple[str, ...] = ()
    """Run folders or pretrained:NAME."""
    timesteps: int = 20_000
    updates: int = 600
    episodes: int = 100
    """Of the true score."""


def measure(options: Options) -> str:
    """Estimate what is missing, and return the table and the rank correlations."""
    done = _lines(options.estimates)
    for run in options.runs:
        if any(line["run"] == run for line in done):
            continue
        agent = load_agent(run, conditioning="target")
        assert agent.environment is not None
        _, robot, version = agent.config.dataset_id.split("/")  # flowrl/hopper/medium-v0
        name, target = f"{robot}-{version.removesuffix('-v0')}", agent.config.targets[0]
        data = load_episodes("flowrl", name)
        assert data.reference is not None
        estimates = estimate(agent, data, target, timesteps=options.timesteps, updates=options.updates)
        (result,) = evaluate(
            agent, agent.environment, [target], options.episodes, EVALUATION_SEED, data.reference
        )
        line: dict[str, Any] = {"run": run, "dataset": name}
        for column in COLUMNS:
            line[column] = data.reference.normalized_score(float(getattr(estimates, column).mean()))
        line["true"] = data.reference.normalized_score(float(result.returns.mean()))
        with options.estimates.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        done.append(line)
    done.sort(key=lambda line: (line["dataset"], line["run"]))
    rows = [tuple(line[name] for name in (*COLUMNS, "true")) for line in done]
    table = [
        [line["dataset"], *(f"{value:.1f}" for value in row)] for line, row in zip(done, rows, strict=True)
    ]
    head = ["set", "data", "first order", "fitted Q", "true score"]
    values, robots = np.array(rows), np.array([line["dataset"].partition("-")[0] for line in done])
    ranks = []
    for robot in ("all", *dict.fromkeys(robots)):
        chosen = values[(robots == robot) | (robot == "all")]
        cells = [f"{rank_correlation(chosen[:, column], chosen[:, -1]):.2f}" for column in range(3)]
        ranks.append([robot, str(len(chosen)), *cells])
    head_of_ranks = ["robot", "policies", "data", "first order", "fitted Q"]
    return f"{markdown_table(head_of_ranks, ranks)}\n\n{markdown_table(head, table)}"


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, where equal values have their mean rank."""
    ranks = [np.sign(values[:, None] - values).sum(axis=1) for values in (first, second)]
    return correlation(*ranks)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    with exit_on_user_error():
        print(measure(tyro.cli(Options, description=__doc__)))
