"""Uploads of a run to the Hub: each checkpoint's adapter beside the training; all at the end, or any time later."""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.adapter.modelspec import describe_tags
from sd3tune.config import load_config
from sd3tune.config.run_folder import RUN_FILE, read_run_file
from sd3tune.config.sections.outputs import REPO_ID, REPO_ID_IN_WORDS
from sd3tune.errors import RunError
from sd3tune.files.atomic import TEMPORARY, make_folder
from sd3tune.invocation import command_line
from sd3tune.publish.files import (
    ADAPTERS,
    CARD,
    CONFIG,
    Upload,
    config_of_run,
    files_of_checkpoint,
    files_of_product,
    files_of_run,
    pictures_left_out,
)
from sd3tune.publish.repository import Repository, repository_of
from sd3tune.run.card import card_of, card_to_upload
from sd3tune.run.folder import holds_report
from sd3tune.run.preflight import Plan, naming_hub_push
from sd3tune.run.thumbnail import thumbnail, with_metadata
from sd3tune.terminal import say, say_above_bars
from sd3tune.training.checkpoint import checkpoint_at
from sd3tune.training.loop import View

_PATIENCE = 10.0
"""Seconds that a run which was stopped waits for the upload in hand."""


def run_push(run: Path, repo_id: str | None, picture: Path | None = None) -> None:
    """Upload a finished run, of an earlier upload what is missing or differs. Raises UserError.

    The uploaded adapter has `picture` as its thumbnail; the run's own file stays as it is.
    """
    if repo_id is not None and not REPO_ID.fullmatch(repo_id):
        raise RunError(f"--repo-id: {repo_id!r} cannot name a repository; {REPO_ID_IN_WORDS}")
    if not read_run_file(run):
        raise RunError(f"{run}: not a run folder: no {RUN_FILE} of sd3tune is in it; name one that a training wrote")
    if not holds_report(run):
        resume = command_line("sd3tune", "train", "CONFIG", "--resume")
        raise RunError(f"{run}: this run has not finished; finish it with `{resume}`, then push it")
    settings = load_config(run / "config.yaml").config.hub
    target = repo_id or settings.repo_id
    if target is None:
        raise RunError(f"{run}: its configuration names no repository (hub.repo_id); give --repo-id user/name")
    shown = _thumbnails(run, picture) if picture else {}
    for line in _named_before_upload(run):
        say(f"note: {line}")
    repository = Repository(target, settings.private)
    repository.check_token()
    repository.prepare()
    say(push_run(run, repository, shown, progress=True))


def push_run(run: Path, repository: Repository, instead: Upload = MappingProxyType({}), progress: bool = False) -> str:
    """Upload all of a finished run that is for others. Returns a line that says where it is. Raises UserError.

    `instead` has other contents for some of the files.
    """
    files = {**files_of_run(run), **instead}
    if CARD in files:
        files[CARD] = card_to_upload(run, repository.repo_id)
    commit = repository.commit(files, f"{run.name}, trained with sd3tune", progress)
    return f"uploaded  {repository.url}" if commit else f"uploaded  {repository.url} has all of it already"


def _thumbnails(run: Path, picture: Path) -> Upload:
    """The adapters of a run with a picture in them."""
    adapters = {name: path for name, path in files_of_product(run).items() if name.endswith(ADAPTER_FILE)}
    if not adapters:
        raise RunError(f"--thumbnail {picture}: {run} holds a whole model, which has no place for one; leave it out")
    more = thumbnail(picture)
    return {name: with_metadata(path, more) for name, path in adapters.items()}


def _named_before_upload(run: Path) -> list[str]:
    """What of the captions the adapter holds, and the pictures that are not uploaded."""
    left_out = _left_out(run)
    if not (run / ADAPTERS[0] / ADAPTER_FILE).is_file():
        return left_out
    tags = read_adapter(run).contract.get("tag_frequency")
    return [*([describe_tags(tags)] if tags else []), *left_out]


def _left_out(run: Path) -> list[str]:
    names = pictures_left_out(run)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return [f"not uploaded: {shown}: no preview that this run drew"] if names else []


def prepare_upload(plan: Plan) -> None:
    """Before anything is encoded: make the repository, and see that it may be written to. Raises RunError."""
    repository = repository_of(plan.config.hub)
    if repository is not None:
        with naming_hub_push():
            repository.prepare()


def upload_finished(plan: Plan, uploads: Uploads | None, say: Callable[[str], None]) -> None:
    """Upload what a run left, if it is to be. It lies on the disk, so a failure is a warning and the way to go on."""
    repository = repository_of(plan.config.hub)
    if repository is None:
        return
    try:
        if uploads is not None:
            uploads.close(finished=True)
        for line in _left_out(plan.run):
            say(f"note: {line}")
        say(push_run(plan.run, repository))
    except (Exception, KeyboardInterrupt) as error:
        reason = " ".join(str(error).split()) or f"{repository.repo_id}: stopped"
        say(f"warning: hub: not all was uploaded: {reason}; it is kept in the run, later: {push_command(plan.run)}")


def push_command(run: Path) -> str:
    return command_line("sd3tune", "hub", "push", str(run))


@dataclass(frozen=True)
class _Staged:
    """A checkpoint's adapter on its way, with the pictures so far and a card of its own.

    They are links of its own, as the checkpoint may be pruned while it waits.
    """

    name: str
    folder: Path
    """Beside the checkpoints, under a name that the next attempt removes."""
    linked: Mapping[str, Path]
    """Name in the repository -> the file that is linked into `folder`."""
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


class Uploads:
    """A training callback, called after a checkpoint is saved: a thread uploads it, in the order of the steps.

    It takes nothing from the run and gives nothing to it: whatever fails is a warning.
    """

    def __init__(self, plan: Plan, repository: Repository, contract: Mapping[str, Any]) -> None:
        self.plan, self.repository, self.contract = plan, repository, contract
        self.warnings: list[str] = []
        self._waiting: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing, self._giving_up = threading.Event(), threading.Event()

    def __call__(self, view: View) -> None:
        checkpoint = checkpoint_at(self.plan.run, view.step)
        if view.last or not checkpoint.is_dir():  # what the last step left is uploaded at the end
            return
        try:
            staged = self._stage(checkpoint, view.step)
        except Exception as error:  # whatever it is, it must not end the training
            reason = getattr(error, "strerror", None) or error
            self._warn(f"hub: {checkpoint.name} was not uploaded: {reason}; training goes on")
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._upload_all, name="uploads", daemon=True)
            self._thread.start()
        self._waiting.put(staged)

    def _stage(self, checkpoint: Path, step: int) -> _Staged:
        run, config = self.plan.run, self.plan.config
        described = read_run_file(run)
        card = card_of(run, config, self.contract, described, self.repository.repo_id, step)
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
        except Exception as error:  # whatever it is, it must not end the thread
            self._warn(f"hub: {staged.name} was not uploaded: {error}; training goes on")
            if self._closing.is_set():  # nobody waits for each of many that will fail likewise
                self._giving_up.set()

    def close(self, finished: bool) -> None:
        """Wait for what is on its way; after a run that was stopped or failed, for a moment only."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._closing.set()
        if not finished:
            self._giving_up.set()
        self._waiting.put(None)
        thread.join(None if finished else _PATIENCE)

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        say_above_bars(f"warning: {line}")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
