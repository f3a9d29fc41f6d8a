"""What this machine gives a process: processor cores, memory, a folder for files of its user."""

import os
from pathlib import Path

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


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
    for file in _limit_files():
        try:
            memory = min(memory, int(file.read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory


def _limit_files() -> list[Path]:
    """Where the memory limits of this process's control groups, and of those above them, may be (Linux)."""
    files = []
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else ():
        _, controllers, group = line.split(":", 2)
        for folder in (Path(group), *Path(group).parents):
            if controllers == "":  # version 2
                files.append(_GROUPS / folder.relative_to("/") / "memory.max")
            elif controllers == "memory":
                files.append(_GROUPS / "memory" / folder.relative_to("/") / "memory.limit_in_bytes")
    return files


def home_folder() -> Path:
    """Return the user's home, or the working directory where there is none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path.cwd()


def expanded(path: str) -> Path:
    """Return a path with its ``~`` replaced; that of an unknown user stays, which is an error in pathlib."""
    return Path(os.path.expanduser(path))
