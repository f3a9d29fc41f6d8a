"""A sweep on a Ray cluster: one task per run; runs of lost nodes go on elsewhere from their last checkpoint.

Run folders must be on storage that all nodes share; so must the data, where it is not downloaded.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from signal import SIGTERM
from typing import Any

from filelock import FileLock, Timeout

from flowrl.errors import UserError
from flowrl.signals import StopSignals
from flowrl.sweeps.local import Slots
from flowrl.sweeps.plan import PlannedRun
from flowrl.sweeps.progress import SweepProgress
from flowrl.sweeps.state import TRAIN_SCRIPT, failure_of, is_finished, start_training

_CONNECT_SECONDS = 5.0
_HEALTH_SECONDS = 20.0
_STOP_SECONDS = 60.0
_POLL_SECONDS = 0.5
_RETRY_FOREVER = -1
_PASSED_ON = ("MINARI_DATASETS_PATH", "D4RL_DATASET_DIR", "MUJOCO_GL")


def check_ray(address: str | None) -> None:
    """Raise a UserError, within seconds, where Ray is not installed or no cluster answers at HOST:PORT.

    Ray itself would go on trying for minutes, or for ever at an address where something else listens.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--on ray needs Ray: pip install -e '.[ray]'")
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
        raise UserError(f"--address {address}: what listens there does not answer as a Ray cluster")


def run_on_ray(
    runs: list[PlannedRun], slots: Slots, address: str | None, progress: SweepProgress, signals: StopSignals
) -> list[str]:
    """Train the runs on the cluster at ``address`` (HOST:PORT), or on one started here for it.

    Each run takes ``slots.threads`` cores, and a GPU where the cluster has any. A run whose node is lost is
    started again on another; before it goes on, it waits until the lost one has let go of its folder.

    Returns:
        One line for each run that failed.

    Raises:
        UserError: the cluster cannot be joined (see also :func:`check_ray`, to be called before).
        Stopped: after SIGINT or SIGTERM, once the trainings were told to save and end.
    """
    with signals.interruptible():
        ray = _connect(address, slots)
    try:
        with StopSignals() as now:  # Ray's own handlers, set while connecting, would leave at once
            return _run(ray, runs, slots, progress, now)
    finally:
        ray.shutdown()


def _run(
    ray: Any, runs: list[PlannedRun], slots: Slots, progress: SweepProgress, signals: StopSignals
) -> list[str]:
    gpus = 1 if ray.cluster_resources().get("GPU") and runs and runs[0].config.device != "cpu" else 0
    task = ray.remote(num_cpus=slots.threads, num_gpus=gpus, max_retries=_RETRY_FOREVER)(train_on_node)
    waiting = {task.remote(run, slots.threads): run for run in runs}
    failures = []
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
            failures += [] if failure is None else [failure]
            progress.ended(run, failure)
        progress.show(list(waiting.values()))
    return failures


def train_on_node(run: PlannedRun, threads: int) -> str | None:
    """Train or continue one run in a process of its own on this node; return one line if it failed.

    It may be called again for a run that another node has begun, or even finished.
    """
    wait_until_free(run)
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


def wait_until_free(run: PlannedRun) -> None:
    """Wait for the end of a training in the run's folder that is saving its last checkpoint; not forever."""
    if not run.run_dir.is_dir():
        return
    try:
        with FileLock(run.run_dir / ".lock", timeout=_STOP_SECONDS):
            return
    except Timeout:
        return  # the training that starts now says that the folder is in use


def _connect(address: str | None, slots: Slots) -> Any:
    """Return the ray module, connected."""
    import ray  # an extra: only --on ray needs it

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    variables = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    variables["PYTHONPATH"] = os.pathsep.join(
        path for path in (str(TRAIN_SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")) if path
    )
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
