"""`sd3tune hub push`: upload a finished run."""

from __future__ import annotations

from pathlib import Path

from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.adapter.modelspec import describe_tags
from sd3tune.config import load_config
from sd3tune.config.run_folder import RUN_FILE, read_run_file
from sd3tune.config.sections.outputs import REPO_ID, REPO_ID_IN_WORDS
from sd3tune.errors import RunError
from sd3tune.invocation import command_line
from sd3tune.publish.files import (
    ADAPTERS,
    Upload,
    files_of_product,
)
from sd3tune.publish.repository import Repository
from sd3tune.reporting import result, say
from sd3tune.run.folder import holds_report
from sd3tune.run.thumbnail import thumbnail, with_metadata
from sd3tune.run.upload import left_out, push_run


def run_push(run: Path, repo_id: str | None, picture: Path | None = None) -> None:
    """Upload a finished run; after an earlier upload, only missing and changed files. Raises UserError.

    `picture` becomes the thumbnail of the uploaded adapter; the run's own file is not changed.
    """
    if repo_id is not None and not REPO_ID.fullmatch(repo_id):
        raise RunError(f"--repo-id: {repo_id!r} cannot name a repository; {REPO_ID_IN_WORDS}")
    if not read_run_file(run):
        raise RunError(f"{run}: not a run folder: it has no {RUN_FILE} of sd3tune; name the folder of a training run")
    if not holds_report(run):
        resume = command_line("sd3tune", "train", "CONFIG", "--resume")
        raise RunError(f"{run}: this run has not finished; finish it with `{resume}`, then push it")
    settings = load_config(run / "config.yaml").config.hub
    target = repo_id or settings.repo_id
    if target is None:
        raise RunError(f"{run}: its configuration sets no repository (hub.repo_id); give --repo-id user/name")
    with_thumbnail = _thumbnails(run, picture) if picture else {}
    for line in _upload_notes(run):
        say(f"note: {line}")
    repository = Repository(target, settings.private)
    repository.check_token()
    repository.prepare()
    result(push_run(run, repository, with_thumbnail, progress=True))


def _thumbnails(run: Path, picture: Path) -> Upload:
    """Return the run's adapter files with `picture` as their thumbnail."""
    adapters = {name: path for name, path in files_of_product(run).items() if name.endswith(ADAPTER_FILE)}
    if not adapters:
        raise RunError(
            f"--thumbnail {picture}: {run} holds a whole model, which cannot store a thumbnail; leave it out"
        )
    more = thumbnail(picture)
    return {name: with_metadata(path, more) for name, path in adapters.items()}


def _upload_notes(run: Path) -> list[str]:
    """Return notes on the caption tags stored in the adapter, and on pictures that are not uploaded."""
    not_uploaded = left_out(run)
    if not (run / ADAPTERS[0] / ADAPTER_FILE).is_file():
        return not_uploaded
    tags = read_adapter(run).contract.get("tag_frequency")
    return [*([describe_tags(tags)] if tags else []), *not_uploaded]
