"""Runs on the page: a real run folder, damaged ones, and one that grows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.ui.conftest import OpenPage

WRITTEN = Path(__file__).parents[1] / "compat" / "written" / "lora"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, in an opened folder."""
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "opened" / "runs" / "rex"
    shutil.copytree(WRITTEN, folder)
    (folder / "samples").mkdir(exist_ok=True)
    prompts = "[a <b>ball</b>, {prompt: a cube, size: 64}]"
    (folder / "config.yaml").write_text(f"preview: {{prompts: {prompts}}}\nmethod: {{rank: 4}}\n")
    for name in ("base-0", "step-000003-0", "step-000006-0"):
        Image.new("RGB", (64, 64), "teal").save(folder / "samples" / f"{name}.png")
    return folder


@pytest.fixture
def page(open_page: OpenPage, run: Path) -> TestClient:
    return open_page(run.parents[1])


def test_a_finished_run_is_shown(page: TestClient, run: Path) -> None:
    (listed,) = page.get("/api/runs").json()
    assert (listed["name"], listed["state"], listed["step"], listed["shown"]) == ("rex", "finished", 6, "runs/rex")
    named = {"run": str(run)}
    found = page.get("/api/run", params=named).json()
    assert (found["state"], found["base"], found["job"], found["memory"]) == ("finished", "tiny", None, None)
    assert found["resume"].endswith("train runs/rex/config.yaml --resume")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = page.get("/api/run/metrics", params=named).json()
    assert metrics["loss"] == [line["loss"] for line in lines]
    assert len(page.get("/api/run/held-out", params=named).json()) == 3
    previews = page.get("/api/run/previews", params=named).json()
    assert [(one["step"], one["name"]) for one in previews["pictures"]] == [
        (None, "base-0.png"), (3, "step-000003-0.png"), (6, "step-000006-0.png"),
    ]  # fmt: skip
    assert previews["prompts"] == ["a <b>ball</b>", "a cube"]
    assert page.get("/api/run/small", params={**named, "name": "samples/base-0.png"}).status_code == 200
    assert page.get("/api/run/picture", params={**named, "name": "samples/base-0.png"}).status_code == 200
    assert "rank:" in page.get("/api/run/config", params=named).json()["text"]
    assert page.get("/api/run/log", params=named).json() == {"log": None}


def test_only_new_metrics_are_read_and_a_rewritten_file_anew(page: TestClient, run: Path) -> None:
    file = run / "metrics.jsonl"
    first = page.get("/api/run/metrics", params={"run": str(run)}).json()
    assert first["reset"]
    with file.open("a") as appended:
        appended.write('{"step": 7, "loss": NaN, "lr": 0.1, "grad_norm": null}\nnot json\n{"step": 8, "lo')
    second = page.get("/api/run/metrics", params={"run": str(run), "at": first["at"]}).json()
    assert (second["reset"], second["step"], second["loss"]) == (False, [7], [None])
    text = file.read_text().splitlines(keepends=True)[:3]
    file.unlink()
    file.write_text("".join(text))
    third = page.get("/api/run/metrics", params={"run": str(run), "at": second["at"]}).json()
    assert (third["reset"], third["step"]) == (True, [1, 2, 3])
    file.unlink()
    assert page.get("/api/run/metrics", params={"run": str(run), "at": third["at"]}).json()["reset"]


def test_a_damaged_run_is_still_shown(page: TestClient, run: Path) -> None:
    for name in ("metrics.jsonl", "validation.jsonl", "config.yaml"):
        (run / name).write_bytes(b"\xff\x00{")
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text('{"rows": 3}')
    named = {"run": str(run)}
    for path in ("", "/metrics", "/held-out", "/previews", "/evaluation", "/log", "/config"):
        assert page.get(f"/api/run{path}", params=named).status_code == 200, path
    (run / "run.json").write_text("[]")
    assert page.get("/api/run", params=named).json()["begun"] is False


def test_an_evaluation_is_a_table(page: TestClient, run: Path) -> None:
    figure = {"mean": 0.512345, "low": None, "high": None}
    rows = [{"name": "base", "figures": {}}, {"name": "<b>last</b>", "figures": {"dino": {"subject": figure}}}]
    (run / "eval").mkdir()
    (run / "eval" / "eval.json").write_text(json.dumps({"rows": rows, "verdict": {"sentence": "good"}}))
    found = page.get("/api/run/evaluation", params={"run": str(run)}).json()["evaluation"]
    assert found["columns"] == ["", "subject, dino"]
    assert found["rows"] == [["base", "-"], ["<b>last</b>", "0.512"]]


def test_files_of_a_run_are_read_only_inside_it(page: TestClient, run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    shutil.copytree(run, secret / "rex")
    (run / "samples" / "link.png").symlink_to(secret / "rex" / "samples" / "base-0.png")
    for folder in (str(secret / "rex"), "../secret/rex", "/etc", "a\0b"):
        assert page.get("/api/run", params={"run": folder}).status_code == 403, folder
        assert page.get("/api/run/small", params={"run": folder, "name": "samples/base-0.png"}).status_code == 403
    for name in ("../../../secret/rex/samples/base-0.png", "/etc/hostname", "samples/link.png", "a\0b"):
        assert page.get("/api/run/small", params={"run": str(run), "name": name}).status_code == 403, name
    assert page.get("/api/run/picture", params={"run": str(run), "name": "run.json"}).status_code == 422


def test_a_run_of_this_user_elsewhere_is_shown_but_not_resumed(page: TestClient, run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "cat"
    shutil.copytree(run, elsewhere)
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "runs.txt").write_text(json.dumps(str(elsewhere)) + "\n")
    assert {one["name"] for one in page.get("/api/runs").json()} == {"rex", "cat"}
    assert page.get("/api/run", params={"run": str(elsewhere)}).json()["here"] is False
    assert page.get("/api/run/small", params={"run": str(elsewhere), "name": "samples/base-0.png"}).status_code == 200
    assert "resume it in a terminal" in page.post("/api/run/resume", json={"run": str(elsewhere)}).text


def test_resuming_queues_the_runs_own_command_once(page: TestClient, run: Path) -> None:
    job = page.post("/api/run/resume", json={"run": str(run)}).json()
    assert job["command"].endswith("sd3tune train runs/rex/config.yaml --resume")
    assert page.get("/api/run", params={"run": str(run)}).json()["job"]["state"] == "queued"
    assert page.post("/api/run/resume", json={"run": str(run)}).status_code == 422


def test_a_run_in_a_terminal_is_seen_with_its_memory(page: TestClient, run: Path) -> None:
    hold = "import sys, time, filelock as f; lock = f.FileLock(sys.argv[2]); lock.acquire(); print('held', flush=True)"
    hold = f"{hold}; time.sleep(60)"
    command = [sys.executable, "-c", hold, "sd3tune", str(run / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == "held\n"
        found = page.get("/api/run", params={"run": str(run)}).json()
        assert (found["state"], found["job"]) == ("running", None)
        assert found["memory"]["system"] > 10**6
        assert page.post("/api/run/resume", json={"run": str(run)}).status_code == 422
        trainer.kill()
    assert page.get("/api/run", params={"run": str(run)}).json()["state"] == "finished"
