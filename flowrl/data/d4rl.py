"""D4RL's Gym-MuJoCo datasets: their names, where their files are found, and the files' HDF5 layout."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from gymnasium.spaces import Space, flatdim

from flowrl.atomic import file_sha256
from flowrl.data.arrays import IN_MEMORY, Storage, chunks, release
from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.data.download import DownloadError, download
from flowrl.data.mapped import read_or_map
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.spaces import EnvironmentFacts, choices_of, environment_facts, flat_rows
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import EnvironmentUnavailable
from flowrl.errors import UserError, one_line
from flowrl.machine import expanded, home_folder

# A column's name in D4RL's files, then those that it has elsewhere.
COLUMNS = {
    "observations": ("observations",),
    "actions": ("actions",),
    "rewards": ("rewards",),
    "terminals": ("terminals", "terminations", "dones"),
    "timeouts": ("timeouts", "truncations"),
}

# D4RL's data follows the dynamics of Gymnasium's -v4 environments; -v5 changed some (Walker2d's friction).
D4RL_ENVIRONMENTS = {
    f"{robot.lower()}-{level}": EnvironmentSpec(f"{robot}-v4")
    for robot in ("Hopper", "HalfCheetah", "Walker2d", "Ant")
    for level in ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
}

# Tried in order: D4RL's own server, then a mirror of its files on Hugging Face.
D4RL_URLS = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/{file}",
    "https://huggingface.co/datasets/imone/D4RL/resolve/main/{file}",
)


# SHA-256 of files as D4RL published them, where it is known.
PUBLISHED = {"hopper-medium": "5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0"}

_CHUNK_CACHE = 1 << 26  # bytes; a compressed chunk is read in several pieces, but decompressed once

# Ant's observation with contact forces, and the part of it that describes the body.
_ANT_WITH_CONTACT_FORCES, _ANT_BODY = 111, 27


def read_d4rl(
    name: str,
    max_episode_steps: int | None = None,
    split_at_timeouts: bool = False,
    memory_map: Path | None = None,
) -> EpisodeDataset:
    """Read D4RL's v2 dataset ``name`` (a key of ``D4RL_ENVIRONMENTS``), downloading it when it is not here.

    The file, ``hopper_medium-v2.hdf5`` for ``hopper-medium``, is looked for in ``$D4RL_DATASET_DIR`` and
    ``~/.d4rl/datasets``. A local file is used whatever it holds, but its data is named D4RL's only when its
    SHA-256 does not contradict that. With ``memory_map`` its arrays are kept in that folder; the other
    arguments are those of :func:`read_d4rl_file`.

    Raises:
        UserError: neither found nor downloaded, or not a valid file (see :func:`read_d4rl_file`).
    """
    path = find_d4rl_file(name)
    published = PUBLISHED.get(name)
    dataset_id = f"d4rl/{name}-v2"
    notes: tuple[str, ...] = ()
    if published is None:
        notes = (f"{path} is taken for D4RL's {name}-v2 by its name: no published hash is known to check it",)
    elif file_sha256(path) != published:
        dataset_id = f"file:{path.name}"
        notes = (f"{path} is not D4RL's published {name}-v2: its scores are not D4RL scores",)
    read = partial(
        read_d4rl_file,
        path,
        dataset_id=dataset_id,
        environment=D4RL_ENVIRONMENTS[name],
        max_episode_steps=max_episode_steps,
        split_at_timeouts=split_at_timeouts,
    )
    dataset = read_or_map(read, memory_map, [path], dataset_id, max_episode_steps, split_at_timeouts)
    return replace(dataset, notes=(*notes, *dataset.notes))


def find_d4rl_file(name: str) -> Path:
    """Return the local file of D4RL's v2 dataset ``name``, downloaded first if need be.

    Raises:
        UserError: it is not here and cannot be downloaded; the message names the folders and the remedies.
    """
    environment, _, level = name.partition("-")
    file_name = f"{environment}_{level.replace('-', '_')}-v2.hdf5"
    folders = [home_folder() / ".d4rl" / "datasets"]
    if os.environ.get("D4RL_DATASET_DIR"):
        folders.insert(0, expanded(os.environ["D4RL_DATASET_DIR"]))
    for folder in folders:
        if (folder / file_name).is_file():
            return folder / file_name
    path = folders[0] / file_name
    urls = [url.format(file=file_name) for url in D4RL_URLS]
    try:
        download(urls, path, PUBLISHED.get(name), _check_readable)
    except DownloadError as error:
        raise UserError(
            f"dataset {name}: {file_name} is not in {' or '.join(map(str, folders))}, and {error}; "
            "give a file with --dataset PATH.hdf5, or put that file into a folder named by D4RL_DATASET_DIR"
        ) from error
    return path


def _check_readable(path: Path) -> None:
    with open_d4rl_file(path):
        pass


def read_d4rl_file(
    path: Path,
    storage: Storage = IN_MEMORY,
    *,
    dataset_id: str | None = None,
    environment: EnvironmentSpec | None = None,
    max_episode_steps: int | None = None,
    split_at_timeouts: bool = False,
) -> EpisodeDataset:
    """Read an HDF5 file in D4RL's layout; other keys (next_observations, infos, metadata) are ignored.

    An episode ends where ``terminals`` (or ``terminations``, ``dones``) or ``timeouts`` (or ``truncations``)
    is set; with both on one step it terminated. Steps after the last end are kept as one truncated episode,
    with a note. Rewards and flags may be (N, 1), observations and actions of one number (N,). Where the
    environment's are choices (Discrete, MultiDiscrete, MultiBinary), the numbers become one-hot vectors.

    Args:
        path: the file; numbers of any type and byte order, compressed or not.
        storage: where the arrays go.
        dataset_id: name of the data; ``file:NAME`` by default.
        environment: where agents trained on this data are evaluated.
        max_episode_steps: where the file has no timeouts, an episode ends after so many steps at the latest.
        split_at_timeouts: let episodes end at timeouts alone, for files such as AntMaze's, whose terminal
            flag stays set while the robot is at its goal.

    Raises:
        UserError: the file is missing, not HDF5, truncated, damaged or larger than memory; a key is missing
            or has a wrong type, shape or length; a value is NaN or infinite; the file holds no steps.
    """
    with open_d4rl_file(path) as columns:
        steps = len(columns["rewards"])
        environment, dropped, ant_notes = _match_ant(columns["observations"], environment)
        facts = facts_of(environment)
        choices = {
            "observations": _choices(facts.observation_space if facts else None, columns["observations"]),
            "actions": _choices(facts.action_space if facts else None, columns["actions"]),
            "rewards": None,
        }
        widths = {key: flatdim(each) if each else _width(columns[key]) for key, each in choices.items()}
        widths["observations"] -= dropped
        storage.require(str(path), f"{steps} steps", 4 * steps * (sum(widths.values()) + 1))
        arrays = {}
        for key, width in widths.items():
            arrays[key] = storage.empty(key, (steps,) if key == "rewards" else (steps, width))
            _read(path, key, columns[key], choices[key], arrays[key].reshape(steps, width))
        terminals = _read_flags(path, columns["terminals"])
        if "timeouts" in columns:
            timeouts = _read_flags(path, columns["timeouts"])
        elif max_episode_steps is not None:
            ends = np.zeros_like(terminals) if split_at_timeouts else terminals
            timeouts = _timeouts(ends, max_episode_steps)
        elif _name(columns["terminals"]) == "dones" and not split_at_timeouts:  # which mark every end
            timeouts = np.zeros_like(terminals)
        else:
            raise UserError(
                f"{path}: key 'timeouts' is missing: give --max-episode-steps, the steps after which an "
                "episode without a terminal ends"
            )
    ends, more_notes = _episode_ends(terminals, timeouts, split_at_timeouts)
    return build_episodes(
        **arrays,
        episode_lengths=np.diff(ends, prepend=0),
        terminated=terminals[ends - 1],
        dataset_id=f"file:{path.name}" if dataset_id is None else dataset_id,
        where=str(path),
        action_choices=choices_of(choices["actions"]),
        environment=environment,
        reference=reference_scores(environment.env_id) if environment else None,
        notes=(*ant_notes, *more_notes),
        storage=storage,
    )


@contextmanager
def open_d4rl_file(path: Path) -> Iterator[dict[str, h5py.Dataset]]:
    """Open ``path`` and yield its datasets by D4RL's names after checking their types and shapes.

    All must be there but for timeouts.

    Errors of HDF5 itself, here or while the caller reads, become a UserError that names the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE) as file:
            columns = {key: _column(path, file, key) for key in COLUMNS}
            present = {key: column for key, column in columns.items() if column is not None}
            _check_shapes(path, present)
            yield present
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise UserError(
            f"{path}: not a readable HDF5 file (damaged, or another format): {one_line(error)}"
        ) from error


def facts_of(environment: EnvironmentSpec | None) -> EnvironmentFacts | None:
    """What is known of an environment; None where there is none or it cannot be made here."""
    if environment is not None:
        with suppress(EnvironmentUnavailable):
            return environment_facts(environment)
    return None


def _choices(space: Space[Any] | None, column: h5py.Dataset) -> Space[Any] | None:
    """The space, if a column holds the numbers of its choices."""
    return space if choices_of(space) and len(choices_of(space)) == _width(column) else None


def _width(column: h5py.Dataset) -> int:
    return int((*column.shape, 1)[1])


def _read(path: Path, key: str, column: h5py.Dataset, choices: Space[Any] | None, array: np.ndarray) -> None:
    """Fill (steps, width) from a column's first numbers, or from its choices."""
    for rows in chunks(len(array)):
        values = column[rows]
        if choices is not None:
            values = values.reshape(-1, *(choices.shape or ()))
            array[rows] = flat_rows(str(path), key, choices, values, len(values))
        else:
            with np.errstate(over="ignore"):  # which is refused by name, as not finite
                array[rows] = values.reshape(len(values), -1)[:, : array.shape[1]]
        release(array)


def _match_ant(
    observations: h5py.Dataset, environment: EnvironmentSpec | None
) -> tuple[EnvironmentSpec | None, int, tuple[str, ...]]:
    """Make Ant's data and environment agree on contact forces: the environment, columns to drop, and notes.

    D4RL's Ant observations reserve 84 numbers for contact forces, which the simulator of the time left at
    zero; Ant-v4 would fill them with forces that no agent has seen. Zero columns are dropped, as in Ant-v4's
    default; recorded forces switch them on in the environment.
    """
    wide = _width(observations) == _ANT_WITH_CONTACT_FORCES
    if environment is None or (environment.env_id, environment.kwargs) != ("Ant-v4", {}) or not wide:
        return environment, 0, ()
    if any(observations[rows, _ANT_BODY:].any() for rows in chunks(len(observations))):
        return replace(environment, kwargs={"use_contact_forces": True}), 0, ()
    dropped = _ANT_WITH_CONTACT_FORCES - _ANT_BODY
    note = f"Ant's {dropped} contact-force columns are all zero: dropped, as Ant-v4 has none by default"
    return environment, dropped, (note,)


def _episode_ends(
    terminals: np.ndarray, timeouts: np.ndarray, split_at_timeouts: bool
) -> tuple[np.ndarray, list[str]]:
    """Return the ends of episodes, (E,) one past the last step of each, and notes about them."""
    notes = []
    repeated = int((terminals[1:] & terminals[:-1]).sum())
    if repeated and not split_at_timeouts:
        notes.append(
            f"{repeated} episodes have one step, as a terminal follows on a terminal: if the flag stays set "
            "at a goal (AntMaze), --split-at-timeouts keeps such episodes whole"
        )
    ends = np.flatnonzero(timeouts if split_at_timeouts else terminals | timeouts) + 1
    unfinished = len(terminals) - (int(ends[-1]) if len(ends) else 0)
    if unfinished:
        ends = np.append(ends, len(terminals))
        notes.append(f"the last {unfinished} steps end without terminal or timeout: kept as truncated")
    return ends, notes


def _timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    """Return flags, (N,), where an episode reaches ``max_episode_steps``."""
    timeouts = np.zeros_like(terminals)
    start = 0
    for stop in [*(np.flatnonzero(terminals) + 1).tolist(), len(terminals)]:
        timeouts[start + max_episode_steps - 1 : stop : max_episode_steps] = True
        start = stop
    return timeouts


def _column(path: Path, file: h5py.File, key: str) -> h5py.Dataset | None:
    names = COLUMNS[key]
    dataset = next((found for name in names if (found := file.get(name)) is not None), None)
    if dataset is None:
        if key == "timeouts":
            return None
        missing = "' or '".join(names)
        raise UserError(f"{path}: key '{missing}' is missing; D4RL files have {', '.join(COLUMNS)}")
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{path}: '{key}' must be an array, not a {type(dataset).__name__.lower()}")
    if dataset.dtype.kind not in "fiub":
        raise UserError(f"{path}: '{_name(dataset)}' must hold numbers, not {dataset.dtype}")
    return dataset


def _name(dataset: h5py.Dataset) -> str:
    return str(dataset.name).lstrip("/")


def _check_shapes(path: Path, columns: dict[str, h5py.Dataset]) -> None:
    """Compare shapes as the header states them, before anything is allocated."""
    for key, column in columns.items():
        wide, shape = key in ("observations", "actions"), column.shape
        width = None if shape is None or len(shape) not in (1, 2) else (*shape, 1)[1]
        if width is None or width < 1 or (width > 1 and not wide):
            expected = "(steps, numbers per step)" if wide else "(steps,)"
            raise UserError(f"{path}: '{_name(column)}' must have shape {expected}, it has {shape}")
    lengths = {_name(column): len(column) for column in columns.values()}
    if len(set(lengths.values())) != 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise UserError(f"{path}: keys differ in length: {listed}")
    if not len(columns["rewards"]):
        raise UserError(f"{path}: no episodes: the arrays are empty")


def _read_flags(path: Path, column: h5py.Dataset) -> np.ndarray:
    values = column[()].reshape(len(column))
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        raise UserError(f"{path}: '{_name(column)}'[{wrong[0]}] is {values[wrong[0]]}: flags must be 0 or 1")
    return values != 0
