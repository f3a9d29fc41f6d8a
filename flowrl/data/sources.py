"""What ``--dataset`` and ``--env`` name: a file in D4RL's layout, a Minari dataset, or a D4RL dataset."""

import os
from dataclasses import replace
from pathlib import Path

from flowrl.data.d4rl import D4RL_ENVIRONMENTS, find_d4rl_file, read_d4rl, read_d4rl_file
from flowrl.data.dataset import EpisodeDataset
from flowrl.data.embedded import EMBEDDED, SOURCE, load_embedded
from flowrl.data.memory import memory_dataset, memory_environment
from flowrl.data.minari import read_minari
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.specs import EnvironmentSpec, registered_environment
from flowrl.errors import UserError, did_you_mean

MINARI_PREFIX = "minari:"
FILE_SUFFIXES = (".hdf5", ".h5")


def load_episodes(source: str, env: str | None = None) -> EpisodeDataset:
    """Load offline data.

    Args:
        source: ``"minari:ID"`` (local cache, else downloaded), the path of an ``.hdf5`` or ``.h5`` file in
            D4RL's layout, a D4RL v2 dataset such as ``"hopper-medium"`` (local file, else downloaded, else
            flowrl's own data of that name), a memory task such as
            ``"tmaze-500"``, or ``"flowrl"``: flowrl's own data, which ``env`` names.
        env: environment to evaluate in, see :func:`environment_named`. A file names none itself; a Minari
            or D4RL dataset brings its own, which this replaces.

    Returns:
        The data; its ``environment`` is None when neither the source nor ``env`` names one, and its ``notes``
        are for the user. Dimensions are not compared with the environment's here
        (:func:`flowrl.envs.spaces.check_environment` does).

    Raises:
        UserError: unknown source or environment, or data that is missing, damaged or invalid.
    """
    if source == SOURCE and env is not None and memory_environment(env) is not None:
        return memory_dataset(env)
    if source == SOURCE:
        return load_embedded(env or "")
    environment = None if env is None else environment_named(env)
    path = Path(os.path.expanduser(source))  # unlike pathlib's, keeps the tilde of an unknown user
    suffix = path.suffix.lower()
    if source.startswith(MINARI_PREFIX):
        return _evaluated_in(read_minari(source.removeprefix(MINARI_PREFIX)), environment)
    if memory_environment(source) is not None:
        return _evaluated_in(memory_dataset(source), environment)
    if source in D4RL_ENVIRONMENTS:
        return _evaluated_in(_d4rl_or_embedded(source), environment)
    if suffix in FILE_SUFFIXES:
        reference = None if environment is None else reference_scores(environment.env_id)
        return read_d4rl_file(path, environment=environment, reference=reference)
    if path.is_file() or suffix in (".pkl", ".pickle", ".npz", ".npy", ".pt"):
        raise UserError(
            f"dataset '{source}': a file must be HDF5 in D4RL's layout with a name that ends in "
            f"{' or '.join(FILE_SUFFIXES)}; other formats are not read, pickles never"
        )
    raise UserError(
        f"unknown dataset '{source}'{did_you_mean(source, D4RL_ENVIRONMENTS)} "
        f"(or give {MINARI_PREFIX}ID, or a path that ends in {' or '.join(FILE_SUFFIXES)})"
    )


def _d4rl_or_embedded(name: str) -> EpisodeDataset:
    """Read D4RL's dataset; where it is neither here nor to be had, flowrl's own of that name."""
    try:
        find_d4rl_file(name)
    except UserError as error:
        if name not in EMBEDDED:
            raise
        return load_embedded(name, why=str(error).partition("; give a file")[0])
    return read_d4rl(name)


def environment_named(env: str) -> EnvironmentSpec:
    """Return the environment that ``--env`` names: a D4RL dataset's, a memory task's or a Gymnasium id.

    Raises:
        UserError: neither; the message suggests the closest name.
    """
    if env in D4RL_ENVIRONMENTS:
        return D4RL_ENVIRONMENTS[env]
    if (memory_task := memory_environment(env)) is not None:
        return memory_task
    return registered_environment(env, also_known=tuple(D4RL_ENVIRONMENTS))


def _evaluated_in(dataset: EpisodeDataset, environment: EnvironmentSpec | None) -> EpisodeDataset:
    """Replace the dataset's own environment where the user asked for another."""
    if environment is None or environment == dataset.environment:
        return dataset
    if dataset.environment is None:
        note = f"evaluated in {environment.env_id}"
    else:
        note = f"evaluated in {environment.env_id}, not in the data's own {dataset.environment.env_id}"
    reference = dataset.reference or reference_scores(environment.env_id)
    return replace(dataset, environment=environment, reference=reference, notes=(*dataset.notes, note))
