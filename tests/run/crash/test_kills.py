"""Real processes, killed with signal 9 again and again, end in what one that was never stopped ends in."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sd3tune.config import dump_config
from sd3tune.training.checkpoint import list_checkpoints
from tests.run.crash.attempts import Attempt
from tests.run.crash.conftest import begun_from, from_steps, steps_of

SIZE = {"images": 4, "steps": 16}
COMMAND = ("train", "run.yaml", "--resume")


@dataclass(frozen=True)
class Kill:
    """Comes when there are `count` files of that pattern below `work`, or, of metrics, so many lines."""

    pattern: str
    count: int = 1
    lost: str | None = None
    """A folder below `work` that is removed first, so that it is filled again in a run that has trained already."""
    installed: bool = False
    """The installed command, rather than a fork."""

    def found(self, work: Path) -> set[Path]:
        return set(work.glob(self.pattern))

    def has_come(self, work: Path, earlier: set[Path]) -> bool:
        """`earlier`: what was `found` before this attempt, some of it left by killed ones."""
        if self.pattern == "lines":
            file = work / "run" / "metrics.jsonl"
            return file.exists() and file.read_bytes().count(b"\n") >= self.count
        return len(self.found(work) - earlier) >= self.count


SHARDS, DRAWN, SAVED = "store/shard-*", "class/class-*", "run/checkpoints/step-*"
SAVING, PICTURE = "run/checkpoints/.tmp-*-step-*", "run/samples/.tmp-*-step-*"
BEFORE_A_CHECKPOINT = [Kill(SHARDS, 2), Kill(DRAWN, 2)]
KILLS = [
    Kill(SAVED),
    *(Kill(SHARDS, count, lost="store") for count in (1, 2, 3, 4, 5)),
    Kill(SHARDS, 2, lost="store", installed=True),
    *(Kill(DRAWN, count, lost="class") for count in (1, 2, 3)),
    *(Kill("lines", count) for count in (5, 7, 10)),
    Kill("lines", 12, installed=True),
    *(Kill(SAVING) for _ in range(3)),
    Kill(SAVING, installed=True),
    *(Kill(PICTURE) for _ in range(2)),
]
"""Twenty moments, over encoding, class images, training, checkpoints and previews."""
FEW = [Kill(SAVED), Kill(SHARDS, 3, lost="store"), Kill("lines", 5), Kill("lines", 12, installed=True), Kill(SAVING),
       Kill(PICTURE)]  # fmt: skip


def newest(run: Path) -> int:
    return max((int(path.name[-6:]) for path in list_checkpoints(run)), default=0)


def wait_for(come: Callable[[], bool], alive: Callable[[], bool]) -> None:
    while not come():
        assert alive(), "it ended before the moment came"
        time.sleep(0.0005)


@pytest.mark.parametrize("kills", [FEW, pytest.param(KILLS, marks=pytest.mark.long)], ids=["six", "twenty"])
def test_killed_at_many_moments_it_ends_as_one_never_stopped(
    kills: list[Kill], prepare, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, start_cli,
    assert_equal_workspaces,
) -> None:  # fmt: skip
    straight = prepare(tmp_path_factory.mktemp("straight"), **SIZE)
    uninterrupted = Attempt(straight)
    folder = prepare(tmp_path / "killed", **SIZE)
    run = folder / "work" / "run"
    begun = []
    for kill in [*BEFORE_A_CHECKPOINT, *kills]:
        saved = newest(run)
        if kill.lost:
            shutil.rmtree(folder / "work" / kill.lost)
        earlier = kill.found(folder / "work")
        if kill.installed:
            process = start_cli(*COMMAND, cwd=folder)
            wait_for(lambda: kill.has_come(folder / "work", earlier), lambda: process.poll() is None)  # noqa: B023
            process.kill()
            printed, code = process.communicate()[0], process.returncode
        else:
            attempt = Attempt(folder, "--resume")
            wait_for(lambda: kill.has_come(folder / "work", earlier), attempt.process.is_alive)  # noqa: B023
            os.kill(attempt.pid, signal.SIGKILL)
            code, printed = attempt.end()
        assert code == -signal.SIGKILL, printed
        begun += [saved] * ("resuming from" in printed)
        assert begun_from(printed) in (0, saved)
        assert newest(run) > 0 or kill in BEFORE_A_CHECKPOINT

    code, printed = Attempt(folder, "--resume").end()
    assert code == 0, printed
    assert begun_from(printed) > 0
    assert from_steps(run) == [*begun, begun_from(printed)]
    assert steps_of(run / "metrics.jsonl") == list(range(1, SIZE["steps"] + 1))
    assert uninterrupted.end().code == 0
    assert_equal_workspaces(straight, folder)


@pytest.mark.long
def test_one_of_two_processes_is_killed(quick_config, tmp_path: Path, start_cli, assert_equal_runs) -> None:
    def start(name: str, *more: str):
        config = quick_config(tmp_path / name, "train.steps=8", "checkpoint.every=2", "ema={decay: 0.8}")
        (tmp_path / f"{name}.yaml").write_text(dump_config(config))
        return start_cli("train", tmp_path / f"{name}.yaml", "--num-processes", "2", *more)

    straight, process, metrics = start("straight"), start("killed"), tmp_path / "killed" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(steps_of(metrics)) >= 3, lambda: process.poll() is None)
    os.kill(second_of(process.pid), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "error: --num-processes 2: a process ended with exit code -9" in errors
    assert "run the same command with --resume to continue from the last checkpoint" in errors
    again = start("killed", "--resume")
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert begun_from(printed) >= 2
    assert from_steps(tmp_path / "killed") == [begun_from(printed)]
    assert steps_of(metrics) == list(range(1, 9))
    assert straight.wait() == 0
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")


def second_of(launcher: int) -> int:
    """The process of rank 1 that the launcher started."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"\0RANK=1\0" in status.with_name("environ").read_bytes():
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError("the launcher has no second process")
