"""Data that stays on disk: its arrays in files that are mapped into memory, made once from where it came."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from flowrl.atomic import publish
from flowrl.data.arrays import Storage
from flowrl.data.dataset import EpisodeDataset, Statistics
from flowrl.data.staging import staging
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError, one_line

_FORMAT = 1
_LARGE = ("observations", "actions", "rewards", "returns_to_go")  # mapped; those of episodes are read
_OF_EPISODES = ("episode_starts", "episode_lengths", "episode_returns", "terminated")
_DETAILS = "dataset.json"


def mapped_dataset(folder: Path, key: str, read: Callable[[Storage], EpisodeDataset]) -> EpisodeDataset:
    """Return a dataset whose large arrays are files in ``folder/key``, which are written on first use.

    They appear whole or not at all. Of two processes that need the same ones, the second waits.

    Args:
        folder: of all data that is kept like this.
        key: of this data, see :func:`files_key`.
        read: reads it into the storage that it is given.

    Raises:
        UserError: what ``read`` raises, files that are damaged, or a disk that cannot be written.
    """
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


def files_key(paths: Sequence[Path], *options: object) -> str:
    """Return a name for what is read from these files with these options.

    It changes with a file's name, size and time of change, not with the folder that it is in.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return hashlib.sha256(repr((_FORMAT, files, options)).encode()).hexdigest()[:32]


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
        # Copy on write: torch takes no arrays that are read-only.
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c") for name in _LARGE}
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
