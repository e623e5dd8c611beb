"""A Hub on this machine that can be written to: what huggingface_hub asks the real one, answered over real HTTP.

It keeps repositories with their commits in memory, and can be told to refuse, to be busy and to cut connections.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

CUT = 0
"""In place of a status: the connection is cut without an answer."""
CUT_AFTER = -1
"""The request is obeyed, then the connection is cut."""
WRITER, READER = "hf_writer0123456789", "hf_reader0123456789"


@dataclass
class Commit:
    id: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def at(self, revision: str) -> Commit | None:
        found = [commit for commit in self.commits if commit.id == revision]
        return self.commits[-1] if revision == "main" else found[0] if found else None

    def commit(self, message: str, changed: Mapping[str, bytes]) -> Commit:
        files = {**(self.files if self.commits else {}), **changed}
        made = Commit(hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest(), message, files)
        self.commits.append(made)
        return made


@dataclass(frozen=True)
class Request:
    line: str
    """Method and path."""
    body: bytes


class UploadHub(ThreadingHTTPServer):
    """`user` owns the tokens; `faults` are taken from the front by requests whose line they match."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        """LFS objects by their SHA-256."""
        self.requests: list[Request] = []
        self.faults: list[tuple[str, int]] = []
        """(regular expression, status or CUT)."""
        self.open = threading.Event()
        """Cleared: the content of large files is taken in, and not answered for."""
        self.open.set()
        self.lock = threading.Lock()

    def add(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> Repository:
        made = self.repositories[repo_id] = Repository(private)
        made.commit("initial commit", files)
        return made

    def fault(self, line: str) -> int | None:
        with self.lock:
            for number, (pattern, status) in enumerate(self.faults):
                if re.search(pattern, line):
                    del self.faults[number]
                    return status
        return None

    def asked(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, request.line)]


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        line = f"{self.command} {unquote(self.path)}"
        self.server.requests.append(Request(line, body))
        if self.command == "PUT":
            self.server.open.wait(60)
        status = self.server.fault(line)
        self.silenced = status == CUT_AFTER
        if status == CUT:
            self._cut()
        elif status in (None, CUT_AFTER):
            with self.server.lock:
                self._obey(line, body)
        else:
            self._json({"error": "told to"}, status or 500, {"Retry-After": "0"} if status == 429 else {})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _obey(self, line: str, body: bytes) -> None:
        for pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                answer(self, body, *found.groups())
                return
        self._json({"error": f"unknown: {line}"}, 404)

    # Accounts and repositories

    def whoami(self, body: bytes) -> None:
        if self._role() is None:
            return self._json({"error": "Invalid username or password."}, 401)
        return self._json({"name": "user", "type": "user", "auth": {"accessToken": {"role": self._role()}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if not self._may_write(repo_id):
            return None
        if repo_id in self.server.repositories:
            return self._json({"error": "You already created this model repo", "url": self._page(repo_id)}, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs"}, private)
        return self._json({"url": self._page(repo_id)})

    def info(self, body: bytes, repo_id: str, revision: str | None) -> None:
        commit = self._readable(repo_id, revision or "main")
        if commit:
            private = self.server.repositories[repo_id].private
            siblings = [{"rfilename": name} for name in commit.files]
            self._json({"id": repo_id, "sha": commit.id, "private": private, "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        commit = self._readable(repo_id, revision)
        if commit:
            self._json([{"type": "file", "path": name, **_about(name, data)} for name, data in commit.files.items()])

    def resolve(self, body: bytes, repo_id: str, revision: str, name: str) -> None:
        commit = self._readable(repo_id, revision)
        if commit is None:
            return None
        if name not in commit.files:
            return self._json({}, 404, {"X-Error-Code": "EntryNotFound"})
        data = commit.files[name]
        return self._answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit.id})

    # Uploads

    def preupload(self, body: bytes, repo_id: str) -> None:
        if not self._may_write(repo_id):
            return
        have = self.server.repositories[repo_id].files
        self._json({"files": [self._mode(asked["path"], have) for asked in json.loads(body)["files"]]})

    def _mode(self, name: str, have: Mapping[str, bytes]) -> dict[str, Any]:
        oid = {"oid": _oid(name, have[name])} if name in have else {}
        return {"path": name, "uploadMode": "lfs" if _is_large(name) else "regular", "shouldIgnore": False, **oid}

    def batch(self, body: bytes, repo_id: str) -> None:
        if not self._may_write(repo_id):
            return
        objects = json.loads(body)["objects"]
        self._json({"transfer": "basic", "objects": [self._action(wanted) for wanted in objects]})

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.large:
            return wanted
        upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}?signature=secret"}
        return {**wanted, "actions": {"upload": upload, "verify": {"href": f"{self.server.url}/verify"}}}

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._answer(200)

    def verify(self, body: bytes) -> None:
        self._json({}, 200 if json.loads(body)["oid"] in self.server.large else 404)

    def validate(self, body: bytes) -> None:
        self._json({"errors": [], "warnings": []})

    def commit(self, body: bytes, repo_id: str) -> None:
        if not self._may_write(repo_id):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        changed: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.server.large[value["oid"]]
        made = self.server.repositories[repo_id].commit(lines[0]["value"]["summary"], changed)
        self._json({"success": True, "commitOid": made.id, "commitUrl": f"{self._page(repo_id)}/commit/{made.id}"})

    # Rights

    def _role(self) -> str | None:
        return {WRITER: "write", READER: "read"}.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self, repo_id: str) -> bool:
        if self._role() is None:
            self._json({"error": "Invalid username or password."}, 401)
        elif self._role() == "read" or not repo_id.startswith("user/"):
            self._json({"error": "You don't have the rights"}, 403)
        else:
            return True
        return False

    def _readable(self, repo_id: str, revision: str) -> Commit | None:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and self._role() is None):
            known = self._role() is not None
            self._json({}, 404 if known else 401, {"X-Error-Code": "RepoNotFound"} if known else {})
            return None
        commit = found.at(revision)
        if commit is None:
            self._json({}, 404, {"X-Error-Code": "RevisionNotFound"})
        return commit

    # HTTP

    def _page(self, repo_id: str) -> str:
        return f"{self.server.url}/{repo_id}"

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), headers or {})

    def _answer(self, status: int, content: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        if self.silenced:
            return self._cut()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return None

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".png"))


def _oid(name: str, data: bytes) -> str:
    """As the Hub says whether a file has changed: of a large one its SHA-256, else git's own."""
    if _is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _about(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(data).hexdigest()
    return {"size": len(data), "oid": blob}


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate),
    (rf"POST /api/models/{_REPO}/preupload/main.*", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /lfs/(\w+)\?.*", _Handler.store),
    (r"POST /verify", _Handler.verify),
    (rf"POST /api/models/{_REPO}/commit/main.*", _Handler.commit),
    (rf"GET /api/models/{_REPO}/tree/(\w+).*", _Handler.tree),
    (rf"GET /api/models/{_REPO}(?:/revision/(\w+))?(?:\?.*)?", _Handler.info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(\w+)/([^?]+).*", _Handler.resolve),
]


@contextlib.contextmanager
def upload_hub() -> Iterator[UploadHub]:
    with UploadHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
