"""An HTTP server on this machine whose answers the tests choose, and the ways in which servers fail."""

import hashlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes: many reads
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
HALF = SIZE // 2


class Server(ThreadingHTTPServer):
    """Answers each path with the function registered for it and remembers the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and Range header
        self.stopping = threading.Event()

    def url(self, path: str, answer: "Callable[[Handler], None]") -> str:
        self.answers[path] = answer
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what many tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        self.server.answers[self.path](self)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


def whole(handler: Handler, content: bytes = CONTENT, etag: str = '"v1"') -> None:
    """A well-behaved server: ranges, If-Range, an ETag."""
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if wanted and handler.headers.get("If-Range", etag) == etag:
        start = int(wanted[1])
        if start >= len(content):
            handler.head(416, 0, Content_Range=f"bytes */{len(content)}")
            return
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        handler.head(206, len(content) - start, Content_Range=span, ETag=etag)
        handler.wfile.write(content[start:])
        return
    handler.head(200, len(content), ETag=etag)
    handler.wfile.write(content)


def without_ranges(handler: Handler) -> None:
    handler.head(200, SIZE)
    handler.wfile.write(CONTENT)


def dropped_halfway(handler: Handler) -> None:
    handler.head(200, SIZE, ETag='"v1"')
    handler.wfile.write(CONTENT[:HALF])


def stalled_halfway(handler: Handler) -> None:
    dropped_halfway(handler)
    handler.wfile.flush()
    handler.server.stopping.wait(30)


def dripping(handler: Handler) -> None:
    handler.head(200, SIZE)
    for byte in CONTENT[:400]:
        handler.wfile.write(bytes([byte]))
        if handler.server.stopping.wait(0.05):
            return


def silent(handler: Handler) -> None:
    handler.server.stopping.wait(30)


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.head(code, 0)


def redirect(code: int, location: str) -> Callable[[Handler], None]:
    return lambda handler: handler.head(code, 0, Location=location)
