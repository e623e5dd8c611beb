"""Printed commands work as they stand, whatever the shell knows."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sd3tune.invocation import command_line


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment `tmp_path/my env` with an interpreter and a script, none of it on PATH; its folder of programs."""
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    for name in ("python3", "sd3tune"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} $@\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python3"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return programs


def in_a_shell(command: str) -> str:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def test_an_activated_environment_is_called_by_name(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}/usr/bin:/bin")
    assert command_line("sd3tune", "doctor") == "sd3tune doctor"
    assert command_line("hf", "auth", "login") == "hf auth login"


def test_another_environments_program_is_not_taken_for_ours(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "sd3tune").symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{other}{os.pathsep}/usr/bin:/bin")
    assert command_line("sd3tune", "doctor") == "'my env/bin/sd3tune' doctor"


def test_without_it_the_path_is_given_from_where_the_user_is(
    environment: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command_line("sd3tune", "doctor") == "'my env/bin/sd3tune' doctor"
    assert in_a_shell(command_line("sd3tune", "infer", "--prompt", "it's")) == "sd3tune infer --prompt it's"
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert command_line("sd3tune", "doctor") == f"{shlex.quote(str(environment / 'sd3tune'))} doctor"
    assert in_a_shell(command_line("sd3tune", "doctor")) == "sd3tune doctor"


def test_without_a_script_the_module_is_run(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (environment / "sd3tune").unlink()
    assert in_a_shell(command_line("sd3tune", "doctor")) == "python3 -m sd3tune doctor"
    monkeypatch.setenv("PATH", f"{environment}{os.pathsep}/usr/bin:/bin")
    assert command_line("sd3tune", "doctor") == "python3 -m sd3tune doctor"
    assert command_line("tensorboard", "--logdir", "my runs") == "tensorboard --logdir 'my runs'"
