"""Collected episodes on disk: a Minari dataset or a file in D4RL's layout, whole or absent."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import mujoco
import numpy as np
from gymnasium.envs.registration import EnvSpec

import flowrl
from flowrl.atomic import atomic_path, publish, sync
from flowrl.data.collect import Collection, Episode, Recipe, collect, to_dataset
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.minari import check_minari_id, datasets_folder, flat_name, minari_folder
from flowrl.data.staging import staging
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.vector import make_env, no_deprecations
from flowrl.errors import UserError, one_line

METADATA_KEY = "flowrl"  # of what flowrl adds to a Minari dataset's metadata

# What Minari's HDF5 takes at most per transition's byte and, for its groups and chunks, per episode.
_STORED_PER_BYTE, _STORED_PER_EPISODE = 1.5, 1 << 16
_ZEROS = bytes(1 << 20)


def collect_minari(recipe: Recipe, dataset_id: str, overwrite: bool = False) -> Path:
    """Collect ``recipe`` into Minari's local storage (``MINARI_DATASETS_PATH``) and return its folder.

    The dataset appears under its id only when all of it is on disk. Of two processes that collect the same
    one, the second waits for the first.

    Raises:
        UserError: a malformed id, an id that exists already (unless ``overwrite``), a recipe that
            :func:`flowrl.data.collect.collect` refuses, or a disk that cannot be written.
    """
    check_minari_id(dataset_id)
    root = datasets_folder()
    folder = root / dataset_id
    with _disk_errors(folder), staging(root, flat_name(dataset_id)) as aside:
        if folder.exists() and not overwrite:
            raise UserError(f"dataset {dataset_id} exists already ({folder}); replace it with --overwrite")
        _collect_into(recipe, dataset_id, folder, aside)
    return folder


def ensure_minari(recipe: Recipe, dataset_id: str) -> Path:
    """Return the folder of a dataset in Minari's local storage, collected first if it is not there.

    Raises:
        UserError: as :func:`collect_minari`, and for a dataset of that id from another recipe or from
            elsewhere.
    """
    root = datasets_folder()
    folder = root / dataset_id
    if not folder.exists():  # which may be on a read-only disk
        with _disk_errors(folder), staging(root, flat_name(dataset_id)) as aside:
            if not folder.exists():
                _collect_into(recipe, dataset_id, folder, aside)
    provenance = read_provenance(folder)
    if any(provenance.get(key) != value for key, value in recipe.provenance().items()):
        raise UserError(
            f"{folder} was not collected by this version's recipe and policies: collect it again with "
            "flowrl collect and --overwrite, or move it away"
        )
    return folder


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what flowrl wrote about a dataset into its metadata: recipe, hashes, versions.

    Raises:
        UserError: the metadata is damaged or flowrl did not write it.
    """
    path = folder / "data" / "metadata.json"
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))[METADATA_KEY]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the metadata of a dataset that flowrl collected ({error!r})") from None
    if not isinstance(provenance, dict):
        raise UserError(f"{path}: '{METADATA_KEY}' must be a mapping")
    return provenance


def collect_d4rl(recipe: Recipe, path: Path, overwrite: bool = False) -> str:
    """Collect ``recipe`` into an HDF5 file in D4RL's layout and return the data's content hash.

    Raises:
        UserError: the file exists already (unless ``overwrite``), a recipe that
            :func:`flowrl.data.collect.collect` refuses, or a disk that cannot be written.
    """
    if path.suffix.lower() not in (".hdf5", ".h5"):
        raise UserError(f"--out {path}: the name of a file in D4RL's layout ends in .hdf5 or .h5")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; replace it with --overwrite")
    with _disk_errors(path), atomic_path(path) as temporary:
        temporary.touch()  # a folder that cannot be written is refused before the data is collected
        collection = collect(recipe)
        dataset = to_dataset(collection, str(path))
        _check_space(temporary, collection)
        _write_d4rl(dataset, _provenance(collection, dataset.sha256), temporary)
    return dataset.sha256


def _write_d4rl(dataset: EpisodeDataset, provenance: dict[str, Any], path: Path) -> None:
    ends = dataset.episode_starts + dataset.episode_lengths - 1
    terminals = np.zeros(dataset.num_transitions, dtype=bool)
    terminals[ends] = dataset.terminated
    timeouts = np.zeros_like(terminals)
    timeouts[ends] = ~dataset.terminated
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions", "rewards"):
            file[key] = getattr(dataset, key)
        file["terminals"], file["timeouts"] = terminals, timeouts
        for key, value in provenance.items():
            file[f"metadata/{key}"] = json.dumps(value)


def _provenance(collection: Collection, sha256: str) -> dict[str, Any]:
    return {
        **collection.recipe.provenance(),
        "environment": asdict(collection.recipe.acts_in),
        "sha256": sha256,
        "flowrl_version": flowrl.__version__,
        "mujoco_version": mujoco.__version__,
    }


def _collect_into(recipe: Recipe, dataset_id: str, folder: Path, aside: Path) -> None:
    """Collect and write in ``aside``, then move the dataset to ``folder``, replacing one that is there."""
    with closing(make_env(recipe.acts_in)) as env:
        spec = _recorded_spec(env)
    collection = collect(recipe)
    _check_space(aside / "space", collection)
    with minari_folder(aside):
        _write_minari(collection, dataset_id, spec, env.observation_space, env.action_space)
    _add_namespaces(dataset_id)
    if folder.exists():
        os.replace(folder, aside / "replaced")
    publish(aside / dataset_id, folder)


def _recorded_spec(env: gymnasium.Env) -> EnvSpec:
    """How Minari and others make this environment again; a UserError where that cannot be written down."""
    spec = env.spec
    assert spec is not None
    wrappers = {wrapper.name: wrapper for wrapper in spec.additional_wrappers}
    if "WithoutText" in wrappers:  # beneath the flattening
        wrappers.clear()
    wrappers.pop("FlatActions", None)  # these two are flowrl's, and make_env applies all of them anew
    spec.additional_wrappers = tuple(wrappers.values())
    try:
        spec.to_json()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"environment {spec.id}: Minari cannot record it: {one_line(error)}: collect with --format d4rl, "
            "or register it as module:Class with plain arguments"
        ) from error
    return spec


def _write_minari(
    collection: Collection,
    dataset_id: str,
    spec: EnvSpec,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
) -> None:
    import minari  # here: it takes a while to import

    reference = reference_scores(collection.recipe.acts_in.env_id)
    with no_deprecations(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # missing permalink, code and so on
        dataset = minari.create_dataset_from_buffers(
            dataset_id,
            [_to_buffer(index, episode) for index, episode in enumerate(collection.episodes)],
            env=spec,
            observation_space=observation_space,
            action_space=action_space,
            algorithm_name="SAC" if collection.recipe.policies else "uniform random",
            author="flowrl",
            ref_min_score=None if reference is None else reference.minimum,
            ref_max_score=None if reference is None else reference.maximum,
            description=f"Collected by flowrl's own behaviour policies: {collection.recipe}",
            requirements=[f"mujoco=={mujoco.__version__}", f"gymnasium=={gymnasium.__version__}"],
        )
    sha256 = to_dataset(collection, dataset_id).sha256
    dataset.storage.update_metadata({METADATA_KEY: _provenance(collection, sha256)})


def _check_space(path: Path, collection: Collection) -> None:
    """Fill a file at ``path`` with as much as will be stored, and delete it.

    HDF5 may take the whole process down when a write fails; this finds a full disk before it does.
    """
    arrays = [(e.observations, e.actions, e.rewards) for e in collection.episodes]
    size = sum(array.nbytes for episode in arrays for array in episode) * _STORED_PER_BYTE
    size += len(arrays) * _STORED_PER_EPISODE
    try:
        with path.open("wb") as file:
            for _ in range(int(size) // len(_ZEROS) + 1):
                file.write(_ZEROS)
        sync(path)
    finally:
        path.unlink(missing_ok=True)


def _to_buffer(index: int, episode: Episode) -> Any:
    from minari.data_collector import EpisodeBuffer

    last = np.arange(len(episode.rewards)) == len(episode.rewards) - 1
    return EpisodeBuffer(
        id=index,
        seed=episode.seed,
        options={"policy": episode.policy},
        observations=episode.observations,
        actions=episode.actions,
        rewards=episode.rewards,
        terminations=last & episode.terminated,
        truncations=last & (not episode.terminated),
    )


def _add_namespaces(dataset_id: str) -> None:
    """Register the folders between minari's root and the dataset as its namespaces."""
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = dataset_id.rpartition("/")[0]
    if namespace and namespace not in list_local_namespaces():
        create_namespace(namespace)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk, as Python and HDF5 report it, into one UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
