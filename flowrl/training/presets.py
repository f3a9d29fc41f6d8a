"""Presets: what differs between datasets in one table, what differs between recipes in a file each."""

from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from flowrl.errors import UserError, did_you_mean
from flowrl.plain_yaml import read_yaml_mapping

_PACKAGE = Path(__file__).resolve().parents[1]
# Inside an installed package; beside it in the repository.
PRESET_FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
DEFAULT_RECIPE = "default"


def preset_options(name: str | None, env: str | None) -> dict[str, Any]:
    """Return the options of a preset, by field of TrainConfig.

    Args:
        name: a dataset with the default recipe, such as hopper-medium; DATASET-RECIPE; or a recipe for the
            dataset of ``env``. None: the dataset of ``env`` where it has a preset, else no options.
        env: the value of ``--env``.

    Raises:
        UserError: no preset of this name, or one of another dataset than that of ``env``.
    """
    datasets, recipes = _datasets(), sorted(path.stem for path in (PRESET_FOLDER / "recipes").glob("*.yaml"))
    presets = {f"{dataset}-{recipe}": (dataset, recipe) for dataset in datasets for recipe in recipes}
    presets |= {dataset: (dataset, DEFAULT_RECIPE) for dataset in datasets}
    if name is None:
        if env not in datasets:
            return {}
        name = env
    dataset, recipe = presets.get(name, (env or "", name))
    if recipe not in recipes:
        shortened = short_repr(name)[1:-1]
        raise UserError(
            f"--config {shortened}: no such file or preset{did_you_mean(name, [*presets, *recipes])}"
        )
    if env in datasets and env != dataset:
        raise UserError(f"--config {name}: this is for {dataset}, not {env}; give --config {recipe}")
    row = datasets.get(dataset, {})
    own = {option: value for option, value in row.items() if option not in recipes}
    options = read_yaml_mapping(PRESET_FOLDER / "recipes" / f"{recipe}.yaml")
    return {**own, **options, **row.get(recipe, {}), "env": dataset or None}


def _datasets() -> dict[str, dict[str, Any]]:
    """The options of each dataset in the table, and by name of a recipe those that lie over its own."""
    table: dict[str, dict[str, Any]] = {}
    for row in read_yaml_mapping(PRESET_FOLDER / "datasets.yaml").values():
        table |= dict.fromkeys(row.pop("datasets"), row)
    return table
