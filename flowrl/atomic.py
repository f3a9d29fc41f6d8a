"""Files that are whole or absent, written under a temporary name, synced, then renamed; hashes; locks."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from flowrl.errors import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file path beside ``path``; on success sync it and rename it to ``path``.

    On any exception the temporary file is removed and ``path`` is left as it was. The temporary
    name carries the process id, so two processes never write the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Delete what :func:`atomic_path` of a killed process left of these files, which no other one writes."""
    for name in names:
        for temporary in folder.glob(f".{name}.*{TEMPORARY_SUFFIX}"):
            temporary.unlink()


def publish(temporary: Path, path: Path) -> None:
    """Sync a file, or a folder with all that it holds, and rename it to ``path``, durably."""
    for entry in (*temporary.rglob("*"), temporary):
        sync(entry)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Write a file, or the names in a folder, through to the disk."""
    if os.name == "nt" and path.is_dir():  # which opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as a hex digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def sole_user(folder: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of an existing folder, the file ``.lock`` in it.

    Raises:
        UserError: ``refusal``, where another process holds it.
    """
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(refusal) from error
    with lock:
        yield
