"""`sd3tune cache ls` and `sd3tune cache prune`: list the contents of a store of encodings, and shrink it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sd3tune.config import load_config
from sd3tune.data.headers import Headers
from sd3tune.data.store import is_store
from sd3tune.data.survey import Names, StoreFile, remove, survey
from sd3tune.encode.manifest import Manifest
from sd3tune.encode.report import megabytes
from sd3tune.errors import RunError
from sd3tune.run.places import store_folder

_KINDS: dict[Names, str] = {
    ("mean", "std"): "images",
    ("mask",): "masks",
    ("hidden", "pooled"): "captions, CLIP",
    ("hidden",): "captions, T5",
}


def list_store(where: Path | None) -> list[str]:
    """Return lines that list the contents of a store; see `find_store` for `where`. Raises RunError."""
    root = find_store(where)
    files = survey(root)
    count, nbytes = Counter[str](), Counter[str]()
    for file in files:
        for names, number in file.entries.items():
            kind = _KINDS.get(names, "other")
            count[kind] += number
            nbytes[kind] += file.entry_bytes[names]
    lines = [f"store     {root}"]
    lines += [
        f"{kind:<15} {count[kind]:>8} {'entry ' if count[kind] == 1 else 'entries'} {megabytes(nbytes[kind]):>10}"
        for kind in (*_KINDS.values(), "other")
        if count[kind]
    ]
    for kind in ("temporary", "unreadable"):
        found = [file for file in files if file.kind == kind]
        if found:
            lines.append(f"{kind:<15} {_files(found):>16} {megabytes(_bytes(found)):>10}")
    shards = [file.idle_days for file in files if file.kind == "shard"]
    if shards:
        lines.append(f"last used       {_ago(min(shards))}, the oldest part {_ago(max(shards))}")
    total = f"{'in all':<15} {_files(files):>16} {megabytes(_bytes(files)):>10}"
    return [*lines, total] if files else [*lines, "empty"]


def prune_store(
    where: Path | None, *, older_than: float | None = None, everything: bool = False, yes: bool = False
) -> list[str]:
    """Remove unfinished and unreadable files, and files unused for `older_than` days or, with `everything`, all files.

    Returns lines that list the files. Without `yes`, this is a dry run. Raises RunError while a run uses the store.
    """
    if everything and older_than is not None:
        raise RunError("--all removes everything, so --older-than has no effect: give one of them")
    root = find_store(where)

    def unwanted(file: StoreFile) -> bool:
        return everything or file.kind != "shard" or (older_than is not None and file.idle_days > older_than)

    files = remove(root, unwanted) if yes else [file for file in survey(root) if unwanted(file)]
    if yes and everything:
        Manifest.forget(root)
        Headers.forget(root)
    lines = [f"store     {root}"]
    for kind in ("shard", "temporary", "unreadable"):
        found = [file for file in files if file.kind == kind]
        if found:
            count = sum(sum(file.entries.values()) for file in found)
            detail = f", {count} entries" if kind == "shard" else f", {kind}"
            lines.append(f"{'removed' if yes else 'to remove'}: {_files(found)}{detail}, {megabytes(_bytes(found))}")
    if not files:
        return [*lines, "nothing to remove"]
    return lines if yes else [*lines, "dry run: nothing was removed; add --yes to remove these files"]


def find_store(where: Path | None) -> Path:
    """Return the store at a folder, the store of a configuration, or by default the store of runs started here.

    Raises RunError when there is none.
    """
    if where is None:
        cache = os.environ.get("SD3TUNE_CACHE")
        root = Path(cache).expanduser().absolute() / "store" if cache else Path.cwd() / ".cache" / "sd3tune"
    elif where.is_dir():
        root = where.absolute()
    else:
        root = store_folder(load_config(where).config)
    if not root.is_dir():
        raise RunError(f"{root}: no store there; name its folder, or the configuration of a run that uses it")
    if not is_store(root):
        raise RunError(f"{root}: is not a store of encodings; name the folder that `sd3tune cache CONFIG` prints")
    return root


def _files(files: Sequence[StoreFile]) -> str:
    return f"{len(files)} file{'s' * (len(files) != 1)}"


def _bytes(files: Sequence[StoreFile]) -> int:
    return sum(file.nbytes for file in files)


def _ago(days: float) -> str:
    if days >= 1:
        return f"{days:.0f} day{'s' * (round(days) != 1)} ago"
    return f"{days * 24:.0f} h ago" if days * 24 >= 1 else "within the hour"
