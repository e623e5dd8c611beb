"""Uploads during training: a thread uploads each checkpoint's adapter; the whole run is uploaded at its end."""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config.run_folder import read_run_file
from sd3tune.files.atomic import TEMPORARY, make_folder
from sd3tune.publish.files import (
    CARD,
    CONFIG,
    Upload,
    config_of_run,
    files_of_checkpoint,
)
from sd3tune.publish.repository import Repository, repository_of
from sd3tune.reporting import say
from sd3tune.run.callbacks.base import RunCallback, Setup
from sd3tune.run.card import card_of
from sd3tune.run.preflight import Plan
from sd3tune.run.upload import left_out, push_command, push_run
from sd3tune.training.checkpoint import checkpoint_at
from sd3tune.training.loop import View

_STOP_TIMEOUT = 10.0
"""Seconds that a stopped run waits for the current upload."""


@dataclass(frozen=True)
class _Staged:
    """A checkpoint's adapter queued for upload, with the pictures so far and its own card.

    Its files are hard links, as the checkpoint may be pruned before the upload.
    """

    name: str
    folder: Path
    """In the run folder, under a temporary name, so that the next attempt removes it."""
    linked: Mapping[str, Path]
    """Name in the repository -> file to link into `folder`."""
    written: Mapping[str, bytes]

    @property
    def files(self) -> Upload:
        return {**self.written, **{name: self.folder / name for name in self.linked}}

    def link(self) -> None:
        for name, path in self.linked.items():
            target = self.folder / name
            make_folder(target.parent)
            _link(path, target)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Uploads(RunCallback):
    """A training callback that uploads saved checkpoints from a thread, in the order of the steps.

    It does not affect training: every failure is only a warning.
    """

    def __init__(self, plan: Plan, repository: Repository, contract: Mapping[str, Any]) -> None:
        super().__init__()
        self.plan, self.repository, self.contract = plan, repository, contract
        self._waiting: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing, self._giving_up = threading.Event(), threading.Event()

    @classmethod
    def make(cls, setup: Setup) -> Uploads | None:
        hub = setup.plan.config.hub
        repository = repository_of(hub) if hub.push == "checkpoint" and setup.processes.is_main else None
        return cls(setup.plan, repository, setup.contract) if repository else None

    def __call__(self, view: View) -> None:
        checkpoint = checkpoint_at(self.plan.run, view.step)
        if view.last or not checkpoint.is_dir():  # the last step is uploaded with the finished run
            return
        try:
            staged = self._stage(checkpoint, view.step)
        except Exception as error:  # whatever it is, it must not end the training
            reason = getattr(error, "strerror", None) or error
            self._warn(f"hub: {checkpoint.name} was not uploaded: {reason}; training continues")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._upload_all, name="uploads", daemon=True)
            self._thread.start()
        self._waiting.put(staged)

    def _stage(self, checkpoint: Path, step: int) -> _Staged:
        run, config = self.plan.run, self.plan.config
        run_facts = read_run_file(run)
        card = card_of(run, config, self.contract, run_facts, self.repository.repo_id, step)
        written = {CARD: card.encode(), CONFIG: config_of_run(run)}
        folder = run / f"{TEMPORARY}{secrets.token_hex(8)}-upload-{checkpoint.name}"
        staged = _Staged(checkpoint.name, folder, files_of_checkpoint(run, checkpoint), written)
        try:
            staged.link()
        except OSError:
            staged.remove()
            raise
        return staged

    def _upload_all(self) -> None:
        while (staged := self._waiting.get()) is not None:
            if not self._giving_up.is_set():
                self._upload(staged)
            staged.remove()

    def _upload(self, staged: _Staged) -> None:
        try:
            self.repository.commit(staged.files, f"{self.plan.config.name}, {staged.name}")
        except Exception as error:  # no error may end the thread
            self._warn(f"hub: {staged.name} was not uploaded: {error}; training continues")
            if self._closing.is_set():  # the others would fail as well, and the run waits
                self._giving_up.set()

    def close(self, finished: bool) -> None:
        """Wait for pending uploads; after a stopped or failed run, only briefly."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        if not finished:
            self._giving_up.set()
        self._waiting.put(None)
        thread.join(None if finished else _STOP_TIMEOUT)

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        say(f"warning: {line}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def upload_finished(plan: Plan, uploads: Uploads | None, say: Callable[[str], None]) -> None:
    """Upload a finished run, if configured. A failure is a warning with the upload command, as the files are saved."""
    repository = repository_of(plan.config.hub)
    if repository is None:
        return
    try:
        if uploads is not None:
            uploads.close(finished=True)
        for line in left_out(plan.run):
            say(f"note: {line}")
        say(push_run(plan.run, repository))
    except (Exception, KeyboardInterrupt) as error:
        reason = " ".join(str(error).split()) or f"{repository.repo_id}: stopped"
        way_out = f"the run is kept; upload it with: {push_command(plan.run)}"
        say(f"warning: hub: the upload is incomplete: {reason}; {way_out}")
