"""Settings of the whole process, made by flowrl's commands, training and evaluation; importing makes none."""

import ctypes
import os
import sys
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h


def prepare_threads() -> None:
    """Let torch's threads sleep soon after their work; only has an effect before torch is imported.

    By default those of GCC's OpenMP look for more work for so long that they take the cores from the physics,
    and evaluation lasts a quarter longer.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")


@cache
def prepare_process() -> None:
    """Make training and evaluation fast; once per process.

    glibc keeps freed tensors of up to 1 GiB for the next update. By default it returns those above 32 MiB,
    and the kernel clears their pages anew in every update: an eighth of the time of full episodes, with the
    same peak. MuJoCo's internal timers are disabled: :func:`flowrl.envs.mujoco_vector.stop_timers`.
    """
    from flowrl.envs.mujoco_vector import stop_timers

    stop_timers()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
