"""A Hub on this machine: what huggingface_hub asks the real one, answered over real HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = 1 << 26
"""Bytes from which on a file is hollow: such a file is known by its beginning and its size."""


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks the real Hub: model info, the file tree, HEAD and GET of a file."""

    root: Path
    """The folder of every repository, or one with a folder OWNER/NAME for each."""
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        owner, name = path.removeprefix("/api/models").split("/")[1:3]
        repository = self.root / owner / name if (self.root / owner / name).is_dir() else self.root
        if owner == "missing":
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if owner == "unauthorized":  # what the real Hub says of a missing or private model without a token
            return self.answer(401, {"X-Error-Message": "Invalid username or password."})
        if owner == "broken":
            return self.answer(500, {})
        if path.startswith("/api/models/") and "/revision/nonsense" in path:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/") and "/tree/" in path:
            return self.answer(200, {}, json.dumps(tree(repository)).encode())
        if path.startswith("/api/models/"):
            return self.answer(200, {}, json.dumps({"id": f"{owner}/sd3", "sha": COMMIT, "siblings": []}).encode())
        if owner == "gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        file = repository / path.partition(f"/resolve/{COMMIT}/")[2]
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{identity(file)}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, headers, file)

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], content: bytes | Path = b"") -> None:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(size)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content.read_bytes() if isinstance(content, Path) else content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def tree(repository: Path) -> list[dict[str, object]]:
    files = sorted(path for path in repository.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": str(file.relative_to(repository)),
            "size": file.stat().st_size,
            "oid": identity(file),
        }
        for file in files
    ]


def identity(file: Path) -> str:
    """Return what the Hub knows the content of a file by."""
    if file.stat().st_size < _LARGE:
        return hashlib.sha1(file.read_bytes()).hexdigest()
    with file.open("rb") as stream:
        return hashlib.sha1(stream.read(1 << 20) + str(file.stat().st_size).encode()).hexdigest()


def cache_large_files(repository: Path, name: str, home: Path) -> None:
    """Link a repository's large files into the Hub's cache as downloaded content that no snapshot has yet.

    A download then asks for all that it needs, and transfers the rest. `name` is OWNER/NAME; `home` is HF_HOME.
    """
    blobs = home / "hub" / f"models--{name.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    for file in repository.rglob("*.safetensors"):
        with contextlib.suppress(FileExistsError):  # the same content under two names
            os.link(file, blobs / identity(file))


def ask(endpoint: str, home: Path, script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run lines of Python in a process of its own, as huggingface_hub reads its environment when it is imported."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {**ours, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Hub,), {"root": root, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()
