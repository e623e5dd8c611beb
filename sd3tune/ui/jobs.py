"""Commands that the page starts: each a folder with its command line, its log and, at the end, its exit code.

A job is a session of its own, so it survives the page. A shell waits for the command and writes the exit code, also
while no page runs. The command is found again by the shell's process id and its job folder among the shell's words.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from filelock import FileLock, Timeout

from sd3tune.errors import RunError
from sd3tune.files.atomic import new_folder, remove_folder, write_text
from sd3tune.files.own_json import read_object
from sd3tune.invocation import command_line, program
from sd3tune.reporting import say

State = Literal["queued", "running", "done", "stopped", "failed"]

PASSWORD = "SD3TUNE_UI_PASSWORD"
"""Environment variable with the password, which jobs do not inherit."""
LOG = "log.txt"
_COMMAND, _CLAIM, _PID, _CODE = "command.json", "claim", "pid", "code"
_STOPPED = 130
_CLAIM_SECONDS = 10.0
"""A claimed job whose shell has not written its id after this time never started."""
_SHELL = """\
trap : INT TERM
job=$1; shift
echo $$ > "$job/pid"
"$@" > "$job/log.txt" 2>&1 < /dev/null
echo $? > "$job/.code" && mv "$job/.code" "$job/code"
"""
"""The trap lets the shell outlive Ctrl-C, which the command's whole session gets."""


@dataclass(frozen=True)
class Job:
    """A command with its folder; its state is read from there each time."""

    folder: Path
    words: tuple[str, ...]
    """The words behind `sd3tune`."""
    title: str
    run: str | None
    """The run folder that it trains."""
    in_queue: bool
    """Whether it waits for its turn; other jobs start at once."""

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def command(self) -> str:
        """The line that does the same in a terminal."""
        return command_line("sd3tune", *self.words)

    @property
    def code(self) -> int | None:
        """The exit code; None until the command has ended."""
        try:
            return int((self.folder / _CODE).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    @property
    def ended(self) -> float:
        """When the command ended, in seconds since 1970; 0 if it did not."""
        try:
            return (self.folder / _CODE).stat().st_mtime
        except OSError:
            return 0.0

    @property
    def pid(self) -> int | None:
        """The process id of the living shell; None if it has ended."""
        try:
            pid = int((self.folder / _PID).read_text(encoding="ascii"))
            return pid if str(self.folder) in psutil.Process(pid).cmdline() else None
        except (OSError, ValueError, psutil.Error):
            return None

    @property
    def state(self) -> State:
        code = self.code
        if code is not None:
            return "done" if code == 0 else "stopped" if code == _STOPPED else "failed"
        claimed = self._claimed()
        if claimed is None:
            return "queued"
        if self.pid is not None or (time.time() - claimed < _CLAIM_SECONDS and not (self.folder / _PID).exists()):
            return "running"
        return "failed" if self.code is None else self.state  # it may have ended meanwhile

    def _claimed(self) -> float | None:
        try:
            return (self.folder / _CLAIM).stat().st_mtime
        except OSError:
            return None

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "title": self.title,
            "command": self.command,
            "run": self.run,
            "state": self.state,
            "code": self.code,
            "queued": self.in_queue,
        }


class Jobs:
    """The jobs in a folder. Several pages, and several servers, may use it at once."""

    def __init__(self, folder: Path, where: Path) -> None:
        self.folder, self.where = folder, where

    def all(self) -> list[Job]:
        """Return the jobs, oldest first."""
        names = sorted(entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else []
        return [job for name in names if (job := self.find(name))]

    def find(self, name: str) -> Job | None:
        """Return the job of this id; None if there is none."""
        if not re.fullmatch(r"\d{20}-[a-z0-9-]*", name):
            return None
        folder = self.folder / name
        try:
            written = read_object(folder / _COMMAND)
            words = tuple(map(str, written["words"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        title, run = str(written.get("title", "")), written.get("run")
        return Job(folder, words, title, run if isinstance(run, str) else None, bool(written.get("in_queue")))

    def add(self, words: Sequence[str], title: str, run: Path | None = None, *, in_queue: bool = True) -> Job:
        """Write a job of the command `sd3tune WORDS...`; outside the queue it starts at once. Raises RunError."""
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:40]
        folder = self.folder / f"{time.time_ns():020d}-{slug}"
        described = {"words": [*words], "title": title, "run": None if run is None else str(run), "in_queue": in_queue}
        with new_folder(folder) as new:
            write_text(new / _COMMAND, json.dumps(described, indent=2) + "\n")
        job = self.find(folder.name)
        if job is None:
            raise RunError(f"{folder}: cannot be read back; check the disk")
        if not in_queue:
            self._start(job)
        return job

    def start_next(self) -> Job | None:
        """Start the oldest job of the queue if none of them runs. Return it; None if there is nothing to start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", blocking=False):
                queue = [job for job in self.all() if job.in_queue]
                waiting = [job for job in queue if job.state == "queued"]
                if not waiting or any(job.state == "running" for job in queue):
                    return None
                self._start(waiting[0])
                return waiting[0]
        except Timeout:  # another server starts one
            return None

    def remove(self, job: Job) -> None:
        """Remove a job that does not run: out of the queue, or out of the list. Raises RunError if it runs."""
        if job.state == "running":
            raise RunError(f"{job.title}: runs; stop it first")
        remove_folder(job.folder)

    def _start(self, job: Job) -> None:
        with (job.folder / _CLAIM).open("x"):  # never twice, also if this server dies here
            say(f"$ {job.command}")
        subprocess.Popen(
            ["sh", "-c", _SHELL, "sh", str(job.folder), *program(), *job.words],
            cwd=self.where,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def stop(job: Job) -> bool:
    """Send Ctrl-C to a job: a training finishes its step and saves; a second one ends it at once. False if it ended."""
    pid = job.pid
    if pid is None:
        return False
    say(f"stop: {shlex.join(['kill', '-INT', f'-{pid}'])}   # {job.command}")
    try:
        os.killpg(pid, signal.SIGINT)
    except ProcessLookupError:
        return False
    return True


def environment() -> dict[str, str]:
    """Return the environment of commands: this process's, without the password."""
    return {name: value for name, value in os.environ.items() if name != PASSWORD}
