"""The command line as a program, what importing the package does to a process, and ``flowrl info``."""

import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from conftest import EPISODE_LENGTHS
from processes import REPOSITORY, Command, finish
from tiny_training import arguments, steps_on_disk

from flowrl import __main__
from flowrl.__main__ import COMMANDS, EXIT_BROKEN_PIPE, main
from flowrl.data.d4rl import read_d4rl_file
from flowrl.data.info import histogram

# Importing torch's compiler takes as long as all the rest of torch.
NOT_FOR_ACTING = ("tyro", "tensorboard", "minari", "h5py", "mujoco", "yaml", "matplotlib", "torch._dynamo")


def test_without_a_command_all_are_listed(capsys):
    for words, code in (([], 0), (["--help"], 0), (["tran"], 2)):
        assert main(words) == code
        output, errors = capsys.readouterr()
        for name in COMMANDS:
            assert re.search(rf"^  {name} +\w", errors if code else output, re.MULTILINE)
        assert (output if code else errors) == ""
        assert ("unknown command 'tran'; did you mean 'train'?" in errors) == bool(code)


def test_an_environment_of_a_module_in_the_current_folder(tiny_dataset, tmp_path, monkeypatch, capsys):
    robot = "'gymnasium.envs.mujoco.hopper_v4:HopperEnv', max_episode_steps=30"
    (tmp_path / "mine.py").write_text(f"import gymnasium\ngymnasium.register('Mine-v0', {robot})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "argv", [])
    assert main(["info", str(tiny_dataset), "--env", "mine:Mine-v0"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["info", str(tiny_dataset), "--env", "yours:Mine-v0"])
    assert "module 'yours' cannot be imported" in capsys.readouterr().err


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
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert result.stdout.strip() == b""


def test_a_terminal_without_unicode(tiny_dataset, tmp_path):
    folder = tmp_path / "r\N{LATIN SMALL LETTER U WITH DIAERESIS}n"  # printed, and not ASCII
    words = ["train", *arguments(tiny_dataset, folder, steps=4, eval_episodes=1)]
    hook = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')"
    code, output, errors = finish(Command(words, hook))
    assert code == 0, errors
    assert output.isascii()
    assert "target_return" in output


CLOSED_PIPE = """
import os
from flowrl.training import trainer
reader, writer = os.pipe()
os.dup2(writer, 1)
evaluate = trainer.evaluate
def closed(*arguments):
    os.close(reader)
    return evaluate(*arguments)
trainer.evaluate = closed
"""


def test_a_closed_pipe_loses_no_update(tiny_dataset, tmp_path):
    """The pipe is closed before its table is printed."""
    words = arguments(tiny_dataset, tmp_path / "run", eval_every=25, checkpoint_every=1000)
    assert finish(Command(["train", *words], CLOSED_PIPE))[0] == EXIT_BROKEN_PIPE
    assert steps_on_disk(tmp_path / "run")[-1] == "step-00000025"


def test_an_interrupted_import_is_no_traceback():
    hook = "import signal, flowrl.__main__ as main; main.import_module = lambda _: signal.raise_signal(2)"
    assert finish(Command(["info", "x"], hook)) == (-2, "", "")


def test_a_dataset_is_described(tiny_dataset, capsys):
    returns = read_d4rl_file(tiny_dataset).episode_returns
    assert main(["info", str(tiny_dataset), "--env", "Hopper-v4"]) == 0
    output = capsys.readouterr().out
    assert output.isascii()
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    assert (lines["dataset"], lines["transitions"]) == ("file:tiny.hdf5", "60")
    assert lines["episodes"] == "5, 3 of them terminated"
    assert len(histogram(np.array([0.1, np.nextafter(0.1, 1)]))) == len(histogram(np.arange(9.0)))
    assert lines["lengths"] == f"from 1 to 30, median 9, mean {np.mean(EPISODE_LENGTHS):g}"
    middle = f"median {np.median(returns):.6g}, mean {returns.mean():.6g}"
    assert lines["returns"] == f"from {returns.min():.6g} to {returns.max():.6g}, {middle}"
    assert lines["observations"].endswith("1 of them constant")
    assert lines["normalised"].endswith("returns of -20.2723 and 3234.3 are 0 and 100")
    assert (lines["environment"], "refused" in lines) == ("Hopper-v4", False)
