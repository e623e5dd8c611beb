"""The page about a run holds all that its folder has, needs nothing else, and gives nothing away."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
from pathlib import Path

import pytest

from sd3tune.commands.train import run_training
from sd3tune.html_report.frame import WEB
from sd3tune.html_report.page import comparison_page, report_page
from sd3tune.html_report.read import read_run
from sd3tune.run.folder import locked
from tests.drawn_runs import EVIL, Page

SECTIONS = {"pictures", "curves", "asked", "data", "use", "configuration", "environment", "learned"}


def page_of(run: Path, photos: bool = True) -> Page:
    return Page(report_page(read_run(run), photos))


def edit(file: Path, **values: object) -> None:
    """Change keys of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def test_a_finished_run_has_every_section_and_needs_no_network(drawn_run: Path) -> None:
    page = page_of(drawn_run)
    assert page.ids() >= SECTIONS
    assert page.charts().keys() >= {"Training loss", "Held-out loss", "Held-out loss by sigma", "Learning rate"}
    assert page.charts()["Held-out loss by sigma"][0] == "sigma 0.0-0.2"
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "form", "base")
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert not any(name.startswith("on") for name in attributes), attributes
    assert "url(" not in page.html.replace("location", "")
    assert sum(map(len, page.scripts)) < 1.5 * 2**20
    for words in ("sd3tune infer --lora .", "load_lora_weights", "ComfyUI reads", "max_sequence_length: 16"):
        assert words in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 2 + 3 * 2 + 3  # bases, steps 0 to 2, photos


def test_only_the_pages_own_scripts_run(drawn_run: Path) -> None:
    page = page_of(drawn_run)
    policy = next(of["content"] for _, of in page.elements if of.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy.partition("script-src")[2]
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in page.scripts[1:]]
    assert policy.endswith("script-src " + " ".join(f"'sha256-{one}'" for one in digests))


def test_prompts_and_captions_may_hold_anything(drawn_run: Path) -> None:
    page = page_of(drawn_run)
    assert len(page.scripts) == 3
    assert not [of for _, of in page.elements if of.get("src") == "x"]
    assert page.text.count(" ".join(f"a dog {EVIL}".split())) >= 1
    assert " ".join(f"a photo of sks dog {EVIL}".split()) in page.text


def test_photos_and_captions_can_be_left_out(drawn_run: Path) -> None:
    page = page_of(drawn_run, photos=False)
    assert "a photo of sks dog" not in page.text
    assert "0.png" not in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 2 + 3 * 2


def test_secrets_of_the_machine_are_left_out(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"HF_TOKEN": "hf_PlantedPlantedPlanted", "MY_API_KEY": "planted-key", "HOME": "/home/planted-user"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    everything = " ".join([*planted.values(), "planted-host", "hf_AnotherOneOfSomebody", "https://me:planted@host/x"])
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("description: null", f"description: {json.dumps(everything)}"))
    warnings = [f"/home/planted-user/photos/a.png: {everything}"]
    argv = ["/home/planted-user/.venv/bin/sd3tune", "train", "/srv/planted/x.yaml", "data.cache_dir=/srv/planted/c"]
    edit(
        copied / "run.json", argv=argv, warnings=warnings, report=None, ended={"state": "failed", "reason": everything}
    )
    html = page_of(copied).html
    assert "The configuration cannot be read" not in html
    assert re.findall(r".{0,60}(?:planted|Planted|AnotherOne).{0,60}", html) == []
    assert "sd3tune train x.yaml data.cache_dir=c" in html
    assert "[hidden]" in html


def test_a_run_that_trains_or_has_died_has_a_page(copied: Path) -> None:
    edit(copied / "run.json", report=None, timings={})
    shutil.rmtree(copied / "adapter")
    with locked(copied):
        page = page_of(copied)
    assert "This run is training now, at step 2 of 2" in page.text
    assert "checkpoints/step-000002" in page.text
    assert page.ids() >= SECTIONS - {"learned"}
    shutil.rmtree(copied / "checkpoints")
    (copied / "validation.jsonl").unlink()
    shutil.rmtree(copied / "samples")
    edit(copied / "run.json", ended={"state": "failed", "reason": "the disk is full"})
    page = page_of(copied)
    assert "ended with an error or was killed, at step 2 of 2: the disk is full" in page.text
    assert page.ids() & SECTIONS == {"curves", "asked", "data", "configuration", "environment"}
    assert "Held-out loss" not in page.charts()


def test_damaged_files_leave_a_note_and_the_rest(copied: Path) -> None:
    (copied / "metrics.jsonl").write_text("nothing\n")
    (copied / "config.yaml").write_text("model: [")
    (copied / "samples" / "step-000002-0.png").write_bytes(b"no picture")
    page = page_of(copied)
    assert "A file of measurements cannot be read" in page.text
    assert "The configuration cannot be read" in page.text
    assert page.ids() >= {"pictures", "curves", "environment"}


def test_a_run_of_an_earlier_version_has_a_page(of_earlier_version: Path) -> None:
    page = page_of(of_earlier_version)
    assert page.ids() >= SECTIONS - {"pictures"}
    assert "Prior loss" in page.charts()
    assert not read_run(of_earlier_version).notes


def test_a_full_fine_tune_without_validation_has_a_page(quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path / "run", "method={kind: full}", "train.steps=1", "data.resolution=32"))
    page = page_of(tmp_path / "run")
    assert "sd3tune infer --base model" in page.text
    assert page.ids() & SECTIONS == SECTIONS - {"pictures"}


def test_an_evaluation_is_shown(copied: Path) -> None:
    figure = {"mean": 0.5, "low": 0.4, "high": 0.6}
    values = {
        "sd3tune_eval": 1,
        "verdict": {"sentence": "It learned <the> subject."},
        "rows": [{"name": "trained", "figures": {"dinov2": {"subject": figure}}}],
        "prompts": ["a dog"],
        "seeds": 1,
        "encoders": [{"name": "dinov2", "source": "facebook/dinov2-small"}],
    }
    (copied / "eval").mkdir()
    (copied / "eval" / "eval.json").write_text(json.dumps(values))
    page = page_of(copied)
    assert "It learned <the> subject." in page.text
    assert "0.500 (0.400 to 0.600)" in page.text


def test_runs_are_compared(drawn_run: Path, of_earlier_version: Path) -> None:
    runs = [read_run(drawn_run), read_run(of_earlier_version)]
    page = Page(comparison_page(runs, ["rex", "older"]))
    assert page.ids() >= {"differences", "curves", "pictures"}
    assert page.charts()["Held-out loss"] == ["rex", "older"]
    assert page.charts()["Training loss, smoothed"] == ["rex", "older"]
    assert "optimizer.lr" not in page.text  # equal in both
    assert "train.steps 2 6" in page.text
    assert sum(tag == "img" for tag, _ in page.elements) == 4  # two prompts, before and after
    assert "output_dir" not in page.text


def test_the_vendored_files_are_those_whose_origin_is_noted() -> None:
    noted = re.findall(r"^([0-9a-f]{64})  (\S+)$", (WEB / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {name for _, name in noted} == {path.name for path in WEB.glob("uPlot*") if path.suffix != ".LICENSE"}
    for digest, name in noted:
        assert hashlib.sha256((WEB / name).read_bytes()).hexdigest() == digest, name
