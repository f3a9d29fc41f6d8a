"""Downloads against a server on this machine that fails in every way that real ones do."""

import multiprocessing
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from failing_server import (
    CONTENT,
    HALF,
    SHA256,
    SIZE,
    Handler,
    Server,
    dripping,
    dropped_halfway,
    redirect,
    silent,
    stalled_halfway,
    status,
    whole,
    without_ranges,
)

from flowrl.data.download import DownloadError, download, file_sha256, require_answer
from flowrl.errors import UserError

KNOWN: dict[str, Any] = {"size": SIZE, "sha256": SHA256}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()


def refuse(urls: list[str], path: Path, message: str, **options: Any) -> str:
    with pytest.raises(DownloadError, match=message) as caught:
        download(urls, path, **options)
    assert not path.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if not file.name.endswith(".lock")}


@pytest.mark.parametrize("known", [KNOWN, {}], ids=["known", "unknown"])
def test_a_file_arrives_with_nothing_beside_it(server: Server, tmp_path: Path, known: dict[str, Any]) -> None:
    path = tmp_path / "new" / "folder" / "data.bin"
    download([server.url("/data", whole)], path, **known)
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == {"data.bin"}
    assert server.requests == [("/data", None)]


def test_an_existing_file_is_left_alone_without_asking(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(b"mine")
    download([server.url("/data", whole)], path, **KNOWN)
    assert path.read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize("code", [400, 403, 404, 500, 503])
def test_an_http_error_moves_on_to_the_mirror_and_is_reported_without_one(
    server: Server, tmp_path: Path, code: int
) -> None:
    broken, path = server.url("/broken", status(code)), tmp_path / "data.bin"
    message = refuse([broken], path, f"HTTP status {code}", **KNOWN)
    assert broken in message
    assert left_in(tmp_path) == set()
    download([broken, server.url("/mirror", whole)], path, **KNOWN)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, tmp_path: Path, code: int) -> None:
    target = server.url("/mirror", whole)
    download([server.url("/moved", redirect(code, target))], tmp_path / "data.bin", **KNOWN)
    assert (tmp_path / "data.bin").read_bytes() == CONTENT


def test_redirects_in_a_circle_or_to_local_files_are_refused(server: Server, tmp_path: Path) -> None:
    circle = server.url("/circle", redirect(302, "/circle"))
    refuse([circle], tmp_path / "data.bin", "HTTP status 302")
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    for target in (secret.as_uri(), "ftp://127.0.0.1/x", f"data:,{'x' * SIZE}"):
        refuse([server.url("/out", redirect(302, target))], tmp_path / "data.bin", "/out: ")


def test_a_dropped_connection_is_resumed_where_it_broke(server: Server, tmp_path: Path) -> None:
    def drops_once(handler: Handler) -> None:
        (whole if handler.headers.get("Range") else dropped_halfway)(handler)

    for known in (KNOWN, {}):
        path = tmp_path / f"data{len(known)}.bin"
        server.requests.clear()
        download([server.url("/data", drops_once)], path, **known)
        assert path.read_bytes() == CONTENT
        assert server.requests == [("/data", None), ("/data", f"bytes={HALF}-")]
    assert left_in(tmp_path) == {"data0.bin", "data2.bin"}


def test_a_connection_that_always_drops_ends_and_the_part_is_resumed_by_a_later_run(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "data.bin"
    url = server.url("/data", dropped_halfway)
    refuse([url], path, f"connection closed after {HALF} of {SIZE} bytes", **KNOWN)
    assert (tmp_path / ".data.bin.part").read_bytes() == CONTENT[:HALF]
    assert len(server.requests) == 2  # the second one brought nothing new
    server.requests.clear()
    download([server.url("/data", whole)], path, **KNOWN)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("/data", f"bytes={HALF}-")]
    assert left_in(tmp_path) == {"data.bin"}


def test_a_drop_can_be_continued_at_a_mirror_when_the_hash_is_known(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    mirror = server.url("/mirror", lambda handler: whole(handler, etag='"v1"'))
    download([server.url("/data", dropped_halfway), mirror], path, **KNOWN)
    assert path.read_bytes() == CONTENT
    assert server.requests[-1] == ("/mirror", f"bytes={HALF}-")


def test_without_a_known_hash_a_mirror_starts_from_the_beginning(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    other = CONTENT[::-1]
    mirror = server.url("/mirror", lambda handler: whole(handler, other))
    download([server.url("/data", dropped_halfway), mirror], path)
    assert path.read_bytes() == other
    assert server.requests[-1] == ("/mirror", None)


def test_a_file_changed_on_the_server_is_not_joined_to_the_old_beginning(
    server: Server, tmp_path: Path
) -> None:
    path, other = tmp_path / "data.bin", CONTENT[::-1]
    refuse([server.url("/data", dropped_halfway)], path, "connection closed")
    download([server.url("/data", lambda handler: whole(handler, other, '"v2"'))], path)
    assert path.read_bytes() == other


def test_a_range_that_was_not_asked_for_is_not_appended(server: Server, tmp_path: Path) -> None:
    def first_half_again(handler: Handler) -> None:
        if handler.headers.get("Range"):
            handler.head(206, HALF, Content_Range=f"bytes 0-{HALF - 1}/{SIZE}")
            handler.wfile.write(CONTENT[:HALF])
        else:
            whole(handler)

    path = tmp_path / "data.bin"
    refuse([server.url("/data", dropped_halfway)], path, "connection closed")
    download([server.url("/data", first_half_again)], path)
    assert path.read_bytes() == CONTENT


def test_a_part_of_unknown_origin_is_not_used_without_a_hash(server: Server, tmp_path: Path) -> None:
    for origin in (None, "", "{", "[]", '{"url": "x"}', '{"url": "x", "validator": "y"}'):
        path = tmp_path / "data.bin"
        (tmp_path / ".data.bin.part").write_bytes(b"\0" * HALF)
        if origin is not None:
            (tmp_path / ".data.bin.part.json").write_text(origin)
        download([server.url("/data", whole)], path)
        assert path.read_bytes() == CONTENT
        path.unlink()


def test_a_server_that_ignores_or_refuses_ranges_is_asked_for_the_whole_file(
    server: Server, tmp_path: Path
) -> None:
    def wrong_range(handler: Handler) -> None:
        if handler.headers.get("Range"):
            handler.head(206, HALF, Content_Range=f"bytes 0-{HALF - 1}/{SIZE}")
            handler.wfile.write(CONTENT[:HALF])
        else:
            whole(handler)

    def no_range_stated(handler: Handler) -> None:
        if handler.headers.get("Range"):
            handler.head(206, HALF)
            handler.wfile.write(CONTENT[HALF:])
        else:
            whole(handler)

    def bare_416(handler: Handler) -> None:
        (status(416) if handler.headers.get("Range") else whole)(handler)

    for answer in (without_ranges, wrong_range, no_range_stated, bare_416):
        path = tmp_path / "data.bin"
        (tmp_path / ".data.bin.part").write_bytes(CONTENT[:HALF])
        download([server.url("/data", answer)], path, **KNOWN)
        assert path.read_bytes() == CONTENT, answer
        path.unlink()
    assert left_in(tmp_path) == set()


def test_a_complete_part_is_finished_and_a_wrong_or_overlong_one_fetched_anew(
    server: Server, tmp_path: Path
) -> None:
    url, path = server.url("/data", whole), tmp_path / "data.bin"
    for part in (CONTENT, CONTENT[:-1] + b"?", b"?" * HALF, CONTENT + b"more"):
        (tmp_path / ".data.bin.part").write_bytes(part)
        download([url], path, **KNOWN)
        assert path.read_bytes() == CONTENT
        path.unlink()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (stalled_halfway, f"timed out after {HALF} bytes"),
        (silent, "timed out"),
        (dripping, "slower than 1024 bytes/s"),
    ],
)
def test_a_stalling_server_ends_within_the_time_out(
    server: Server, tmp_path: Path, answer: Callable[[Handler], None], message: str
) -> None:
    started = time.monotonic()
    refuse([server.url("/slow", answer)], tmp_path / "data.bin", message, timeout=0.5)
    assert time.monotonic() - started < 5  # at most three attempts


def test_a_stalling_server_gives_way_to_the_mirror(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    download([server.url("/slow", silent), server.url("/mirror", whole)], path, timeout=2.0)
    assert path.read_bytes() == CONTENT


def test_nobody_listening_is_reported_at_once(server: Server, tmp_path: Path) -> None:
    unused = Server()
    dead = f"http://127.0.0.1:{unused.server_port}/data"
    unused.server_close()
    message = refuse([dead, "http://no-such-host.invalid/data"], tmp_path / "data.bin", "Connection refused")
    assert "no-such-host.invalid/data: " in message
    assert left_in(tmp_path) == set()
    with pytest.raises(DownloadError, match="Connection refused"):
        require_answer(dead)
    with pytest.raises(DownloadError, match="timed out"):
        require_answer(server.url("/silent", silent), timeout=0.1)
    require_answer(server.url("/gone", status(404)))
    require_answer(server.url("/there", status(200)))


def test_a_lying_length_never_gives_a_wrong_file(server: Server, tmp_path: Path) -> None:
    def claims(length: int) -> Callable[[Handler], None]:
        def answer(handler: Handler) -> None:
            handler.head(200, length)
            handler.wfile.write(CONTENT)

        return answer

    path = tmp_path / "data.bin"
    for length in (0, HALF, SIZE - 1, SIZE + 1, 2 * SIZE, 10**15):
        refuse([server.url("/data", claims(length))], path, "offers .* bytes, the file has", **KNOWN)
        assert left_in(tmp_path) == set()
    # Without a known size, too long a length shows as a broken connection; too short a one must be
    # caught by what the file holds.
    refuse([server.url("/data", claims(SIZE + 1))], path, f"closed after {SIZE} of {SIZE + 1} bytes")
    (tmp_path / ".data.bin.part").unlink()

    def complete(part: Path) -> None:
        if len(part.read_bytes()) != SIZE:
            raise UserError("truncated")

    message = "gave a file that is not usable: truncated"
    refuse([server.url("/data", claims(HALF))], path, message, check=complete)
    assert left_in(tmp_path) == set()


def test_bodies_without_a_length_are_bounded_by_the_known_size(server: Server, tmp_path: Path) -> None:
    def until_close(content: bytes) -> Callable[[Handler], None]:
        def answer(handler: Handler) -> None:
            handler.head(200, None, Connection="close")
            handler.wfile.write(content)

        return answer

    def chunked(handler: Handler) -> None:
        handler.head(200, None, Transfer_Encoding="chunked")
        for start in range(0, SIZE, 100_000):
            piece = CONTENT[start : start + 100_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    def broken_chunks(handler: Handler) -> None:
        handler.head(200, None, Transfer_Encoding="chunked")
        handler.wfile.write(b"ff\r\nshort")

    for answer in (until_close(CONTENT), chunked):
        for known in (KNOWN, {}):
            path = tmp_path / "data.bin"
            download([server.url("/data", answer)], path, **known)
            assert path.read_bytes() == CONTENT
            path.unlink()
    refuse([server.url("/data", until_close(CONTENT * 3))], path, "sends more than", **KNOWN)
    refuse([server.url("/data", until_close(CONTENT[:HALF]))], path, "closed after .* bytes", **KNOWN)
    refuse([server.url("/data", broken_chunks)], path, "/data: ", **KNOWN)


def test_a_wrong_file_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    wrong = server.url("/wrong", lambda handler: whole(handler, CONTENT[::-1]))
    refuse([wrong], path, "gave a file with another SHA-256", **KNOWN)
    assert left_in(tmp_path) == set()
    download([wrong, server.url("/right", whole)], path, **KNOWN)
    assert path.read_bytes() == CONTENT


def test_compressed_bodies_are_not_mistaken_for_the_file(server: Server, tmp_path: Path) -> None:
    def compressed(handler: Handler) -> None:
        handler.head(200, SIZE, Content_Encoding="gzip")
        handler.wfile.write(CONTENT)

    refuse([server.url("/data", compressed)], tmp_path / "data.bin", "content encoding gzip")


def test_a_file_that_fails_its_check_moves_on_to_the_mirror(server: Server, tmp_path: Path) -> None:
    def check(part: Path) -> None:
        if part.read_bytes() != CONTENT:
            raise UserError("an error page")

    page = server.url("/page", lambda handler: whole(handler, b"<html>sign in</html>"))
    path = tmp_path / "data.bin"
    refuse([page], path, "not usable: an error page", check=check)
    download([page, server.url("/mirror", whole)], path, check=check)
    assert path.read_bytes() == CONTENT


def test_a_full_disk_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, limits[1]))
    try:
        refuse(
            [server.url("/data", whole)], tmp_path / "data.bin", "cannot be written: File too large", **KNOWN
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(tmp_path) == set()


def test_a_folder_that_cannot_be_made_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"file/data\.bin: cannot be written: "):
        download([server.url("/data", whole)], tmp_path / "file" / "data.bin", **KNOWN)
    assert server.requests == []


def test_an_interrupt_keeps_the_part_for_the_next_run(server: Server, tmp_path: Path) -> None:
    def interrupted(part: Path) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "data.bin"
    with pytest.raises(KeyboardInterrupt):
        download([server.url("/data", whole)], path, check=interrupted)
    assert not path.exists()
    server.requests.clear()
    download([server.url("/data", whole)], path)
    assert path.read_bytes() == CONTENT
    assert server.requests == [("/data", f"bytes={SIZE}-")]


def _download_in_process(url: str, path: str) -> None:
    download([url], Path(path), **KNOWN)


def test_two_processes_download_once(server: Server, tmp_path: Path) -> None:
    def slow(handler: Handler) -> None:
        time.sleep(0.5)
        whole(handler)

    url, path = server.url("/data", slow), tmp_path / "data.bin"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_download_in_process, args=(url, str(path))) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert server.requests == [("/data", None)]
    assert file_sha256(path) == SHA256
    assert left_in(tmp_path) == {"data.bin"}
