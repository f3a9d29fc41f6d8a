"""Off-policy estimates of many trained agents beside their true scores: results/off-policy.md.

    python scripts/maintain/off_policy.py estimates.jsonl --runs runs/default/*/flow-episode/seed*

Estimates are appended to the file, and runs that are in it already are not estimated again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from flowrl import load_agent
from flowrl.data import load_episodes
from flowrl.errors import exit_on_user_error
from flowrl.evaluation.off_policy import estimate
from flowrl.report.table import markdown_table

COLUMNS = ("data", "first_order", "fitted_q")


@dataclass(frozen=True)
class Options:
    """Where the agents and their true scores are."""

    estimates: tyro.conf.Positional[Path]
    """A .jsonl file."""
    runs: tuple[Path, ...] = ()
    """Folders DATASET/METHOD/seed<k>."""
    scores: Path = Path("results/default/scores.jsonl")
    """True scores at the first target, conditioned on the target itself."""
    timesteps: int = 20_000
    updates: int = 600


def measure(options: Options) -> str:
    """Estimate what is missing, and return the table and the rank correlations."""
    done = _lines(options.estimates)
    for run in options.runs:
        name, seed = run.parents[1].name, int(run.name.removeprefix("seed"))
        if any((line["dataset"], line["seed"]) == (name, seed) for line in done):
            continue
        agent = load_agent(run, conditioning="target")
        data = load_episodes("flowrl", name)
        estimates = estimate(
            agent, data, agent.config.targets[0], timesteps=options.timesteps, updates=options.updates
        )
        line = {"dataset": name, "seed": seed}
        for column in COLUMNS:
            mean = float(getattr(estimates, column).mean())
            line[column] = mean if data.reference is None else data.reference.normalized_score(mean)
        with options.estimates.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        done.append(line)
    true = {
        (line["dataset"], line["seed"]): line["normalized_score_mean"]
        for line in _lines(options.scores)
        if line["conditioning"] == "target"
    }
    rows = [(*(line[name] for name in COLUMNS), true[line["dataset"], line["seed"]]) for line in done]
    table = [
        [line["dataset"], str(line["seed"]), *(f"{value:.1f}" for value in row)]
        for line, row in zip(done, rows, strict=True)
    ]
    head = ["set", "seed", "data", "first order", "fitted Q", "true score"]
    values, robots = np.array(rows), np.array([line["dataset"].partition("-")[0] for line in done])
    ranks = []
    for robot in ("all", *dict.fromkeys(robots)):
        chosen = values[(robots == robot) | (robot == "all")]
        cells = [f"{rank_correlation(chosen[:, column], chosen[:, -1]):.2f}" for column in range(3)]
        ranks.append([robot, str(len(chosen)), *cells])
    head_of_ranks = ["robot", "policies", "data", "first order", "fitted Q"]
    return f"{markdown_table(head_of_ranks, ranks)}\n\n{markdown_table(head, table)}"


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, of values without ties."""
    distances = first.argsort().argsort() - second.argsort().argsort()
    return float(1 - 6 * np.square(distances).sum() / (len(first) * (len(first) ** 2 - 1)))


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    with exit_on_user_error():
        print(measure(tyro.cli(Options, description=__doc__)))
