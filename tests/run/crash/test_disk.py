"""A disk that fills up, goes away or turns read-only in the middle of a run costs what the last checkpoint lacks.

The run says so in one line, and goes on with `--resume` when the disk is as it was.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sd3tune.training.checkpoint import list_checkpoints
from tests.forks import FORKS
from tests.mistakes.process import UNABLE, Unable, move_mount, obey_permissions, small_disk
from tests.run.crash.conftest import from_steps

RUN, AWAY = Path("work/run"), Path("work/away")
FULL = "cannot write here: No space left on device; free some space, and run the same command with --resume"
CLOSED = "cannot write here: Permission denied; make it writable, and run the same command with --resume"
GONE = "missing during training: moved, or its disk was unmounted; restore it, and run the same command with --resume"


@dataclass(frozen=True)
class Trouble:
    name: str
    at: tuple[str, str]
    """The audit event at which it happens, and the file's path; `step` there stands for the second checkpoint."""
    says: str
    before: Callable[[], object]
    """What the process has to do at its start."""
    happen: Callable[[], object]
    repair: Callable[[], object]


def fill() -> None:
    with open("work/filler", "wb", buffering=0) as filler:
        for size in (2**20, 2**12, 1):
            try:
                while filler.write(bytes(size)):
                    pass
            except OSError:
                continue


def permit(folder: int, file: int) -> None:
    for path in [RUN, *RUN.rglob("*")]:
        path.chmod(folder if stat.S_ISDIR(path.stat().st_mode) else file)


def mounted() -> None:
    RUN.mkdir()
    AWAY.mkdir()
    small_disk(str(RUN), "8m")


CHECKPOINT, LINE, ADAPTER, PICTURE = (
    ("os.mkdir", r"\.tmp-[0-9a-f]+-step-0+4$"),
    ("open", "metrics.jsonl$"),
    ("os.mkdir", "run/adapter$"),
    ("open", r"samples/\.tmp-[0-9a-f]+-step-0+4-0\.png$"),
)
TROUBLES = [
    Trouble("full at a checkpoint", CHECKPOINT, FULL, lambda: small_disk("work", "8m"), fill,
            lambda: os.unlink("work/filler")),
    Trouble("full at the end", ADAPTER, FULL, lambda: small_disk("work", "8m"), fill,
            lambda: os.unlink("work/filler")),
    Trouble("moved at a line", LINE, GONE, bool, lambda: RUN.rename(AWAY), lambda: AWAY.rename(RUN)),
    Trouble("moved at a picture", PICTURE, GONE, bool, lambda: RUN.rename(AWAY), lambda: AWAY.rename(RUN)),
    Trouble("moved at the end", ADAPTER, GONE, bool, lambda: RUN.rename(AWAY), lambda: AWAY.rename(RUN)),
    Trouble("unmounted at a line", LINE, GONE, mounted, lambda: move_mount(RUN, AWAY), lambda: move_mount(AWAY, RUN)),
    Trouble("read-only at a line", LINE, CLOSED, obey_permissions, lambda: permit(0o500, 0o400),
            lambda: permit(0o700, 0o600)),
    Trouble("read-only at a checkpoint", CHECKPOINT, CLOSED, obey_permissions, lambda: permit(0o500, 0o400),
            lambda: permit(0o700, 0o600)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TROUBLES)), ids=[trouble.name.replace(" ", "-") for trouble in TROUBLES])
def test_a_disk_in_trouble_costs_what_the_last_checkpoint_lacks(
    number: int, prepare, tmp_path: Path, straight: Path, assert_equal_workspaces
) -> None:
    folder = prepare(tmp_path / "here")
    process = FORKS.Process(target=story, args=(str(folder), number))
    process.start()
    process.join(120)
    printed = [(folder / name).read_text() for name in ("first", "second") if (folder / name).exists()]
    if process.exitcode == UNABLE:
        pytest.skip(f"this machine does not allow it: {printed}")
    assert process.exitcode == 0, printed
    first, second = printed
    (error,) = [line for line in first.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {folder / RUN}")
    assert TROUBLES[number].says in error
    assert "Traceback" not in first
    assert not (folder / "debris").exists()

    step = 4 if TROUBLES[number].at in (ADAPTER, PICTURE) else 2
    assert f"resuming from step-{step:06d}" in second
    shutil.rmtree(folder / "work")
    (folder / "after").rename(folder / "work")
    assert from_steps(folder / RUN) == [step]
    assert_equal_workspaces(straight, folder)


def story(folder: str, number: int) -> None:
    """In a process of its own, whose mounts and rights are seen by it alone: trouble, repair, resume, and copy out."""
    trouble = TROUBLES[number]
    os.chdir(folder)
    try:
        trouble.before()
    except Unable as reason:
        Path("first").write_text(str(reason))
        sys.exit(UNABLE)
    sys.addaudithook(when(*trouble.at, trouble.happen))
    assert command("first") == 2
    if trouble.says == GONE and RUN.exists() and (trouble.before is bool or any(RUN.iterdir())):
        Path("debris").touch()
    trouble.repair()
    assert command("second", "--resume") == 0
    shutil.copytree("work", "after", ignore=lambda folder, names: {"away"} & set(names))


def when(event: str, path: str, happen: Callable[[], object]) -> Callable[[str, tuple[object, ...]], None]:
    """A hook that calls `happen` once, at that event, when there is a checkpoint."""
    ready = [True]

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        if name != event or not ready or not isinstance(arguments[0], str | Path):
            return
        if re.search(path, os.fspath(arguments[0])) and list_checkpoints(RUN):
            ready.clear()
            happen()

    return hook


def command(log: str, *more: str) -> int:
    """`sd3tune train`; returns its exit code."""
    from sd3tune.cli.main import run

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["sd3tune", "train", "run.yaml", *more]
    try:
        run()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
