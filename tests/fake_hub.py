"""The part of the Hugging Face Hub's interface that agents and datasets are sent and loaded by."""

import base64
import json
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_token"


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: ``files[repo][path]`` is a file's content; every revision is the same.

    Datasets are beside models, without a folder of their own.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.claimed_sizes: dict[str, int] = {}  # by path, in place of the true ones
        self.downloaded: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = self._parts()
        if parts == ["api", "models"]:  # all of them
            self._answer(json.dumps([{"id": repo} for repo in self.server.files]).encode())
        elif parts[:2] == ["api", "models"]:  # api/models/OWNER/NAME[/revision/REVISION], .../tree/REVISION
            repo, revision = "/".join(parts[2:4]), (parts[5:6] or ["main"])[0]
            if not self._exists(repo, revision):
                return
            if parts[4:5] == ["tree"]:
                self._answer(json.dumps(self._entries(repo, self.server.files[repo])).encode())
                return
            siblings = [{"rfilename": path} for path in self.server.files[repo]]
            self._answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        else:  # OWNER/NAME/resolve/REVISION/PATH
            repo, path = "/".join(parts[:2]), unquote("/".join(parts[4:]))
            content = self.server.files.get(repo, {}).get(path)
            if content is None:
                self._answer(b"{}", {"X-Error-Code": "EntryNotFound"}, status=404)
                return
            if self.command == "GET":
                self.server.downloaded.append(path)
            self._answer(content, {"ETag": f'"{abs(hash(content)):x}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers["Content-Length"]
        body = self._chunks() if length is None else self.rfile.read(int(length))
        parts = self._parts()
        repo = "/".join(parts[2:4])
        if "paths-info" in parts:
            if self._exists(repo, parts[-1]):
                found = [path for path in parse_qs(body.decode())["paths"] if path in self.server.files[repo]]
                self._answer(json.dumps(self._entries(repo, found)).encode())
        elif self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._answer(b'{"error": "Invalid username or password."}', status=401)
        elif parts[-1] == "create":
            request = json.loads(body)
            repo = "/".join(filter(None, (request.get("organization"), request["name"])))
            self.server.files.setdefault(repo, {})
            self._answer(json.dumps({"url": f"{self.server.url}/{repo}"}).encode())
        elif parts[-1] == "validate-yaml":
            self._answer(b'{"warnings": [], "errors": []}')
        elif "preupload" in parts:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._answer(json.dumps({"files": modes}).encode())
        else:  # api/models/OWNER/NAME/commit/main
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[repo][entry["value"]["path"]] = content
            url = f"{self.server.url}/{repo}/commit/{COMMIT}"
            self._answer(json.dumps({"commitUrl": url, "commitOid": COMMIT}).encode())

    def _parts(self) -> list[str]:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "datasets"]:
            parts[1] = "models"
        return parts[1:] if parts[0] == "datasets" else parts

    def _entries(self, repo: str, paths: Iterable[str]) -> list[dict[str, object]]:
        sizes = {path: len(content) for path, content in self.server.files[repo].items()}
        sizes |= self.server.claimed_sizes
        return [{"type": "file", "path": path, "oid": "0", "size": sizes[path]} for path in paths]

    def _exists(self, repo: str, revision: str) -> bool:
        missing = "RepoNotFound" if repo not in self.server.files else None
        if missing is None and unquote(revision) not in ("main", "v1", COMMIT):
            missing = "RevisionNotFound"
        if missing is not None:
            self._answer(b"{}", {"X-Error-Code": missing}, status=404)
        return missing is None

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
