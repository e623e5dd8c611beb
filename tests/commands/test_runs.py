"""`sd3tune runs` prints a table of runs and what to do with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sd3tune.run.folder import locked
from sd3tune.run.listing import remember_run
from tests.conftest import Command
from tests.run.test_listing import write_run


@pytest.fixture
def four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs in all four states, one of them elsewhere; the working directory."""
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    write_run(here / "runs" / "going on")
    write_run(here / "runs" / "done", step=20, saved=20, report={})
    (here / "runs" / "done" / "validation.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
    write_run(here / "runs" / "dead", saved=None)
    remember_run(write_run(tmp_path / "elsewhere", ended={"state": "stopped", "reason": None}))
    for age, run in enumerate((here / "runs" / "going on", here / "runs" / "done", here / "runs" / "dead")):
        for path in run.rglob("*"):
            os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.chdir(here)
    return here


def test_the_table_has_state_steps_and_the_next_command(four: Path, command: Command) -> None:
    with locked(four / "runs" / "going on"):
        done = command("runs")
    elsewhere = str(four.parent / "elsewhere")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert lines[0] == "run state steps best loss last active"
    assert lines[1].startswith(f"{elsewhere} stopped 7 of 20 - ")
    assert [line[: line.index(" - " if " - " in line else " 0.5")] for line in lines[2:5]] == [
        "runs/going on running 7 of 20", "runs/done finished 20 of 20", "runs/dead failed 7 of 20",
    ]  # fmt: skip
    assert "0.5000 at 10" in lines[3]
    assert lines[5:] == [
        "",
        "next:",
        f"stopped sd3tune train {elsewhere}/config.yaml --resume",
        "running sd3tune report 'runs/going on'",
        "finished sd3tune report runs/done",
        "failed sd3tune train runs/dead/config.yaml",
    ]


def test_programs_get_an_object_for_each_run(four: Path, command: Command) -> None:
    objects = [json.loads(line) for line in command("runs", "runs", "--json", "--quiet").out.splitlines()]
    assert [(one["folder"], one["state"], one["step"], one["steps"], one["best_loss"]) for one in objects] == [
        ("runs/going on", "failed", 7, 20, None),
        ("runs/done", "finished", 20, 20, 0.5),
        ("runs/dead", "failed", 7, 20, None),
    ]
    assert objects[0]["next"] == "sd3tune train 'runs/going on/config.yaml' --resume"


def test_no_runs_and_a_wrong_folder_say_what_to_do(tmp_path: Path, command: Command, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    assert command("runs").out == "no runs in runs or on the list of runs; start one: sd3tune train CONFIG\n"
    done = command("runs", "missing")
    assert (done.code, done.err) == (2, "error: missing: no such folder; name one that holds runs, such as runs\n")
