"""Data prepared aside, by one process at a time, before it is moved to its place."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


@contextmanager
def staging(root: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder in ``root`` to prepare ``name`` in, while no other process does.

    A second process prints that it waits. The folder is deleted in the end, whatever is still in it; that of
    a killed process is deleted by the next one.

    Raises:
        OSError: ``root`` cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root / f".{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that prepares {name}", file=sys.stderr)
        lock.acquire()
    folder = root / f".incomplete-{name}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
