"""Training of behaviour policies: soft actor-critic by sbx-rl (an optional extra), with snapshots all along.

The run folder holds ``training.json`` (what was asked), ``snapshots/`` (the actor every so many steps),
``returns.jsonl`` (what each earned), ``replay/`` (every transition, in files that are written once) and
``checkpoint.msgpack`` (networks, optimisers, random keys). Nothing in it is a pickle. A run that was stopped
in any way continues from its last checkpoint when it is started again; the episode it was in stays
unfinished, so a resumed run is as good as a straight one but not the same bit for bit.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import tyro
from export_behavior import measure_returns, save_policy
from tqdm import tqdm

from flowrl.atomic import atomic_path, sole_user, write_text
from flowrl.behavior.policy import BehaviorPolicy, Layer
from flowrl.errors import UserError, exit_on_user_error
from flowrl.options import PositiveCount, checked, flag
from flowrl.signals import StopSignals

EVALUATION_SEED = 1_000_000  # far from the training seeds, the same for every snapshot
REPLAY_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")


@dataclass(frozen=True)
class BehaviorTraining:
    """One training run of a behaviour policy; every action bound of these environments is 1."""

    env: Literal["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5"]
    run_dir: Path
    """Folder of the run; an existing run of the same environment and seed is continued."""
    steps: PositiveCount = 1_000_000
    """Environment steps in all; raising it continues a finished run."""
    seed: int = 0
    snapshot_every: PositiveCount = 25_000
    """Environment steps between snapshots, each measured and followed by a checkpoint."""
    evaluation_episodes: PositiveCount = 10
    hidden_width: PositiveCount = 128
    batch_size: PositiveCount = 256
    environment_steps_per_update: PositiveCount = 40
    """Environment steps between two rounds of gradient steps."""
    gradient_steps_per_update: PositiveCount = 20
    learning_starts: int = 10_000
    """Environment steps with uniform random actions before learning starts."""
    actor_learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3


def train_behavior(training: BehaviorTraining) -> int:
    """Run ``training`` to its end, or until SIGINT or SIGTERM; return the exit code 0, 130 or 143.

    Raises UserError when an option is out of its bounds, when sbx-rl is not installed, when the folder
    belongs to a different run or is in use, or when its files are damaged.
    """
    checked(BehaviorTraining, asdict(training), flag)
    model = _make_model(training)
    training.run_dir.mkdir(parents=True, exist_ok=True)
    in_use = f"--run-dir {training.run_dir}: another process is training there"
    with sole_user(training.run_dir, in_use), StopSignals() as signals:
        claim_run_dir(training)
        _train(training, model, signals)
    return 128 + signals.received if signals.received else 0


def _make_model(training: BehaviorTraining) -> Any:
    try:
        from sbx import SAC
    except ImportError as error:
        raise UserError(
            f"training behaviour policies needs sbx-rl ({error}): pip install -e '.[behavior]'"
        ) from None
    environment = gymnasium.wrappers.DtypeObservation(gymnasium.make(training.env), np.float32)
    return SAC(
        "MlpPolicy",
        environment,
        learning_rate=training.actor_learning_rate,
        qf_learning_rate=training.critic_learning_rate,
        # Nothing is ever forgotten: a round of updates may overshoot the last step, hence the margin.
        buffer_size=training.steps + training.environment_steps_per_update + 1,
        learning_starts=training.learning_starts,
        batch_size=training.batch_size,
        train_freq=training.environment_steps_per_update,
        gradient_steps=training.gradient_steps_per_update,
        policy_kwargs={"net_arch": [training.hidden_width, training.hidden_width]},
        seed=training.seed,
    )


def claim_run_dir(training: BehaviorTraining) -> None:
    """Write what was asked, or check that what was asked before is the same run, perhaps with more steps."""
    path = training.run_dir / "training.json"
    wanted = {name: value for name, value in asdict(training).items() if name not in ("run_dir", "steps")}
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not readable JSON ({error})") from None
        for name, value in wanted.items():
            if known.get(name) != value:
                raise UserError(
                    f"{path}: this run has {name} {known.get(name)}, not {value}; use another --run-dir"
                )
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def _train(training: BehaviorTraining, model: Any, signals: StopSignals) -> None:
    from stable_baselines3.common.callbacks import BaseCallback

    class StopOnSignal(BaseCallback):
        """Moves the progress bar and ends the round of steps as soon as a signal has come."""

        def _on_step(self) -> bool:
            progress.update(1)
            return not signals.received

    run_dir = training.run_dir
    step = _load_checkpoint(run_dir, model)
    forget_after(run_dir, step)
    if step == 0:
        _take_snapshot(training, model, step, 0.0)
    with tqdm(total=training.steps, initial=step, desc=training.env, unit="step", disable=None) as progress:
        while step < training.steps and not signals.received:
            target = min(training.steps, (step // training.snapshot_every + 1) * training.snapshot_every)
            started = time.perf_counter()
            model.learn(target - step, StopOnSignal(), log_interval=None, reset_num_timesteps=False)
            # The step in which a signal arrived was not stored; the buffer holds the count.
            first, step = step, model.replay_buffer.pos
            speed = (step - first) / (time.perf_counter() - started)
            _save_replay(run_dir, model.replay_buffer, first, step)
            if not signals.received:
                _take_snapshot(training, model, step, speed)
            _save_checkpoint(run_dir, model, step)


def _take_snapshot(training: BehaviorTraining, model: Any, step: int, steps_per_second: float) -> None:
    policy = actor_policy(model.policy.actor_state.params, training.env, step)
    save_policy(policy, training.run_dir / "snapshots" / f"{step:09d}.safetensors")
    measured = measure_returns(policy, training.evaluation_episodes, EVALUATION_SEED)
    line = {
        "step": step,
        "return_mean": measured.mean,
        "return_std": measured.std,
        "length_mean": float(np.mean(measured.lengths)),
        "episodes": training.evaluation_episodes,
        "steps_per_second": steps_per_second,
    }
    with (training.run_dir / "returns.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    tqdm.write(
        f"{training.env} step {step}: return {measured.mean:.1f} +- {measured.std:.1f}, "
        f"length {line['length_mean']:.0f}, {steps_per_second:.0f} steps/s"
    )
    sys.stdout.flush()


def actor_policy(params: Any, env_id: str, steps: int) -> BehaviorPolicy:
    """Return the policy that sbx's squashed Gaussian actor with these flax parameters is.

    Its dense layers are numbered in order of use: the hidden ones, then mean, then log standard deviation.
    """
    dense = params["params"]

    def layer(index: int) -> Layer:
        weights = dense[f"Dense_{index}"]
        return np.asarray(weights["kernel"], np.float64), np.asarray(weights["bias"], np.float64)

    depth = len(dense) - 2
    hidden = tuple(layer(index) for index in range(depth))
    return BehaviorPolicy(env_id, steps, hidden, mean=layer(depth), log_std=layer(depth + 1))


def _save_replay(run_dir: Path, buffer: Any, first: int, last: int) -> None:
    """Write transitions first..last-1 to a file of their own; files written before stay as they are."""
    arrays = {name: getattr(buffer, name)[first:last, 0] for name in REPLAY_ARRAYS}
    with (
        atomic_path(run_dir / "replay" / f"{first:09d}-{last:09d}.npz") as temporary,
        temporary.open("wb") as file,
    ):
        np.savez(file, **arrays)


def _replay_files(run_dir: Path) -> list[tuple[int, int, Path]]:
    """Return (first transition, one past the last, file), in order."""
    files = sorted((run_dir / "replay").glob("?????????-?????????.npz"))
    return [(int(path.stem[:9]), int(path.stem[10:]), path) for path in files]


def _learner_state(model: Any) -> dict[str, Any]:
    return {
        "actor": model.policy.actor_state,
        "critic": model.policy.qf_state,
        "entropy": model.ent_coef_state,
        "key": model.key,
        "policy_key": model.policy.key,
        "updates": model._n_updates,
        "step": 0,
    }


def _save_checkpoint(run_dir: Path, model: Any, step: int) -> None:
    from flax.serialization import to_bytes

    with atomic_path(run_dir / "checkpoint.msgpack") as temporary:
        temporary.write_bytes(to_bytes({**_learner_state(model), "step": step}))


def _load_checkpoint(run_dir: Path, model: Any) -> int:
    """Put the last checkpoint and its transitions into ``model``; return its step, 0 when there is none."""
    from flax.serialization import from_bytes

    path = run_dir / "checkpoint.msgpack"
    if not path.exists():
        return 0
    try:
        state = from_bytes(_learner_state(model), path.read_bytes())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a checkpoint of this run ({error}); start again in another folder"
        ) from None
    step = int(state["step"])
    buffer = model.replay_buffer
    if step > buffer.buffer_size:
        raise UserError(f"--steps: the run in {run_dir} is already at step {step}; give at least that")
    for first, last, file in _replay_files(run_dir):
        if first == buffer.pos and last <= step:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    for name in REPLAY_ARRAYS:
                        getattr(buffer, name)[first:last, 0] = arrays[name]
            except (ValueError, KeyError, OSError, EOFError) as error:
                raise UserError(
                    f"{file}: damaged transitions ({error}); start again in another folder"
                ) from None
            buffer.pos = last
    if buffer.pos != step:
        raise UserError(f"{run_dir / 'replay'}: transitions {buffer.pos} to {step} are missing")
    model.policy.actor_state, model.policy.qf_state = state["actor"], state["critic"]
    model.ent_coef_state, model._n_updates = state["entropy"], int(state["updates"])
    model.key, model.policy.key = state["key"], state["policy_key"]
    model.num_timesteps = step
    # Numpy's global generator picks the batches and the environment needs a fresh seed: both differ from the
    # ones the run began with, or it would repeat its first episodes.
    np.random.seed((model.seed + step) % 2**32)  # noqa: NPY002 (what stable-baselines3's buffer uses)
    model.env.seed(model.seed + step)
    return step


def forget_after(run_dir: Path, step: int) -> None:
    """Delete what was written after the checkpoint at ``step``: those steps will be taken again."""
    for _, last, file in _replay_files(run_dir):
        if last > step:
            file.unlink()
    for snapshot in (run_dir / "snapshots").glob("*.safetensors"):
        if int(snapshot.stem) > step or step == 0:
            snapshot.unlink()
    path = run_dir / "returns.jsonl"
    if path.exists():
        kept = [
            line
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n") and step > 0 and json.loads(line)["step"] <= step
        ]
        write_text(path, "".join(kept))


def main() -> int:
    """Parse the command line and train; the exit code is 130 or 143 when a signal ended the run."""
    training = tyro.cli(BehaviorTraining, description=__doc__)
    with exit_on_user_error():
        return train_behavior(training)


if __name__ == "__main__":
    sys.exit(main())
