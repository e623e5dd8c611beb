"""From an adapter to pictures, to the same picture again, and to another tool's file, by clicks in Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

import sd3tune
from sd3tune.files.tensor_header import read_header
from tests.run_files import CONSOLE_SCRIPT
from tests.ui.chromium import DESKTOP, PHONE, chromium, needs_chromium, opened, picture
from tests.ui.process import served

HEARTS = Path(sd3tune.__file__).parent / "assets" / "heart"
TRAINING = """\
name: heart
model: {base: nano, max_sequence_length: 16}
method: {kind: lora, rank: 16, alpha: 16}
data: {sources: [{path: photos}], resolution: 64}
optimizer: {lr: 3.0e-3}
train: {steps: 80, batch_size: 6}
checkpoint: {every: 40}
preview:
  every: 80
  steps: 8
  guidance: 2.0
  prompts: ["an orange sks shape on a black background", "a blue sks shape on a green background"]
"""
PROMPT = "an orange sks shape on a black background"
DRAWN = "images/an-orange-sks-shape-on-a-black-background-seed3"
PATIENCE = 300_000
"""Milliseconds to wait for a drawing on a busy machine."""

pytestmark = [needs_chromium, pytest.mark.long]


def test_a_picture_is_drawn_and_drawn_again_from_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(HEARTS, folder / "photos")
    (folder / "heart.yaml").write_text(TRAINING)
    subprocess.run([CONSOLE_SCRIPT, "train", "heart.yaml"], cwd=folder, check=True)
    with served(str(folder)) as link, chromium() as browser:
        _, page, errors = opened(browser, link)
        page.get_by_role("link", name="Try").click()
        draw(page)
        repeat(page)
        assert is_equal(folder / f"{DRAWN}.png", folder / f"{DRAWN}-2.png")
        compare_checkpoints(page)
        assert not is_equal(
            folder / f"{DRAWN}-lora-step-000040-weight-1.png", folder / f"{DRAWN}-lora-step-000080-weight-1.png"
        )
        look_around(page, tmp_path)
        share(page, tmp_path)
        assert errors == []
    assert any(key.startswith("diffusion_model.") for key in keys(folder / "runs/heart/heart-comfyui.safetensors"))


def draw(page: Page) -> None:
    """Draw at a part of the adapter's weight, after a mistake; what a prompt holds is text."""
    prompt, button = page.get_by_label("Prompt", exact=True), page.get_by_role("button", name="Draw", exact=True)
    prompt.fill("it's <b>bold</b>")
    expect(page.locator("#command code")).to_have_text(
        "sd3tune infer --lora runs/heart --prompt 'it'\"'\"'s <b>bold</b>'"
    )
    prompt.fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill("3")
    page.get_by_label("Steps", exact=True).fill("0")
    expect(page.locator("#problems")).to_have_text("--steps 0: at least 1")
    expect(button).to_be_disabled()
    page.get_by_label("Steps", exact=True).fill("8")
    page.get_by_label("Weight, slider").fill("0.9")
    expect(page.locator("#command code")).to_have_text(
        f"sd3tune infer --lora runs/heart@0.9 --prompt '{PROMPT}' --seed 3 --steps 8"
    )
    button.click()
    expect(page.locator(".tile")).to_have_count(2, timeout=PATIENCE)  # the picture, and before and after


def repeat(page: Page) -> None:
    page.locator(f"[data-path='{DRAWN}.png']").click()
    expect(page.locator("#viewer-recipe")).to_contain_text("heart at 0.9")
    page.get_by_role("button", name="Again, but").click()
    expect(page.get_by_label("Weight", exact=True)).to_have_value("0.9")
    expect(page.locator("#command code")).to_have_text(f"sd3tune infer --from {DRAWN}.png")
    page.get_by_label("Seed", exact=True).fill("4")
    expect(page.locator("#command code")).to_have_text(f"sd3tune infer --from {DRAWN}.png --seed 4")
    page.get_by_label("Seed", exact=True).fill("3")
    expect(page.locator("#command code")).to_have_text(f"sd3tune infer --from {DRAWN}.png")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".tile")).to_have_count(3, timeout=PATIENCE)


def compare_checkpoints(page: Page) -> None:
    page.get_by_role("button", name="Start afresh").click()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed", exact=True).fill("3")
    page.get_by_label("Columns").select_option("lora")
    page.get_by_label("Rows").select_option("weight")
    expect(page.locator("#command code")).to_have_text(
        f"sd3tune infer --prompt '{PROMPT}' --seed 3 --grid lora=runs/heart/checkpoints --grid weight=0,0.5,1"
    )
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".sheet")).to_have_count(2, timeout=PATIENCE)


def look_around(page: Page, tmp_path: Path) -> None:
    """On a desktop, in the dark, and on a phone, where nothing is wider than the window."""
    picture(page, "try", tmp_path)
    page.locator(f"[data-path='{DRAWN}.png']").click()
    expect(page.locator("#viewer-recipe")).to_contain_text("heart at 0.9")
    page.emulate_media(color_scheme="dark")
    page.evaluate("scrollTo(0, 0)")
    picture(page, "recipe-dark", tmp_path)
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.get_by_role("button", name="Close").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.emulate_media(color_scheme="light")


def share(page: Page, tmp_path: Path) -> None:
    page.get_by_role("link", name="Share").click()
    page.get_by_role("listitem").filter(has_text="ComfyUI").get_by_role("button").click()
    expect(page.get_by_role("link", name="heart-comfyui.safetensors")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_role("heading", name="heart", exact=True)).to_be_visible()
    expect(page.locator(".widget img").first).to_have_js_property("naturalWidth", 64)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "share-phone", tmp_path)
    page.set_viewport_size(DESKTOP)
    page.evaluate("scrollTo(0, 0)")
    picture(page, "share", tmp_path)


def is_equal(one: Path, other: Path) -> bool:
    with Image.open(one) as first, Image.open(other) as second:
        return ImageChops.difference(first, second).getbbox() is None


def keys(file: Path) -> list[str]:
    return list(read_header(file).tensors)
