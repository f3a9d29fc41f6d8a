"""What this machine gives a process: processor cores, memory, a folder for files of its user."""

import os
from pathlib import Path


def available_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes of memory of this machine, or of the container's limit; None where unknown."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory


def home_folder() -> Path:
    """Return the user's home, or the working directory where there is none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path.cwd()
