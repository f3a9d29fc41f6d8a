"""What a sweep trains: datasets x methods x seeds, one run folder each.

A method is a name for some of TrainConfig's options. Methods come from a sweep file, or are the product of
attention kinds, token layouts and context lengths.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.atomic import write_text
from flowrl.data.d4rl import D4RL_ENVIRONMENTS
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.embedded import EMBEDDED, SOURCE, embedded_named
from flowrl.data.memory import memory_environment
from flowrl.data.sources import FILE_SUFFIXES, MINARI_PREFIX
from flowrl.errors import UserError, did_you_mean
from flowrl.plain_yaml import read_yaml_mapping
from flowrl.training.config import TrainConfig, checked_options, parse_train_config
from flowrl.training.presets import PRESET_FOLDER
from flowrl.training.setup import load_dataset

PLAN_FILE = "sweep.json"
TIMESTEPS_PER_UPDATE = "timesteps_per_update"
_FILE_KEYS = ("datasets", "methods", "seeds", "common")
_OWN_OPTIONS = ("seed", "run_dir", "resume")  # of each run, given by the sweep
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Sweep:
    """Datasets x methods x seeds; ``methods`` maps names to options, which win over ``common``'s."""

    datasets: tuple[str, ...]
    methods: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    common: dict[str, Any]
    arguments: tuple[str, ...] = ()
    """Options of scripts/train.py from the command line; they win over all others."""


@dataclass(frozen=True)
class PlannedRun:
    """One training of a sweep; ``config.run_dir`` is its folder, ``<dataset>/<method>/seed<k>``."""

    name: str
    dataset: str
    method: str
    config: TrainConfig
    timesteps: int
    """Timesteps per update, on average; 0 where it was not asked for."""

    @property
    def run_dir(self) -> Path:
        assert self.config.run_dir is not None  # plan_runs saw to it
        return self.config.run_dir


def read_sweep(name: str) -> Sweep:
    """Read a sweep file: a path, or a name in configs/sweeps/.

    Raises:
        UserError: no such file, or one that is not a mapping of datasets, methods, seeds and common.
    """
    folder = PRESET_FOLDER / "sweeps"
    path = next((p for p in (Path(name), folder / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        names = [known.stem for known in folder.glob("*.yaml")]
        raise UserError(f"--sweep {name}: no such file or sweep{did_you_mean(name, names)}")
    data = read_yaml_mapping(path)
    for key in data:
        if key not in _FILE_KEYS:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(str(key), _FILE_KEYS)}")
    datasets, methods = data.get("datasets", []), data.get("methods", {})
    seeds, common = data.get("seeds", [0]), data.get("common", {})
    if not isinstance(datasets, list) or not all(isinstance(entry, str) for entry in datasets):
        raise UserError(f"{path}: 'datasets' must be a list of names")
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: 'seeds' must be a list of whole numbers")
    if not isinstance(common, dict) or not isinstance(methods, dict):
        raise UserError(f"{path}: 'common' must be a mapping of options, 'methods' one of names to options")
    for method, options in methods.items():
        if not isinstance(options, dict):
            raise UserError(f"{path}: method '{method}' must be a mapping of options")
    return Sweep(tuple(datasets), methods, tuple(seeds), common)


def product_methods(
    attention: Iterable[str], token_layout: Iterable[str], context_length: Iterable[int | str]
) -> dict[str, dict[str, Any]]:
    """Return one method for each combination, named like ``flow-interleaved-20``."""
    return {
        f"{kind}-{layout}-{context}": {
            "attention": kind,
            "token_layout": layout,
            "context_length": context,
        }
        for kind, layout, context in product(attention, token_layout, context_length)
    }


def plan_runs(sweep: Sweep, runs_dir: Path) -> list[PlannedRun]:
    """Return the runs of a sweep, all of the first seed before any of the second.

    Datasets are loaded only where ``timesteps_per_update`` needs the length of their episodes.

    Raises:
        UserError: an unknown dataset, method option or value; nothing to do; a folder that holds another run.
    """
    for values, what in ((sweep.datasets, "datasets"), (sweep.methods, "methods"), (sweep.seeds, "seeds")):
        if not values:
            raise UserError(f"nothing to sweep over: no {what}")
        if len(set(values)) < len(values):
            raise UserError(f"--{what} {' '.join(map(str, values))}: one is given twice")
    for argument in sweep.arguments:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in _OWN_OPTIONS:
            raise UserError(f"{argument}: the sweep gives each run its own; see --seeds and --runs-dir")
    cells = []
    for dataset in sweep.datasets:
        loaded: dict[tuple, EpisodeDataset] = {}
        for method, options in sweep.methods.items():
            config, timesteps = _cell_config(sweep, dataset, method, options, loaded)
            cells.append((dataset, method, config, timesteps))
    runs = []
    for seed, (dataset, method, config, timesteps) in product(sweep.seeds, cells):
        name = f"{_folder_of(dataset)}/{method}/seed{seed}"
        seeded = replace(config, seed=seed, run_dir=runs_dir / name)
        runs.append(PlannedRun(name, dataset, method, seeded, timesteps))
    folders = {run.dataset: _folder_of(run.dataset) for run in runs}
    if len(set(folders.values())) < len(folders):
        raise UserError(f"--datasets {' '.join(folders)}: two of them have one folder name")
    return runs


def write_plan(runs: list[PlannedRun], runs_dir: Path) -> None:
    """Record which runs belong to the sweep, so that a report can name those that are missing.

    Runs planned earlier in the same folder stay in the record.
    """
    entries = {entry["run"]: entry for entry in read_plan(runs_dir)}
    for run in runs:
        entries[run.name] = {
            "run": run.name,
            "dataset": run.dataset,
            "method": run.method,
            "seed": run.config.seed,
            "steps": run.config.steps,
        }
    write_text(runs_dir / PLAN_FILE, json.dumps({"runs": list(entries.values())}, indent=1) + "\n")


def read_plan(runs_dir: Path) -> list[dict[str, Any]]:
    """Return the entries (run, dataset, method, seed, steps) of a sweep's folder; none without a record.

    Raises:
        UserError: a record that is damaged.
    """
    path = runs_dir / PLAN_FILE
    if not path.is_file():
        return []
    types = {"run": str, "dataset": str, "method": str, "seed": int, "steps": int}
    try:
        entries = json.loads(path.read_bytes())["runs"]
        fitting = all({key: type(value) for key, value in entry.items()} == types for entry in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the record of a sweep: {error}") from error
    if not fitting:
        raise UserError(f"{path}: not the record of a sweep: each run needs {', '.join(types)}")
    return entries


def _cell_config(
    sweep: Sweep,
    dataset: str,
    method: str,
    options: dict[str, Any],
    loaded: dict[tuple, EpisodeDataset],
) -> tuple[TrainConfig, int]:
    """The configuration of one dataset and method, seed and folder aside, and its timesteps per update."""
    where = f"method '{method}'"
    if not _FOLDER_NAME.fullmatch(str(method)):
        raise UserError(
            f"{where}: a method's name is a folder's; letters, digits, '.', '_', '+' and '-' only"
        )
    merged = {**sweep.common, **options}
    for name in _OWN_OPTIONS:
        if name in merged:
            raise UserError(f"{where}: '{name}' is given by the sweep; see --seeds and --runs-dir")
    wanted = merged.pop(TIMESTEPS_PER_UPDATE, None)
    if wanted is not None and "batch_size" in merged:
        raise UserError(f"{where}: give '{TIMESTEPS_PER_UPDATE}' or 'batch_size', not both")
    if wanted is not None and (type(wanted) is not int or wanted < 1):
        raise UserError(f"{where}: '{TIMESTEPS_PER_UPDATE}' must be a whole number above 0, not {wanted}")
    options = {**_data_options(dataset), **checked_options(merged, where)}
    config = parse_train_config(sweep.arguments, options)
    if _is_file(dataset):
        is_its_own = config.dataset == (dataset,)
    else:
        is_its_own = config.env == dataset and config.dataset in ((), (SOURCE,))
    if not is_its_own:
        given = f"--env {config.env} --dataset {' '.join(config.dataset)}"
        raise UserError(f"{where}: {given} is not the sweep's dataset '{dataset}'; see --datasets")
    if config.dataset == (SOURCE,):
        embedded_named(dataset)
    if wanted is None:
        return config, 0
    length = float(config.context_length) if isinstance(config.context_length, int) else 0.0
    if config.context_length == "episode":
        key = (config.env, config.dataset, config.top_fraction)
        if key not in loaded:
            loaded[key] = load_dataset(config)
        length = mean_drawn_episode_length(loaded[key].episode_lengths)
    options["batch_size"] = max(1, round(wanted / length))
    config = parse_train_config(sweep.arguments, options)
    return config, round(config.batch_size * length)


def mean_drawn_episode_length(episode_lengths: np.ndarray) -> float:
    """Mean length of an episode drawn for training, from lengths (episodes,) in timesteps.

    :class:`flowrl.data.sampler.WindowSampler` draws an episode with a probability in proportion to its
    length, so that this is above the plain mean.
    """
    lengths = episode_lengths.astype(np.float64)
    return float(np.square(lengths).sum() / lengths.sum())


def _data_options(dataset: str) -> dict[str, str]:
    if dataset in D4RL_ENVIRONMENTS or dataset in EMBEDDED or memory_environment(dataset) is not None:
        return {"env": dataset}
    if _is_file(dataset):
        return {"dataset": dataset}
    known = did_you_mean(dataset, {*D4RL_ENVIRONMENTS, *EMBEDDED})
    raise UserError(
        f"unknown dataset '{dataset}'{known} "
        f"(or give {MINARI_PREFIX}ID, or a path that ends in {' or '.join(FILE_SUFFIXES)})"
    )


def _is_file(dataset: str) -> bool:
    return dataset.startswith(MINARI_PREFIX) or Path(dataset).suffix.lower() in FILE_SUFFIXES


def _folder_of(dataset: str) -> str:
    name = dataset.removeprefix(MINARI_PREFIX).removesuffix(".hdf5").removesuffix(".h5")
    return "-".join(part for part in Path(name).parts if part not in ("/", "..", "."))
