"""A Hub on this machine: what huggingface_hub asks the real one, answered over real HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks the real Hub: model info, the file tree, HEAD and GET of a file."""

    root: Path
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        owner = path.removeprefix("/api/models").split("/")[1]
        if owner == "missing":
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if owner == "unauthorized":  # what the real Hub says of a missing or private model without a token
            return self.answer(401, {"X-Error-Message": "Invalid username or password."})
        if owner == "broken":
            return self.answer(500, {})
        if path.startswith("/api/models/") and "/revision/nonsense" in path:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if path.startswith("/api/models/") and "/tree/" in path:
            return self.answer(200, {}, json.dumps(self.tree()).encode())
        if path.startswith("/api/models/"):
            return self.answer(200, {}, json.dumps({"id": f"{owner}/sd3", "sha": COMMIT, "siblings": []}).encode())
        if owner == "gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        file = self.root / path.partition(f"/resolve/{COMMIT}/")[2]
        if not file.is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, headers, content)

    do_HEAD = do_GET

    def tree(self) -> list[dict[str, object]]:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": str(file.relative_to(self.root)),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]

    def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Hub,), {"root": root, "requests": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()
