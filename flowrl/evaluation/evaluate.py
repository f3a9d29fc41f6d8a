"""Evaluate an agent: several target returns, several episodes each, all in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation.rollout import BatchedAgent, rollout
from flowrl.options import MOST_EPISODES
from flowrl.process import prepare_process
from flowrl.ranks import ALONE, Ranks


@dataclass(frozen=True)
class TargetResult:
    """The episodes of one target return; arrays are (episodes,).

    Spreads are sample standard deviations (ddof 1), standard errors those over sqrt(episodes). Scores are
    None where the environment has no reference scores, successes and worlds where it reports none.
    """

    target_return: float
    returns: np.ndarray
    lengths: np.ndarray
    normalized_scores: np.ndarray | None
    successes: np.ndarray | None = None
    worlds: np.ndarray | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, as in ``metrics.jsonl`` and in the JSON file of an evaluation.

        ``target_return``, ``episodes``, ``return_mean``, ``return_std``, ``return_standard_error``,
        ``length_mean``, the same three of ``normalized_score``, ``success_rate`` from 0 to 1, and every
        episode in ``returns``, ``lengths``, ``normalized_scores``, ``successes`` and ``worlds``. Scores
        without a reference, what is not reported and the spread of one episode are left out.
        """
        figures: dict[str, Any] = {"target_return": self.target_return, "episodes": len(self.returns)}
        figures |= _figures("return", self.returns)
        figures["length_mean"] = float(self.lengths.mean())
        if self.normalized_scores is not None:
            figures |= _figures("normalized_score", self.normalized_scores)
        if self.successes is not None:
            figures["success_rate"] = float(self.successes.mean())
        arrays = {name: values for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return figures | {name: values.tolist() for name, values in arrays.items()}


def evaluate(
    agent: BatchedAgent,
    environment: EnvironmentSpec,
    targets: Sequence[float],
    episodes: int,
    seed: int,
    reference: ReferenceScores | None,
    ranks: Ranks = ALONE,
) -> list[TargetResult]:
    """Run ``episodes`` episodes for each target, all in one batch; return one result per different target.

    Targets are compared on the same starts (:func:`episode_seeds`), and the same call has the same starts
    again. Several ranks share the episodes out, and all return the results of all.

    Raises:
        UserError: no target, no episode, too many of them, or a target that is not finite; and see
            :func:`flowrl.evaluation.rollout.rollout`.
    """
    targets = tuple(dict.fromkeys(float(target) for target in targets))
    if not targets or not np.isfinite(targets).all():
        raise UserError(
            f"--targets {' '.join(map(str, targets))}: at least one finite target return is needed"
        )
    if not 1 <= episodes <= MOST_EPISODES // len(targets):
        raise UserError(f"--episodes {episodes}: must be from 1 to {MOST_EPISODES} of all targets together")
    prepare_process()
    target_returns = np.repeat(targets, episodes)  # (slots,)
    seeds = np.tile(episode_seeds(seed, episodes), len(targets))  # (slots,)
    outcomes = np.zeros((4, len(seeds)))  # each rank fills in its own; NaN is what is not reported
    if len(seeds[ranks.mine]):
        own = rollout(agent, environment, target_returns[ranks.mine], seeds[ranks.mine])
        for row, values in enumerate((own.returns, own.lengths, own.successes, own.worlds)):
            outcomes[row, ranks.mine] = np.nan if values is None else values
    outcomes = ranks.sum(torch.from_numpy(outcomes)).numpy()
    results = []
    for target, its_outcomes in zip(targets, np.split(outcomes, len(targets), axis=1), strict=True):
        returns, lengths, successes, worlds = its_outcomes
        scores = None if reference is None else reference.normalized_score(returns)
        succeeded = None if np.isnan(successes).all() else successes > 0
        its_worlds = None if np.isnan(worlds).all() else worlds.astype(np.int64)
        results.append(TargetResult(target, returns, lengths.astype(np.int64), scores, succeeded, its_worlds))
    return results


def episode_seeds(seed: int, episodes: int) -> np.ndarray:
    """Environment seeds of an evaluation's episodes, (episodes,): the first words of NumPy's SeedSequence.

    More episodes begin with the same ones; another seed has others.
    """
    return np.random.SeedSequence(seed).generate_state(episodes)


def format_table(results: Sequence[TargetResult]) -> str:
    """Return a plain-text table: mean, standard deviation, (standard error), per target and hidden world."""
    rows = [["target_return", "episodes", "return", "length", "normalized_score"]]
    if results[0].successes is not None:
        rows[0].append("success_rate")
    for result in results:
        scores = result.normalized_scores
        row = [
            f"{result.target_return:g}",
            f"{len(result.returns)}",
            _spread(result.returns),
            f"{result.lengths.mean():.1f}",
            "no reference" if scores is None else _spread(scores),
        ]
        rows.append(row if result.successes is None else [*row, f"{result.successes.mean():.2f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append("mean +/- standard deviation (standard error of the mean) over episodes")
    lines += [_by_world(result, result.worlds) for result in results if result.worlds is not None]
    return "\n".join(lines)


def _by_world(result: TargetResult, worlds: np.ndarray) -> str:
    scores = result.normalized_scores
    name, values = ("return", result.returns) if scores is None else ("normalized_score", scores)
    each = [f"{world}: {_spread(values[worlds == world])}" for world in np.unique(worlds)]
    return f"{name} by world, target {result.target_return:g}: {', '.join(each)}"


def standard_error(values: np.ndarray) -> float:
    """Sample standard deviation over the square root of the count; NaN for a single value."""
    return float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def short_number(value: float) -> str:
    """One decimal, below 1 two significant digits: returns may be of any scale."""
    return f"{value:.2g}" if 0 < abs(value) < 1 else f"{value:.1f}"


def _figures(name: str, values: np.ndarray) -> dict[str, float]:
    figures = {f"{name}_mean": float(values.mean())}
    if len(values) > 1:
        figures[f"{name}_std"] = float(values.std(ddof=1))
        figures[f"{name}_standard_error"] = standard_error(values)
    return figures


def _spread(values: np.ndarray) -> str:
    if len(values) == 1:
        return short_number(values[0])
    mean, deviation, error = map(short_number, (values.mean(), values.std(ddof=1), standard_error(values)))
    return f"{mean} +/- {deviation} ({error})"
