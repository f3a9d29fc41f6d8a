"""How long and how much memory: interleaved repetitions in one process, peak memory in fresh processes.

On a shared machine the speed drifts from minute to minute. Contenders therefore take turns, and ratios are
taken inside each round, where both sides saw the same machine; what is reported is the median over rounds.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SHORTEST_SAMPLE = 0.05  # seconds: quicker calls are repeated until a sample lasts that long
LONG_CALL = 1.0  # seconds
_STATUS = Path("/proc/self/status")
# Imported once by the process that the fresh ones are forked from; it computes nothing itself.
_PRELOADED = "workload"


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles over rounds."""

    median: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Spread":
        """The same in other units."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Timing(Spread):
    """Seconds of one call, with a sample per round."""

    samples: tuple[float, ...]

    def ratio_to(self, other: "Timing", *, factor: float = 1.0) -> Spread:
        """How many times longer this took than ``other`` did, round by round, times ``factor``."""
        return spread([factor * a / b for a, b in zip(self.samples, other.samples, strict=True)])


def spread(samples: Sequence[float]) -> Spread:
    """Return the median and the quartiles of at least one sample."""
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    return Spread(median, low, high)


def nothing() -> None:
    """Wait for nothing: on a CPU a call has done its work when it returns."""


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    repetitions: int,
    *,
    wait: Callable[[], object] = nothing,
) -> dict[str, Timing]:
    """Time every contender once per round, for ``repetitions`` rounds after one that is not counted.

    A sample is the mean over as many calls as last :data:`SHORTEST_SAMPLE`. ``wait`` is called at the end
    of a sample, inside the clock: on a GPU it waits for the device.
    """
    calls = {}
    for name, contender in contenders.items():  # warms up caches, threads and allocators, too
        seconds = _seconds(contender, 1, wait)
        if seconds < LONG_CALL:  # a short first call is no estimate
            seconds = _seconds(contender, 1, wait)
        calls[name] = max(round(SHORTEST_SAMPLE / seconds), 1)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, contender in contenders.items():
            samples[name].append(_seconds(contender, calls[name], wait))
    return {name: Timing(**asdict(spread(values)), samples=tuple(values)) for name, values in samples.items()}


def peak_memory(
    function: Callable[..., object], *arguments: Any, warm_up: tuple[Any, ...] | None = None
) -> int:
    """Return by how many bytes ``function(*arguments)`` raises the resident memory of a fresh process.

    The function and its arguments must be picklable by name. ``warm_up`` are small arguments for a first
    call, so that what libraries allocate once and for all is not counted.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOADED])
    with context.Pool(1) as pool:
        return pool.apply(_peak_of, (partial(function, *arguments), warm_up and partial(function, *warm_up)))


def _seconds(contender: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        contender()
    wait()
    return (time.perf_counter() - start) / calls


def _peak_of(call: Callable[[], object], warm_up: Callable[[], object] | None) -> int:
    if warm_up is not None:
        warm_up()
    before = resident("VmRSS")
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process now (VmRSS) or at most (VmHWM).

    Not ``ru_maxrss`` where Linux has better: a child inherits its parent's there.
    """
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024
