"""Download a file over HTTP: it arrives whole under its final name, or not at all."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pooch
import requests

from flowrl.atomic import publish
from flowrl.data.staging import staging
from flowrl.errors import UserError, one_line

TIMEOUT = 10.0  # seconds to wait for a connection, and for the next bytes


class DownloadError(UserError):
    """No URL gave the file; the message lists each URL with its reason."""


def download(urls: Sequence[str], path: Path, sha256: str | None, check: Callable[[Path], None]) -> None:
    """Download ``path`` from the first of ``urls`` that gives it, with a progress bar on a terminal.

    One process downloads at a time; a second one waits and then finds the file there.

    Args:
        urls: tried in order.
        path: final name; its folder is created. Nothing happens when the file exists.
        sha256: expected hex digest, where known.
        check: raises UserError when the file's content is not what it should be.

    Raises:
        DownloadError: every URL failed, or the folder cannot be written.
    """
    failures = []
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=TIMEOUT)
    pooch.get_logger().setLevel("WARNING")
    try:
        with staging(path.parent, path.name) as folder:
            if path.exists():
                return
            for url in urls:
                try:
                    file = Path(pooch.retrieve(url, sha256, path.name, folder, downloader=downloader))
                    check(file)
                except (requests.RequestException, ValueError, UserError) as error:  # ValueError: its hash
                    failures.append(f"{url}: {_root_cause(error)}")
                    (folder / path.name).unlink(missing_ok=True)
                else:
                    publish(file, path)
                    return
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written: {error.strerror or error}") from error
    raise DownloadError(f"{path.name} could not be downloaded ({'; '.join(failures)})")


def require_answer(url: str) -> None:
    """Return when a web server answers at ``url``, with any status.

    Raises:
        DownloadError: there is no answer in time.
    """
    try:
        requests.head(url, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise DownloadError(f"{url}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    """Return, on one line, the message of the exception that started the others."""
    while error.__context__ is not None:
        error = error.__context__
    return one_line(error)
