"""What a sweep trains: datasets x methods x seeds, one run folder each.

A method is a name for some of TrainConfig's options. Methods come from a sweep file, or are the product of
attention kinds, token layouts and context lengths.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from flowrl.atomic import write_text
from flowrl.data.d4rl import D4RL_ENVIRONMENTS
from flowrl.data.embedded import EMBEDDED, SOURCE, embedded_recipe
from flowrl.data.sources import FILE_SUFFIXES, MINARI_PREFIX, unknown_dataset
from flowrl.envs.memory import tmaze_environment
from flowrl.errors import UserError, did_you_mean
from flowrl.options import Seed, checked
from flowrl.plain_yaml import read_yaml_mapping
from flowrl.training.config import (
    TrainConfig,
    checked_options,
    dataset_folder,
    method_name,
    parse_train_config,
)
from flowrl.training.presets import PRESET_FOLDER

PLAN_FILE = "sweep.json"
_OWN_OPTIONS = ("seed", "run_dir", "resume")  # of each run, given by the sweep
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Sweep:
    """Datasets x methods x seeds; ``methods`` maps names to options, which win over ``common``'s."""

    datasets: tuple[str, ...] = ()
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: tuple[Seed, ...] = (0,)
    common: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep; ``config.run_dir`` is its folder, ``<dataset>/<method>/seed<k>``."""

    name: str
    method: str
    config: TrainConfig

    @property
    def run_dir(self) -> Path:
        assert self.config.run_dir is not None  # set by plan_runs
        return self.config.run_dir


def read_sweep(name: str) -> Sweep:
    """Read a sweep file: a path, or a name in configs/sweeps/.

    Raises:
        UserError: no such file, or one that is not a mapping of :class:`Sweep`'s fields.
    """
    folder = PRESET_FOLDER / "sweeps"
    path = next((p for p in (Path(name), folder / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        names = [known.stem for known in folder.glob("*.yaml")]
        raise UserError(f"--sweep {name}: no such file or sweep{did_you_mean(name, names)}")
    return Sweep(**checked(Sweep, read_yaml_mapping(path), lambda key: f"{path}: '{key}'"))


def product_methods(
    attention: Iterable[str], token_layout: Iterable[str], context_length: Iterable[int | str]
) -> dict[str, dict[str, Any]]:
    """Return one method for each combination, named like ``flow-interleaved-20``."""
    names = ("attention", "token_layout", "context_length")
    methods = [dict(zip(names, v, strict=True)) for v in product(attention, token_layout, context_length)]
    return {method_name(asdict(TrainConfig()) | options): options for options in methods}


def plan_runs(sweep: Sweep, runs_dir: Path, arguments: Sequence[str] = ()) -> list[PlannedRun]:
    """Return the runs of a sweep, all of the first seed before any of the second.

    Args:
        sweep: what to train.
        runs_dir: folder of the runs.
        arguments: options of ``flowrl train`` from the command line; they win over all others.

    Raises:
        UserError: an unknown dataset, method option or value, or nothing to do.
    """
    for values, what in ((sweep.datasets, "datasets"), (sweep.methods, "methods"), (sweep.seeds, "seeds")):
        if not values:
            raise UserError(f"nothing to sweep over: no {what}")
        if len(set(values)) < len(values):
            raise UserError(f"--{what} {' '.join(map(str, values))}: one is given twice")
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in _OWN_OPTIONS:
            raise UserError(f"{argument}: the sweep gives each run its own; see --seeds and --runs-dir")
    cells = [
        (dataset, method, _cell_config(dataset, method, {**sweep.common, **options}, arguments))
        for dataset, (method, options) in product(sweep.datasets, sweep.methods.items())
    ]
    runs = []
    for seed, (dataset, method, config) in product(sweep.seeds, cells):
        name = f"{dataset_folder(dataset)}/{method}/seed{seed}"
        runs.append(PlannedRun(name, method, replace(config, seed=seed, run_dir=runs_dir / name)))
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"--datasets {' '.join(sweep.datasets)}: two of them have one folder name")
    return runs


def write_plan(runs: list[PlannedRun], runs_dir: Path) -> None:
    """Record which runs belong to the sweep, so that a report can name those that are missing.

    Runs planned earlier in the same folder stay in the record.
    """
    methods = read_plan(runs_dir) | {run.name: run.method for run in runs}
    entries = [{"run": name, "method": method} for name, method in methods.items()]
    write_text(runs_dir / PLAN_FILE, json.dumps({"runs": entries}, indent=1) + "\n")


def read_plan(runs_dir: Path) -> dict[str, str]:
    """Return the methods of a sweep's runs by the names of the runs, their folders; none without a record.

    Raises:
        UserError: a record that is damaged.
    """
    path = runs_dir / PLAN_FILE
    if not path.is_file():
        return {}
    try:
        methods = {entry["run"]: entry["method"] for entry in json.loads(path.read_bytes())["runs"]}
        if not all(isinstance(word, str) for names in methods.items() for word in names):
            raise TypeError("each run needs a run and a method, which are names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the record of a sweep: {error}") from error
    return methods


def _cell_config(
    dataset: str,
    method: str,
    options: dict[str, Any],
    arguments: Sequence[str],
) -> TrainConfig:
    """The configuration of one dataset and method, seed and folder aside."""
    where = f"method '{method}'"
    if not _FOLDER_NAME.fullmatch(method):
        raise UserError(
            f"{where}: a method's name is a folder's; letters, digits, '.', '_', '+' and '-' only"
        )
    for name in _OWN_OPTIONS:
        if name in options:
            raise UserError(f"{where}: '{name}' is given by the sweep; see --seeds and --runs-dir")
    if {"timesteps_per_update", "batch_size"} <= options.keys():
        raise UserError(f"{where}: give 'timesteps_per_update' or 'batch_size', not both")
    data = _data_options(dataset)
    options = {**data, **checked_options(options, where)}
    config = parse_train_config(arguments, options)
    sources = (data["dataset"],) if "dataset" in data else ((), (SOURCE,))
    if config.dataset not in sources or config.env != data.get("env", config.env):
        given = f"--env {config.env} --dataset {' '.join(config.dataset)}"
        raise UserError(f"{where}: {given} is not the sweep's dataset '{dataset}'; see --datasets")
    if config.dataset == (SOURCE,):
        embedded_recipe(dataset)
    return config


def _data_options(dataset: str) -> dict[str, Any]:
    """The option of training that names the dataset: ``env`` or ``dataset``."""
    if dataset in D4RL_ENVIRONMENTS or dataset in EMBEDDED or tmaze_environment(dataset) is not None:
        return {"env": dataset}
    if dataset.startswith(MINARI_PREFIX) or Path(dataset).suffix.lower() in FILE_SUFFIXES:
        return {"dataset": (dataset,)}
    raise unknown_dataset(dataset)
