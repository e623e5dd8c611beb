"""Downloads from the Hub, with its errors explained to users."""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd3tune.errors import ModelError
from sd3tune.files.atomic import FULL
from sd3tune.reporting import Reporter, current

_fetching = True
"""True if files that are not in the Hub's cache may be downloaded; see `no_downloads`."""
_OF_THE_DISK = (*FULL, errno.EACCES, errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS)


ANOTHER_BASE = "name a folder or `tiny` as the base"


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """Make `download` return only cached files, and raise ModelError for others, inside the context."""
    global _fetching
    before, _fetching = _fetching, False
    try:
        yield
    finally:
        _fetching = before


def download(
    repo: str, revision: str | None, patterns: list[str], progress: bool = False, otherwise: str = ANOTHER_BASE
) -> Path:
    """Return a repository's snapshot folder in the Hub's own cache, with the matching files in it.

    A commit whose files are cached needs no network. Raises ModelError with one line that explains the failure;
    `otherwise` is the alternative suggested to a user without a network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    bar: Any = (current() if progress else Reporter(quiet=True)).bar_of(tqdm)
    offline = not _fetching or (revision is not None and not _is_reachable(repo, revision))
    with _in_words(repo, revision, otherwise):
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, tqdm_class=bar, local_files_only=offline
            )
        )


@functools.cache
def _is_reachable(repo: str, revision: str) -> bool:
    """Ask the Hub once: for a commit, its client would try for half a minute, with a message each time."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().model_info(repo, revision=revision)
    except (errors.HfHubHTTPError, errors.HFValidationError):
        return True  # `download` explains it
    except Exception:  # no connection: the HTTP library depends on the version
        return False
    return True


def files_in_root(repo: str, revision: str, otherwise: str) -> list[str]:
    """Return the names of the files in a repository's root; needs the network. Raises ModelError."""
    from huggingface_hub import HfApi, errors

    with _in_words(repo, revision, otherwise):
        if not _fetching:
            raise errors.LocalEntryNotFoundError(repo)
        return [name for name in HfApi().list_repo_files(repo, revision=revision) if "/" not in name]


@contextlib.contextmanager
def _in_words(repo: str, revision: str | None, otherwise: str) -> Iterator[None]:
    """Turn any error of the client into a ModelError of one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError:
        raise ModelError(f"{repo}: no such folder, and not a valid Hub id") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{repo}: the Hub has no revision {revision!r} of this model") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(f"{repo}: {_problem(repo, error, otherwise)}") from None
    except Exception as error:  # a broken connection: the HTTP library depends on the version
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise ModelError(
                f"{repo}: cannot be downloaded: {error.filename or constants.HF_HUB_CACHE}: {error.strerror}; "
                "free some space, or let HF_HOME name another folder"
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{repo}: the download failed: {type(error).__name__}: {reason}") from error


def cached(repo: str, revision: str | None) -> Path | None:
    """Return the cached snapshot folder, perhaps incomplete, or None; never uses the network."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        index = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    except errors.HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def _problem(repo: str, error: BaseException | None, otherwise: str) -> str:
    from huggingface_hub import errors

    if not _fetching:
        return f"not on this machine; --allow-download fetches what a picture was drawn with, or {otherwise}"

    while error is not None and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__
    status = error.response.status_code if error is not None and error.response is not None else None
    gated = isinstance(error, errors.GatedRepoError)
    if gated or status in (401, 403):
        obstacle = "this model is gated" if gated else "no such model (see the spelling), or gated or private"
        return (
            f"{obstacle}: accept its licence at https://huggingface.co/{repo}, make an access token (a password "
            "for programs) at https://huggingface.co/settings/tokens, and give it to `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such model on the Hub, and no such folder here; check the spelling"
    if status is not None:
        return f"the Hub answered with HTTP status {status}; try again later"
    return "not on this machine, and the Hub cannot be reached: check the network (and HF_HUB_OFFLINE), or " + otherwise
