"""*Try*: the form's command, the recipe as a form, and what is refused."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sd3tune.cli.main import app
from sd3tune.files.png_recipe import save_png
from sd3tune.inference.job import InferenceJob
from sd3tune.sampling.samplers import SAMPLERS
from sd3tune.ui import drawing
from sd3tune.ui.workspace import Workspace

OpenPage = Callable[..., TestClient]
WRITTEN = Path(__file__).parents[1] / "compat" / "written" / "lora"
PICTURE = "runs/rex/images/lora.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An opened folder with the run `runs/rex`, which has a checkpoint and drew a picture, and a secret beside it."""
    opened = tmp_path / "opened"
    shutil.copytree(WRITTEN, opened / "runs" / "rex")
    shutil.copytree(WRITTEN / "adapter", opened / "runs" / "rex" / "checkpoints" / "step-000003" / "adapter")
    shutil.copytree(WRITTEN, tmp_path / "secret")
    return opened


def asked(page: TestClient, **values: Any) -> dict[str, Any]:
    answer: dict[str, Any] = page.post("/api/try/command", json={"values": values}).json()
    return answer


def job_of(command: str, monkeypatch: pytest.MonkeyPatch) -> InferenceJob:
    """The job that the command line makes of a printed command."""
    jobs: list[InferenceJob] = []
    monkeypatch.setattr("sd3tune.commands.infer.run_infer", lambda job: jobs.append(job) or [])
    program, *words = shlex.split(command)
    assert program.endswith("sd3tune")
    app(words, standalone_mode=False)
    return jobs[0]


def test_the_printed_command_asks_for_what_the_form_says(
    folder: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(folder)
    prompt = 'it\'s a "dog"; $(rm -rf .) & --seed\n<b>5'
    answer = asked(
        page, loras=["runs/rex@0.8"], prompt=prompt, seed="7", size="64x32", steps="", before=False, out="images",
        grid=["weight=0,0.5", "guidance=1|2"], negative="--help", t5=None, offload=True, num="1",
    )  # fmt: skip
    assert answer["problems"] == []
    job = job_of(answer["command"], monkeypatch)
    assert job.given == {"prompt": prompt, "negative": "--help", "seed": 7, "size": (64, 32)}
    assert job.loras == ["runs/rex@0.8"]
    assert job.grid == ["weight=0,0.5", "guidance=1|2"]
    assert (job.before, job.memory.offload, job.num, job.t5) == (False, True, 1, None)
    assert "--steps" not in answer["command"]
    assert "--num" not in answer["command"]


def test_a_drawing_waits_in_the_queue_of_the_trainings(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder)
    job = page.post("/api/try/draw", json={"values": {"loras": ["runs/rex"], "prompt": "a dog"}}).json()
    assert (job["state"], job["queued"], job["title"]) == ("queued", True, "Draw a dog")
    assert job["command"].endswith("sd3tune infer --lora runs/rex --prompt 'a dog'")


def test_weights_of_all_kinds_are_offered(folder: Path, open_page: OpenPage) -> None:
    for kind, file in (("embedding", "learned_embeds.safetensors"), ("model", "model_index.json")):
        run = folder / "runs" / kind
        (run / kind).mkdir(parents=True)
        shutil.copy(WRITTEN / "run.json", run)
        (run / kind / file).write_text("{}")
    shutil.copy(WRITTEN / "adapter" / "pytorch_lora_weights.safetensors", folder / "loose.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no header")
    shutil.copytree(folder / "runs" / "rex", folder / "runs" / "away")
    shutil.rmtree(folder / "runs" / "away" / "adapter")
    (folder / "runs" / "away" / "adapter").symlink_to(folder.parent / "secret" / "adapter")
    found = {one["name"]: one["weights"] for one in open_page(folder).get("/api/try/sources").json()}
    assert [(one["path"], one["label"], one["kind"]) for one in found["rex"]] == [
        ("runs/rex", "final", "adapter"),
        ("runs/rex/checkpoints/step-000003", "step 3", "adapter"),
    ]
    assert found["rex"][0]["settings"]["base"] == "tiny"
    assert [(one["path"], one["kind"]) for one in found["model"]] == [("runs/model/model", "model")]
    assert [(one["path"], one["kind"]) for one in found["embedding"]] == [("runs/embedding", "embedding")]
    assert found["loose.safetensors"][0]["path"] == "loose.safetensors"
    assert not found.keys() & {"broken.safetensors", "away"}


def test_again_asks_for_nothing_that_the_recipe_says_already(
    folder: Path, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = open_page(folder)
    recipe = page.get("/api/try/recipe", params={"path": PICTURE}).json()
    assert recipe["command"].endswith(f"sd3tune infer --from {PICTURE}")
    assert ["base", "tiny"] in recipe["says"]
    assert [(one["place"], one["weight"]) for one in recipe["loras"]] == [("runs/rex", 1.0)]
    same = {**recipe["values"], "from_picture": recipe["path"], "out": "images"}
    assert asked(page, **same)["command"] == recipe["command"]
    changed = asked(page, **{**same, "seed": "11", "negative": "blur"})["command"]
    job = job_of(changed, monkeypatch)
    assert job.given == {"seed": 11, "negative": "blur"}
    assert job.from_picture == Path(PICTURE)


def test_a_text_of_the_recipe_can_be_cleared(tmp_path: Path) -> None:
    workspace = Workspace.opened_on([tmp_path])
    (tmp_path / "x.png").touch()
    words = drawing.words_of(workspace, {"from_picture": "x.png", "negative": ""}, {"negative": "blur", "seed": "3"})
    assert words == ["infer", "--from", "x.png", "--negative", ""]
    switched = drawing.words_of(workspace, {"from_picture": "x.png", "t5": False}, {"t5": True})
    assert switched == ["infer", "--from", "x.png", "--no-t5"]
    mended = drawing.words_of(workspace, {"from_picture": "x.png", "steps": "4"}, {"steps": "many"})
    assert mended == ["infer", "--from", "x.png", "--steps", "4"]


def test_a_preview_is_drawn_with_the_checkpoint_of_its_step(folder: Path, open_page: OpenPage) -> None:
    samples = folder / "runs" / "rex" / "samples"
    samples.mkdir()
    recipe = (
        '{"prompt": "a dog", "steps": 4, "guidance": 2.5, "seed": 3, "weights": "raw", "size": [64, 32],'
        ' "slg": {"scale": 2.8, "layers": [7, 8], "start": 0.01, "stop": 0.2}}'
    )
    for name in ("step-000003-0.png", "step-000004-0.png", "base-0.png"):
        save_png(Image.new("RGB", (8, 8)), samples / name, recipe)
    page = open_page(folder)

    def look(name: str) -> dict[str, Any]:
        found: dict[str, Any] = page.get("/api/try/recipe", params={"path": f"runs/rex/samples/{name}"}).json()
        return found

    kept = look("step-000003-0.png")
    assert kept["values"] == {
        "prompt": "a dog", "steps": "4", "guidance": "2.5", "seed": "3", "size": "64x32", "slg": "2.8",
        "slg_layers": "7,8", "slg_start": "0.01", "slg_stop": "0.2",
    }  # fmt: skip
    assert kept["loras"][0]["place"] == "runs/rex/checkpoints/step-000003"
    assert look("step-000004-0.png")["loras"][0]["place"] == "runs/rex"
    assert "Step 4 was not kept" in look("step-000004-0.png")["note"]
    assert look("base-0.png")["loras"][0]["weight"] == 0


def test_pictures_appear_as_they_are_written(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder)

    def look(known: str = "") -> dict[str, Any]:
        found: dict[str, Any] = page.get("/api/try/pictures", params={"folder": "images", "known": known}).json()
        return found

    assert look()["pictures"] == []
    (folder / "images").mkdir()
    save_png(Image.new("RGB", (8, 8)), folder / "images" / "a.png", "{}")
    first = look()
    assert [one["path"] for one in first["pictures"]] == ["images/a.png"]
    assert look(first["digest"])["pictures"] is None
    save_png(Image.new("RGB", (8, 8)), folder / "images" / "b.png", "{}")
    assert len(look(first["digest"])["pictures"]) == 2


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"loras": ["../secret"]}, "outside"),
        ({"loras": ["../secret@0.5"]}, "outside"),
        ({"embeddings": ["/etc"]}, "outside"),
        ({"base": "../secret"}, "outside"),
        ({"out": "../secret"}, "outside"),
        ({"from_picture": "../secret/images/lora.png"}, "outside"),
        ({"look_in": ["link"]}, "outside"),
        ({"image": "link/images/lora.png"}, "outside"),
        ({"grid": ["lora=../secret,runs/rex"]}, "outside"),
        ({"grid": ["lora=link/*"]}, "outside"),
        ({"grid": ["lora=../*"]}, "a pattern begins in"),
        ({"config": "x.yaml"}, "no such setting"),
        ({"prompts": "x.csv"}, "no such setting"),
        ({"nonsense": "1"}, "no such setting"),
        ({"loras": ["runs/rexx"]}, "neither"),
        ({"loras": ["runs/rex@much"]}, "not a weight"),
        ({"grid": ["weights=1"]}, "no such axis"),
        ({"grid": ["seed="]}, "write values such as 0,1,2"),
        ({"grid": ["seed=a,b"]}, "whole number"),
        ({"steps": "0"}, "at least 1"),
        ({"size": "65"}, "multiples of 16"),
        ({"offload": "yes"}, "true or false"),
        ({"loras": []}, "Choose a run"),
        ({"prompt": ""}, "Write a prompt"),
    ],
)
def test_what_cannot_be_drawn_is_said(values: dict[str, Any], problem: str, folder: Path, open_page: OpenPage) -> None:
    (folder / "link").symlink_to(folder.parent / "secret")
    page = open_page(folder)
    everything = {"loras": ["runs/rex"], "prompt": "a dog", **values}
    if values.keys() & {"base", "embeddings"}:
        del everything["loras"]
    answer = page.post("/api/try/command", json={"values": everything})
    text = " ".join(answer.json()["problems"])
    assert problem in text
    assert answer.json().get("command") is None
    assert page.post("/api/try/draw", json={"values": everything}).status_code in (403, 422)
    assert page.get("/api/jobs").json() == []


def test_pictures_and_recipes_outside_are_not_shown(folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder)
    assert page.get("/api/try/recipe", params={"path": "../secret/images/lora.png"}).status_code == 403
    assert page.get("/api/try/pictures", params={"folder": "../secret"}).status_code == 403


@pytest.mark.parametrize("path", ["/api/try/draw", "/api/try/command", "/api/share/push", "/api/share/convert"])
def test_another_site_starts_nothing(path: str, folder: Path, open_page: OpenPage) -> None:
    page = open_page(folder)
    answer = page.post(path, json={}, headers={"sec-fetch-site": "cross-site", "origin": "http://evil.example"})
    assert answer.status_code == 403
    page.cookies.clear()
    assert page.post(path, json={}).status_code == 401


def test_a_strangers_texts_are_escaped(folder: Path, open_page: OpenPage) -> None:
    evil = folder / "images"
    evil.mkdir()
    save_png(
        Image.new("RGB", (8, 8)), evil / "x.png", '{"base": "<script>", "dtype": "fp32", "prompt": "<img onerror>"}'
    )
    odd = (
        '{"base": [], "dtype": {}, "loras": 5, "embeddings": "x", "slg": 1, "size": "x", "steps": [[]], "encoders": 1}'
    )
    save_png(Image.new("RGB", (8, 8)), evil / "odd.png", odd)
    page = open_page(folder)
    answer = page.get("/api/try/recipe", params={"path": "images/x.png"})
    assert answer.headers["content-type"] == "application/json"
    assert ["prompt", "<img onerror>"] in answer.json()["says"]
    assert page.get("/api/try/recipe", params={"path": "images/odd.png"}).json()["loras"] == []
    shown = page.get("/try").text
    assert "<script>" not in shown.replace('<script type="module"', "")


def test_the_form_offers_the_samplers_that_there_are() -> None:
    assert set(drawing.SAMPLERS) == set(SAMPLERS)
