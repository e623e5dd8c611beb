"""Weights & Biases: a run keeps its id when it is resumed."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from sd3tune.config.files import short_path
from sd3tune.config.sections.outputs import WandbConfig
from sd3tune.files.atomic import write_text
from sd3tune.invocation import command_line
from sd3tune.tracking.base import Start

FOLDER = "wandb"
ID_FILE = "wandb_id"
INIT_TIMEOUT = 20.0
FINISH_TIMEOUT = 120.0
"""Seconds allowed for the upload at the end of a run."""

_PRIVATE: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "save_code": False,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "host": "-",
    "username": "-",
    "email": "-",
}
"""Settings that keep host name, user name, command line, paths, packages, git state and source code private."""


class Wandb:
    """A `Tracker`. wandb's steps must ascend; steps that the server already has are not sent again."""

    def __init__(self, settings: WandbConfig, start: Start, warn: Callable[[str], None]) -> None:
        self._settings, self._start, self._folder = settings, start, start.folder / FOLDER
        self._id = self._stored_id()
        wandb.setup(wandb.Settings(silent=True))  # also disables the prompt for an API key
        logging.getLogger("wandb").setLevel(logging.WARNING)  # lower levels log local paths
        try:
            self._run = self._open(settings.mode)
        except Exception as error:  # no login, no network or no response
            if settings.mode == "offline":
                raise
            wandb.teardown()  # the failed run still holds the id
            self._run = self._open("offline")
            way_out = f"continuing offline; upload later with: {self._sync_command()}"
            warn(f"tracking.wandb: not online: {_one_line(error)}; {way_out}")
        self.where = self._sync_command() if self._run.offline else str(self._run.url)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, dict(values))

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        self._log(step, {name: wandb.Image(str(path), caption=caption)})

    def close(self, finished: bool) -> None:
        try:
            self._run.finish(exit_code=0 if finished else 1)
        except TimeoutError:
            raise TimeoutError(f"the upload is incomplete; finish it with: {self._sync_command()}") from None

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.starting_step:
            self._run.log(values, step=step)

    def _stored_id(self) -> str:
        file = self._start.folder / ID_FILE
        if file.exists():
            return file.read_text(encoding="utf-8").strip()
        new = uuid.uuid4().hex[:8]
        write_text(file, new + "\n")
        return new

    def _open(self, mode: Literal["online", "offline"]) -> wandb.Run:
        self._remove_links()  # left by a failed start
        self._start.remove_earlier(FOLDER)
        run = wandb.init(
            settings=wandb.Settings(
                **_PRIVATE,
                mode=mode,
                root_dir=str(self._folder.parent.absolute()),
                project=self._settings.project,
                entity=self._settings.entity,
                run_tags=tuple(self._settings.tags),
                run_name=self._start.name,
                run_id=self._id,
                resume="allow" if mode == "online" else None,
                allow_val_change=True,
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
                silent=True,
                symlink=False,
                use_dot_wandb=False,
                x_log_level=logging.WARNING,
            ),
            config=dict(self._start.config),
        )
        self._remove_links()
        return run

    def _remove_links(self) -> None:
        """Remove the links into the home directory that wandb makes."""
        for path in self._folder.rglob("debug-core.log"):
            if path.is_symlink():
                path.unlink()

    def _sync_command(self) -> str:
        return command_line("wandb", "sync", short_path(Path(self._run.dir).parent))


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
