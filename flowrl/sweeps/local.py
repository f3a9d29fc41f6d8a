"""A sweep on this machine: as many runs at a time as there are cores or GPUs."""

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from signal import SIGTERM

import torch

from flowrl.machine import available_cores
from flowrl.signals import StopSignals
from flowrl.sweeps.plan import PlannedRun
from flowrl.sweeps.process import failure_of, start_training

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Slots:
    """How many runs train at a time, and what each gets."""

    jobs: int
    threads: int
    gpus: int

    def environment(self, slot: int) -> dict[str, str]:
        """Environment variables of the process in a slot (from 0)."""
        variables = {"OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
            variables["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % self.gpus]
        return variables


def local_slots(jobs: int | None, device: str) -> Slots:
    """Divide this machine: one run per GPU, or per core where the runs are for the CPU; or ``jobs`` runs.

    All runs of a device such as "cuda:1" use that one.
    """
    cores = available_cores()
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") and torch.cuda.is_available() else 0
    jobs = jobs or gpus or (1 if device.startswith("cuda") else cores)
    return Slots(jobs, max(1, cores // jobs), gpus)


def run_local(
    runs: list[PlannedRun], slots: Slots, signals: StopSignals
) -> Iterator[tuple[PlannedRun, str | None]]:
    """Train the runs in order, ``slots.jobs`` at a time; yield each that ends, with its failure if it failed.

    Raises:
        Stopped: after SIGINT or SIGTERM, once every run has saved a checkpoint and ended.
    """
    waiting = list(runs)
    processes: dict[int, tuple[PlannedRun, subprocess.Popen]] = {}  # by slot
    while waiting or processes:
        for slot in range(slots.jobs):
            if slot not in processes and waiting:
                run = waiting.pop(0)
                processes[slot] = (run, start_training(run, slots.environment(slot)))
        time.sleep(_POLL_SECONDS)
        if signals.received is not None:
            for _, process in processes.values():
                process.send_signal(SIGTERM)
            for _, process in processes.values():
                process.wait()
            signals.stop()
        for slot, (run, process) in list(processes.items()):
            if process.poll() is not None:
                del processes[slot]
                yield run, failure_of(run, process.returncode)
