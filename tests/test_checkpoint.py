"""Checkpoints are whole or absent: what is damaged, foreign or hostile is refused by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from broken_inputs import MARKER, PICKLES, Bomb, files_of_at_most, reseal
from tiny_training import steps_on_disk

from flowrl.errors import UserError
from flowrl.model import checkpoint
from flowrl.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

FILES = ("agent.json", "manifest.json", "model.safetensors", "training.json", "training.safetensors")


def make_checkpoint(step, size=50):
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        agent={"name": "agent", "step": step},
        model={"weight": torch.randn(size, generator=generator), "scale": torch.tensor(2.0)},
        training={"evaluated_step": step - 1},
        training_tensors={
            "random": torch.arange(30, dtype=torch.uint8),
            "optimizer.0.step": torch.tensor(1.0),
        },
    )


def assert_equal(actual, expected):
    assert (actual.step, actual.agent, actual.training) == (expected.step, expected.agent, expected.training)
    for name in ("model", "training_tensors"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=0)


def folder_of(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def test_what_is_saved_comes_back(tmp_path):
    for step in (5, 300):
        folder = save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
        assert folder == folder_of(tmp_path, step)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert_equal(load_checkpoint(tmp_path, for_training=True), make_checkpoint(300))
    assert_equal(load_checkpoint(tmp_path, 5, for_training=True), make_checkpoint(5))
    assert_equal(load_checkpoint(folder_of(tmp_path, 5), for_training=True), make_checkpoint(5))
    for_acting = load_checkpoint(tmp_path)
    assert (for_acting.training, for_acting.training_tensors) == ({}, {})
    shutil.copytree(folder, tmp_path / "best")  # a checkpoint may be carried anywhere
    assert load_checkpoint(tmp_path / "best").step == 300


def test_every_file_is_synced_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_dir():
            assert not folder_of(tmp_path, 1).exists()
            assert path.stat().st_size > 0
        synced.append(path.name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_checkpoint(tmp_path, make_checkpoint(1), keep=1)
    assert {*FILES, "checkpoints"} <= set(synced)
    assert synced[-1] == "checkpoints"  # the rename itself


def test_bytes_flipped_or_cut_are_refused_by_name(tmp_path):
    """Every 100th; of the manifest, which has no checksum, every one."""
    save_checkpoint(tmp_path, make_checkpoint(12), keep=1)
    folder, tried = folder_of(tmp_path, 12), 0
    for name in FILES:
        whole, stride = (folder / name).read_bytes(), 1 if name == "manifest.json" else 100
        for position in range(0, len(whole), stride):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << (position // stride % 8)
            for damaged in (bytes(flipped), whole[: position // 100 * 100]):
                (folder / name).write_bytes(damaged)
                with pytest.raises(UserError, match=f"{name}|{folder.name}") as caught:
                    load_checkpoint(tmp_path, for_training=True)
                assert "\n" not in str(caught.value)
                tried += 1
        (folder / name).write_bytes(whole)
    assert tried >= 500
    assert_equal(load_checkpoint(tmp_path, for_training=True), make_checkpoint(12))


def test_fall_back_to_the_newest_whole_one_and_say_so(tmp_path, capsys):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=4)
    content = (folder_of(tmp_path, 4) / "model.safetensors").read_bytes()
    (folder_of(tmp_path, 4) / "model.safetensors").write_bytes(content[:-1])
    (folder_of(tmp_path, 3) / "training.safetensors").write_bytes(b"")
    assert_equal(load_checkpoint(tmp_path, for_training=True), make_checkpoint(2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "step-00000004/model.safetensors" in lines[0]
    assert "step-00000003/training.safetensors" in lines[1]
    assert all("falling back to the checkpoint at step 2" in line for line in lines)
    with pytest.raises(UserError, match=r"step-00000004/model\.safetensors"):  # asked for by number: no other
        load_checkpoint(tmp_path, 4)
    for step in (1, 2):
        (folder_of(tmp_path, step) / "agent.json").write_text("{}")
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kill_at", range(1, 30))
def test_a_kill_at_any_change_of_the_disk_leaves_a_whole_checkpoint(tmp_path, kill_at):
    """Stop for good at the k-th change of the disk, while a step is saved anew with keep=1."""
    save_checkpoint(tmp_path, make_checkpoint(7), keep=1)
    changes = 0

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes >= kill_at:
                raise Killed
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
        try:
            save_checkpoint(tmp_path, make_checkpoint(7), keep=1)
        except Killed:
            pass
        else:
            assert changes < kill_at
    assert_equal(load_checkpoint(tmp_path, for_training=True), make_checkpoint(7))
    save_checkpoint(tmp_path, make_checkpoint(8), keep=1)
    assert steps_on_disk(tmp_path) == ["step-00000008"]


def test_missing_runs_and_steps_are_named(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="no checkpoint in it"):
        load_checkpoint(tmp_path)
    for step in (1, 2):
        save_checkpoint(tmp_path, make_checkpoint(step), keep=2)
    with pytest.raises(UserError, match=r"--checkpoint 3: .* has checkpoints at steps 1, 2"):
        load_checkpoint(tmp_path, 3)
    with pytest.raises(UserError, match=r"--checkpoint 1: .*step-00000002 is one checkpoint, of step 2"):
        load_checkpoint(folder_of(tmp_path, 2), 1)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_pickle_under_any_accepted_name_is_refused(tmp_path, monkeypatch, name):
    """Even with a matching manifest; torch.save's format is a pickle too."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    path = folder_of(tmp_path, 3) / name
    torch.save({"weight": Bomb()}, path)
    for pickled in (PICKLES[0], path.read_bytes()):
        path.write_bytes(pickled)
        reseal(path.parent)
        with pytest.raises(UserError, match=name):
            load_checkpoint(tmp_path, for_training=True)
    (path.parent / "manifest.json").write_bytes(PICKLES[0])
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / MARKER).exists()


def hostile_manifests(files):
    inside = files["model.safetensors"]
    renamed = {name: entry for name, entry in files.items() if name != "model.safetensors"}
    return {
        "parent": {"step": 3, "files": {**renamed, "../../x": inside}},
        "absolute": {"step": 3, "files": {**renamed, "/etc/passwd": inside}},
        "extra": {"step": 3, "files": {**files, "../model.safetensors": inside}},
        "missing": {"step": 3, "files": renamed},
        "step of another folder": {"step": 4, "files": files},
        "entry with a path": {"step": 3, "files": {**files, "model.safetensors": {**inside, "path": "/x"}}},
    }


@pytest.mark.parametrize("case", hostile_manifests({"model.safetensors": {}}))
def test_a_hostile_manifest_is_refused(tmp_path, case):
    save_checkpoint(tmp_path, make_checkpoint(3), keep=1)
    path = folder_of(tmp_path, 3) / "manifest.json"
    path.write_text(json.dumps(hostile_manifests(json.loads(path.read_text())["files"])[case]))
    with pytest.raises(UserError, match=r"manifest\.json|model\.safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("limit", [0, 150_000])
def test_a_full_disk_costs_nothing_already_saved(tmp_path, limit):
    """No file may grow beyond ``limit`` bytes: the save fails at its first or at a late file."""
    save_checkpoint(tmp_path, make_checkpoint(1, size=50_000), keep=1)
    message = "step-00000002: cannot save the checkpoint: "
    with files_of_at_most(limit), pytest.raises(UserError, match=message):
        save_checkpoint(tmp_path, make_checkpoint(2, size=50_000), keep=1)
    assert steps_on_disk(tmp_path) == ["step-00000001"]
    assert_equal(load_checkpoint(tmp_path, for_training=True), make_checkpoint(1, size=50_000))
