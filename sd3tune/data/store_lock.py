"""Locks on a store's folder: shared by any number of users, or exclusive for the removal of files.

A portable lock has one holder. So each user locks its own file, the first free `user-N.lock`, and a removal locks all
of them. Both first lock `gate.lock`, which a removal keeps until it is done. The system releases the locks of a process
that ends; the files remain and are reused. Earlier versions share a lock on `store.lock`, which a removal locks too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_GATE, _EARLIER = "gate.lock", "store.lock"
LOCK_FILES = (_GATE, _EARLIER)
"""Lock files; every folder that was ever used as a store has at least one."""


def use(root: Path) -> FileLock:
    """Lock the folder as one of its users, until the returned lock is released. Waits for a removal, which is brief.

    Raises OSError if no lock file can be created.
    """
    with FileLock(root / _GATE):
        for number in itertools.count():
            lock = FileLock(root / f"user-{number}.lock", blocking=False, thread_local=False)
            with contextlib.suppress(Timeout):
                lock.acquire()
                return lock
    raise AssertionError("unreachable")


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Lock the folder exclusively. Raises Timeout if any process, this one included, uses it, and OSError as `use`."""
    with FileLock(root / _GATE), contextlib.ExitStack() as held:
        for path in (root / _EARLIER, *sorted(root.glob("user-*.lock"))):
            held.enter_context(FileLock(path, blocking=False))
        yield
