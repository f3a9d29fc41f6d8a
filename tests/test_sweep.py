"""Sweeps: their plans, and real processes that are stopped, killed, broken and resumed, here and on Ray."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from broken_inputs import refusal
from filelock import FileLock, Timeout
from processes import REPOSITORY, Command, finish, wait_for
from tiny_training import OPTIONS, assert_same_end, figures, flags, steps_on_disk

from flowrl.errors import UserError
from flowrl.sweeps import ray_cluster
from flowrl.sweeps.command import run_sweep
from flowrl.sweeps.local import Slots
from flowrl.sweeps.plan import Sweep, plan_runs, read_plan, read_sweep
from flowrl.sweeps.process import is_finished, log_path, train_arguments
from flowrl.sweeps.ray_cluster import train_on_node
from flowrl.training.run import run_train

TINY = OPTIONS | {"num_layers": 1, "eval_episodes": 1, "eval_every": 0, "log_every": 5, "targets": [5.0]}
STEPS = 40
HOPPER = "datasets: [hopper-medium]\nmethods: "
METHODS = {"flow-6": {"context_length": 6}, "softmax-6": {"attention": "softmax", "context_length": 6}}


def write_sweep(path: Path, dataset: Path, steps: int, seeds: tuple[int, ...] = (0,)) -> Path:
    sweep = {"datasets": [str(dataset)], "methods": METHODS, "seeds": list(seeds)}
    path.write_text(yaml.safe_dump({**sweep, "common": {**TINY, "steps": steps}}))
    return path


def start_sweep(file: Path, runs_dir: Path, *words: str) -> Command:
    """Start a sweep in a process of its own."""
    return Command(["sweep", "--sweep", str(file), "--runs-dir", str(runs_dir), "--jobs", "2", *words])


def last_step(run_dir: Path) -> int:
    """The last update in the metrics of a run that may be training; 0 before the first."""
    metrics = run_dir / "metrics.jsonl"
    whole, _, _ = metrics.read_text().rpartition("\n") if metrics.exists() else ("", "", "")
    return max((json.loads(line)["step"] for line in whole.splitlines()), default=0)


def is_free(run_dir: Path) -> bool:
    """Whether no process is training in the folder."""
    with suppress(Timeout), FileLock(run_dir / ".lock", timeout=0):
        return True
    return False


def test_plan_goes_seed_by_seed_and_options_win_in_order(tmp_path):
    sweep = Sweep(
        datasets=("hopper-medium", "walker2d-medium"),
        methods={"a": {"embed_dim": 16}, "b": {"context_length": "episode"}},
        seeds=(3, 1),
        common={"embed_dim": 32, "dataset": "flowrl", "dropout": 0.3, "learning_rate": 0.5},
    )
    runs = plan_runs(sweep, tmp_path, ["--dropout", "0.4"])
    assert [run.name for run in runs] == [
        f"{dataset}/{method}/seed{seed}"
        for seed in (3, 1)
        for dataset in ("hopper-medium", "walker2d-medium")
        for method in ("a", "b")
    ]
    assert [run.config.embed_dim for run in runs[:2]] == [16, 32]  # the method's over the common one
    assert {run.config.dropout for run in runs} == {0.4}  # the command line over both
    assert {run.config.learning_rate for run in runs} == {0.5}  # common over the preset's 1e-3
    assert runs[0].config.return_scale == 1000.0  # the preset of hopper-medium
    assert [run.config.seed for run in runs[::4]] == [3, 1]
    assert runs[1].run_dir == tmp_path / "hopper-medium" / "b" / "seed3"


def test_timesteps_per_update_win_over_a_presets_batch_size(tmp_path, capsys):
    common = {"config": "paper", "timesteps_per_update": 1280}
    [run] = plan_runs(Sweep(("hopper-medium",), {"windows": {}}, (0,), common), tmp_path)
    assert (run.config.batch_size, run.config.timesteps_per_update) == (None, 1280)
    sweep = Sweep(("hopper-medium",), {"windows": {}}, (0,), {"batch_size": 64})
    [run] = plan_runs(sweep, tmp_path, ["--timesteps-per-update", "5000"])
    assert (run.config.batch_size, run.config.timesteps_per_update) == (None, 5000)
    words = ["--datasets", "hopper-medium", "--dry-run", "--runs-dir", str(tmp_path)]
    for more, size in (([], "about 1280 timesteps"), (["--batch-size", "8"], "batch size 8")):
        assert run_sweep([*words, *more]) == 0
        assert f"new, 3000 updates of {size}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("datasets: [hoper-medium]\nmethods: {a: {}}", [], "did you mean 'hopper-medium'"),
        (HOPPER + "{a: {atention: flow}}", [], "did you mean 'attention'"),
        (HOPPER + "{a: {attention: foo}}", [], "'attention' 'foo': should be"),
        (HOPPER + "{a: {}}", ["--methods", "b"], "no such method"),
        (HOPPER + "{a: {}}", ["--attention", "flow"], "has its own methods"),
        (HOPPER + "{a: {}}", ["--seed", "1"], "--seeds"),
        (HOPPER + "{a/b: {}}", [], "folder"),
        (HOPPER.replace("datasets", "dataset") + "{a: {}}", [], "did you mean 'datasets'"),
        ("datasets: [hopper-medium, hopper-medium]\nmethods: {a: {}}", [], "given twice"),
        ("datasets: [ant-medium]\nmethods: {a: {dataset: flowrl}}", [], "no embedded dataset 'ant-medium'"),
        (HOPPER + "{a: {timesteps_per_update: 2, batch_size: 3}}", [], "not both"),
        (HOPPER + "{a: {}}", ["--env", "ant-medium"], "is not the sweep's dataset"),
        ("datasets: [ant-medium, ant-medium.hdf5]\nmethods: {a: {}}", [], "two of them have one folder name"),
    ],
)
def test_bad_input_is_one_line(text, words, message, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    words = ["--sweep", str(file), "--runs-dir", str(tmp_path / "runs"), *words]
    assert message in refusal(lambda: run_sweep(words))
    assert not (tmp_path / "runs").exists()


def test_dry_run_prints_the_plan_and_makes_nothing(tiny_dataset, tmp_path, capsys):
    file = write_sweep(tmp_path / "sweep.yaml", tiny_dataset, steps=1000, seeds=(0, 1))
    assert run_sweep(["--sweep", str(file), "--runs-dir", str(tmp_path / "runs"), "--dry-run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    names = [run.name for run in plan_runs(read_sweep(str(file)), tmp_path / "runs")]
    assert lines == [f"{name}: new, 1000 updates of batch size 4" for name in names]
    assert total == "4 runs, 4 of them to train: at most 4000 updates"
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_stops_no_other_and_is_tried_again(tiny_dataset, tmp_path, capfd):
    file, runs = write_sweep(tmp_path / "sweep.yaml", tiny_dataset, steps=10), tmp_path / "runs"
    plan = plan_runs(read_sweep(str(file)), runs)
    broken, good = plan[0].run_dir, plan[1].run_dir
    in_the_way = broken / "something"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    assert run_sweep(["--sweep", str(file), "--runs-dir", str(runs)]) == 1
    output, errors = capfd.readouterr()
    assert "1 of 2 runs finished" in output
    assert f"failed: {plan[0].name}: exit code 2: error: --run-dir {broken}: already there" in errors
    assert steps_on_disk(good)[-1] == "step-00000010"
    assert read_plan(runs) == {run.name: run.method for run in plan}
    in_the_way.unlink()
    before = {path: path.stat().st_mtime_ns for path in good.rglob("*")}
    assert run_sweep(["--sweep", str(file), "--runs-dir", str(runs)]) == 0
    assert "2 of 2 runs finished" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in good.rglob("*")} == before  # was not touched
    with pytest.raises(UserError, match="was trained with 8, --resume cannot change it"):
        run_sweep(["--sweep", str(file), "--runs-dir", str(runs), "--embed-dim", "16"])


@pytest.fixture(scope="module")
def whole_runs(tiny_dataset, tmp_path_factory):
    """The same trainings by scripts/train.py's own command line, uninterrupted; one folder per method."""
    folder = tmp_path_factory.mktemp("whole")
    for method, options in METHODS.items():
        words = flags({**TINY, **options, "steps": STEPS, "run_dir": folder / method})
        run_train(["--dataset", str(tiny_dataset), *words])
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_continues_exactly(number, whole_runs, tiny_dataset, held_at_20, tmp_path):
    file, runs = write_sweep(tmp_path / "sweep.yaml", tiny_dataset, STEPS), tmp_path / "runs"
    plan = plan_runs(read_sweep(str(file)), runs)
    process = start_sweep(file, runs)
    wait_for(lambda: all(last_step(run.run_dir) == 20 for run in plan), process)
    process.send_signal(number)
    process.communicate(timeout=200)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    for run in plan:  # every training has received SIGTERM and ended too; with SIGKILL, soon
        with FileLock(run.run_dir / ".lock", timeout=200):
            assert steps_on_disk(run.run_dir)[-1] == "step-00000020"
    held_at_20.unlink()
    assert run_sweep(["--sweep", str(file), "--runs-dir", str(runs)]) == 0
    for run in plan:
        assert_same_end(run.run_dir, whole_runs / run.method)
    assert [entry["step"] for entry in figures(run.run_dir, "train")] == list(range(5, STEPS + 1, 5))


def test_slots_share_out_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slots = Slots(jobs=4, threads=2, gpus=2)
    assert [slots.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert slots.environment(1) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "5"}
    assert Slots(jobs=2, threads=1, gpus=0).environment(1) == {"OMP_NUM_THREADS": "1"}


# Starts a head node and another with one core each, prints the address, and removes the other on a line.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
other = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
print("address", cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(other, allow_graceful=False)
    print("lost", flush=True)
cluster.shutdown()
"""


def test_the_run_of_a_lost_node_resumes_elsewhere(whole_runs, tiny_dataset, held_at_20, tmp_path):
    """It is lost while both runs are in their checkpoint of update 20."""
    pytest.importorskip("ray")
    data, runs = Path(os.path.relpath(tiny_dataset)), tmp_path / "runs"  # of this folder, not of Ray's
    file = write_sweep(tmp_path / "sweep.yaml", data, STEPS)
    plan = plan_runs(read_sweep(str(file)), runs)
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    try:
        lines = iter(cluster.stdout.readline, "")
        address = next(line.split()[1] for line in lines if line.startswith("address"))
        sweep = start_sweep(file, runs, "--on", "ray", "--address", address)
        wait_for(lambda: all(last_step(run.run_dir) == 20 for run in plan), sweep)
        print("lose it", file=cluster.stdin, flush=True)
        assert next(line for line in lines if line.startswith("lost"))
        wait_for(lambda: any(is_free(run.run_dir) for run in plan), sweep)
        held_at_20.unlink()
        code, output, errors = finish(sweep)
    finally:
        cluster.communicate(timeout=200)
    assert (code, "2 of 2 runs finished" in output) == (0, True), (output, errors)
    starts = {run.name: log_path(run).read_text().count("\nrun folder ") for run in plan}
    assert sorted(starts.values()) == [1, 2]  # the lost one started twice, the other was left alone
    lost = next(run for run in plan if starts[run.name] == 2)
    assert re.search(r"resuming .* at step [12]0", log_path(lost).read_text())
    for run in plan:
        assert_same_end(run.run_dir, whole_runs / run.method)


@pytest.mark.parametrize(
    ("listening", "message"),
    [(False, "no Ray cluster can be reached there"), (True, "does not answer as a Ray cluster")],
)
def test_an_unreachable_address_is_an_error(listening, message, tiny_dataset, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_cluster, "_HEALTH_SECONDS", 1.0)
    file = write_sweep(tmp_path / "sweep.yaml", tiny_dataset, 10)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listening:
            other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--address {address}: .*{message}"):
            run_sweep([
                *("--sweep", str(file), "--runs-dir", str(tmp_path / "runs")),
                *("--on", "ray", "--address", address),
            ])  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_is_not_trained_again(tiny_dataset, tmp_path):
    """Ray repeats the task of a lost node, even one that had just ended."""
    file = write_sweep(tmp_path / "sweep.yaml", tiny_dataset, 10)
    run = plan_runs(read_sweep(str(file)), tmp_path / "runs")[0]
    run_train(train_arguments(run))
    assert is_finished(run)
    assert train_on_node(run, threads=1, folder=os.getcwd()) is None
    assert not is_finished(replace(run, config=replace(run.config, steps=5)))  # training refuses these
    assert not log_path(run).exists()
