"""What an HDF5 file may claim: checked before HDF5 allocates or decompresses anything on its word."""

import os
import zlib
from pathlib import Path

import h5py
import numpy as np

from flowrl.errors import UserError

# A header may claim any size. Up to the first limit it is believed; above it, the bytes stored must
# justify it, and nothing may exceed the machine's memory.
_BELIEVED_BYTES = 1 << 28
_MAX_COMPRESSION = 100

# HDF5 gives a filter as much memory as its output takes, whatever the chunk's own size. These are the most
# bytes that one stored byte can become; filters that are not here are not run.
_DEFLATE, _LZF = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF
_COMPRESSION = {_DEFLATE: 1032, _LZF: 88}
_HARMLESS = (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
_CHECKSUM_BYTES = 16  # what other filters may add to a chunk


def check_claimed_size(where: str, what: str, claimed: int, stored: int) -> None:
    """Refuse to allocate ``claimed`` bytes for data of which only ``stored`` bytes are on disk.

    Raises:
        UserError: the claim is beyond any sensible compression, or beyond this machine's memory.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if claimed > min(memory, max(_BELIEVED_BYTES, _MAX_COMPRESSION * stored)):
        raise UserError(
            f"{where}: {what} would take {claimed} bytes of memory but {stored} are stored: "
            "the data is damaged or too large for this machine"
        )


def check_hdf5_dataset(where: str, key: str, dataset: h5py.Dataset) -> None:
    """Refuse a dataset that would take more memory than it should, or takes values from other files.

    Args:
        where: file or data that the message names.
        key: the dataset's name for the message.
        dataset: its values stay unread, except that large compressed chunks are inflated, at most to the
            size they should have.

    Raises:
        UserError: as above, and for compression other than gzip or lzf, or several on top of each other.
    """
    if dataset.is_virtual or dataset.external:
        raise UserError(
            f"{where}: '{key}' keeps its values in another file; only self-contained files are read"
        )
    on_disk = os.path.getsize(dataset.file.filename)  # no chunk's stated length is to be trusted either
    stored = min(dataset.id.get_storage_size(), on_disk)
    size = int(dataset.size or 0) * max(dataset.dtype.itemsize, 4)
    chunk = int(np.prod(dataset.chunks or (0,), dtype=object)) * dataset.dtype.itemsize  # inflated whole
    check_claimed_size(where, f"'{key}' of shape {dataset.shape}", max(size, chunk), stored)
    _check_compression(where, key, dataset, chunk)


def check_hdf5_file(where: str, path: Path) -> None:
    """Apply :func:`check_hdf5_dataset` to all that an HDF5 file holds, and refuse links to elsewhere.

    Raises:
        UserError: see there; the sizes of all datasets together are bounded too.
        OSError: not an HDF5 file, or a damaged one.
    """
    names: list[str] = []  # of everything, each once; no exception may leave the visiting functions
    with h5py.File(path, "r") as file:
        linked = file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else name)
        if linked is not None:
            raise UserError(f"{where}: '{linked}' is a link; only self-contained files are read")
        file.visit(names.append)
        datasets = [(name, file[name]) for name in names if file.get(name, getclass=True) is h5py.Dataset]
        for name, dataset in datasets:
            check_hdf5_dataset(where, name, dataset)
        claimed = sum(int(dataset.size or 0) * dataset.dtype.itemsize for _, dataset in datasets)
    check_claimed_size(where, f"all of {path.name}", claimed, path.stat().st_size)


def _check_compression(where: str, key: str, dataset: h5py.Dataset, chunk: int) -> None:
    """Refuse chunks that may decompress to much more than the ``chunk`` bytes that each should hold."""
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(index) for index in range(properties.get_nfilters())]
    codes = [code for code, *_ in filters]
    for code, _, _, name in filters:
        if code not in _COMPRESSION and code not in _HARMLESS:
            raise UserError(f"{where}: '{key}' is stored by the filter {name!r}; gzip and lzf are read")
    compressors = [code for code in codes if code in _COMPRESSION]
    if len(compressors) > 1:
        raise UserError(f"{where}: '{key}' is compressed more than once")
    if not compressors:
        return
    suspects: list[h5py.h5d.StoreInfo] = []

    def collect(info: h5py.h5d.StoreInfo) -> None:
        if info.size * _COMPRESSION[compressors[0]] > _BELIEVED_BYTES:
            suspects.append(info)

    dataset.id.chunk_iter(collect)
    for info in suspects:
        if info.filter_mask & (1 << codes.index(compressors[0])):
            continue  # this chunk was left uncompressed
        if compressors[0] == _LZF or _inflates_beyond(dataset, info, chunk + _CHECKSUM_BYTES):
            raise UserError(
                f"{where}: '{key}' has a compressed chunk of {info.size} bytes that may expand to more than "
                f"the {chunk} bytes it should hold"
            )


def _inflates_beyond(dataset: h5py.Dataset, info: h5py.h5d.StoreInfo, limit: int) -> bool:
    _, stored = dataset.id.read_direct_chunk(info.chunk_offset)
    try:
        return len(zlib.decompressobj().decompress(stored, limit + 1)) > limit
    except zlib.error:
        return False  # damaged: HDF5 will stop there as well and say so
