"""What a report is about: finished runs read from their folders, and a list of those that are not."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flowrl.errors import UserError
from flowrl.plain_yaml import read_yaml_mapping
from flowrl.sweeps.plan import PLAN_FILE, read_plan
from flowrl.training.config import TrainConfig
from flowrl.training.metrics import METRICS_FILE, read_metrics

# Options in which runs of one cell of the table may differ.
_FREE_OPTIONS = frozenset(
    (
        *("seed", "run_dir", "config", "resume", "device", "compile"),
        *("log_every", "checkpoint_every", "keep_checkpoints", "eval_every"),
    )
)


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
    train: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    """Lines of metrics, one per step and target return."""

    @property
    def steps(self) -> int:
        return int(self.config["steps"])

    @property
    def metric(self) -> str:
        """What its scores are: normalised where the environment has reference scores, else returns."""
        normalized = all("normalized_score_mean" in line for line in self.evaluations)
        return "normalized_score_mean" if normalized else "return_mean"

    @property
    def curve(self) -> dict[int, float]:
        """Score at the first target return after each evaluated update."""
        target = self.evaluations[0]["target_return"]
        return {
            line["step"]: float(line[self.metric])
            for line in self.evaluations
            if line["target_return"] == target
        }

    @property
    def last_score(self) -> float:
        """Score of the last checkpoint at the first target return."""
        return self.curve[self.steps]

    @property
    def best_score(self) -> float:
        """The highest score of any evaluation at any target return."""
        return max(float(line[self.metric]) for line in self.evaluations)

    @property
    def achieved(self) -> dict[float, float]:
        """Mean return of the last checkpoint at each target return."""
        return {
            float(line["target_return"]): float(line["return_mean"])
            for line in self.evaluations
            if line["step"] == self.steps
        }


def load_runs(paths: Iterable[Path]) -> tuple[list[RunResult], list[str]]:
    """Read the finished runs in folders of sweeps or runs; also return a line for each that is not finished.

    Raises:
        UserError: no run in a folder, a damaged file, or the same dataset, method and seed twice.
    """
    finished: list[RunResult] = []
    unfinished: list[str] = []
    for path, method in _find_runs(paths):
        result = _load_run(path, method)
        if isinstance(result, RunResult):
            finished.append(result)
        else:
            unfinished.append(result)
    return finished, unfinished


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
        differing = {"steps": runs, "targets": row}
        differing |= {name: cell for name in sorted({*run.config} - _FREE_OPTIONS - {"steps", "targets"})}
        for name, others in differing.items():
            values = [(other, other.config.get(name)) for other in others]
            other, value = next(((o, v) for o, v in values if v != run.config.get(name)), (run, None))
            if other is not run:
                column_label.append(f"{name} {run.config.get(name)}")
                _refuse(mixed, run, other, name, str(run.config.get(name)), str(value))
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


def _find_runs(paths: Iterable[Path]) -> list[tuple[Path, str | None]]:
    """Folders of runs with the names that sweeps gave to their methods."""
    found: dict[Path, str | None] = {}
    for path in paths:
        if (path / PLAN_FILE).is_file():
            found |= {path / entry["run"]: entry["method"] for entry in read_plan(path)}
        elif (path / METRICS_FILE).is_file():
            found[path] = None
        else:
            inside = sorted(file.parent for file in path.rglob(METRICS_FILE))
            if not inside:
                raise UserError(f"{path}: no runs in it; give folders of runs, or of sweeps ({PLAN_FILE})")
            found |= dict.fromkeys(inside)
    return list(found.items())


def _load_run(path: Path, method: str | None) -> RunResult | str:
    if not (path / METRICS_FILE).is_file() or not (path / "config.yaml").is_file():
        return f"{path}: missing"
    # A run from before an option was there has what is its default now.
    config = asdict(TrainConfig()) | read_yaml_mapping(path / "config.yaml")
    identity = read_metrics(path, "run")
    train, evaluations = read_metrics(path, "train"), read_metrics(path, "evaluation")
    try:
        if config["eval_episodes"] == 0:
            return f"{path}: trained without evaluation"
        if not identity or not evaluations or evaluations[-1]["step"] < config["steps"]:
            done = max((line["step"] for line in train), default=0)
            return f"{path}: partial, {done} of {config['steps']} updates"
        environment = identity[0]["environment"]
        result = RunResult(
            path=path,
            dataset=identity[0]["dataset_id"].removesuffix(f" top {config.get('top_fraction', 1):g}"),
            sha256=identity[0]["dataset_sha256"],
            environment=environment["env_id"],
            method=method or method_name(config),
            seed=config["seed"],
            config=config,
            train=tuple(train),
            evaluations=tuple(evaluations),
        )
        _ = (result.last_score, result.best_score, result.achieved)  # raises where a figure is missing
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its config.yaml and {METRICS_FILE} are not those of a run: {error}"
        ) from error
    return result


def method_name(config: dict[str, Any]) -> str:
    """Return a method's name from its options, for runs that are of no sweep."""
    if config.get("agent", "transformer") != "transformer":
        name = config["agent"]
    else:
        name = f"{config['attention']}-{config['token_layout']}-{config['context_length']}"
    fraction = config.get("top_fraction", 1)
    return name if fraction == 1 else f"{name}-top{fraction:g}"


def _labelled(name: str, labels: list[str]) -> str:
    return f"{name} ({', '.join(labels)})" if labels else name


def _refuse(mixed: bool, run: RunResult, other: RunResult, what: str, value: str, other_value: str) -> None:
    if not mixed:
        raise UserError(
            f"{run.path} and {other.path} do not belong in one table: {what} {value} against {other_value}; "
            "--mixed puts them apart, labelled"
        )
