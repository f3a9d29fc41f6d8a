"""The runs of a report: read from run folders and from JSON files of evaluations."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError, one_line
from flowrl.plain_yaml import read_yaml_mapping
from flowrl.sweeps.plan import PLAN_FILE, read_plan
from flowrl.training.config import TrainConfig, method_name
from flowrl.training.metrics import METRICS_FILE, read_metrics

EVALUATION_FILE = "evaluation.json"

# Options in which runs of one cell of the table may differ.
_FREE_OPTIONS = frozenset(
    (
        *("seed", "run_dir", "config", "resume", "device", "compile"),
        *("log_every", "checkpoint_every", "keep_checkpoints", "eval_every", "eval_episodes", "eval_seed"),
        *("keep_best", "dataset", "memory_map"),  # hashes of the data are compared
    )
)

_OF_EVALUATION = ("conditioning", "source_clamp", "temperature")  # options of `evaluate`, over the run's own

CHOSEN = ", best by its own evaluation"  # ends the method's name of a checkpoint that --keep-best kept

_DEFAULTS = json.loads(json.dumps(asdict(TrainConfig())))  # with lists, as in files

Figures = dict[str, Any]  # of one target return, as training and evaluation write them


class Unit(NamedTuple):
    """What scores are measured in: the figure that holds their mean and the one that lists all episodes."""

    name: str
    mean: str
    episodes: str
    factor: float = 1.0


NORMALIZED = Unit("normalised score", "normalized_score_mean", "normalized_scores")
RETURN = Unit("return", "return_mean", "returns")
UNITS = (NORMALIZED, Unit("success rate, %", "success_rate", "successes", 100.0), RETURN)  # by preference


@dataclass(frozen=True)
class RunResult:
    """One finished run. ``dataset`` and ``method`` are its row and column; both may get a label added."""

    path: Path
    dataset: str
    sha256: str
    environment: str
    method: str
    seed: int
    config: dict[str, Any]
    """Options of training; of a method from outside, only some."""
    final: tuple[Figures, ...]
    """Evaluation of the last checkpoint, one for each target return; the first is the run's score."""
    train: tuple[Figures, ...] = ()
    evaluations: tuple[Figures, ...] = ()
    """Evaluations during training, one for each update and target return."""

    def has(self, unit: Unit) -> bool:
        """Whether all its evaluations have scores in this unit."""
        return all(unit.mean in figures for figures in (*self.final, *self.evaluations))

    def last_score(self, unit: Unit) -> float:
        """Mean score of the last checkpoint."""
        return _score(self.final[0], unit)

    def curve(self, unit: Unit) -> dict[int, float]:
        """Mean score after each evaluated update, at the first target return."""
        target = self.final[0]["target_return"]
        return {f["step"]: _score(f, unit) for f in self.evaluations if f["target_return"] == target}

    def policies(self, unit: Unit) -> list[np.ndarray]:
        """Scores (episodes,) of the last checkpoint at each target return whose episodes are known."""
        listed = [figures[unit.episodes] for figures in self.final if unit.episodes in figures]
        return [unit.factor * np.asarray(scores, dtype=np.float64) for scores in listed]

    @property
    def achieved(self) -> dict[float, float]:
        """Mean return of the last checkpoint by target return."""
        return {f["target_return"]: f["return_mean"] for f in self.final if f["target_return"] is not None}


def load_runs(paths: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """Read the finished runs in folders of sweeps or runs and in JSON files of evaluations.

    Returns:
        The finished runs, and a line for each that is not finished.

    Raises:
        UserError: no run in a folder, or a damaged file.
    """
    found: list[RunResult | str] = []
    for path in paths:
        if path.is_file():
            found.append(_read_evaluation(path))
        else:
            found += [_load_run(folder, method) for folder, method in _find_runs(path).items()]
    finished = [run for run in found if isinstance(run, RunResult)]
    return finished, [line for line in found if isinstance(line, str)]


def check_comparable(runs: list[RunResult], mixed: bool) -> list[RunResult]:
    """Return the runs if they may share a table; with ``mixed``, labelled where they differ.

    Raises:
        UserError: without ``mixed``, runs of one dataset on different data or environments, runs of different
            numbers of updates, runs of one cell with different options; in any case, one run given twice.
    """
    labelled = []
    for run in runs:
        row = [other for other in runs if other.dataset == run.dataset]
        cell = [other for other in row if other.method == run.method]
        row_label, column_label = [], []
        for other in row:
            if (other.sha256, other.environment) != (run.sha256, run.environment):
                row_label = [run.sha256[:8], run.environment]
                _refuse(mixed, run, other, "dataset", f"sha256 {run.sha256[:12]} in {run.environment}",
                        f"sha256 {other.sha256[:12]} in {other.environment}")  # fmt: skip
        differing = {"steps": runs, "targets": row, "reference_scores": row}
        differing |= {name: cell for name in sorted({*run.config} - _FREE_OPTIONS - {*differing})}
        for name, others in differing.items():
            for other in others:
                if {name} <= run.config.keys() & other.config and run.config[name] != other.config[name]:
                    column_label.append(f"{name} {run.config[name]}")
                    _refuse(mixed, run, other, name, str(run.config[name]), str(other.config[name]))
                    break
        labelled.append(
            replace(
                run,
                dataset=_labelled(run.dataset, row_label),
                method=_labelled(run.method, column_label),
            )
        )
    seen: dict[tuple[str, str, int], RunResult] = {}
    for run in labelled:
        twin = seen.setdefault((run.dataset, run.method, run.seed), run)
        if twin is not run:
            raise UserError(
                f"{run.path} and {twin.path}: both are {run.method} on {run.dataset} with seed {run.seed}; "
                "give one of them"
            )
    return labelled


def _find_runs(path: Path) -> dict[Path, str | None]:
    """Folders of runs with the names that a sweep gave to their methods."""
    if (path / PLAN_FILE).is_file():
        return {path / run: method for run, method in read_plan(path).items()}
    if (path / METRICS_FILE).is_file():
        return {path: None}
    inside = dict.fromkeys(sorted(file.parent for file in path.rglob(METRICS_FILE)))
    for plan in path.rglob(PLAN_FILE):
        inside |= _find_runs(plan.parent)
    if not inside:
        raise UserError(f"{path}: no runs in it; give folders of runs, or of sweeps ({PLAN_FILE})")
    return inside


def _load_run(path: Path, method: str | None) -> RunResult | str:
    if not (path / METRICS_FILE).is_file() or not (path / "config.yaml").is_file():
        return f"{path}: missing"
    # A run from before an option was there has what is its default now.
    config = _DEFAULTS | read_yaml_mapping(path / "config.yaml")
    identity = read_metrics(path, "run")
    speeds = ("updates_per_second", "tokens_per_second")
    train = read_metrics(path, "train", speeds)
    evaluations = read_metrics(path, "evaluation", ("return_mean",))
    try:
        if config["eval_episodes"] == 0 and (not evaluations or evaluations[-1]["step"] < config["steps"]):
            return f"{path}: trained without evaluation"
        if not identity or not evaluations or evaluations[-1]["step"] < config["steps"]:
            done = max((line["step"] for line in train), default=0)
            unevaluated = ", not evaluated" * (done >= config["steps"])
            return f"{path}: partial, {done} of {config['steps']} updates{unevaluated}"
        last = [line for line in evaluations if line["step"] == config["steps"]]
        result = _result(path, identity[0], config, method, last)
        result = replace(result, train=tuple(train), evaluations=tuple(evaluations))
        _ = result.last_score(RETURN), result.curve(RETURN)[config["steps"]], result.achieved
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: its config.yaml and {METRICS_FILE} are not those of a run: {one_line(error)}"
        ) from error
    if not (path / EVALUATION_FILE).is_file():
        return result
    separate = _read_evaluation(path / EVALUATION_FILE)
    if separate.method.endswith(CHOSEN):
        raise UserError(
            f"{separate.path}: of the checkpoint that --keep-best chose; give it as a file of its own"
        )
    if (separate.sha256, separate.environment) != (result.sha256, result.environment):
        raise UserError(f"{separate.path}: not an evaluation of this run")
    if separate.config.get("steps") != config["steps"]:
        raise UserError(f"{separate.path}: of another number of updates than the run's: evaluate it again")
    first = result.final[0]["target_return"]
    final = tuple(sorted(separate.final, key=lambda figures: figures["target_return"] != first))
    if final[0]["target_return"] != first:
        raise UserError(f"{separate.path}: not at the run's first target return {first:g}: evaluate it again")
    evaluated = {name: separate.config[name] for name in _OF_EVALUATION if name in separate.config}
    return replace(result, final=final, config=result.config | evaluated)


def _read_evaluation(path: Path) -> RunResult:
    """Read what ``flowrl evaluate --json`` wrote, or the result of a method from outside in the same form."""
    try:
        document = json.loads(path.read_bytes())
        config, method = document["config"], document.get("method")
        if method is None:
            if not config:
                raise UserError(
                    f"{path}: names no options, as the agent was evaluated apart from its run: evaluate the "
                    'run folder, or write "method": NAME and "config": {"seed": 0} into the file'
                )
            config = _DEFAULTS | config
        result = _result(path, document, config, method, document["targets"])
        if document.get("chosen_by"):
            return replace(result, method=f"{result.method}{CHOSEN}")
        if document["checkpoint_step"] not in (None, config.get("steps")):
            raise ValueError(f"of checkpoint {document['checkpoint_step']}, not of the last one")
        _ = result.last_score(RETURN) + sum(result.achieved.values())
    except (AttributeError, OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: not the results of an evaluation: {one_line(error)}") from error
    return result


def _result(
    path: Path, identity: dict[str, Any], config: dict[str, Any], method: str | None, final: Iterable[Figures]
) -> RunResult:
    """The result without its curves; ``identity`` names dataset and environment."""
    # Its best episodes are a method's choice, not another dataset.
    dataset = identity["dataset_id"].removesuffix(f" top {config.get('top_fraction', 1):g}")
    environment = TypeAdapter(EnvironmentSpec).validate_json(json.dumps(identity["environment"]))
    final = tuple(final)
    evaluated = {name: identity[name] for name in _OF_EVALUATION if name in identity}
    config = {"temperature": 0.0, **config, **evaluated}
    if final[0]["target_return"] is not None:
        config["targets"] = [float(f"{final[0]['target_return']:g}")]  # of the score
    return RunResult(
        path=path,
        dataset=dataset,
        sha256=identity["dataset_sha256"],
        environment=str(environment.without_registered_options()),
        method=method or method_name(config),
        seed=config["seed"],
        config=config,
        final=final,
    )


def _score(figures: Figures, unit: Unit) -> float:
    return unit.factor * float(figures[unit.mean])


def _labelled(name: str, labels: list[str]) -> str:
    return f"{name} ({', '.join(labels)})" if labels else name


def _refuse(mixed: bool, run: RunResult, other: RunResult, what: str, value: str, other_value: str) -> None:
    if not mixed:
        raise UserError(
            f"{run.path} and {other.path} do not belong in one table: {what} {value} against {other_value}; "
            "--mixed puts them apart, labelled"
        )
