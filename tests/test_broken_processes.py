"""A handful of broken inputs in real processes: one line on stderr, exit code 2, little memory."""

import json
import os
import struct
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import h5py
import pytest
from broken_inputs import MARKER, PICKLES
from conftest import write_tiny_dataset
from tiny_training import REPOSITORY, arguments, train_here

LARGEST = 2 << 30  # bytes


def refused(script: str, *words: object, folder: Path) -> str:
    """Run a script in an empty folder; its one line of error."""
    out, err = folder / "stdout", folder / "stderr"
    started = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "scripts" / script), *map(str, words)],
            cwd=folder, stdout=stdout, stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": "http://127.0.0.1:9"},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 2, err.read_text()
    assert usage.ru_maxrss * 1024 < LARGEST  # the peak of this process alone
    assert time.monotonic() - started < 60
    assert sorted(path.name for path in folder.iterdir()) == ["stderr", "stdout"]
    (line,) = err.read_text().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture(scope="module")
def run(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "run"
    train_here(tiny_dataset, path, steps=2, checkpoint_every=2, eval_episodes=0, keep_checkpoints=1)
    return path


def train_words(dataset: Path) -> list[str]:
    words = arguments(dataset, Path("run"))
    return words[:2] + words[4:]  # the default run folder: none may appear


def test_a_file_that_claims_10_to_the_12_rows(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "claim.hdf5"
    with h5py.File(path, "w") as file:
        for key, width in (("observations", 11), ("actions", 3)):
            options = {"chunks": (16, width), "compression": "gzip"}
            file.create_dataset(key, shape=(10**12, width), dtype="f4", **options)
            file[key][:16] = 1.0
        for key in ("rewards", "terminals", "timeouts"):
            file.create_dataset(key, shape=(10**12,), dtype="f4", chunks=(16,), compression="gzip")
    line = refused("train.py", *train_words(path), folder=folder)
    assert "claim.hdf5: 1000000000000 steps take" in line


def test_a_dataset_for_another_environment(tmp_path: Path, folder: Path) -> None:
    write_tiny_dataset(tmp_path / "tiny.hdf5")
    words = [*train_words(tmp_path / "tiny.hdf5"), "--env", "Ant-v4"]
    assert "environment Ant-v4 has observations of 27" in refused("train.py", *words, folder=folder)


def test_a_pickle_named_like_a_dataset_and_like_a_preset(tmp_path: Path, folder: Path) -> None:
    for name, flag in (("data.hdf5", "--dataset"), ("preset.yaml", "--config")):
        (tmp_path / name).write_bytes(PICKLES[0])
        assert name in refused("train.py", flag, tmp_path / name, folder=folder)
    assert not (folder / MARKER).exists()


def test_weights_whose_header_claims_gigabytes(run: Path, folder: Path) -> None:
    checkpoint = run / "checkpoints" / "step-00000002"
    header = {"w": {"dtype": "F32", "shape": [1 << 33], "data_offsets": [0, 1 << 35]}}
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(64)
    whole = (checkpoint / "model.safetensors").read_bytes()
    manifest = (checkpoint / "manifest.json").read_text()
    changed = json.loads(manifest)
    changed["files"]["model.safetensors"] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "model.safetensors").write_bytes(content)
    (checkpoint / "manifest.json").write_text(json.dumps(changed))
    try:
        assert "model.safetensors: not a safetensors file" in refused("evaluate.py", run, folder=folder)
    finally:
        (checkpoint / "model.safetensors").write_bytes(whole)
        (checkpoint / "manifest.json").write_text(manifest)


def test_a_name_that_is_too_long_and_figures_that_are_none(run: Path, folder: Path, tmp_path: Path) -> None:
    assert "File name too long" in refused("evaluate.py", "a" * 300, folder=folder)
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000)
    line = refused("plot_curves.py", tmp_path, "--output", "x.png", folder=folder)
    assert "metrics.jsonl: line 1 is not a line of metrics" in line
