"""*Share*: the card, what goes up, push, conversion and downloads."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sd3tune.files.png_recipe import save_png
from sd3tune.publish.files import files_of_run
from sd3tune.ui.card import as_html, read_card
from tests.upload_hub import WRITER, upload_hub

OpenPage = Callable[..., TestClient]
WRITTEN = Path(__file__).parents[1] / "compat" / "written" / "lora"
CARD = """---
license: other
widget:
  - text: a "sks" <b>dog</b>
    output: {url: samples/step-000003-0.png}
  - text: stolen
    output: {url: "https://evil.example/y.png"}
---
# rex

<Gallery />

![first](samples/step-000003-0.png) ![away](https://evil.example/x.png) ![up](../../secret.png)

<script>alert(1)</script> <img src=x onerror=alert(1)>

[good](https://huggingface.co) [bad](javascript:alert(1)) [data](data:text/html,x) [sheet](samples/over_time.png)
[up](../x.png) [file](run.json) [host](//evil.example/x.png)

| a | b |
| --- | --- |
| 1 | 2 |
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An opened folder with the run `runs/rex`, its card and a preview."""
    opened = tmp_path / "opened"
    run = opened / "runs" / "rex"
    shutil.copytree(WRITTEN, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("{here}", str(WRITTEN.parent)))
    (run / "README.md").write_text(CARD)
    (run / "samples").mkdir()
    recipe = '{"prompt": "a dog", "steps": 4, "guidance": 2.5, "seed": 3, "weights": "raw"}'
    save_png(Image.new("RGB", (8, 8)), run / "samples" / "step-000003-0.png", recipe)
    Image.new("RGB", (8, 8)).save(run / "samples" / "mine.png")
    return opened


@pytest.fixture
def without_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def share(page: TestClient, run: str = "runs/rex") -> dict[str, Any]:
    answer: dict[str, Any] = page.get("/api/share", params={"run": run}).json()
    return answer


def test_the_card_is_rendered_without_anything_that_runs(folder: Path, open_page: OpenPage) -> None:
    shown = share(open_page(folder))
    card = shown["card"]
    assert shown["header"].startswith("license: other\n")
    assert "<h1>rex</h1>" in card
    assert "<td>2</td>" in card
    assert 'src="/api/picture?path=runs%2Frex%2Fsamples%2Fstep-000003-0.png"' in card
    assert card.count("<img") == 2
    assert "<figcaption>a &quot;sks&quot; &lt;b&gt;dog&lt;/b&gt;</figcaption>" in card
    assert "<em>stolen</em>" in card
    assert 'href="/api/picture?path=runs%2Frex%2Fsamples%2Fover_time.png"' in card
    assert "&lt;script&gt;" in card
    assert "<script" not in card
    assert "javascript:" not in card.replace("[bad](javascript:alert(1))", "")
    assert "evil.example" not in card
    assert 'href="https://huggingface.co" target="_blank" rel="noopener noreferrer"' in card
    assert card.count("href=") == 2


@pytest.mark.parametrize("text", ["", "no header\n", "---\nopen\n", "---\na: 1\n---\nrest\n"])
def test_a_card_keeps_all_of_its_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    header, markdown = read_card(tmp_path / "README.md")
    assert (header, markdown) == (("a: 1", "rest\n") if "rest" in text else ("", text))
    assert read_card(tmp_path / "missing") == ("", "")
    assert as_html("", "![x](a.png)", "") == "<p><em>x</em></p>\n"


def test_what_goes_up_is_what_a_push_sends(folder: Path, open_page: OpenPage) -> None:
    shown = share(open_page(folder))
    sent = files_of_run(folder / "runs" / "rex")
    assert [one["name"] for one in shown["uploads"]] == list(sent)
    assert "adapter/pytorch_lora_weights.safetensors" in sent
    assert shown["left_out"] == ["samples/mine.png"]
    assert all(one["size"] > 0 for one in shown["uploads"])


@pytest.mark.usefixtures("without_token")
def test_a_missing_token_is_said(folder: Path, open_page: OpenPage) -> None:
    token = share(open_page(folder))["token"]
    assert token["ready"] is False
    assert "hf auth login" in token["text"]


def test_a_token_is_never_shown(folder: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    shown = share(open_page(folder))
    assert shown["token"]["ready"] is True
    assert "hf_secret" not in json.dumps(shown)


def test_conversion_starts_at_once_into_a_free_name(
    folder: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd3tune.ui.jobs.Jobs._start", lambda self, job: None)
    page = open_page(folder)
    asked = {"run": "runs/rex", "weights": "runs/rex", "form": "comfyui"}
    job = page.post("/api/share/convert", json=asked).json()
    assert job["command"].endswith("lora convert runs/rex --to comfyui --out runs/rex/rex-comfyui.safetensors")
    assert job["queued"] is False
    (folder / "runs" / "rex" / "rex-comfyui.safetensors").touch()
    assert page.post("/api/share/convert", json=asked).json()["command"].endswith("rex-comfyui-2.safetensors")
    for wrong in ({"form": "nonsense"}, {"weights": "runs/other"}, {"run": "runs"}):
        assert page.post("/api/share/convert", json={**asked, **wrong}).status_code == 422
    assert page.post("/api/share/convert", json={**asked, "run": "../x"}).status_code == 403


def test_push_names_repository_and_thumbnail(
    folder: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd3tune.ui.jobs.Jobs._start", lambda self, job: None)
    page = open_page(folder)
    preview = "runs/rex/samples/step-000003-0.png"
    asked = {"run": "runs/rex", "repo_id": "user/rex", "thumbnail": preview}
    command = page.post("/api/share/push", json=asked).json()["command"]
    assert command.endswith(f"hub push runs/rex --repo-id user/rex --thumbnail {preview}")
    assert page.post("/api/share/command", json=asked).json()["command"] == command
    missing = page.post("/api/share/command", json={"run": "runs/rex"}).json()
    assert missing == {"command": None, "problems": ["Write the repository, such as user/name."]}
    assert page.post("/api/share/push", json={**asked, "repo_id": "--private"}).status_code == 422
    assert page.post("/api/share/push", json={**asked, "thumbnail": "runs/rex/run.json"}).status_code == 422
    assert page.post("/api/share/push", json={**asked, "thumbnail": "/etc/passwd"}).status_code == 403


@pytest.mark.long
def test_a_push_from_the_page_sends_what_the_page_showed(
    folder: Path, open_page: OpenPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real command, to a Hub on this machine; its log is the page's."""
    with upload_hub() as server:
        for name, value in {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        page = open_page(folder)
        shown = share(page)
        assert shown["token"]["ready"] is True
        asked = {"run": "runs/rex", "repo_id": "user/rex", "thumbnail": "runs/rex/samples/step-000003-0.png"}
        job = page.post("/api/share/push", json=asked).json()
        until = time.monotonic() + 300
        while job["state"] == "running" and time.monotonic() < until:
            time.sleep(0.2)
            job = page.get("/api/jobs/log", params={"id": job["id"]}).json()
        log = job["log"]
        assert job["state"] == "done", log
        assert f"{server.url}/user/rex" in log
        assert WRITER not in log
        sent = server.repositories["user/rex"].files
    assert server.repositories["user/rex"].private is True
    assert {*sent} - {".gitattributes"} == {one["name"] for one in shown["uploads"]}


def test_a_run_named_like_an_option_is_none(folder: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3tune.ui.jobs.Jobs._start", lambda self, job: None)
    shutil.copytree(WRITTEN, folder / "--repo-id=evil")
    job = open_page(folder).post("/api/share/push", json={"run": "--repo-id=evil", "repo_id": "user/rex"}).json()
    assert job["command"].endswith("hub push ./--repo-id=evil --repo-id user/rex")


def test_only_results_can_be_downloaded(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder)
    run = folder / "runs" / "rex"
    (run / "rex-kohya.safetensors").write_bytes(b"kohya")
    (run / "link.safetensors").symlink_to("/etc/passwd")
    names = [one["name"] for one in share(page)["results"]]
    assert {"adapter/pytorch_lora_weights.safetensors", "rex-kohya.safetensors", "README.md"} <= {*names}
    assert not {*names} & {"link.safetensors", "config.yaml"}

    def get(name: str, of: str = "runs/rex") -> Any:
        return page.get("/api/share/download", params={"run": of, "name": name})

    assert get("rex-kohya.safetensors").content == b"kohya"
    assert (
        'filename="rex.safetensors"' in get("adapter/pytorch_lora_weights.safetensors").headers["content-disposition"]
    )
    assert get("README.md").headers["content-disposition"].startswith("attachment")
    for name in ("metrics.jsonl", "../rex/metrics.jsonl", "/etc/passwd", "link.safetensors", "checkpoints"):
        assert get(name).status_code == 404
    assert get("README.md", "..").status_code == 403
