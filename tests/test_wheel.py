"""The package as it is installed from a wheel: away from the repository, without a home and a compiler."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import REPOSITORY
from setuptools import find_packages
from tiny_training import arguments

PROGRAM = """
import json, sys
import flowrl
from flowrl.__main__ import main
from flowrl.data.embedded import EMBEDDED
from flowrl.sweeps.plan import read_sweep
from flowrl.training.config import parse_train_config
print(flowrl.__file__)
assert parse_train_config(["--env", "hopper-medium"]).return_scale == 1000
assert parse_train_config(["--config", "walker2d-medium-long"]).context_length == "episode"
assert set(read_sweep("embedded").datasets) <= set(EMBEDDED)
for words in json.loads(sys.argv[1]):
    code = main(words)
    assert code == 0, (words, code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the repository: building leaves files beside the sources."""
    copy, built = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("flowrl", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, copy)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(built), str(copy)]
    subprocess.run([sys.executable, *build], check=True, timeout=200)
    (path,) = built.glob("*.whl")
    return path


def test_a_wheel_holds_every_package_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in find_packages(str(REPOSITORY), include=["flowrl*"]):
        assert f"{package.replace('.', '/')}/__init__.py" in names, package
    data = [path for path in (REPOSITORY / "flowrl").rglob("*") if path.is_file()]
    data = [path for path in data if "__pycache__" not in path.parts and path.name != ".gitignore"]
    assert len(data) > 80
    assert {str(path.relative_to(REPOSITORY)) for path in data} <= names
    configs = [path for path in (REPOSITORY / "configs").rglob("*.yaml")]
    assert {f"flowrl/{path.relative_to(REPOSITORY)}" for path in configs} <= names
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "flowrl = flowrl.__main__:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_train_resume_evaluate_and_report_from_a_wheel(wheel, tiny_dataset, tmp_path):
    installed, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    run = Path("run")
    commands = [
        ["train", *arguments(tiny_dataset, run, steps=20)],
        ["train", "--resume", str(run), "--steps", "30"],
        ["evaluate", str(run), "--episodes", "1", "--json", "run/evaluation.json"],
        ["report", str(run), "--output", "report"],
        ["evaluate", "pretrained:tmaze-500", "--episodes", "1", "--json", "tmaze.json"],
    ]
    kept = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "SYSTEMROOT")
    variables = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, json.dumps(commands)],
        cwd=work,
        env={**variables, "PYTHONPATH": str(installed), "PATH": str(tmp_path / "nothing")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(installed / "flowrl" / "__init__.py")
    assert json.loads((work / run / "evaluation.json").read_text())["checkpoint_step"] == 30
    assert "flow-interleaved-6" in (work / "report" / "report.md").read_text()
    tmaze = json.loads((work / "tmaze.json").read_text())
    assert tmaze["targets"][0]["return_mean"] == 1
