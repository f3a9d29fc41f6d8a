"""Download one file over HTTP so that it arrives whole under its final name, or not at all."""

import contextlib
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
from tqdm import tqdm

from flowrl.atomic import sync_folder
from flowrl.errors import UserError

_HEADERS = {"User-Agent": "flowrl", "Accept-Encoding": "identity"}
_ATTEMPTS_PER_URL = 3  # further attempts only after one that brought new bytes
_CHUNK_BYTES = 1 << 16
_MIN_BYTES_PER_SECOND = 1024  # a server that drips slower than this counts as stalled
_MAX_BYTES = 1 << 34  # a body of unknown size is cut off here


class DownloadError(UserError):
    """No URL gave the file; the message lists each URL with its reason."""


class _Refused(Exception):
    """This URL cannot give the file; asking it again is pointless."""


class _Interrupted(Exception):
    """The transfer broke off; what arrived is kept and can be resumed."""


def download(
    urls: Sequence[str],
    path: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    timeout: float = 10.0,
) -> None:
    """Download ``path`` from the first of ``urls`` that gives it, with a progress bar on a terminal.

    Bytes go to a hidden ``.part`` file beside ``path``, which an interrupted download leaves for the next
    one to resume (by HTTP ranges, as long as the server's file is unchanged). Only a file that passes every
    check is renamed to ``path``. A lock file lets one process at a time download; a second one waits and
    then finds the file there.

    Args:
        urls: tried in order.
        path: final name; its folder is created. Nothing is done when the file exists.
        size: expected number of bytes, where known.
        sha256: expected hex digest, where known.
        check: raises UserError when the file's content is not what it should be.
        timeout: seconds to wait for a connection or for the next bytes.

    Raises:
        DownloadError: every URL failed, or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    failures = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if path.exists():
                return
            for url in urls:
                # When a left-over part fails its checks, the part may be at fault: ask once more, anew.
                for _ in range(2 if part.exists() else 1):
                    try:
                        _fetch(url, part, size=size, hash_known=sha256 is not None, timeout=timeout)
                        _verify(part, size, sha256, check)
                    except (_Refused, _Interrupted) as error:
                        failures.append(f"{url}: {error}")
                        if part.exists():
                            break
                    else:
                        _publish(part, path)
                        return
    except OSError as error:
        with contextlib.suppress(OSError):
            _discard(part)  # a full disk: give its space back
        raise DownloadError(f"{path}: cannot be written: {error.strerror or error}") from error
    raise DownloadError(f"{path.name} could not be downloaded ({'; '.join(dict.fromkeys(failures))})")


def require_answer(url: str, timeout: float = 10.0) -> None:
    """Return when a web server answers at ``url``, whatever it says.

    Raises:
        DownloadError: none does within ``timeout`` seconds.
    """
    try:
        _opener().open(urllib.request.Request(url, headers=_HEADERS, method="HEAD"), timeout=timeout).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DownloadError(f"{url}: {_reason(error)}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of ``path``, saying so when another process has it."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting for another process that downloads {path.name}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, part: Path, *, size: int | None, hash_known: bool, timeout: float) -> None:
    """Bring ``part`` to its full length, resuming after breaks as long as each attempt makes progress."""
    for attempt in range(1, _ATTEMPTS_PER_URL + 1):
        before = _length(part)
        try:
            _transfer(url, part, size=size, hash_known=hash_known, timeout=timeout)
            return
        except _Interrupted:
            if attempt == _ATTEMPTS_PER_URL or _length(part) <= before:
                raise


def _transfer(url: str, part: Path, *, size: int | None, hash_known: bool, timeout: float) -> None:
    """One HTTP request that appends to ``part`` or, when there is nothing to resume, writes it anew."""
    offset, headers = _resume_point(url, part, hash_known)
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            complete = error.headers.get("Content-Range") == f"bytes */{offset}"
        if error.code == 416 and offset:
            if not complete:  # the server's file is shorter than our part: start over
                _discard(part)
                _transfer(url, part, size=size, hash_known=hash_known, timeout=timeout)
            return
        raise _Refused(" ".join(f"HTTP status {error.code} {error.reason}".split())) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _Refused(_reason(error)) from error

    with response:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _Refused(f"unexpected content encoding {response.headers['Content-Encoding']}")
        offset, expected = _announced_span(response, offset, part)
        if size is not None and expected is not None and expected != size:
            raise _Refused(f"offers {expected} bytes, the file has {size}")
        if offset == 0:
            _remember_source(url, part, response.headers)
        _append_body(response, part, offset, expected if size is None else size, timeout)


def _resume_point(url: str, part: Path, hash_known: bool) -> tuple[int, dict[str, str]]:
    """Return how many bytes of ``part`` to keep and the request's headers.

    Without a known hash, only bytes of the same URL are kept, under If-Range, so that a file changed
    on the server since is sent whole instead of being joined to the old beginning.
    """
    headers = dict(_HEADERS)
    offset = _length(part)
    if not offset:
        return 0, headers
    try:
        source = json.loads(_source_file(part).read_text(encoding="utf-8"))
        validator = source["validator"] if source["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        validator = None
    if isinstance(validator, str):
        headers["If-Range"] = validator
    elif not hash_known:
        return 0, headers
    headers["Range"] = f"bytes={offset}-"
    return offset, headers


def _announced_span(response: http.client.HTTPResponse, offset: int, part: Path) -> tuple[int, int | None]:
    """Return where the body belongs and the whole file's length, if the server states it."""
    length = response.headers.get("Content-Length", "")
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != offset:
            _discard(part)
            raise _Refused("answered with a range that was not asked for")
        return offset, int(match[2]) if match[2].isdigit() else None
    return 0, int(length) if length.isdigit() else None


def _append_body(
    response: http.client.HTTPResponse, part: Path, offset: int, expected: int | None, timeout: float
) -> None:
    received, window_bytes, window_start = offset, 0, time.monotonic()
    bar = tqdm(desc=part.name[1:-5], total=expected, initial=offset, unit="B", unit_scale=True, disable=None)
    with bar, part.open("ab" if offset else "wb") as file:
        while True:
            try:
                chunk = response.read1(_CHUNK_BYTES)  # one recv, so that the time-out bounds it
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _Interrupted(f"{_reason(error)} after {received} bytes") from error
            if not chunk:
                break
            received += len(chunk)
            if received > (_MAX_BYTES if expected is None else expected):
                raise _Refused(f"sends more than {received - len(chunk)} bytes")
            file.write(chunk)
            bar.update(len(chunk))
            window_bytes += len(chunk)
            elapsed = time.monotonic() - window_start
            if elapsed > timeout:
                if window_bytes < _MIN_BYTES_PER_SECOND * elapsed:
                    raise _Interrupted(f"slower than {_MIN_BYTES_PER_SECOND} bytes/s after {received} bytes")
                window_bytes, window_start = 0, time.monotonic()
    if expected is not None and received < expected:
        raise _Interrupted(f"connection closed after {received} of {expected} bytes")


def _verify(part: Path, size: int | None, sha256: str | None, check: Callable[[Path], None] | None) -> None:
    """Refuse and remove a part that is not the file."""
    reason = None
    if size is not None and _length(part) != size:
        reason = f"gave {_length(part)} bytes, the file has {size}"
    elif sha256 is not None and file_sha256(part) != sha256:
        reason = "gave a file with another SHA-256"
    elif check is not None:
        try:
            check(part)
        except UserError as error:
            reason = f"gave a file that is not usable: {error}"
    if reason is not None:
        _discard(part)
        raise _Refused(reason)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as a hex digest."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)
    _source_file(part).unlink(missing_ok=True)


def _remember_source(url: str, part: Path, headers: Any) -> None:
    """Note which version of which file the part is the beginning of."""
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    _source_file(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _source_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _source_file(part).unlink(missing_ok=True)


def _length(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _opener() -> urllib.request.OpenerDirector:
    """Only HTTP and HTTPS, so that no redirect reaches local files or FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError):
        return "timed out"
    return " ".join(str(getattr(inner, "strerror", None) or inner).split()) or type(inner).__name__
