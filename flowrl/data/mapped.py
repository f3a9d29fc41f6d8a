"""Data that stays on disk: its arrays in files that are mapped into memory, made once from where it came."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from flowrl.atomic import publish
from flowrl.data.arrays import IN_MEMORY, Storage
from flowrl.data.dataset import EpisodeDataset, Statistics
from flowrl.data.staging import staging
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError, one_line

_FORMAT = 1
_LARGE = ("observations", "actions", "rewards", "returns_to_go")  # mapped; those of episodes are read
_OF_EPISODES = ("episode_starts", "episode_lengths", "episode_returns", "terminated")
_DETAILS = "dataset.json"


def read_or_map(
    read: Callable[[Storage], EpisodeDataset], folder: Path | None, files: Iterable[Path], *options: object
) -> EpisodeDataset:
    """Read data into memory, or return it mapped from arrays in ``folder``, which are written on first use.

    The arrays appear whole or not at all. Of two processes that need the same ones, the second waits.

    Args:
        read: reads the data into the storage that it is given.
        folder: of all data that is mapped; None reads into memory.
        files: what is read. They are recognised by name, size and time of change, wherever they are.
        options: everything else that the data depends on.

    Raises:
        UserError: what ``read`` raises, arrays that are damaged, or a disk that cannot be written.
    """
    if folder is None:
        return read(IN_MEMORY)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--memory-map {folder}: a file; give the name of a folder")
    files = sorted(files)
    if not all(file.is_file() for file in files):
        return read(IN_MEMORY)  # which reports what is missing
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((_FORMAT, facts, options)).encode()).hexdigest()[:32]
    final = folder / key
    try:
        if not final.exists():
            with staging(folder, key) as aside:
                if not final.exists():
                    _write(read(Storage(aside)), aside)
                    publish(aside, final)
    except OSError as error:
        raise UserError(f"--memory-map {folder}: cannot be written: {one_line(error)}") from error
    return _open(final)


def _write(dataset: EpisodeDataset, folder: Path) -> None:
    """Write what is not in ``folder`` yet: all but the large arrays."""
    for name in _OF_EPISODES:
        np.save(folder / f"{name}.npy", getattr(dataset, name))
    details = {
        "dataset_id": dataset.dataset_id,
        "sha256": dataset.sha256,
        "action_choices": dataset.action_choices,
        "environment": dataset.environment and asdict(dataset.environment),
        "reference": dataset.reference and asdict(dataset.reference),
        "notes": dataset.notes,
        "statistics": {name: value.tolist() for name, value in vars(dataset.statistics).items()},
    }
    (folder / _DETAILS).write_text(json.dumps(details), encoding="utf-8")


def _open(folder: Path) -> EpisodeDataset:
    try:
        details: dict[str, Any] = json.loads((folder / _DETAILS).read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _LARGE}
        arrays |= {name: np.load(folder / f"{name}.npy") for name in _OF_EPISODES}
        lengths = {len(arrays[name]) for name in _LARGE} | {int(arrays["episode_lengths"].sum())}
        if len(lengths) != 1:
            raise ValueError(f"lengths differ: {sorted(lengths)}")
        statistics = {name: np.array(value, np.float32) for name, value in details.pop("statistics").items()}
        environment = TypeAdapter(EnvironmentSpec | None).validate_json(json.dumps(details["environment"]))
        details |= {
            "action_choices": tuple(details["action_choices"]),
            "environment": environment,
            "reference": details["reference"] and ReferenceScores(**details["reference"]),
            "notes": tuple(details["notes"]),
        }
        return EpisodeDataset(**arrays, statistics=Statistics(**statistics), **details)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise UserError(f"{folder}: damaged ({one_line(error)}); delete it to have it made again") from error
