"""An on-disk store of tensors under content-based keys, independent of models.

Entries are in immutable shards: safetensors files that get their names only when complete. Any number of processes may
read and write concurrently; a killed writer loses only unflushed entries. Each entry has a digest, which is checked at
the first read; earlier versions wrote none. A shard with a damaged entry is renamed to `*.damaged`, and all of its
entries count as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sd3tune.data.store_lock import LOCK_FILES, alone, use
from sd3tune.errors import RunError
from sd3tune.files.atomic import FULL, TEMPORARY, remove_stale, write_bytes
from sd3tune.files.json import parse_object
from sd3tune.files.tensor_header import MOST_BYTES, read_header
from sd3tune.files.tensors import digest
from sd3tune.reporting import escaped

SHARD_BYTES = 64 * 2**20
FLUSH_SECONDS = 30.0
CHECKED_BYTES = 2 * 2**30
"""Number of bytes that `Store.check` reads, in about a second; other entries are checked at their first read."""
_PREFIX, _SUFFIX, _DAMAGED = "shard-", ".safetensors", ".damaged"
_DIGESTS = "digests"
"""Key of the entries' digests, as JSON, in a shard's metadata."""

logger = logging.getLogger(__name__)


def key(kind: str, **fields: Any) -> str:
    """Return the SHA-256, in hex, of the fields as canonical JSON: equal fields have equal keys on every machine."""
    canonical = json.dumps({"kind": kind, **fields}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    shard: Path
    names: list[str]
    nbytes: int
    digest: str | None


class Store:
    """The entries under `root` at the last `refresh`, and entries written through this object since.

    While the object exists, it counts as a user of the folder, which prevents `survey.remove` from deleting files.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._index: dict[str, Entry] = {}
        self._shards: set[Path] = set()
        self._unreadable: set[Path] = set()
        self._open: dict[Path, Any] = {}
        self._sound: set[str] = set()
        self._noted: dict[str, tuple[str, dict[str, torch.Tensor]]] = {}
        self._lock = threading.Lock()
        self._locked = False
        self._share()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def damaged(self) -> bool:
        """True if a shard was found that cannot be read."""
        return bool(self._unreadable)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Return the keys without an entry, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def nbytes(self, keys: Iterable[str]) -> int:
        """Return the bytes of the tensors under these keys. Raises KeyError for a missing key."""
        return sum(self._index[key].nbytes for key in dict.fromkeys(keys))

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """Return the tensors of an entry, on the CPU, memory-mapped: do not change them in place. Thread-safe.

        Raises KeyError for a key without an entry, and RunError if its shard was deleted or the entry is damaged.
        """
        if key in self._noted:
            of, noted = self._noted[key]
            return {**self._stored(of), **noted}
        return self._stored(key)

    def note(self, key: str, of: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let `get(key)` return the entry `of` with further tensors, which are in memory only."""
        self._noted[key] = of, dict(tensors)

    def _stored(self, key: str) -> dict[str, torch.Tensor]:
        entry = self._index[key]
        tensors = self._read(key, entry)
        if entry.digest is not None and key not in self._sound:
            if entry.digest != _digest(key, tensors):
                self._set_aside(entry.shard)
                raise RunError(f"{entry.shard}: damaged on the disk; run again (with --resume) to encode it again")
            self._sound.add(key)
        return tensors

    def check(self, keys: Iterable[str], nbytes: int = CHECKED_BYTES) -> list[str]:
        """Check entries against their digests, up to `nbytes` in all. Return the keys whose entries are lost.

        A damaged entry is lost together with all other entries in its shard.
        """
        present = [key for key in dict.fromkeys(keys) if key in self._index]
        for key in present:
            entry = self._index.get(key)
            if entry is None or entry.digest is None or key in self._sound:
                continue
            nbytes -= entry.nbytes
            if nbytes < 0:
                break
            try:
                self.get(key)
            except RunError:
                self._set_aside(entry.shard)
        return [key for key in present if key not in self._index]

    def _set_aside(self, shard: Path) -> None:
        """Drop a damaged shard from the index, and rename it if possible, so that no process uses it again."""
        with contextlib.suppress(OSError):
            shard.replace(shard.with_suffix(_DAMAGED))
        self._unreadable.add(shard)
        self._open.pop(shard, None)
        self._index = {key: entry for key, entry in self._index.items() if entry.shard != shard}

    def _read(self, key: str, entry: Entry) -> dict[str, torch.Tensor]:
        try:
            with self._lock:
                shard = self._open.get(entry.shard)
                if shard is None:
                    shard = self._open[entry.shard] = safe_open(str(entry.shard), framework="pt", device="cpu")
                    with contextlib.suppress(OSError):
                        os.utime(entry.shard)  # the age then shows the last use
            return {name: shard.get_tensor(f"{key}/{name}") for name in entry.names}
        except (OSError, SafetensorError) as error:
            raise RunError(f"{entry.shard}: cannot be read any more ({error}); run again to encode it anew") from None

    def refresh(self) -> None:
        """Add the shards that other processes have finished to the index; warn of unreadable shards."""
        try:
            found = [path for path in shards_in(self.root) if path not in self._shards]
        except OSError as error:
            raise RunError(f"{self.root}: cannot be listed ({error.strerror}); check data.cache_dir") from None
        for path in found:
            self._take_in(path)

    def _take_in(self, path: Path) -> None:
        self._shards.add(path)
        try:
            entries = read_index(path)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._unreadable.add(path)
            logger.warning(
                "%s",
                escaped(f"{path}: passed over ({error}); what it held is encoded again, the file can be deleted"),
            )
            return
        for key, entry in entries.items():
            self._index.setdefault(key, entry)

    @contextlib.contextmanager
    def writer(self, shard_bytes: int = SHARD_BYTES, flush_seconds: float = FLUSH_SECONDS) -> Iterator[Writer]:
        """Yield a writer, which flushes at `shard_bytes`, after `flush_seconds`, and at the end, also after an error.

        Raises RunError, naming the folder, if it cannot be written; no partial file remains.
        """
        with _disk_trouble(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        self._share()
        remove_stale(self.root)
        writer = Writer(self, shard_bytes, flush_seconds)
        try:
            yield writer
        finally:
            writer.flush()

    def _share(self) -> None:
        """Lock the folder as a user once it exists; do without the lock if no lock file can be created."""
        if self._locked or not self.root.is_dir():
            return
        with contextlib.suppress(OSError):
            weakref.finalize(self, use(self.root).release, force=True)
            self._locked = True


class Writer:
    """Writer of entries, a shard at a time; made by `Store.writer`."""

    def __init__(self, store: Store, shard_bytes: int, flush_seconds: float) -> None:
        self._store = store
        self._shard_bytes, self._flush_seconds = shard_bytes, flush_seconds
        self._buffer: dict[str, torch.Tensor] = {}
        self._digests: dict[str, str] = {}
        self._buffered_bytes = 0
        self._flushed_at = time.monotonic()

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an entry, with copies of the tensors. An existing entry is not changed."""
        if key in self._store:
            return
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        self._buffer |= {f"{key}/{name}": tensor for name, tensor in copies.items()}
        self._digests[key] = _digest(key, copies)
        self._buffered_bytes += sum(tensor.nbytes for tensor in copies.values())
        overdue = time.monotonic() - self._flushed_at > self._flush_seconds
        if overdue or self._buffered_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write all entries so far to disk, so that other processes and the store can read them."""
        buffer, self._buffer, self._buffered_bytes = self._buffer, {}, 0
        digests, self._digests = self._digests, {}
        self._flushed_at = time.monotonic()
        if not buffer:
            return
        shard = self._store.root / f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"
        with _disk_trouble(self._store.root):
            write_bytes(shard, save(buffer, metadata={_DIGESTS: json.dumps(digests)}))
        self._store._take_in(shard)


@contextlib.contextmanager
def _disk_trouble(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RunError) as error:
        cause = error.__cause__ if isinstance(error, RunError) else error
        if not isinstance(cause, OSError):
            raise
        raise _unwritable(folder, cause) from None


def _unwritable(folder: Path, cause: OSError) -> RunError:
    full = cause.errno in FULL
    way_out = "free some space or set data.cache_dir to another disk" if full else "set data.cache_dir elsewhere"
    return RunError(f"{folder}: cannot be written ({cause.strerror or cause}); {way_out}")


@contextlib.contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """Lock the folder of a store exclusively. Raises RunError if any process has a `Store` there, even this one."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(alone(root))
        except Timeout:
            raise RunError(f"{root}: a run is using this store; try again when it has ended") from None
        except OSError as error:
            raise _unwritable(root, error) from None
        yield


def is_store(root: Path) -> bool:
    """Return True if the folder was ever used as a store."""
    return any((root / name).exists() for name in LOCK_FILES) or bool(shards_in(root))


def shards_in(root: Path) -> list[Path]:
    """Return the shards: the files with entries."""
    return sorted(root.glob(f"{_PREFIX}*{_SUFFIX}"))


def damaged_in(root: Path) -> list[Path]:
    """Return the damaged shards that were renamed."""
    return sorted(root.glob(f"{_PREFIX}*{_DAMAGED}"))


def temporaries_in(root: Path) -> list[Path]:
    """Return the temporary files of writers; if no store is open, they are left over."""
    return sorted(root.glob(f"{TEMPORARY}*"))


def read_index(shard: Path) -> dict[str, Entry]:
    """Return the entries of a shard from its header alone. Raises ValueError unless it is a complete shard."""
    header = read_header(shard)
    digests = parse_object(header.metadata.get(_DIGESTS, "{}"), MOST_BYTES)
    names: dict[str, list[str]] = {}
    nbytes: dict[str, int] = {}
    for full_name, tensor in header.tensors.items():
        key, slash, name = full_name.rpartition("/")
        if not slash:
            raise ValueError(f"holds {full_name!r}, which is not an entry")
        first, last = tensor["data_offsets"]
        names.setdefault(key, []).append(name)
        nbytes[key] = nbytes.get(key, 0) + last - first
    return {key: Entry(shard, found, nbytes[key], digests.get(key)) for key, found in names.items()}


def _digest(key: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the digest of an entry. It includes the key, so that swapped entries count as damaged."""
    parts = [f"{name} {digest(tensors[name])}" for name in sorted(tensors)]
    return xxhash.xxh3_128_hexdigest("\n".join([key, *parts]).encode())
