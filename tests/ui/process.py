"""The page as users start it: a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd3tune.ui.jobs import Jobs
from sd3tune.ui.workspace import JOBS


@contextmanager
def served(*words: str) -> Iterator[str]:
    """`sd3tune ui WORDS...` as a process at a free port; the link that it prints. It is ended as `kill` does."""
    command = [sys.executable, "-m", "sd3tune", "ui", *words, "--port", "0", "--no-browser", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield next(value["url"] for line in process.stdout if "url" in (value := json.loads(line)))
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


def kill_jobs(folder: Path) -> None:
    """Kill the commands that a page on this folder has started, which would outlive a test that failed."""
    for job in Jobs(folder / JOBS, folder).all():
        if (pid := job.pid) is not None:
            os.killpg(pid, signal.SIGKILL)


def text_of(link: str) -> str:
    """The page behind a link, as a browser without scripts gets it."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with opener.open(link) as answer:
        text: str = answer.read().decode()
    return text
