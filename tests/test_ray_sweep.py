"""A sweep on a Ray cluster: two nodes on this machine, one of them lost on the way."""

import os
import re
import socket
import subprocess
import sys

import pytest
from test_sweep import METHODS, TINY, last_step, start_sweep, write_sweep
from tiny_training import REPOSITORY, assert_same_end, figures, finish, flags, wait_for

from flowrl.errors import UserError
from flowrl.sweeps import ray_cluster
from flowrl.sweeps.command import run_sweep
from flowrl.sweeps.plan import plan_runs, read_sweep
from flowrl.sweeps.process import is_finished, log_path, train_arguments
from flowrl.sweeps.ray_cluster import train_on_node
from flowrl.training.run import run_train

STEPS = 1_000  # long enough that both runs train at one time

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


def test_the_run_of_a_lost_node_resumes_elsewhere(tiny_dataset, tmp_path):
    pytest.importorskip("ray")
    file, runs = write_sweep(tmp_path / "sweep.yaml", tiny_dataset, STEPS), tmp_path / "runs"
    plan = plan_runs(read_sweep(str(file)), runs)
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        lines = iter(cluster.stdout.readline, "")
        address = next(line.split()[1] for line in lines if line.startswith("address"))
        sweep = start_sweep(file, runs, "--on", "ray", "--address", address)
        wait_for(lambda: all(30 < last_step(run.run_dir) < STEPS for run in plan), sweep)
        print("lose it", file=cluster.stdin, flush=True)
        assert next(line for line in lines if line.startswith("lost"))
        code, output, errors = finish(sweep)
    finally:
        cluster.communicate(timeout=60)
    assert (code, "2 of 2 runs finished" in output) == (0, True), (output, errors)
    starts = {run.name: log_path(run).read_text().count("\nrun folder ") for run in plan}
    assert sorted(starts.values()) == [1, 2]  # the lost one started twice, the other was left alone
    lost = next(run for run in plan if starts[run.name] == 2)
    resumed_at = re.search(r"resuming .* at step (\d+)", log_path(lost).read_text())
    assert resumed_at is not None
    assert 0 < int(resumed_at[1]) < STEPS
    words = flags({**TINY, **METHODS[lost.method], "steps": STEPS, "run_dir": tmp_path / "whole"})
    run_train(["--dataset", str(tiny_dataset), *words])
    assert [line["step"] for line in figures(lost.run_dir, "train")] == list(range(5, STEPS + 1, 5))
    assert_same_end(lost.run_dir, tmp_path / "whole")


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
    assert train_on_node(run, threads=1) is None
    assert not log_path(run).exists()
