"""Put snapshots of a behaviour training run into the package: float16 weights and an index of their returns.

Example:
    python scripts/maintain/export_behavior.py --run-dir runs/behavior/hopper --levels random=0 medium=200000
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from safetensors.numpy import save

from flowrl.atomic import atomic_path, file_sha256, write_text
from flowrl.behavior.policy import BehaviorPolicy, load_policy
from flowrl.behavior.shipped import ASSETS_DIR, INDEX_NAME, BehaviorAsset
from flowrl.envs.reference_scores import reference_scores
from flowrl.envs.specs import EnvironmentSpec
from flowrl.envs.vector import make_env
from flowrl.errors import UserError, exit_on_user_error

# Not the seed of the measurements that the snapshots were chosen by: those favour the chosen ones.
EXPORT_SEED = 2_000_000


@dataclass(frozen=True)
class MeasuredReturns:
    """Undiscounted returns and lengths (steps) of whole episodes, in the order they were run."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        return float(np.std(self.returns))


def measure_returns(policy: BehaviorPolicy, episodes: int, seed: int) -> MeasuredReturns:
    """Run ``episodes`` episodes of ``policy``, actions sampled, in the environment it was trained in.

    Episode i starts from environment seed ``seed + i`` and samples its actions from a generator of the same
    seed, so that its return depends on no other episode.
    """
    environment = make_env(EnvironmentSpec(policy.env_id))
    returns, lengths = [], []
    for episode in range(episodes):
        generator = np.random.default_rng(seed + episode)
        observation, _ = environment.reset(seed=seed + episode)
        episode_return, length, finished = 0.0, 0, False
        while not finished:
            action = policy.act(observation[None], generator.standard_normal((1, policy.action_dim)))[0]
            observation, reward, terminated, truncated, _ = environment.step(action)
            episode_return += float(reward)
            length += 1
            finished = terminated or truncated
        returns.append(episode_return)
        lengths.append(length)
    environment.close()
    return MeasuredReturns(tuple(returns), tuple(lengths))


def save_policy(policy: BehaviorPolicy, path: Path, dtype: type[np.floating] = np.float32) -> None:
    """Write ``policy`` as a safetensors snapshot in ``dtype``, whole or not at all."""
    layers = {f"hidden.{index}": layer for index, layer in enumerate(policy.hidden)}
    layers |= {"mean": policy.mean, "log_std": policy.log_std}
    tensors = {
        f"{name}.{part}": np.ascontiguousarray(array, dtype=dtype)
        for name, layer in layers.items()
        for part, array in zip(("weight", "bias"), layer, strict=True)
    }
    data = save(tensors, {"env_id": policy.env_id, "steps": str(policy.steps)})
    # safetensors writes the metadata in random order. Sorted, equal policies have equal hashes. A file
    # begins with the length of its header, 8 bytes, and the header, JSON.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    with atomic_path(path) as temporary:
        text = json.dumps(header, separators=(",", ":")).encode()
        temporary.write_bytes(data[:8] + text.ljust(end - 8) + data[end:])


@dataclass(frozen=True)
class BehaviorExport:
    """Which snapshots of a training run to put into the package, as all policies of their environment."""

    run_dir: Path
    """Folder of a run of train_behavior.py."""
    levels: tuple[str, ...]
    """NAME=STEP pairs, worst first, such as random=0 medium=200000."""
    episodes: int = 20
    """Episodes by which each is measured."""
    assets_dir: Path = ASSETS_DIR


def export_behavior(export: BehaviorExport) -> list[BehaviorAsset]:
    """Write the policies of an environment and their index, replacing those before; return the entries.

    Each policy goes to float16 when that leaves its measured mean return within two standard errors of the
    float32 one's over the same seeds, and stays in float32 otherwise.

    Raises:
        UserError: a level that is not NAME=STEP or has no snapshot; snapshots of more than one environment.
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
    """Whether two measurements' means differ by at most two standard errors of their difference."""
    variances = [m.std**2 / max(len(m.returns) - 1, 1) for m in (first, second)]
    return abs(first.mean - second.mean) <= 2 * sum(variances) ** 0.5


def main() -> None:
    """Parse the command line, export, and print the policies with their scores."""
    export = tyro.cli(BehaviorExport, description=__doc__)
    with exit_on_user_error():
        for asset in export_behavior(export):
            print(
                f"{asset.env_id} {asset.name}: step {asset.training_steps}, return {asset.return_mean:.1f} "
                f"+- {asset.return_std:.1f}, normalised {asset.normalized_score:.1f}, {asset.dtype}"
            )


if __name__ == "__main__":
    main()
