"""From photos to a picture by clicks alone, through a trainer that dies, in Chromium."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

import sd3tune
from tests.ui.chromium import PHONE, WRITES_PICTURES, chromium, needs_chromium, opened, picture
from tests.ui.process import kill_jobs, served

HEARTS = sorted((Path(sd3tune.__file__).parent / "assets" / "heart").iterdir())
STEPS = "250" if WRITES_PICTURES else "40"
SETTINGS = {
    "train.steps": STEPS, "train.batch_size": "4" if WRITES_PICTURES else "1", "validation.holdout": "1",
    "checkpoint.every": "10", "preview.every": "25" if WRITES_PICTURES else "20",
    "preview.prompts": "an orange sks shape on a black background", "optimizer.lr": "0.002",
}  # fmt: skip
PATIENCE = 600_000
"""Milliseconds to wait for a training on a busy machine."""

pytestmark = needs_chromium


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder to open, whose trainings end with the test."""
    opened_on = tmp_path / "work"
    opened_on.mkdir()
    yield opened_on
    kill_jobs(opened_on)


def test_photos_become_a_picture_although_the_trainer_is_killed(folder: Path, tmp_path: Path) -> None:
    with served(str(folder)) as link, chromium() as browser:
        _, page, errors = opened(browser, link)
        send_photos(page)
        assert (folder / "photos/heart/red-on-white.txt").read_text() == "a red sks shape, on <b>white</b>\n"
        picture(page, "photos", tmp_path)
        configure(page)
        written = (folder / "heart.yaml").read_text()
        assert "base: nano" in written
        assert f"steps: {STEPS}" in written
        page.evaluate("document.getElementById('settings').scrollIntoView()")
        page.evaluate("document.getElementById('yaml').scrollTop = 330")  # below the header
        picture(page, "settings", tmp_path)
        page.get_by_role("button", name="Start training").click()
        page.locator("#state").get_by_role("link", name="Watch").click()
        kill_when_saved(page, folder)
        expect(page.locator("#run-state")).to_have_text("failed", timeout=PATIENCE)
        page.get_by_role("button", name="Resume").click()
        expect(page.locator("#run-state")).to_have_text("done", timeout=PATIENCE)
        expect(page.locator("#at-step")).to_have_text(f"step {STEPS}", timeout=PATIENCE)
        expect(page.locator("#log")).to_contain_text("resuming from step-")
        for side in ("by the base", f"at step {STEPS}"):
            expect(page.locator(f".pair img[alt$='{side}']")).to_have_js_property("naturalWidth", 64)
        look_around(page, tmp_path)
        assert errors == []
    assert list((folder / "runs/heart/adapter").glob("*.safetensors"))


def send_photos(page: Page) -> None:
    page.get_by_label("Base model").select_option("nano")
    page.get_by_label("Name of the run").fill("heart")
    page.get_by_label("Caption for photos without their own").fill("a sks shape")
    page.locator("#pick").set_input_files([str(file) for file in HEARTS])
    expect(page.locator(".photo")).to_have_count(6)
    box = page.get_by_label("Caption of red-on-white.png")
    box.fill("a red sks shape, on <b>white</b>")
    box.blur()
    expect(box).to_have_class("saved")
    page.locator("#notices").get_by_role("button", name="Dismiss").click()
    expect(page.locator("b")).to_have_count(0)  # what a caption holds is text


def configure(page: Page) -> None:
    page.get_by_role("button", name="Create the configuration").click()
    steps = page.locator("#form").get_by_label("train.steps", exact=True)
    steps.fill("-1")
    steps.blur()
    expect(page.locator("#problems")).to_contain_text("train.steps: -1 is too small")
    expect(page.locator("#saved")).to_contain_text("not saved")
    for key, value in SETTINGS.items():
        box = page.locator("#form").get_by_label(key, exact=True)
        box.fill(value)
        box.blur()
        expect(page.locator("#saved")).to_have_text("saved")
        expect(page.locator("#form").get_by_label(key, exact=True)).to_have_value(value)


def kill_when_saved(page: Page, folder: Path) -> None:
    """Kill the trainer, as the system does when memory runs out, once it has saved a checkpoint."""
    expect(page.locator("#figures")).to_contain_text("Saved at", timeout=PATIENCE)
    expect(page.locator("#figures")).to_contain_text("GB")
    shell = int(next((folder / "runs/.ui").glob("*/pid")).read_text())
    trainer = next(one for one in psutil.Process(shell).children() if "train" in one.cmdline())
    os.kill(trainer.pid, signal.SIGKILL)


def look_around(page: Page, tmp_path: Path) -> None:
    """The finished run on a desktop, in the dark, and on a phone, where nothing is wider than the window."""
    expect(page.locator("#loss canvas")).to_be_visible()
    picture(page, "watch", tmp_path)
    page.emulate_media(color_scheme="dark")
    expect(page.locator("#loss canvas")).to_be_visible()
    picture(page, "watch-dark", tmp_path)
    page.set_viewport_size(PHONE)
    for address in ("/watch", "/jobs", "/new", f"/watch?run={page.url.partition('run=')[2]}"):
        page.goto(f"{page.url.partition('/watch')[0].partition('/jobs')[0].partition('/new')[0]}{address}")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], address
    page.emulate_media(color_scheme="light")
    page.wait_for_load_state("networkidle")
    picture(page, "watch-phone", tmp_path)
