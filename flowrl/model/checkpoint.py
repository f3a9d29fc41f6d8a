"""Checkpoints: folders that are whole or absent, and that are checked before anything in them is used.

``checkpoints/step-00001000/`` holds ``agent.json`` and ``model.safetensors`` (all that acting needs),
``training.json`` and ``training.safetensors`` (what resuming needs besides), and ``manifest.json`` with the
size and SHA-256 of each. The folder is written under a temporary name, synced, then renamed.
An agent saved alone (:func:`save_agent`) has the first two files and a manifest of them.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl.atomic import TEMPORARY_SUFFIX, file_sha256, publish
from flowrl.errors import UserError

CHECKPOINTS = "checkpoints"
BEST = "best"  # folder of a run, with a folder of checkpoints of its own
AGENT_JSON, MODEL_TENSORS = "agent.json", "model.safetensors"
TRAINING_JSON, TRAINING_TENSORS = "training.json", "training.safetensors"
MANIFEST = "manifest.json"
_AGENT_FILES = frozenset((AGENT_JSON, MODEL_TENSORS))
_FILES = _AGENT_FILES | {TRAINING_JSON, TRAINING_TENSORS}
AGENT_FILES = _AGENT_FILES | {MANIFEST}  # all of an agent's own folder
_REPLACED_SUFFIX = ".replaced"  # of a checkpoint whose step is being saved anew; good until that is done
_FOLDER_NAME = re.compile(rf"step-([0-9]+)({re.escape(_REPLACED_SUFFIX)})?")


CheckpointName = int | Literal["best"]  # its step, or the one that --keep-best kept


@dataclass(frozen=True)
class Checkpoint:
    """The contents of one checkpoint: plain JSON data and flat dictionaries of tensors."""

    step: int
    agent: dict[str, Any]
    model: dict[str, Tensor]
    training: dict[str, Any]
    training_tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The training tensors whose names begin with ``prefix``, by the rest of their names."""
        tensors = self.training_tensors.items()
        return {name.removeprefix(prefix): value for name, value in tensors if name.startswith(prefix)}


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write the checkpoint, then delete older ones so that ``keep`` are left; return its folder.

    At every moment the newest whole checkpoint is found by :func:`load_checkpoint`. Later steps than this
    one, damaged ones that a resumed run skipped, are neither counted nor touched.

    Raises:
        UserError: the folder cannot be written (full disk, no permission); earlier checkpoints are untouched.
    """
    final = run_dir / CHECKPOINTS / f"step-{checkpoint.step:08d}"
    replaced = final.with_name(f"{final.name}{_REPLACED_SUFFIX}")
    for unfinished in final.parent.glob(f".step-*{TEMPORARY_SUFFIX}"):  # of a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    with _new_folder(final, "checkpoint") as folder:
        _write_json(folder / TRAINING_JSON, checkpoint.training)
        save_file(checkpoint.training_tensors, folder / TRAINING_TENSORS)
        _write_agent(folder, checkpoint.step, checkpoint.agent, checkpoint.model)
        if final.exists():  # saved before: at the same moment, or damaged and now reached again
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
    shutil.rmtree(replaced, ignore_errors=True)
    older = [folder for folder in _folders(run_dir) if _step_of(folder) < checkpoint.step]
    for folder in older[keep - 1 :]:
        shutil.rmtree(folder)
    return final


def save_agent(folder: Path, step: int, agent: dict[str, Any], model: dict[str, Tensor]) -> None:
    """Write an agent alone to a new folder, whole or not at all; :func:`load_checkpoint` reads it.

    Raises:
        UserError: the folder is there already, or cannot be written.
    """
    if folder.exists():
        raise UserError(f"{folder}: already there; give the name of a new folder")
    with _new_folder(folder, "agent") as temporary:
        _write_agent(temporary, step, agent, model)


def delete_later_checkpoints(run_dir: Path, step: int) -> None:
    """Delete the checkpoints of steps after this one."""
    for folder in _folders(run_dir):
        if _step_of(folder) > step:
            shutil.rmtree(folder)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run folder holds any checkpoint, whole or damaged."""
    return any(_folders(run_dir))


def load_checkpoint(
    run_dir: Path, step: CheckpointName | None = None, *, for_training: bool = False
) -> Checkpoint:
    """Read the checkpoint of ``step``, or the newest whole one, verifying sizes and checksums first.

    ``best`` is the one that training kept with ``--keep-best``.

    ``run_dir`` is a run folder or one checkpoint's own folder. A damaged newer checkpoint is passed over
    with a printed line when ``step`` is None. Without ``for_training`` the training state stays unread.

    Raises:
        UserError: no such run or step, or no whole checkpoint (the message names the file that is wrong).
    """
    if step == "best":
        if not has_checkpoint(run_dir / BEST):
            raise UserError(f"--checkpoint best: {run_dir} has none; --keep-best keeps it while training")
        return load_checkpoint(run_dir / BEST)
    if (run_dir / MANIFEST).is_file():
        loaded = _load(run_dir, for_training)
        if step not in (None, loaded.step):
            raise UserError(f"--checkpoint {step}: {run_dir} is one checkpoint, of step {loaded.step}")
        return loaded
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    folders = list(_folders(run_dir))
    if not folders:
        raise UserError(f"{run_dir}: no checkpoint in it; a run folder holds {CHECKPOINTS}/step-*/{MANIFEST}")
    if step is not None:
        for folder in folders:
            if _step_of(folder) == step:
                return _load(folder, for_training)
        known = ", ".join(str(_step_of(folder)) for folder in reversed(folders))
        raise UserError(f"--checkpoint {step}: {run_dir} has checkpoints at steps {known}")
    damage: list[str] = []
    for folder in folders:
        try:
            checkpoint = _load(folder, for_training)
        except UserError as error:
            damage.append(str(error))
            continue
        for line in damage:
            print(f"warning: {line}; falling back to the checkpoint at step {checkpoint.step}")
        return checkpoint
    raise UserError(f"{run_dir}: no whole checkpoint: {'; '.join(damage)}")


def _folders(run_dir: Path) -> Iterator[Path]:
    """Checkpoint folders, newest first; unfinished ones have other names."""
    found = [path for path in (run_dir / CHECKPOINTS).glob("step-*") if _FOLDER_NAME.fullmatch(path.name)]
    yield from sorted(found, key=lambda path: (_step_of(path), path.suffix != _REPLACED_SUFFIX), reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-").removesuffix(_REPLACED_SUFFIX))


def _load(folder: Path, for_training: bool) -> Checkpoint:
    manifest = _read_json(folder / MANIFEST)
    files, step = manifest.get("files"), manifest.get("step")
    expected = (_FILES, _AGENT_FILES)
    if not isinstance(files, dict) or type(step) is not int or step < 0 or set(files) not in expected:
        raise UserError(f"{folder / MANIFEST}: not a manifest of {', '.join(sorted(_FILES))}")
    if for_training and set(files) != _FILES:
        raise UserError(f"{folder}: an agent alone, without the training state that --resume needs")
    if _FOLDER_NAME.fullmatch(folder.name) and _step_of(folder) != step:  # copies may be called anything
        raise UserError(f"{folder / MANIFEST}: states step {step}, which is not its folder's")
    for name in sorted(files):
        _verify(folder / name, files[name])
    return Checkpoint(
        step=step,
        agent=_read_json(folder / AGENT_JSON),
        model=_read_tensors(folder / MODEL_TENSORS),
        training=_read_json(folder / TRAINING_JSON) if for_training else {},
        training_tensors=_read_tensors(folder / TRAINING_TENSORS) if for_training else {},
    )


@contextmanager
def _new_folder(final: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder beside ``final``, which gets its name once it is written and synced."""
    temporary = final.with_name(f".{final.name}{TEMPORARY_SUFFIX}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{final}: cannot save the {what}: {error}") from error
        raise


def _write_agent(folder: Path, step: int, agent: dict[str, Any], model: dict[str, Tensor]) -> None:
    """Write an agent, and last the manifest of all that the folder holds."""
    _write_json(folder / AGENT_JSON, agent)
    save_file(model, folder / MODEL_TENSORS)
    files = {path.name: _describe(path) for path in sorted(folder.iterdir())}
    _write_json(folder / MANIFEST, {"step": step, "files": files})


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _verify(path: Path, expected: object) -> None:
    try:
        described = _describe(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if described != expected:
        raise UserError(f"{path}: its size or SHA-256 differs from the manifest's; the file is damaged")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, nested without end
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error
