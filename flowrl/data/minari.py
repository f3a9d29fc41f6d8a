"""Minari datasets: found in the local cache or downloaded by minari, and read episode by episode."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Space, flatdim

from flowrl.atomic import publish
from flowrl.data.arrays import IN_MEMORY, Storage, release
from flowrl.data.dataset import EpisodeDataset, build_episodes
from flowrl.data.download import require_answer
from flowrl.data.mapped import read_or_map
from flowrl.data.staging import staging
from flowrl.envs.reference_scores import ReferenceScores, reference_scores
from flowrl.envs.spaces import check_spaces, choices_of, flat_rows
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import as_choices, without_text
from flowrl.errors import UserError, did_you_mean, one_line
from flowrl.machine import expanded, home_folder

D4RLS_SCORES = "the dataset has no reference scores of its own: D4RL's are used to normalise"
_NUMBER = Box(-math.inf, math.inf, ())  # a timestep's reward or flag


def read_minari(dataset_id: str, storage: Storage = IN_MEMORY) -> EpisodeDataset:
    """Read the Minari dataset ``dataset_id``, for example ``mujoco/hopper/medium-v0``, into ``storage``.

    Observations are flattened as Gymnasium's FlattenObservation does it: boxes of any shape, one-hot vectors
    of choices, and Dict and Tuple spaces of them, in the order of the recorded space's keys; text in a Dict
    is left out. Actions are boxes or choices. Of an episode's T + 1 observations the last one has no action
    and is left out.

    The evaluation environment is the one that the dataset names (``eval_env_spec``, else ``env_spec``);
    its ``ref_min_score`` and ``ref_max_score`` are the reference scores, D4RL's table where it has none.

    Raises:
        UserError: malformed id, neither here nor downloadable, spaces other than the above, or data that is
            damaged or invalid.
    """
    import minari  # here: it takes a while to import and D4RL files do not need it

    name, folder = f"minari:{dataset_id}", local_folder(dataset_id)
    with _named_errors(name, folder), np.errstate(over="ignore"):  # what is not finite is refused by name
        metadata = _read_metadata(folder)
        dataset = minari.load_dataset(dataset_id)
        recorded = _in_recorded_order(dataset.observation_space, json.loads(metadata["observation_space"]))
        observed, acted = without_text(recorded), as_choices(dataset.action_space)
        check_spaces(name, observed, acted)
        total_steps, widths = int(dataset.total_steps), (flatdim(observed), flatdim(acted))
        storage.require(name, f"{total_steps} steps", 4 * total_steps * (sum(widths) + 2))
        observations, actions = (
            storage.empty(key, (total_steps, width))
            for key, width in zip(("observations", "actions"), widths, strict=True)
        )
        rewards = storage.empty("rewards", (total_steps,))
        episode_lengths, terminated = [], []
        stop = early_flags = 0
        for episode in dataset.iterate_episodes():
            where, length = f"{name}: episode {episode.id}", len(episode.rewards)
            if length == 0:
                raise UserError(f"{where} has no steps")
            seen = flat_rows(where, "observations", observed, episode.observations, length + 1)[:length]
            done = flat_rows(where, "actions", acted, episode.actions, length)
            earned = flat_rows(where, "rewards", _NUMBER, episode.rewards, length)[:, 0]
            ends = flat_rows(where, "terminations", _NUMBER, episode.terminations, length)[:, 0]
            flat_rows(where, "truncations", _NUMBER, episode.truncations, length)
            start, stop = stop, stop + length
            if stop > total_steps:
                raise UserError(f"{name}: its episodes have more than the {total_steps} steps it states")
            observations[start:stop], actions[start:stop], rewards[start:stop] = seen, done, earned
            episode_lengths.append(length)
            terminated.append(bool(ends[-1]))
            early_flags += bool(np.any(ends[:-1]))
            for array in (observations, actions, rewards):
                release(array)
        if stop != total_steps:
            raise UserError(f"{name}: its episodes have {stop} steps, it states {total_steps}")

    environment, environment_notes = _environment(metadata)
    reference, reference_notes = _reference(metadata, environment)
    if early_flags:
        note = f"{early_flags} episodes have a termination flag before their last step: kept whole"
        environment_notes.append(note)
    return build_episodes(
        observations=observations,
        actions=actions,
        rewards=rewards,
        episode_lengths=np.array(episode_lengths, dtype=np.int64),
        terminated=np.array(terminated, dtype=bool),
        dataset_id=name,
        where=name,
        action_choices=choices_of(acted),
        environment=environment,
        reference=reference,
        notes=(*environment_notes, *reference_notes),
        storage=storage,
    )


def load_minari(dataset_id: str, memory_map: Path | None) -> EpisodeDataset:
    """The same as :func:`read_minari`, or, with a folder for it, read from disk as needed."""
    files = (each for each in local_folder(dataset_id).rglob("*") if each.is_file())
    return read_or_map(partial(read_minari, dataset_id), memory_map, files, dataset_id)


def datasets_folder() -> Path:
    """Minari's local cache, found as minari finds it."""
    folder = os.environ.get("MINARI_DATASETS_PATH")
    return expanded(folder) if folder else home_folder() / ".minari" / "datasets"


def check_minari_id(dataset_id: str) -> None:
    """Raise UserError unless the id is one that can name a Minari dataset and nothing outside its storage."""
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", dataset_id, re.ASCII):
        raise UserError(f"malformed Minari id '{dataset_id}': one looks like mujoco/hopper/medium-v0")


def flat_name(dataset_id: str) -> str:
    """Return the id as one file name."""
    return dataset_id.replace("/", "--")


def local_folder(dataset_id: str) -> Path:
    """Return the dataset's folder in the local cache, downloaded first, as a whole, if it is not there.

    Raises:
        UserError: a malformed id, or neither here nor downloadable.
    """
    import minari

    check_minari_id(dataset_id)
    root = datasets_folder()
    final = root / dataset_id
    if final.exists():
        return final
    try:
        with staging(root, flat_name(dataset_id)) as folder:
            if final.exists():  # another process was faster
                return final
            if os.environ.get("MINARI_REMOTE", "hf://").startswith("hf://"):
                # huggingface_hub would retry for half a minute where there is no network.
                require_answer(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
            with minari_folder(folder):
                minari.download_dataset(dataset_id)
            final.parent.mkdir(parents=True, exist_ok=True)
            publish(folder / dataset_id, final)
            return final
    except Exception as error:  # whatever minari's remote storage and its HTTP library raise
        raise UserError(
            f"minari:{dataset_id} is not in {root}{_local_hint(dataset_id)}, and minari could not download "
            f"it ({_reason(error)}): check the id and the network, or put the dataset's folder there "
            "(MINARI_DATASETS_PATH)"
        ) from error


@contextlib.contextmanager
def minari_folder(folder: Path) -> Iterator[None]:
    """Let minari work in ``folder``: it takes its folder from the environment only."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _local_hint(dataset_id: str) -> str:
    """Say which datasets are in the local cache, when any are."""
    import minari

    local: list[str] = []
    with contextlib.suppress(Exception):  # this only decorates another error
        local = list(minari.list_local_datasets())
    return did_you_mean(dataset_id, local) if local else ""


def _read_metadata(folder: Path) -> dict[str, Any]:
    """Read the dataset's metadata and check what minari would otherwise guess.

    Without its spaces, minari makes the environment from the entry point in the file, that is, calls whatever
    function the file names. Such a file is refused before minari sees it.
    """
    metadata = json.loads((folder / "data" / "metadata.json").read_text(encoding="utf-8"))
    where = folder / "data" / "metadata.json"
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: expected a JSON object")
    for key in ("observation_space", "action_space", "data_format"):
        if not isinstance(metadata.get(key), str):
            raise UserError(f"{where}: key '{key}' is missing or not a string")
    episodes, steps = (metadata.get(key) for key in ("total_episodes", "total_steps"))
    if type(episodes) is not int or type(steps) is not int or not 0 <= episodes <= steps:
        raise UserError(f"{where}: 'total_episodes' {episodes!r} and 'total_steps' {steps!r} are not counts")
    return metadata


def _in_recorded_order(space: Space[Any], recorded: Any) -> Space[Any]:
    """A Dict space with its keys in the order of its JSON, which minari's own reading of it sorts."""
    if not isinstance(space, Dict):
        return space
    order = recorded["subspaces"]
    return Dict([(key, _in_recorded_order(space.spaces[key], part)) for key, part in order.items()])


def _environment(metadata: Mapping[str, Any]) -> tuple[EnvironmentSpec | None, list[str]]:
    """Return the evaluation environment that the dataset names, and notes for the user."""
    recorded = metadata.get("eval_env_spec") or metadata.get("env_spec")
    if recorded is None:
        return None, ["the dataset names no environment: give one with --env to evaluate"]
    try:
        return EnvironmentSpec.from_gymnasium_json(recorded), []
    except UserError as error:
        return None, [f"the dataset's {error}: give another with --env to evaluate"]


def _reference(
    metadata: Mapping[str, Any], environment: EnvironmentSpec | None
) -> tuple[ReferenceScores | None, list[str]]:
    """Return the dataset's own reference scores, else D4RL's for its environment, saying which."""
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if isinstance(low, int | float) and isinstance(high, int | float) and -math.inf < low < high < math.inf:
        return ReferenceScores(float(low), float(high)), []
    table = None if environment is None else reference_scores(environment.env_id)
    if table is None:
        return None, []
    return table, [D4RLS_SCORES]


@contextlib.contextmanager
def _named_errors(name: str, folder: Path) -> Iterator[None]:
    """Turn what minari and its storages raise on damaged datasets into one UserError that names the data."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # AssertionError, KeyError, OSError, MemoryError ...: minari promises none
        raise UserError(f"{name}: {folder} cannot be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
