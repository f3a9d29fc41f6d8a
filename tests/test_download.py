"""Downloads from a server on this machine that fails in the ways that real ones do."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from broken_inputs import files_of_at_most
from conftest import left_in
from failing_server import CONTENT, SHA256, SIZE, Server, sends, silent, stalled_halfway, status

from flowrl.data import download as module
from flowrl.data.download import DownloadError, download, require_answer
from flowrl.errors import UserError


def accept(file: Path) -> None:
    """The check of tests that are not about it."""


def complete(file: Path) -> None:
    if file.read_bytes() != CONTENT:
        raise UserError("an error page")


def refuse(
    url: str, path: Path, message: str, sha256: str | None = SHA256, check: Callable[[Path], None] = accept
) -> None:
    """The download of ``url`` fails with one line that names it, and leaves nothing behind."""
    with pytest.raises(DownloadError, match=message) as caught:
        download([url], path, sha256, check)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left_in(path.parent) == set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (status(404), "404 Client Error"),
        (status(302, Location="file:///etc/hostname"), "No connection adapters"),
        (sends(CONTENT[: SIZE // 2], SIZE), "IncompleteRead"),
        (sends(CONTENT[::-1]), "does not match the known hash"),
        (stalled_halfway, "timed out"),
        (silent, "timed out"),
    ],
)
def test_a_server_that_fails_is_named_and_the_mirror_used(server, tmp_path, monkeypatch, answer, message):
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    path, url = tmp_path / "data.bin", server.url("/data", answer)
    refuse(url, path, message)
    download([url, server.url("/mirror", sends(CONTENT))], path, SHA256, accept)
    assert path.read_bytes() == CONTENT


def test_an_unreachable_host_is_reported_at_once(server, tmp_path):
    unused = Server()
    dead = f"http://127.0.0.1:{unused.server_port}/data"
    unused.server_close()
    refuse(dead, tmp_path / "data.bin", "Connection refused")
    refuse("http://no-such-host.invalid/data", tmp_path / "data.bin", "no-such-host")
    with pytest.raises(DownloadError, match="Connection refused"):
        require_answer(dead)
    require_answer(server.url("/gone", status(404)))
    require_answer(server.url("/there", status(200)))


def test_a_full_disk_leaves_nothing_behind(server, tmp_path):
    url, path = server.url("/data", sends(CONTENT)), tmp_path / "data.bin"
    message = r"data\.bin: cannot be written: File too large"
    with files_of_at_most(SIZE // 2), pytest.raises(DownloadError, match=message):
        download([url], path, SHA256, accept)
    assert left_in(tmp_path) == set()


def test_what_a_killed_process_left_is_removed(server, tmp_path):
    leftover = tmp_path / ".incomplete-data.bin" / "data.bin"
    leftover.parent.mkdir()
    leftover.write_bytes(CONTENT[: SIZE // 2])
    download([server.url("/data", sends(CONTENT))], tmp_path / "data.bin", None, complete)
    assert left_in(tmp_path) == {"data.bin"}


def test_several_processes_download_once(server, tmp_path):
    def slow(handler):
        time.sleep(0.5)
        sends(CONTENT)(handler)

    url, path = server.url("/data", slow), tmp_path / "data.bin"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=download, args=([url], path, SHA256, accept)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.requests == ["/data"]
    assert path.read_bytes() == CONTENT
    assert left_in(tmp_path) == {"data.bin"}
