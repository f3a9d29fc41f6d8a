"""Where a dataset's arrays are: in memory, or in files that are mapped into it and read as needed."""

import mmap
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowrl.errors import UserError
from flowrl.machine import available_memory

_ROWS = 1 << 14  # of a chunk


@dataclass(frozen=True)
class Storage:
    """Makes float32 arrays in memory, or as ``NAME.npy`` files in ``folder``."""

    folder: Path | None = None

    def require(self, where: str, what: str, needed: int) -> None:
        """Raise UserError when there is no room for ``needed`` bytes, which a file claims to hold.

        ``where`` and ``what`` begin the message.
        """
        if self.folder is not None:
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise UserError(
                    f"{where}: {what} take {needed / 2**30:,.1f} GiB on disk, {self.folder.parent} has "
                    f"{free / 2**30:,.1f} free"
                )
            return
        memory = available_memory()
        if memory is not None and needed > memory:
            raise UserError(
                f"{where}: {what} take {needed / 2**30:,.1f} GiB of memory, this machine has "
                f"{memory / 2**30:,.1f}: the data is too large, for which there is --memory-map, or its "
                "header is damaged"
            )

    def empty(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array to fill."""
        if self.folder is None:
            return np.empty(shape, dtype=np.float32)
        return np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.float32, shape)


IN_MEMORY = Storage()


def chunks(length: int) -> Iterator[slice]:
    """The slices that cover ``length`` rows, few enough in each to bound temporary copies."""
    for start in range(0, length, _ROWS):
        yield slice(start, min(start + _ROWS, length))


def row_chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """All rows of an array, a chunk at a time, of which no more than that stays in memory if it is mapped."""
    for rows in chunks(len(array)):
        yield array[rows]
        release(array)


def release(array: np.ndarray) -> None:
    """Drop a mapped file's pages from this process; they are read again where needed.

    Otherwise every page that was ever read counts as the process' memory until the system lacks some.
    Those of a copy-on-write map stay, since they may hold changes.
    """
    owner: object = array
    mode = None
    while isinstance(owner, np.ndarray):
        mode, owner = getattr(owner, "mode", None), owner.base
    if isinstance(owner, mmap.mmap) and mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
