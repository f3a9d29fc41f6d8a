"""An HTTP server on this machine whose answers the tests choose, and the ways in which servers fail."""

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes: many reads
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers each path with the function registered for it and remembers the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.requests: list[str] = []  # paths
        self.stopping = threading.Event()

    def url(self, path: str, answer: "Callable[[Handler], None]") -> str:
        self.answers[path] = answer
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients close connections early in many tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.answers[self.path](self)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def sends(content: bytes, length: int | None = None) -> Callable[[Handler], None]:
    """Send ``content`` under a Content-Length of its own or another one."""

    def answer(handler: Handler) -> None:
        handler.head(200, len(content) if length is None else length)
        handler.wfile.write(content)

    return answer


def stalled_halfway(handler: Handler) -> None:
    sends(CONTENT[: SIZE // 2], SIZE)(handler)
    handler.wfile.flush()
    handler.server.stopping.wait(30)


def silent(handler: Handler) -> None:
    handler.server.stopping.wait(30)


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.head(code, 0, **headers)
