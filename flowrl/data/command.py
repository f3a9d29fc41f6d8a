"""The command ``flowrl collect``: its options, and the recipe that they describe."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from flowrl.behavior.shipped import behavior_assets, behavior_names
from flowrl.data.collect import UNIFORM, Part, Recipe
from flowrl.data.embedded import EMBEDDED, embedded_id
from flowrl.data.writers import collect_d4rl, collect_minari, ensure_minari, read_provenance
from flowrl.envs.failures import failures_kept
from flowrl.envs.options import EnvironmentOptions
from flowrl.envs.specs import EnvironmentSpec, named_environment
from flowrl.errors import UserError
from flowrl.options import Count, NotNegative, PositiveCount
from flowrl.process import prepare_process


@dataclass(frozen=True)
class CollectCommand(EnvironmentOptions):
    """Collect a dataset with policies of the package, as a Minari dataset or an HDF5 file."""

    name: tyro.conf.Positional[str]
    """An embedded dataset (hopper-medium), or an environment with --policies: hopper, or any Gymnasium id or
    module:Name-v0, where the policy 'uniform' acts."""
    policies: tuple[str, ...] = ()
    """NAME or NAME=SHARE of the timesteps, such as medium=3 expert=1."""
    noise: NotNegative = 0.0
    """Standard deviation of the normal noise added to actions; with --policies."""
    steps: PositiveCount | None = None
    """Transitions, at least; 200000 unless given."""
    seed: Count | None = None
    format: Literal["minari", "d4rl"] = "minari"
    id: str | None = None
    """Id of the Minari dataset; an embedded dataset as published has its own."""
    out: Path | None = None
    """HDF5 file to write with --format d4rl."""
    overwrite: bool = False
    push: str | None = None
    """User or organisation of the Hugging Face Hub: send the dataset there, with a card of its recipe. The
    first part of its id names the repository. One that is here already is sent if its recipe is the same."""
    dry_run: Path | None = None
    """With --push: write what would be sent to this new folder, and send nothing."""


@failures_kept(Path())
def run_collect(command: CollectCommand) -> None:
    """Collect and print where the data is and its content hash; a signal leaves nothing behind.

    Raises:
        UserError: a name, policy or option that makes no sense, and see :mod:`flowrl.data.writers`.
    """
    recipe = _recipe(command)
    if command.push is not None:
        if command.format == "d4rl":
            raise UserError("--push sends Minari datasets: leave --format d4rl out")
        # Here, for only sending imports what agents are made of.
        from flowrl.sharing.dataset import check_push, push_dataset

        check_push(_dataset_id(command, recipe), command.push, recipe.acts_in, command.dry_run)
    elif command.dry_run is not None:
        raise UserError("--dry-run goes with --push")
    prepare_process()
    if command.format == "d4rl":
        if command.out is None or command.id is not None:
            raise UserError("--format d4rl writes to --out FILE.hdf5, not to --id")
        sha256 = collect_d4rl(recipe, command.out, command.overwrite)
        print(f"{command.out}: content SHA-256 {sha256}")
        return
    if command.out is not None:
        raise UserError("--out needs --format d4rl; Minari datasets go to MINARI_DATASETS_PATH")
    dataset_id = _dataset_id(command, recipe)
    if command.push is not None and not command.overwrite:
        folder = ensure_minari(recipe, dataset_id)
    else:
        folder = collect_minari(recipe, dataset_id, command.overwrite)
    print(f"{dataset_id}: {folder}, content SHA-256 {read_provenance(folder)['sha256']}")
    if command.push is not None:
        print(push_dataset(dataset_id, folder, command.push, command.dry_run))


def _recipe(command: CollectCommand) -> Recipe:
    if command.name in EMBEDDED:
        if command.policies or command.noise:
            raise UserError(f"{command.name} has its own policies: --policies and --noise go with hopper")
        recipe = EMBEDDED[command.name]
    else:
        known, named = [], None
        if command.name in behavior_names():
            known = list(behavior_assets(command.name))
        else:
            own = {name: EnvironmentSpec(name) for name in (*EMBEDDED, *behavior_names())}
            named = named_environment(command.name, command.env_import, own)
        parts = tuple(Part.parse(policy, command.noise) for policy in command.policies)
        if not parts or (named is not None and any(part.policy != UNIFORM for part in parts)):
            raise UserError(f"{command.name}: give --policies, of {', '.join([*known, UNIFORM])}")
        recipe = Recipe(command.name if named is None else named.env_id, parts, spec=named)
    environment = command.apply(recipe.acts_in)
    if environment != recipe.acts_in:
        recipe = replace(recipe, spec=environment)
    steps = recipe.steps if command.steps is None else command.steps
    return replace(recipe, steps=steps, seed=recipe.seed if command.seed is None else command.seed)


def _dataset_id(command: CollectCommand, recipe: Recipe) -> str:
    """Return the id to store under; an embedded dataset's own is for its own recipe only."""
    own = embedded_id(command.name) if command.name in EMBEDDED else None
    if own is not None and recipe == EMBEDDED[command.name]:
        return command.id or own
    if command.id is None or command.id.startswith("flowrl/"):
        raise UserError("give this dataset its own id, such as --id mine/hopper/mixed-v0")
    return command.id
