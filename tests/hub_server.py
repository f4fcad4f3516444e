"""A stand-in of the Hugging Face hub on this machine: as much of its HTTP as pushing and pulling a
repository takes, for the hub's own client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"
SHA = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: files by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.commits = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing: pytest shows what fails."""

    def do_GET(self) -> None:
        kind, repo, rest = self._asked()
        if repo not in self.server.repos:
            # As the hub, which does not tell a private one from none.
            return self._send(404, {"error": "Repository not found"}, code="RepoNotFound")
        files = self.server.repos[repo]
        if kind == "file":
            return self._send(200, files[rest], ETag=f'"{_digest(files[rest])}"')
        if rest.startswith("tree/"):
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
                for path, data in files.items()
            ]
            return self._send(200, listed)
        if rest.startswith("revision/") and rest != "revision/main":
            return self._send(404, {"error": "no such revision"}, code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in files]
        return self._send(200, {"id": repo, "sha": SHA, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815 (http.server's names)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.created.append(asked)
            self.server.repos.setdefault(name, {})
            return self._send(200, {"url": f"{self.server.url}/{name}"})
        _, repo, rest = self._asked()
        if rest.startswith("preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            return self._send(200, {"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        self.server.commits += 1
        url = f"{self.server.url}/{repo}/commit/{SHA}"
        return self._send(200, {"commitUrl": url, "commitOid": SHA})

    def _asked(self) -> tuple[str, str, str]:
        """What a path is of: an api or a file, the repository, and the rest."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            return "api", "/".join(parts[2:4]), "/".join(parts[4:])
        return "file", "/".join(parts[:2]), "/".join(parts[4:])

    def _send(self, status: int, content: Any, code: str = "", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        sent = {"Content-Length": str(len(data)), "X-Repo-Commit": SHA, **headers}
        if code:
            sent["X-Error-Code"] = code
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running one."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
