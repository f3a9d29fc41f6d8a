"""A sweep on a Ray cluster: one task per run; runs of lost nodes resume elsewhere from their last checkpoint.

Run folders must be on storage that all nodes share; so must the data, where it is not downloaded.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from signal import SIGTERM
from typing import Any

from filelock import FileLock, Timeout

from flowrl.errors import UserError
from flowrl.signals import StopSignals
from flowrl.sweeps.local import Slots
from flowrl.sweeps.plan import PlannedRun
from flowrl.sweeps.process import failure_of, is_finished, python_path, start_training

_CONNECT_SECONDS = 5.0
_HEALTH_SECONDS = 20.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.5
_RETRY_FOREVER = -1
_PASSED_ON = ("MINARI_DATASETS_PATH", "D4RL_DATASET_DIR", "MUJOCO_GL")


def check_ray(address: str | None) -> None:
    """Raise a UserError, within seconds, where Ray is not installed or no cluster answers at HOST:PORT.

    Ray itself would retry for minutes, or for ever at an address where another program listens.
    """
    if getattr(importlib.util.find_spec("ray"), "origin", None) is None:  # a folder of that name has none
        raise UserError("--on ray needs Ray: pip install 'flowrl[ray]'")
    if address is None:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--address {address}: must be HOST:PORT, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"--address {address}: no Ray cluster can be reached there: {error}") from error
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(command, capture_output=True, timeout=_HEALTH_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise UserError(f"--address {address}: the server there does not answer as a Ray cluster")


def run_on_ray(
    runs: list[PlannedRun], slots: Slots, address: str | None, signals: StopSignals
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Train the runs on the cluster at ``address`` (HOST:PORT), or on one that is started here.

    Each run takes ``slots.threads`` cores, and a GPU where the cluster has any. A run whose node is lost
    starts again on another node, once the lost process has released the run's folder.

    Yields:
        Each run that ends, with its failure if it failed.

    Raises:
        UserError: the cluster cannot be joined (see also :func:`check_ray`, to be called before).
        Stopped: after SIGINT or SIGTERM, once the runs have saved a checkpoint and ended.
    """
    with signals.interruptible():
        ray = _connect(address, slots)
    try:
        with StopSignals() as now:  # Ray has set handlers of its own, which would exit at once
            yield from _run(ray, runs, slots, now)
    finally:
        ray.shutdown()


def _run(
    ray: Any, runs: list[PlannedRun], slots: Slots, signals: StopSignals
) -> Iterator[tuple[PlannedRun, str | None]]:
    gpus = 1 if ray.cluster_resources().get("GPU") and runs and runs[0].config.device != "cpu" else 0
    task = ray.remote(num_cpus=slots.threads, num_gpus=gpus, max_retries=_RETRY_FOREVER)(train_on_node)
    waiting = {task.remote(run, slots.threads, os.getcwd()): run for run in runs}
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_SECONDS)
        if signals.received is not None:
            for reference in waiting:
                ray.cancel(reference, force=False)  # a KeyboardInterrupt in train_on_node
            ray.wait(list(waiting), num_returns=len(waiting), timeout=_STOP_SECONDS)
            signals.stop()
        for reference in ready:
            run = waiting.pop(reference)
            try:
                failure = ray.get(reference)
            except ray.exceptions.RayError as error:
                failure = f"{run.name}: {str(error).strip().splitlines()[-1]}"
            yield run, failure


def train_on_node(run: PlannedRun, threads: int, folder: str) -> str | None:
    """Start or resume one run in a process of its own on this node; return one line if it failed.

    Another node may have begun the run, or even finished it. Relative paths are those of ``folder``.
    """
    os.chdir(folder)
    if run.run_dir.is_dir():
        # A lost process may still save its last checkpoint; training reports a folder that stays in use.
        with suppress(Timeout), FileLock(run.run_dir / ".lock", timeout=_STOP_SECONDS):
            pass
    if is_finished(run):
        return None
    process = start_training(run, {"OMP_NUM_THREADS": str(threads)})
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
    except BaseException:  # cancelled
        process.send_signal(SIGTERM)
        process.wait()
        raise
    return failure_of(run, process.returncode)


def _connect(address: str | None, slots: Slots) -> Any:
    """Return the ray module, connected."""
    import ray  # of an extra

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    variables["PYTHONPATH"] = python_path()
    settings: dict[str, Any] = {
        "runtime_env": {"env_vars": variables}, "log_to_driver": False, "logging_level": "error",
    }  # fmt: skip
    if address is None:
        ray.init(address="local", num_cpus=slots.jobs * slots.threads, include_dashboard=False, **settings)
        return ray
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--address {address}: no Ray cluster answers there: {reason}") from error
    return ray
