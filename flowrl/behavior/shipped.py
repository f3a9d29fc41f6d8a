"""The behaviour policies of the package: a folder per environment, with an index of their returns."""

import json
from dataclasses import dataclass
from pathlib import Path

from flowrl.atomic import file_sha256
from flowrl.behavior.policy import BehaviorPolicy, load_policy
from flowrl.errors import UserError, did_you_mean

ASSETS_DIR = Path(__file__).parents[1] / "assets" / "behavior"
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class BehaviorAsset:
    """One shipped policy: its file, its place in its training run, and its stochastic returns."""

    name: str
    file: str
    sha256: str
    env_id: str
    training_steps: int
    dtype: str
    episodes: int
    return_mean: float
    return_std: float
    length_mean: float
    normalized_score: float


def behavior_names() -> list[str]:
    """Return the environments that have shipped policies: "hopper", ..."""
    return sorted(index.parent.name for index in ASSETS_DIR.glob(f"*/{INDEX_NAME}"))


def behavior_assets(environment: str) -> dict[str, BehaviorAsset]:
    """Return the shipped policies of ``environment`` ("hopper", ...) by name, worst first.

    Raises UserError for an environment that has none and for an index that is damaged.
    """
    path = ASSETS_DIR / environment / INDEX_NAME
    known = behavior_names()
    if environment not in known:
        raise UserError(
            f"no behaviour policies for environment '{environment}'{did_you_mean(environment, known)}"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["policies"]
        return {entry["name"]: BehaviorAsset(**entry) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable index of behaviour policies ({error})") from None


def load_behavior(environment: str, name: str) -> BehaviorPolicy:
    """Load the shipped policy ``name`` ("random", ..., "expert") of ``environment`` ("hopper").

    Raises UserError for an unknown environment or name, and for a file that is missing or is not, byte for
    byte, the one that the index describes.
    """
    assets = behavior_assets(environment)
    if name not in assets:
        raise UserError(f"no behaviour policy '{name}' for {environment}{did_you_mean(name, assets)}")
    asset = assets[name]
    path = ASSETS_DIR / environment / asset.file
    if not path.is_file():
        raise UserError(f"{path}: this behaviour policy is missing; reinstall flowrl")
    digest = file_sha256(path)
    if digest != asset.sha256:
        raise UserError(f"{path}: SHA-256 is {digest}, expected {asset.sha256}; reinstall flowrl")
    return load_policy(path)
