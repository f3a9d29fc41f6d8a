"""Files in D4RL's HDF5 layout: observations, actions, rewards, terminals, timeouts, one row per step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from flowrl.data.episodes import EpisodeDataset, build_episodes
from flowrl.envs.reference_scores import ReferenceScores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.errors import UserError

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")
# A header may claim any size. Up to the first limit it is believed; above it, the bytes stored must
# justify it, and no array may exceed the machine's memory.
_BELIEVED_BYTES = 1 << 28
_MAX_COMPRESSION = 100


def read_d4rl_file(
    path: Path,
    *,
    dataset_id: str | None = None,
    environment: EnvironmentSpec | None = None,
    reference: ReferenceScores | None = None,
    notes: tuple[str, ...] = (),
) -> EpisodeDataset:
    """Read an HDF5 file in D4RL's layout; other keys (next_observations, infos, metadata) are ignored.

    An episode ends where ``terminals`` or ``timeouts`` is set; with both on one step it terminated. Steps
    after the last end are kept as one truncated episode, which the notes say.

    Args:
        path: the file; float32, float64, either byte order, compressed or not.
        dataset_id: name of the data; ``file:NAME`` by default.
        environment: where agents trained on this data are evaluated.
        reference: returns that normalised scores are measured against.
        notes: sentences to show to the user, kept before this function's own.

    Raises:
        UserError: the file is missing, not HDF5, truncated or damaged; a key is missing or has a wrong
            type, shape or length; a value is NaN or infinite; the file holds no steps.
    """
    with open_d4rl_file(path) as datasets:
        for key in ("observations", "actions", "rewards"):
            _check_size(path, key, datasets[key])
        # Columns are converted to float32 by HDF5 as they are read, so no float64 copy ever exists.
        observations, actions, rewards = (
            _read_float32(datasets[key]) for key in ("observations", "actions", "rewards")
        )
        terminals, timeouts = (_read_flags(path, key, datasets[key]) for key in ("terminals", "timeouts"))

    ends = np.flatnonzero(terminals | timeouts) + 1  # (E,) one past each episode's last step
    if not len(ends) or ends[-1] != len(rewards):
        unfinished = len(rewards) - (int(ends[-1]) if len(ends) else 0)
        ends = np.append(ends, len(rewards))
        notes = (*notes, f"the last {unfinished} steps end without terminal or timeout: kept as truncated")
    return build_episodes(
        observations=observations,
        actions=actions,
        rewards=rewards,
        episode_lengths=np.diff(ends, prepend=0),
        terminated=terminals[ends - 1],
        dataset_id=f"file:{path.name}" if dataset_id is None else dataset_id,
        where=str(path),
        environment=environment,
        reference=reference,
        notes=notes,
    )


@contextmanager
def open_d4rl_file(path: Path) -> Iterator[dict[str, h5py.Dataset]]:
    """Open ``path`` and yield its five datasets after checking their presence, types and shapes.

    Errors of HDF5 itself, here or while the caller reads, become a UserError that names the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with h5py.File(path, "r") as file:
            datasets = {key: _dataset(path, file, key) for key in REQUIRED_KEYS}
            _check_shapes(path, datasets)
            yield datasets
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable HDF5 file (damaged, or another format): {reason}") from error


def _dataset(path: Path, file: h5py.File, key: str) -> h5py.Dataset:
    if key not in file:
        # A dangling link is listed but not found.
        raise UserError(f"{path}: key '{key}' is missing; D4RL files have {', '.join(REQUIRED_KEYS)}")
    dataset = file[key]
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: '{key}' must be an array, not a {type(dataset).__name__.lower()}")
    if dataset.file.filename != file.filename or dataset.is_virtual or dataset.external:
        raise UserError(
            f"{path}: '{key}' keeps its values in another file; only self-contained files are read"
        )
    kinds = "fiu" if key in ("observations", "actions", "rewards") else "fiub"
    if dataset.dtype.kind not in kinds:
        raise UserError(f"{path}: '{key}' must hold numbers, not {dataset.dtype}")
    return dataset


def _check_shapes(path: Path, datasets: dict[str, h5py.Dataset]) -> None:
    """Compare shapes as the header states them, before anything is allocated."""
    for key, dataset in datasets.items():
        dimensions = 2 if key in ("observations", "actions") else 1
        shape = dataset.shape
        if shape is None or len(shape) != dimensions or (dimensions == 2 and shape[1] == 0):
            expected = "(steps, numbers per step)" if dimensions == 2 else "(steps,)"
            raise UserError(f"{path}: '{key}' must have shape {expected}, it has {shape}")
    lengths = {key: len(dataset) for key, dataset in datasets.items()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise UserError(f"{path}: keys differ in length: {listed}")
    if not lengths["rewards"]:
        raise UserError(f"{path}: no episodes: the arrays are empty")


def _check_size(path: Path, key: str, dataset: h5py.Dataset) -> None:
    size = int(dataset.size) * max(dataset.dtype.itemsize, 4)
    chunk = int(np.prod(dataset.chunks or (0,), dtype=object)) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if max(size, chunk) > min(memory, max(_BELIEVED_BYTES, _MAX_COMPRESSION * stored)):
        raise UserError(
            f"{path}: '{key}' claims {size} bytes (shape {dataset.shape}) but {stored} are stored: "
            "the file is damaged or too large for this machine"
        )


def _read_float32(dataset: h5py.Dataset) -> np.ndarray:
    values = np.empty(dataset.shape, dtype=np.float32)
    dataset.read_direct(values)
    return values


def _read_flags(path: Path, key: str, dataset: h5py.Dataset) -> np.ndarray:
    _check_size(path, key, dataset)
    values = dataset[()]
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise UserError(f"{path}: '{key}'[{wrong[0]}] is {values[wrong[0]]}: flags must be 0 or 1")
    return values != 0
