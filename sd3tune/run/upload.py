"""Uploading a run to the Hub: all of a finished run, at its end or any time later."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from sd3tune.invocation import command_line
from sd3tune.publish.files import (
    CARD,
    Upload,
    files_of_run,
    pictures_left_out,
)
from sd3tune.publish.repository import Repository, repository_of
from sd3tune.run.card import card_to_upload
from sd3tune.run.preflight import Plan, explain_hub_push


def push_run(
    run: Path, repository: Repository, overrides: Upload = MappingProxyType({}), progress: bool = False
) -> str:
    """Upload all of a finished run that is for others. Returns a line that says where it is. Raises UserError.

    `overrides` has other contents for some of the files.
    """
    files = {**files_of_run(run), **overrides}
    if CARD in files:
        files[CARD] = card_to_upload(run, repository.repo_id)
    commit = repository.commit(files, f"{run.name}, trained with sd3tune", progress)
    return f"uploaded  {repository.url}" if commit else f"uploaded  {repository.url} has all of it already"


def prepare_upload(plan: Plan) -> None:
    """Before anything is encoded: make the repository, and see that it may be written to. Raises RunError."""
    repository = repository_of(plan.config.hub)
    if repository is not None:
        with explain_hub_push():
            repository.prepare()


def push_command(run: Path) -> str:
    return command_line("sd3tune", "hub", "push", str(run))


def left_out(run: Path) -> list[str]:
    """Return a line that names the pictures which are not uploaded; none where all are."""
    names = pictures_left_out(run)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return [f"not uploaded: {shown}: no preview that this run drew"] if names else []
