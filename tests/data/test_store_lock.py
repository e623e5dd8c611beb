"""Users of a store and its removals exclude each other, in one process, in several, and in those of version 0.1.0."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import Timeout

from sd3tune.data.store_lock import alone, use

USER = "from pathlib import Path; from sd3tune.data.store_lock import use; lock = use(Path({root!r}))"
REMOVER = """
from pathlib import Path; from sd3tune.data.store_lock import alone; held = alone(Path({root!r})); held.__enter__()
"""
EARLIER = "import fcntl; file = open({root!r} + '/store.lock', 'a'); fcntl.flock(file, fcntl.LOCK_SH)"
"""What version 0.1.0 does while a run uses a store."""


@contextmanager
def another_process(code: str, root: Path) -> Iterator[subprocess.Popen[str]]:
    script = f"{code.format(root=str(root))}\nprint('held', flush=True); input()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def can_be_removed_from(root: Path) -> bool:
    try:
        with alone(root):
            return True
    except Timeout:
        return False


def test_users_share_and_a_removal_waits_for_none_of_them(tmp_path: Path) -> None:
    locks = [use(tmp_path) for _ in range(3)]
    for lock in locks:
        assert not can_be_removed_from(tmp_path)
        lock.release()
    assert can_be_removed_from(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("user-*")) == ["user-0.lock", "user-1.lock", "user-2.lock"]
    use(tmp_path).release()
    assert len(list(tmp_path.glob("user-*"))) == 3  # the files are used again


@pytest.mark.parametrize("code", [USER, EARLIER], ids=["today", "0.1.0"])
def test_another_process_is_respected_until_it_is_killed(code: str, tmp_path: Path) -> None:
    with another_process(code, tmp_path) as process:
        use(tmp_path).release()  # users never wait for each other
        assert not can_be_removed_from(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert can_be_removed_from(tmp_path)


def test_a_user_waits_for_a_removal_in_another_process(tmp_path: Path) -> None:
    entered: list[object] = []
    waiting = threading.Thread(target=lambda: entered.append(use(tmp_path)))
    with another_process(REMOVER, tmp_path) as process:
        waiting.start()
        waiting.join(0.3)
        assert not entered
        process.kill()
        waiting.join(30)
    assert len(entered) == 1
    assert not can_be_removed_from(tmp_path)


def test_a_removal_is_seen_by_version_0_1_0(tmp_path: Path) -> None:
    with alone(tmp_path), (tmp_path / "store.lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_lock_that_nobody_refers_to_is_dropped(tmp_path: Path) -> None:
    lock = use(tmp_path)
    assert not can_be_removed_from(tmp_path)
    del lock
    gc.collect()
    assert can_be_removed_from(tmp_path)
