"""`--quiet` and `--json`: options of every command, before it or after it, and of every process of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sd3tune.config import dump_config
from sd3tune.runtime import launch
from tests.conftest import Command, Finished

ORDERS = ["--json train {file}", "train --json {file}", "train {file} train.steps=2 --json"]


@pytest.fixture
def config_file(quick_config, tmp_path: Path) -> Path:
    file = tmp_path / "dog.yaml"
    file.write_text(dump_config(quick_config(tmp_path / "runs" / "dog", "name=dog", "train.steps=2")))
    return file


def objects(printed: str) -> list[dict]:
    return [json.loads(line) for line in printed.splitlines()]


def test_a_training_for_machines_is_objects_alone(command: Command, config_file: Path, tmp_path: Path) -> None:
    finished = command("--json", "train", config_file, "train.log_every=1")
    assert (finished.code, finished.err) == (0, "")
    found = objects(finished.out)
    assert {one["kind"] for one in found} == {"line", "progress", "result"}
    run = tmp_path / "runs" / "dog"
    (ended,) = (one for one in found if one["kind"] == "result")
    assert {name: ended[name] for name in ("product", "run", "steps")} == {
        "product": str(run / "adapter"),
        "run": str(run),
        "steps": 2,
    }
    steps = [one for one in found if one["kind"] == "progress" and one["text"] == "dog"]
    assert (steps[-1]["done"], steps[-1]["total"], steps[-1]["unit"]) == (2, 2, "step")
    assert steps[-1]["loss"] > 0

    again = command("train", config_file, "train.log_every=1", "--resume", "--json", "--quiet")
    (ended,) = objects(again.out)
    assert ended["kind"] == "result"
    assert ended["product"] == str(run / "adapter")


def test_a_quiet_training_prints_where_the_adapter_is(command: Command, config_file: Path, tmp_path: Path) -> None:
    finished = command("train", config_file, "--quiet")
    assert finished == Finished(0, f"adapter   {tmp_path / 'runs' / 'dog' / 'adapter'}\n", "")


@pytest.mark.parametrize("order", ORDERS)
def test_an_error_for_machines_is_an_object(order: str, command: Command, tmp_path: Path) -> None:
    finished = command(*order.format(file=tmp_path / "none.yaml").split())
    assert (finished.code, finished.err) == (2, "")
    (error,) = objects(finished.out)
    assert error["kind"] == "error"
    assert error["text"].startswith(f"{tmp_path / 'none.yaml'} does not exist")


def test_wrong_usage_is_an_object_too(command: Command) -> None:
    (error,) = objects(command("--json", "nonsense").out)
    assert error == {"kind": "error", "text": "no such command 'nonsense'; see `sd3tune --help`"}


def test_quiet_keeps_errors_and_what_was_asked_for(command: Command, config_file: Path, tmp_path: Path) -> None:
    assert command("train", tmp_path / "none.yaml", "--quiet").err.startswith("error: ")
    shown = command("config", "show", config_file)
    assert command("--quiet", "config", "show", config_file) == shown


@pytest.mark.parametrize("order", ORDERS)
def test_the_processes_of_a_command_get_the_option(
    order: str, command: Command, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    monkeypatch.setattr(launch, "_on_the_cpu", lambda count, arguments, restarts: started.extend(arguments) or 0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    command(*order.format(file=config_file).split(), "--num-processes", 2)
    assert started[1:] == order.format(file=config_file).split()


def test_what_follows_two_dashes_is_no_option(command: Command) -> None:
    finished = command("base", "path", "--", "--json")
    assert finished.err.startswith("error: ")
