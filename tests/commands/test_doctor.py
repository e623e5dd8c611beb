"""`doctor` reports what the machine has, and names each thing in the way with the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from sd3tune.commands import doctor
from sd3tune.commands.doctor import Findings, check_disks, check_environment, check_hub, check_versions, run_doctor
from sd3tune.errors import RunError

SECRET = "hf_thisIsNotToBeSeenByAnyone"


def test_it_runs_without_a_gpu_and_without_a_network_and_shows_no_secret(tmp_path: Path) -> None:
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": SECRET, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(
        [sys.executable, "-m", "sd3tune", "doctor"],
        env={**os.environ, **unreachable, "PYTHONPATH": str(Path(doctor.__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    topics = {line.split()[0] for line in lines if line}
    assert topics >= {"sd3tune", "python", "library", "extra", "cpu", "gpu", "token", "offline", "disk", "variable"}
    assert any(line.split() == ["library", "torch", metadata.version("torch")] for line in lines)
    assert any(line.startswith("token     present, from the environment") for line in lines)
    assert SECRET not in finished.stdout + finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_library_outside_its_range_is_a_problem_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "peft" else installed(name))
    found = Findings()
    check_versions(found)
    assert found.essential == []
    (problem,) = found.problems
    assert problem.startswith("peft 0.1 is outside the range that sd3tune supports: pip install 'peft")


def test_a_missing_library_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed = metadata.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(RunError, match=r"^safetensors is not installed: pip install 'safetensors[<>]") as caught:
        run_doctor()
    assert len(caught.value.problems) == 1
    assert "torch" in capsys.readouterr().out, "the report comes all the same"


def test_every_dependency_of_the_package_is_looked_at() -> None:
    found = Findings()
    check_versions(found)
    looked_at = {line.split()[1] for line in found.lines if line.startswith("library")}
    assert looked_at == doctor._requirements("").keys()
    assert {"torch", "diffusers", "transformers", "peft", "accelerate"} <= looked_at


def test_offline_flags_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    found = Findings()
    check_hub(found)
    assert "offline   TRANSFORMERS_OFFLINE: nothing is downloaded" in found.lines


def test_too_little_room_and_folders_that_cannot_be_written_are_problems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = [("encodings", tmp_path / "not" / "yet", 10**9, "use another disk")]
    monkeypatch.setattr(doctor, "_folders", lambda: iter(folders))
    found = Findings()
    check_disks(found)
    (problem,) = found.problems
    assert problem.startswith(f"{tmp_path}/not/yet: ")
    assert problem.endswith("GB free, and encodings can take 1000000000 GB; use another disk")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = Findings()
    check_disks(found)
    assert found.problems == [f"{tmp_path} is not writable, but encodings are stored there; use another disk"]


def test_a_leftover_world_size_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for value, expected in (("2", 1), ("1", 0)):
        monkeypatch.setenv("WORLD_SIZE", value)
        found = Findings()
        check_environment(found)
        assert len(found.problems) == expected
