"""What ``--dataset`` and ``--env`` name: a file in D4RL's layout, a Minari dataset, or a D4RL dataset."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium

from flowrl.data.d4rl import D4RL_ENVIRONMENTS, facts_of, find_d4rl_file, read_d4rl, read_d4rl_file
from flowrl.data.dataset import EpisodeDataset, concatenate, joined_about
from flowrl.data.embedded import EMBEDDED, ROBOT_TASKS, SOURCE, load_embedded
from flowrl.data.mapped import read_or_map
from flowrl.data.minari import D4RLS_SCORES, load_minari
from flowrl.data.tmaze import tmaze_dataset
from flowrl.envs.memory import tmaze_environment
from flowrl.envs.options import EvaluationOptions
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.specs import EnvironmentSpec, import_modules, named_environment, recorded_or_named
from flowrl.errors import UserError, did_you_mean
from flowrl.machine import expanded

MINARI_PREFIX = "minari:"
FILE_SUFFIXES = (".hdf5", ".h5")
_DEFAULTS = EvaluationOptions()


def load_episodes(
    source: str | EpisodeDataset | Sequence[str | EpisodeDataset],
    env: str | None = None,
    options: EvaluationOptions = _DEFAULTS,
    split_at_timeouts: bool = False,
    memory_map: Path | None = None,
) -> EpisodeDataset:
    """Load offline data.

    Args:
        source: ``"minari:ID"`` (local cache, else downloaded), the path of an ``.hdf5`` or ``.h5`` file in
            D4RL's layout, a D4RL v2 dataset such as ``"hopper-medium"`` (local file, else downloaded, else
            flowrl's own data of that name), a memory task such as ``"tmaze-500"``, or ``"flowrl"``: flowrl's
            own data, which ``env`` names; or data that is loaded already. Several are taken together, one
            after another.
        env: environment to evaluate in, see :func:`environment_named`. A file names none itself; a Minari
            or D4RL dataset brings its own, which this replaces.
        options: what differs from the environment as registered or recorded.
        split_at_timeouts: see :func:`flowrl.data.d4rl.read_d4rl_file`.
        memory_map: folder in which the arrays of files and Minari datasets are kept, to be read as needed.

    Returns:
        The data; its ``environment`` is None when neither the source nor ``env`` names one, and its ``notes``
        are for the user. It is not compared with the environment here
        (:func:`flowrl.data.matching.match_environment` does).

    Raises:
        UserError: unknown source or environment, or data that is missing, damaged or invalid.
    """
    named, reference = None, options.reference()
    sources = (source,) if isinstance(source, str | EpisodeDataset) else tuple(source)
    if not sources:
        raise UserError("give at least one dataset")
    if env is not None and not any(each == SOURCE for each in sources if isinstance(each, str)):
        named = environment_named(env, options.env_import)
    else:
        import_modules(options.env_import)
    datasets = []
    for each in sources:
        if isinstance(each, str):
            each = _load(each, env, named, options, split_at_timeouts, memory_map)
        datasets.append(_evaluated_in(each, named, options))
    if len(datasets) > 1 and env is not None:
        datasets = _in_one_environment(datasets, named and options.apply(named))
    dataset = datasets[0] if len(datasets) == 1 else _joined(datasets, memory_map)
    if reference is None:
        return dataset
    notes = tuple(note for note in dataset.notes if not note.endswith(D4RLS_SCORES))
    return replace(dataset, reference=reference, notes=notes)


def environment_named(env: str, imports: Sequence[str] = ()) -> EnvironmentSpec:
    """Return the environment that ``--env`` names: a D4RL dataset's, a memory task's or a Gymnasium id.

    Raises:
        UserError: see :func:`flowrl.envs.specs.named_environment`.
    """
    tmaze = tmaze_environment(env)
    if tmaze is not None:
        return tmaze
    tasks = {name: EMBEDDED[name].acts_in for name in ROBOT_TASKS}
    return named_environment(env, imports, {**D4RL_ENVIRONMENTS, **tasks})


def _load(
    source: str,
    env: str | None,
    named: EnvironmentSpec | None,
    options: EvaluationOptions,
    split_at_timeouts: bool,
    memory_map: Path | None,
) -> EpisodeDataset:
    path = expanded(source)
    suffix = path.suffix.lower()
    own = env if source == SOURCE else source  # the name of flowrl's own data, if it is that
    if own is None:
        raise UserError(f"dataset '{SOURCE}': give its name too, such as --env hopper-medium")
    tmaze = tmaze_environment(own)
    if tmaze is not None:
        return tmaze_dataset(own, tmaze)
    if source == SOURCE or source in ROBOT_TASKS:
        return load_embedded(own, memory_map)
    if source.startswith(MINARI_PREFIX):
        return load_minari(source.removeprefix(MINARI_PREFIX), memory_map)
    if source in D4RL_ENVIRONMENTS:
        return _d4rl_or_embedded(source, options.max_episode_steps, split_at_timeouts, memory_map)
    if suffix in FILE_SUFFIXES:
        read_as = named and options.apply(named)
        limit = options.max_episode_steps
        read = partial(
            read_d4rl_file,
            path,
            environment=read_as,
            max_episode_steps=limit,
            split_at_timeouts=split_at_timeouts,
        )
        facts = memory_map and facts_of(read_as)  # which decide what is one-hot
        return read_or_map(read, memory_map, [path], read_as, limit, split_at_timeouts, facts)
    if path.is_file() or suffix in (".pkl", ".pickle", ".npz", ".npy", ".pt"):
        raise UserError(
            f"dataset '{source}': a file must be HDF5 in D4RL's layout with a name that ends in "
            f"{' or '.join(FILE_SUFFIXES)}; other formats are not read, pickles never"
        )
    raise unknown_dataset(source)


def unknown_dataset(source: str) -> UserError:
    """The error for a name of no dataset; it suggests the closest."""
    known = did_you_mean(source, {*D4RL_ENVIRONMENTS, *EMBEDDED})
    forms = f"{MINARI_PREFIX}ID, or a path that ends in {' or '.join(FILE_SUFFIXES)}"
    if source in gymnasium.registry or re.fullmatch(r"[\w.]+:[\w.-]+-v\d+", source):  # module:ID
        return UserError(f"'{source}' is an environment: name the data too ({forms})")
    return UserError(f"unknown dataset '{source}'{known} (or give {forms})")


def _in_one_environment(
    datasets: list[EpisodeDataset], named: EnvironmentSpec | None
) -> list[EpisodeDataset]:
    """What one source records of an environment holds for those that name none, or ``--env`` alone."""
    known = [dataset for dataset in datasets if dataset.environment is not None]
    if len({dataset.environment.env_id for dataset in known if dataset.environment}) != 1:
        return datasets
    common = next((dataset for dataset in known if dataset.environment != named), known[0])
    shared = partial(replace, environment=common.environment, reference=common.reference)
    return [shared(dataset) if dataset.environment in (None, named) else dataset for dataset in datasets]


def _joined(datasets: Sequence[EpisodeDataset], memory_map: Path | None) -> EpisodeDataset:
    environment, reference = datasets[0].environment, datasets[0].reference
    # Environments that differ are refused, so that they must not find the copy of those that agree.
    facts = ((data.sha256, data.action_choices, data.environment == environment) for data in datasets)
    joined = read_or_map(partial(concatenate, datasets), memory_map, (), *facts)
    dataset_id, notes = joined_about(datasets)
    return replace(joined, environment=environment, reference=reference, dataset_id=dataset_id, notes=notes)


def _d4rl_or_embedded(
    name: str, max_episode_steps: int | None, split_at_timeouts: bool, memory_map: Path | None
) -> EpisodeDataset:
    """Read D4RL's dataset; where it is neither here nor to be had, flowrl's own of that name."""
    try:
        find_d4rl_file(name)
    except UserError as error:
        if name not in EMBEDDED:
            raise
        return load_embedded(name, memory_map, why=str(error).partition("; give a file")[0])
    return read_d4rl(name, max_episode_steps, split_at_timeouts, memory_map)


def _evaluated_in(
    dataset: EpisodeDataset, named: EnvironmentSpec | None, options: EvaluationOptions
) -> EpisodeDataset:
    """Replace the data's own environment by what the user gave, with a note of what differs.

    What the data recorded of an environment holds where the user names it by its id alone.
    """
    own = dataset.environment
    from_data = own != named  # a file is read as of the environment that the user names
    named = recorded_or_named(own, named)
    environment = None if named is None else options.apply(named)
    if environment == own or environment is None:
        return dataset
    notes = dataset.notes
    if own is not None and from_data and replace(environment, imports=own.imports) != own:
        notes = (*notes, f"evaluated in {environment}, not in the data's own {own}")
    reference = dataset.reference or reference_scores(environment.env_id)
    return replace(dataset, environment=environment, reference=reference, notes=notes)
