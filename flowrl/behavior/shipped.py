"""The behaviour policies that ship with flowrl: a folder per environment, with an index of their worth."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flowrl.atomic import file_sha256, write_text
from flowrl.behavior.measure import MeasuredReturns, measure_returns
from flowrl.behavior.policy import BehaviorPolicy, load_policy, save_policy
from flowrl.envs.reference_scores import reference_scores
from flowrl.errors import UserError, did_you_mean

ASSETS_DIR = Path(__file__).parents[1] / "assets" / "behavior"
INDEX_NAME = "index.json"

# Not the seed of the measurements that the snapshots were chosen by, which flatter the chosen ones.
EXPORT_SEED = 2_000_000


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


def behavior_names(assets_dir: Path = ASSETS_DIR) -> list[str]:
    """Return the environments that have shipped policies: "hopper", ..."""
    return sorted(index.parent.name for index in assets_dir.glob(f"*/{INDEX_NAME}"))


def behavior_assets(environment: str, assets_dir: Path = ASSETS_DIR) -> dict[str, BehaviorAsset]:
    """Return the shipped policies of ``environment`` ("hopper", ...) by name, worst first.

    Raises UserError for an environment that has none and for an index that is damaged.
    """
    path = assets_dir / environment / INDEX_NAME
    if environment not in behavior_names(assets_dir):
        known = behavior_names(assets_dir)
        raise UserError(
            f"no behaviour policies for environment '{environment}'{did_you_mean(environment, known)}"
        )
    try:
        entries = [
            BehaviorAsset(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["policies"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable index of behaviour policies ({error})") from None
    return {entry.name: entry for entry in entries}


def load_behavior(environment: str, name: str, assets_dir: Path = ASSETS_DIR) -> BehaviorPolicy:
    """Load the shipped policy ``name`` ("random", ..., "expert") of ``environment`` ("hopper").

    Raises UserError for an unknown environment or name, and for a file that is missing or is not, byte for
    byte, the one that the index describes.
    """
    assets = behavior_assets(environment, assets_dir)
    if name not in assets:
        raise UserError(f"no behaviour policy '{name}' for {environment}{did_you_mean(name, assets)}")
    asset = assets[name]
    path = assets_dir / environment / asset.file
    if not path.is_file():
        raise UserError(f"{path}: this behaviour policy is missing; reinstall flowrl")
    digest = file_sha256(path)
    if digest != asset.sha256:
        raise UserError(f"{path}: SHA-256 is {digest}, the index says {asset.sha256}; reinstall flowrl")
    return load_policy(path)


@dataclass(frozen=True)
class BehaviorExport:
    """Which snapshots of a training run to ship, as the whole ladder of their environment."""

    run_dir: Path
    """Folder of a run of train_behavior.py."""
    levels: tuple[str, ...]
    """NAME=STEP pairs, worst first, such as random=0 medium=200000."""
    episodes: int = 20
    """Episodes by which each is measured."""
    assets_dir: Path = ASSETS_DIR


def export_behavior(export: BehaviorExport) -> list[BehaviorAsset]:
    """Write the ladder and its index, replacing the one before; return its entries.

    Each policy goes to float16 when that leaves its measured mean return within two standard errors of the
    float32 one's over the same seeds, and stays in float32 otherwise.

    Raises UserError for a level that is not NAME=STEP or has no snapshot, and for snapshots of more than one
    environment.
    """
    policies = {name: load_policy(path) for name, path in _snapshot_paths(export).items()}
    env_ids = {policy.env_id for policy in policies.values()}
    if len(env_ids) != 1:
        raise UserError(f"--run-dir {export.run_dir}: snapshots of several environments: {sorted(env_ids)}")
    folder = export.assets_dir / env_ids.pop().split("-")[0].lower()

    assets = [_export_policy(folder, name, policy, export.episodes) for name, policy in policies.items()]
    index = {"policies": [asdict(asset) for asset in assets]}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    for path in folder.glob("*.safetensors"):
        if path.stem not in policies:
            path.unlink()
    return assets


def _snapshot_paths(export: BehaviorExport) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for level in export.levels:
        name, _, step = level.partition("=")
        if not name or not step.isdecimal() or name in paths:
            raise UserError(f"--levels {level}: want distinct NAME=STEP pairs such as medium=200000")
        paths[name] = export.run_dir / "snapshots" / f"{int(step):09d}.safetensors"
        if not paths[name].is_file():
            raise UserError(f"--levels {level}: there is no {paths[name]}")
    return paths


def _export_policy(folder: Path, name: str, policy: BehaviorPolicy, episodes: int) -> BehaviorAsset:
    path = folder / f"{name}.safetensors"
    full = measure_returns(policy, episodes, EXPORT_SEED)
    dtype: type[np.floating] = np.float16
    save_policy(policy, path, dtype)
    measured = measure_returns(load_policy(path), episodes, EXPORT_SEED)
    if not same_mean(full, measured):
        dtype, measured = np.float32, full
        save_policy(policy, path, dtype)
    reference = reference_scores(policy.env_id)
    if reference is None:
        raise UserError(f"{policy.env_id}: no reference scores, so its policies have no normalised score")
    print(
        f"{name}: float32 {full.mean:.1f} +- {full.std:.1f}, shipped {measured.mean:.1f} ({dtype.__name__})"
    )
    return BehaviorAsset(
        name=name,
        file=path.name,
        sha256=file_sha256(path),
        env_id=policy.env_id,
        training_steps=policy.steps,
        dtype=dtype.__name__,
        episodes=episodes,
        return_mean=measured.mean,
        return_std=measured.std,
        length_mean=float(np.mean(measured.lengths)),
        normalized_score=reference.normalized_score(measured.mean),
    )


def same_mean(first: MeasuredReturns, second: MeasuredReturns) -> bool:
    """Tell whether two measurements' means differ by at most two standard errors of their difference."""
    variances = [m.std**2 / max(len(m.returns) - 1, 1) for m in (first, second)]
    return abs(first.mean - second.mean) <= 2 * sum(variances) ** 0.5
