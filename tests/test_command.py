"""The command line as a program, and what importing the package does to a process."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import REPOSITORY, arguments

from flowrl import __main__
from flowrl.__main__ import COMMANDS, EXIT_BROKEN_PIPE, main

# Importing torch's compiler takes as long as all the rest of torch.
NOT_FOR_ACTING = ("tyro", "tensorboard", "minari", "h5py", "mujoco", "yaml", "matplotlib", "torch._dynamo")


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **variables},
        timeout=200,
        check=False,
    )


def test_without_a_command_all_are_listed(capsys):
    for words, code in (([], 0), (["--help"], 0), (["tran"], 2)):
        assert main(words) == code
        output, errors = capsys.readouterr()
        for name in COMMANDS:
            assert re.search(rf"^  {name} +\w", errors if code else output, re.MULTILINE)
        assert (output if code else errors) == ""


@pytest.mark.parametrize("name", ["train", "finetune", "evaluate", "collect", "info", "sweep", "report"])
def test_scripts_are_commands(name, monkeypatch):
    given = []
    monkeypatch.setattr(__main__, "main", lambda words: given.append(words) or 5)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--some", "option"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "scripts" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 5
    assert given == [[name, "--some", "option"]]


def test_importing_the_package_changes_nothing_and_loads_what_acting_needs():
    program = f"""
import os, sys
before = dict(os.environ)
import flowrl
assert "torch" not in sys.modules
flowrl.load_agent, flowrl.flow_attention
assert dict(os.environ) == before
print(*(name for name in {NOT_FOR_ACTING} if name in sys.modules))
"""
    result = run(["-c", program])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == b""


def test_a_terminal_without_unicode(tiny_dataset: Path, tmp_path: Path):
    folder = tmp_path / "r\N{LATIN SMALL LETTER U WITH DIAERESIS}n"  # printed, and not ASCII
    words = arguments(tiny_dataset, folder, steps=4, eval_episodes=1)
    result = run(["-m", "flowrl", "train", *words], PYTHONIOENCODING="ascii:strict")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert b"target_return" in result.stdout


def test_an_evaluation_that_nobody_reads_costs_no_update(tiny_dataset: Path, tmp_path: Path):
    """The pipe is closed once the run has begun; the table is the next output."""
    run_dir = tmp_path / "run"
    words = arguments(tiny_dataset, run_dir, eval_every=25, checkpoint_every=1000)
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "flowrl", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )
    while b"run folder" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(100) == EXIT_BROKEN_PIPE
    assert b"Traceback" not in errors
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir())[-1] == "step-00000025"
