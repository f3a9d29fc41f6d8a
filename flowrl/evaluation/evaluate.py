"""Evaluate an agent: several target returns, several episodes each, one batch; a table and a JSON file."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

import flowrl
from flowrl.atomic import write_text
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.spaces import check_environment
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError
from flowrl.evaluation.rollout import BatchedAgent, rollout
from flowrl.evaluation.video import check_video, write_video
from flowrl.ranks import ALONE, Ranks
from flowrl.signals import StopSignals

MOST_EPISODES = 100_000  # each has an environment of its own
LARGEST_SEED = (1 << 32) - 1


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a trained run in its environment and print returns and normalised scores."""

    run: tyro.conf.Positional[Path]
    """Run folder that scripts/train.py wrote."""
    episodes: int = 20
    """Episodes per target return."""
    targets: tuple[float, ...] = ()
    """Target returns to ask for; by default those of the run's configuration."""
    acting: Literal["recurrent", "window"] | None = None
    """recurrent: constant cost per step over the whole episode so far; window: recompute the last
    context_length steps. By default the way that the run was trained for."""
    checkpoint: int | None = None
    """Step of the checkpoint to evaluate; by default the last one."""
    seed: int = 0
    """Episode e of every target starts from environment seed `seed + e`."""
    device: str = "auto"
    """Where the agent runs: auto, cpu, cuda, cuda:1, ..."""
    video: Path | None = None
    """Also render one episode per target into this .mp4 file."""
    json: Path | None = None
    """Also write the results, every episode included, to this JSON file."""


@dataclass(frozen=True)
class TargetResult:
    """The episodes of one target return; arrays are (episodes,).

    Spreads are sample standard deviations (ddof 1), standard errors those over sqrt(episodes); both
    are NaN for a single episode. Scores are None where the environment has no reference scores.
    """

    target_return: float
    returns: np.ndarray
    lengths: np.ndarray
    normalized_scores: np.ndarray | None

    def summary(self) -> dict[str, float]:
        """Return the figures under the names that tables, TensorBoard and JSON use."""
        figures = {
            "return_mean": _mean(self.returns),
            "return_std": _std(self.returns),
            "return_standard_error": _standard_error(self.returns),
            "length_mean": _mean(self.lengths),
        }
        if self.normalized_scores is not None:
            figures["normalized_score_mean"] = _mean(self.normalized_scores)
            figures["normalized_score_std"] = _std(self.normalized_scores)
            figures["normalized_score_standard_error"] = _standard_error(self.normalized_scores)
        return figures


def evaluate(
    agent: BatchedAgent,
    environment: EnvironmentSpec,
    targets: Sequence[float],
    episodes: int,
    seed: int,
    reference: ReferenceScores | None,
    ranks: Ranks = ALONE,
) -> list[TargetResult]:
    """Run ``episodes`` episodes for each target, all in one batch, and return one result per target.

    Episode ``e`` of every target starts from environment seed ``seed + e``: targets are compared on the
    same starts, and the same call gives the same starts again. Several ranks share the episodes out, and
    all return the results of all.

    Raises:
        UserError: no target, no episode, too many of them, or a target or seed out of range.
        NonFiniteError: see :func:`flowrl.evaluation.rollout.rollout`.
    """
    if episodes < 1:
        raise UserError(f"--episodes {episodes}: at least one episode per target is needed")
    if episodes * len(targets) > MOST_EPISODES:
        raise UserError(f"--episodes {episodes}: all run at once; at most {MOST_EPISODES} of all targets do")
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed {seed}: must be from 0 to {LARGEST_SEED}")
    if not targets or not np.isfinite(targets).all():
        raise UserError(
            f"--targets {' '.join(map(str, targets))}: at least one finite target return is needed"
        )
    target_returns = np.repeat(np.asarray(targets, dtype=np.float64), episodes)  # (slots,)
    seeds = np.tile(seed + np.arange(episodes), len(targets))  # (slots,)
    outcomes = np.zeros((2, len(seeds)))  # returns and lengths; each rank fills in its own, 0 elsewhere
    if len(seeds[ranks.mine]):
        rollouts = rollout(agent, environment, target_returns[ranks.mine], seeds[ranks.mine])
        outcomes[:, ranks.mine] = rollouts.returns, rollouts.lengths
    outcomes = ranks.sum(torch.from_numpy(outcomes)).numpy()
    returns = outcomes[0].reshape(len(targets), episodes)
    lengths = outcomes[1].astype(np.int64).reshape(len(targets), episodes)
    results = []
    for target, its_returns, its_lengths in zip(targets, returns, lengths, strict=True):
        scores = None
        if reference is not None:
            scores = np.array([reference.normalized_score(float(value)) for value in its_returns])
        results.append(TargetResult(float(target), its_returns, its_lengths, scores))
    return results


def format_table(results: Sequence[TargetResult]) -> str:
    """Return a plain-text table, one line per target: mean, standard deviation, (standard error)."""
    rows = [("target_return", "episodes", "return", "length", "normalized_score")]
    for result in results:
        scores = result.normalized_scores
        rows.append(
            (
                f"{result.target_return:g}",
                f"{len(result.returns)}",
                _spread(result.returns),
                f"{_mean(result.lengths):.1f}",
                "no reference" if scores is None else _spread(scores),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, "mean ± standard deviation (standard error of the mean) over episodes"])


def to_json(
    results: Sequence[TargetResult],
    *,
    environment: EnvironmentSpec,
    dataset_id: str,
    dataset_sha256: str,
    acting: str,
    checkpoint_step: int | None,
    seed: int,
) -> str:
    """Return the results as a JSON document: what was run, the figures per target, every episode."""
    document = {
        "environment": environment.to_dict(),
        "dataset_id": dataset_id,
        "dataset_sha256": dataset_sha256,
        "acting": acting,
        "checkpoint_step": checkpoint_step,
        "seed": seed,
        "versions": {name: version(name) for name in ("flowrl", "torch", "gymnasium", "mujoco")},
        "targets": [_target_to_dict(result) for result in results],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def evaluate_run(config: EvaluateConfig) -> None:
    """Do what the configuration asks: load, run, print the table, write the files.

    Raises:
        UserError: the run, a flag or the environment is unusable.
        Stopped: SIGINT or SIGTERM came; no file is left half-written.
    """
    with StopSignals() as signals, signals.interruptible():
        _evaluate_run(config)


def _evaluate_run(config: EvaluateConfig) -> None:
    if config.json is not None:
        _check_writable("--json", config.json)
    if config.video is not None:
        _check_writable("--video", config.video)
        check_video(config.video)
    agent = flowrl.load_agent(
        config.run, checkpoint=config.checkpoint, acting=config.acting, device=config.device
    )
    environment, targets = agent.environment, config.targets or agent.config.targets
    if environment is None:
        raise UserError(f"{config.run}: its dataset names no environment, so it cannot be evaluated")
    print(
        f"environment {environment.env_id}, dataset {agent.config.dataset_id} "
        f"sha256 {agent.config.dataset_sha256[:12]}, acting {agent.acting}, "
        f"checkpoint {agent.checkpoint_step}, seed {config.seed}"
    )
    check_environment(environment, agent.config.model.observation_dim, agent.config.model.action_dim)
    results = evaluate(agent, environment, targets, config.episodes, config.seed, agent.config.reference)
    print(format_table(results))
    if config.json is not None:
        document = to_json(
            results,
            environment=environment,
            dataset_id=agent.config.dataset_id,
            dataset_sha256=agent.config.dataset_sha256,
            acting=agent.acting,
            checkpoint_step=agent.checkpoint_step,
            seed=config.seed,
        )
        try:
            write_text(config.json, document)
        except OSError as error:
            raise UserError(f"--json {config.json}: cannot be written: {error.strerror}") from error
        print(f"results in {config.json}")
    if config.video is not None:
        write_video(config.video, agent, environment, targets, config.seed)
        print(f"video in {config.video}")


def _check_writable(flag: str, path: Path) -> None:
    """Refuse, before hours of work, a file that could not be written after them."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written there; give a file name in a writable folder")


def _target_to_dict(result: TargetResult) -> dict[str, Any]:
    # JSON knows no NaN: the spread of a single episode is null.
    figures = {name: None if np.isnan(value) else value for name, value in result.summary().items()}
    scores = result.normalized_scores
    return {
        "target_return": result.target_return,
        "episodes": len(result.returns),
        **figures,
        "returns": result.returns.tolist(),
        "lengths": result.lengths.tolist(),
        "normalized_scores": None if scores is None else scores.tolist(),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))


def _std(values: np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def _standard_error(values: np.ndarray) -> float:
    return _std(values) / len(values) ** 0.5


def _spread(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{_mean(values):.1f} ± {_std(values):.1f} ({_standard_error(values):.1f})"
