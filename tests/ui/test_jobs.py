"""Commands that the page starts, as real processes of the real command line."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sd3tune.errors import RunError
from sd3tune.ui.jobs import LOG, PASSWORD, Job, Jobs, stop
from sd3tune.ui.workspace import JOBS
from tests.ui.process import kill_jobs

SLEEP = """\
import os, signal, sys, time
print("begins", os.environ.get("SD3TUNE_UI_PASSWORD"), sys.argv[1:], flush=True)
try:
    time.sleep(float(sys.argv[2]))
except KeyboardInterrupt:
    print("stopped and saved", flush=True)
    sys.exit(130)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """Jobs of a program that sleeps, in the place of sd3tune, which takes seconds to start."""
    program = tmp_path / "program.py"
    program.write_text(SLEEP)
    monkeypatch.setattr("sd3tune.ui.jobs.program", lambda: [shutil.which("python3") or "python3", str(program)])
    yield Jobs(tmp_path / JOBS, tmp_path)
    kill_jobs(tmp_path)


def wait(for_it: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not for_it():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def in_state(job: Job, state: str) -> Callable[[], bool]:
    return lambda: job.state == state


def test_the_queue_runs_one_at_a_time_in_order(jobs: Jobs) -> None:
    first, second = jobs.add(["train", "0.2"], "First"), jobs.add(["train", "0"], "Second")
    assert [job.state for job in jobs.all()] == ["queued", "queued"]
    assert jobs.start_next() == first
    assert jobs.start_next() is None
    assert second.state == "queued"
    wait(in_state(first, "done"))
    assert Jobs(jobs.folder, jobs.where).start_next() == second  # of a page that was started anew
    wait(in_state(second, "done"))
    assert jobs.start_next() is None
    assert "begins None ['train', '0']" in (second.folder / LOG).read_text()


def test_a_job_outlives_the_page_and_is_found_again_and_stopped(jobs: Jobs, monkeypatch) -> None:
    monkeypatch.setenv(PASSWORD, "secret word")
    job = jobs.add(["train", "60"], "Long", in_queue=False)
    wait(lambda: (job.folder / LOG).exists() and "begins None" in (job.folder / LOG).read_text())
    again = Jobs(jobs.folder, jobs.where).find(job.id)
    assert again is not None
    assert again.state == "running"
    assert os.getsid(again.pid or 0) != os.getsid(0)  # a session of its own, so no Ctrl-C in the terminal reaches it
    with pytest.raises(RunError, match="stop it first"):
        jobs.remove(again)
    assert stop(again)
    wait(in_state(again, "stopped"))
    assert again.code == 130
    assert "stopped and saved" in (job.folder / LOG).read_text()
    assert not stop(again)
    jobs.remove(again)
    assert jobs.all() == []


def test_a_killed_command_has_failed_and_the_queue_goes_on(jobs: Jobs) -> None:
    killed, following = jobs.add(["train", "60"], "Killed"), jobs.add(["train", "0"], "Next")
    jobs.start_next()
    wait(lambda: killed.pid is not None and psutil.Process(killed.pid).children())
    psutil.Process(killed.pid).children()[0].kill()
    wait(in_state(killed, "failed"))
    assert killed.code == 137
    assert jobs.start_next() == following
    wait(in_state(following, "done"))


def test_a_job_whose_whole_session_is_gone_has_failed(jobs: Jobs) -> None:
    job = jobs.add(["train", "60"], "Gone", in_queue=False)
    wait(lambda: job.pid is not None and psutil.Process(job.pid).children())
    assert job.pid is not None
    shell = psutil.Process(job.pid)
    for process in [*shell.children(), shell]:
        process.kill()
    wait(in_state(job, "failed"))
    assert job.code is None
    (job.folder / "pid").write_text(str(os.getpid()))  # a number that another process has by now
    assert job.state == "failed"


def test_an_id_from_the_page_names_no_other_folder(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs.add(["train", "0"], "../Tïtle with / and <b>")
    assert job.folder.parent == jobs.folder
    for name in ("..", "../jobs", f"../jobs/{job.id}", "", "key", f"{job.id}/..", "x" * 30):
        assert jobs.find(name) is None
