"""A model hub on 127.0.0.1 that answers as the real one does: commits, ETags, gates, bad tokens, ranges, faults.

with StubHub({"org/model": StubRepo({"model.safetensors": b"…"})}) as hub:
    hub.url      # what HF_ENDPOINT takes
    hub.requests # [("HEAD", "/org/model/resolve/main/model.safetensors", "Bearer hf_…" or ""), …]
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KNOWN_TOKENS = {"hf_member": True, "hf_stranger": False}  # token -> whether gated repositories let it in


@dataclass
class StubRepo:
    """Files at one commit.

    Attributes:
        fault: requests are answered with that status instead,
        fault_after: but for so many of the first.
        cuts: how many of the next downloads break off in the middle of what they send.
        swapped: a byte of every file differs from the one its ETag was computed of.
    """

    files: dict[str, bytes]
    gated: bool = False
    commit: str = COMMIT
    fault: int | None = None
    fault_after: int = 0
    cuts: int = 0
    swapped: bool = False


@dataclass
class StubHub:
    """A running hub. `silent`: it takes every request and never answers. `resumed`: where downloads were taken up."""

    repos: dict[str, StubRepo]
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    silent: bool = False

    def __enter__(self) -> StubHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                token = self.headers.get("Authorization", "")
                hub.requests.append((self.command, self.path, token))
                if hub.silent:
                    hub._closing.wait()
                    self.close_connection = True
                    return
                status, headers, body = hub.answer(self.path, token.removeprefix("Bearer "))
                repo = hub.repos.get("/".join(self.path.split("/")[1:3]))
                if with_body and status == 200 and (rest := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))):
                    start = int(rest[1])
                    hub.resumed.append(start)
                    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                    status, body = 206, body[start:]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body and status in (200, 206) and repo is not None and repo.cuts > 0:
                    repo.cuts -= 1
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                elif with_body:
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        if path in ("/", "/api/whoami-v2"):
            welcome = path == "/" or token in KNOWN_TOKENS
            return (200, {}, b"{}") if welcome else (401, {}, b"")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return 404, {}, b""
        if token and token not in KNOWN_TOKENS:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        repo = self.repos.get(match[1])
        if repo is None:
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b""
        if repo.fault is not None:
            if repo.fault_after == 0:
                return repo.fault, {}, b""
            repo.fault_after -= 1
        if repo.gated and not KNOWN_TOKENS.get(token, False):
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b""
        if match[2] not in ("main", repo.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = repo.files.get(match[3])
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit}, b""
        etag = hashlib.sha256(content).hexdigest()
        if repo.swapped:
            content = bytes([content[0] ^ 1]) + content[1:]
        return 200, {"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"'}, content
