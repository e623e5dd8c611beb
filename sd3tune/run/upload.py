"""Upload of a finished run to the Hub, at its end or later."""

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
    """Upload the public files of a finished run. Return a line with the address. Raises UserError.

    `overrides` replaces the content of some files.
    """
    files = {**files_of_run(run), **overrides}
    if CARD in files:
        files[CARD] = card_to_upload(run, repository.repo_id)
    commit = repository.commit(files, f"{run.name}, trained with sd3tune", progress)
    return f"uploaded  {repository.url}" if commit else f"uploaded  {repository.url} is up to date"


def prepare_upload(plan: Plan) -> None:
    """Create the repository and check write access, before anything is encoded. Raises RunError."""
    repository = repository_of(plan.config.hub)
    if repository is not None:
        with explain_hub_push():
            repository.prepare()


def push_command(run: Path) -> str:
    """Return the command that uploads a run."""
    return command_line("sd3tune", "hub", "push", str(run))


def left_out(run: Path) -> list[str]:
    """Return a line with the pictures that are not uploaded; empty if all are."""
    names = pictures_left_out(run)
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return [f"not uploaded: {shown}: not drawn by this run"] if names else []
