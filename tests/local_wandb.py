"""A wandb server on this machine: it keeps runs by their id, as far as starting, logging and resuming one ask it."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LocalWandb(ThreadingHTTPServer):
    """What was sent to it: `history` is a list of rows per run id, `uploads` are files by their name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.exit_codes: dict[str, int] = {}
        self.uploads: dict[str, bytes] = {}
        self.queries: list[Any] = []

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        self.queries.append(variables)
        entity = {"id": "entity", "name": "someone"}
        if operation == "UpsertBucket":
            project = {"id": "project", "name": variables.get("project") or "p", "entity": entity}
            bucket = {"id": "bucket", "name": variables["name"], "displayName": "run", "project": project}
            return {"upsertBucket": {"inserted": variables["name"] not in self.history, "bucket": bucket}}
        rows = self.history.get(str(variables.get("name")))
        if operation == "RunResumeStatus" and rows:
            bucket = {"id": "bucket", "name": variables["name"], "displayName": "run", "tags": []} | {
                "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "config": "{}",
                "historyTail": json.dumps([json.dumps(rows[-1])]), "eventsTail": "[]",
                "summaryMetrics": "{}", "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {"model": {"id": "project", "name": "p", "entity": entity, "bucket": bucket}}
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables.get("files") or ()]
        viewer = {"id": "viewer", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
        created = {"runID": "bucket", "uploadHeaders": [], "files": files}
        return {"model": None, "viewer": viewer, "serverInfo": None, "createRunFiles": created}


class _Handler(BaseHTTPRequestHandler):
    server: LocalWandb

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply({})

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/upload/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            self._reply({"data": self.server.answer(found[1] if found else "", asked.get("variables") or {})})
        elif stream := re.fullmatch(r"/files/\w+/\w+/(\w+)/file_stream", self.path):
            sent = json.loads(body)
            rows = (sent.get("files") or {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.history.setdefault(stream[1], []).extend(map(json.loads, rows))
            if "exitcode" in sent:
                self.server.exit_codes[stream[1]] = sent["exitcode"]
            self._reply({})
        else:  # telemetry
            self._reply({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def local_wandb() -> Iterator[LocalWandb]:
    with LocalWandb() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
