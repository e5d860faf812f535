"""A model hub on 127.0.0.1 that answers as the real one does: commits, ETags, gates, bad tokens, faults.

with StubHub({"org/model": StubRepo({"model.safetensors": b"…"})}) as hub:
    hub.url      # what HF_ENDPOINT takes
    hub.requests # [("HEAD", "/org/model/resolve/main/model.safetensors", "Bearer hf_…" or ""), …]
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KNOWN_TOKENS = {"hf_member": True, "hf_stranger": False}  # token -> whether gated repositories let it in


@dataclass
class StubRepo:
    """Files at one commit. `fault` answers every request with that status instead."""

    files: dict[str, bytes]
    gated: bool = False
    commit: str = COMMIT
    fault: int | None = None


@dataclass
class StubHub:
    repos: dict[str, StubRepo]
    requests: list[tuple[str, str, str]] = field(default_factory=list)

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
                status, headers, body = hub.answer(self.path, token.removeprefix("Bearer "))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, token: str) -> tuple[int, dict[str, str], bytes]:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return 404, {}, b""
        if token and token not in KNOWN_TOKENS:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        repo = self.repos.get(match[1])
        if repo is None:
            return (404 if token else 401), {"X-Error-Code": "RepoNotFound"}, b""
        if repo.fault is not None:
            return repo.fault, {}, b""
        if repo.gated and not KNOWN_TOKENS.get(token, False):
            return (403 if token else 401), {"X-Error-Code": "GatedRepo"}, b""
        if match[2] not in ("main", repo.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        content = repo.files.get(match[3])
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit}, b""
        etag = hashlib.sha256(content).hexdigest()
        return 200, {"X-Repo-Commit": repo.commit, "ETag": f'"{etag}"'}, content
