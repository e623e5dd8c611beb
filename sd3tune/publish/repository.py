"""A model repository on the Hub for uploads, with the Hub's errors explained."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sd3tune.config.sections.outputs import HubConfig
from sd3tune.errors import RunError
from sd3tune.publish.files import Upload
from sd3tune.reporting import current

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

TOKENS = "https://huggingface.co/settings/tokens"
RETRY_DELAYS = (1.0, 4.0, 16.0)
"""Seconds before each retry; the client retries some requests itself, but neither commits nor all errors."""
_TRANSIENT_STATUSES = (408, 409, 412, 425, 429)  # 409 and 412: a concurrent commit
_NEW_TOKEN = f"make one with write access at {TOKENS} and give it to `hf auth login`"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Repository:
    """The target of an upload, `user/name`. The token comes from `hf auth login` or HF_TOKEN."""

    repo_id: str
    private: bool
    """True to create the repository as private, if it does not exist."""

    def check_token(self) -> None:
        """Raise RunError without a token that may write. Changes nothing on the Hub."""
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise RunError(f"{self.repo_id}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
        if get_token() is None:
            raise RunError(f"{self.repo_id}: there is no Hub token to upload with: {_NEW_TOKEN}")
        with self._explained():
            account = _with_retries(HfApi().whoami)
        if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise RunError(f"{self.repo_id}: the Hub token may only read: {_NEW_TOKEN}")

    def prepare(self) -> None:
        """Create the repository if it is missing, and check write access. Raises RunError."""
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        with self._explained(), _quiet():
            _with_retries(lambda: api.create_repo(self.repo_id, private=self.private, exist_ok=True))
            # Every upload begins with this request. For a small text it uploads nothing.
            probe = CommitOperationAdd("README.md", b"-")
            _with_retries(lambda: api.preupload_lfs_files(self.repo_id, additions=[probe]))

    def commit(self, files: Upload, message: str, progress: bool = False) -> str | None:
        """Upload the files that differ, in one commit. Return its address, or None if nothing differs.

        A retry does not upload finished files again. Raises RunError.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()

        def attempt() -> CommitInfo:
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            return api.create_commit(self.repo_id, operations, commit_message=message)

        with self._explained(), _quiet(progress):
            before = _with_retries(lambda: api.model_info(self.repo_id).sha)
            made = _with_retries(attempt)
        return None if made.oid == before else str(made.commit_url)

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo_id}"

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn every error of the client into a RunError of one line, with tokens removed."""
        from huggingface_hub import get_token

        try:
            yield
        except Exception as error:
            line = f"{self.repo_id}: {self._problem(error)}"
            raise RunError(line.replace(get_token() or "\n", "***")) from None

    def _problem(self, error: BaseException) -> str:
        status, owner = status_of(error), self.repo_id.partition("/")[0]
        if status == 401:
            return f"the Hub does not accept the token: {_NEW_TOKEN}"
        if status == 403:
            return f"the token may not write to {owner}'s models: {_NEW_TOKEN}, or name a repository of your own"
        if status == 404:
            return f"the Hub has no user or organisation {owner!r} that this token may write for; check the spelling"
        if status is not None and is_transient(error):
            return f"the Hub answered with HTTP status {status}; try again later"
        root = _root(error)
        reason = " ".join(str(getattr(error, "server_message", None) or root).split())[:200]
        if status is not None or isinstance(root, ValueError):
            return f"the Hub refuses the upload: {reason}"
        local = _local_cause(error)
        if local is not None:
            return f"{local.filename or 'a file'} cannot be read: {local.strerror}"
        return f"the connection to the Hub failed: {type(root).__name__}: {reason}; check the network"


def repository_of(config: HubConfig) -> Repository | None:
    """Return the repository for a run's own uploads; None if it uploads nothing."""
    if config.push == "never" or config.repo_id is None:
        return None
    return Repository(config.repo_id, config.private)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of a client error; None if the Hub did not respond."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return int(response.status_code)
        error = error.__cause__
    return None


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed: the Hub is busy or down, or the connection was lost."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUSES
    return not isinstance(error, ValueError) and _local_cause(error) is None


def _with_retries(attempt: Callable[[], Answer]) -> Answer:
    """Return the result of `attempt`, retried after `RETRY_DELAYS`; permanent errors are raised at once."""
    for seconds in RETRY_DELAYS:
        try:
            return attempt()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(seconds)
    return attempt()


@contextlib.contextmanager
def _quiet(progress: bool = False) -> Iterator[None]:
    """Silence the client's progress bars and log lines, which contain addresses that are secret for an hour."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger, disabled = logging.getLogger("huggingface_hub"), are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    progress = progress and current().library_bars
    if not progress and not disabled:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not progress and not disabled:
            enable_progress_bars()


def _local_cause(error: BaseException | None) -> OSError | None:
    """Return the error of a local file that is missing or unreadable; None if there is none."""
    while error is not None:
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            return error
        error = error.__cause__
    return None


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
