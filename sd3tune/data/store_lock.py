"""Who uses a store's folder: any number of processes at once, or one alone that removes files.

A portable lock has one holder. So each user locks a file of its own, the first `user-N.lock` that is free, and a
removal locks all of them. Both enter by `gate.lock`, which a removal keeps until it is done. The system drops the locks
of a process that ends; the files stay, and are used again. Earlier versions share a lock on `store.lock`, which a
removal holds as well.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_GATE, _EARLIER = "gate.lock", "store.lock"
LOCK_FILES = (_GATE, _EARLIER)
"""Each folder that was ever used as a store has one of them."""


def use(root: Path) -> FileLock:
    """Take part in the use of the folder until the returned lock is released. Waits for a removal, which is brief.

    Raises OSError where no lock file can be made.
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
    """Use the folder alone. Raises Timeout when anybody uses it, this process included, and OSError as `use` does."""
    with FileLock(root / _GATE), contextlib.ExitStack() as held:
        for path in (root / _EARLIER, *sorted(root.glob("user-*.lock"))):
            held.enter_context(FileLock(path, blocking=False))
        yield
