"""From an adapter to a picture, to the same picture again, and to another tool's file, by clicks in Chromium."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

from sd3tune.files.tensor_header import read_header
from tests.ui.chromium import PHONE, chromium, needs_chromium, opened, picture, served

WRITTEN = Path(__file__).parents[1] / "compat" / "written" / "lora"
PATIENCE = 180_000
"""Milliseconds to wait for a drawing on a busy machine."""

pytestmark = [needs_chromium, pytest.mark.long]


def test_a_picture_is_drawn_and_drawn_again_from_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(WRITTEN, folder / "runs" / "rex")
    with served(folder) as (_, link), chromium() as browser:
        _, page, errors = opened(browser, link)
        page.get_by_role("link", name="Try").click()
        draw(page)
        first, again = folder / "images/a-sks-b-dog-b-seed3.png", folder / "images/a-sks-b-dog-b-seed3-2.png"
        assert first.is_file()
        repeat(page)
        assert is_equal(first, again)
        vary(page)
        assert not is_equal(first, folder / "images/a-sks-b-dog-b-seed4.png")
        narrow(page, tmp_path)
        page.get_by_role("link", name="Share").click()
        page.get_by_role("listitem").filter(has_text="ComfyUI").get_by_role("button").click()
        expect(page.get_by_role("link", name="rex-comfyui.safetensors")).to_be_visible(timeout=PATIENCE)
        assert errors == []
    assert any(
        key.startswith("diffusion_model.") for key in read_header(folder / "runs/rex/rex-comfyui.safetensors").tensors
    )


def draw(page: Page) -> None:
    """Draw at half the adapter's weight; what the prompt holds is text."""
    page.get_by_label("Prompt", exact=True).fill("a sks <b>dog</b>")
    page.get_by_label("Seed", exact=True).fill("3")
    page.get_by_label("Steps", exact=True).fill("0")
    expect(page.locator("#problems")).to_have_text("--steps 0: at least 1")
    expect(page.get_by_role("button", name="Draw", exact=True)).to_be_disabled()
    page.get_by_label("Steps", exact=True).fill("2")
    page.get_by_label("Weight, slider").fill("0.5")
    expect(page.locator("#command code")).to_have_text(
        "sd3tune infer --lora runs/rex@0.5 --prompt 'a sks <b>dog</b>' --seed 3 --steps 2"
    )
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".tile")).to_have_count(2, timeout=PATIENCE)  # the picture, and before and after


def repeat(page: Page) -> None:
    page.locator("[data-path$='-seed3.png']").click()
    expect(page.locator("#viewer-recipe")).to_contain_text("rex at 0.5")
    page.get_by_role("button", name="Again, but").click()
    expect(page.get_by_label("Weight", exact=True)).to_have_value("0.5")
    expect(page.locator("#command code")).to_have_text("sd3tune infer --from images/a-sks-b-dog-b-seed3.png")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".tile")).to_have_count(3, timeout=PATIENCE)


def vary(page: Page) -> None:
    page.get_by_label("Seed", exact=True).fill("4")
    expect(page.locator("#command code")).to_have_text("sd3tune infer --from images/a-sks-b-dog-b-seed3.png --seed 4")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".tile")).to_have_count(4, timeout=PATIENCE)


def narrow(page: Page, tmp_path: Path) -> None:
    """On a phone nothing is wider than the window, in any of the pages' states."""
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.locator("[data-path$='-seed4.png']").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "try-phone", tmp_path)
    page.get_by_role("button", name="Close").click()


def is_equal(one: Path, other: Path) -> bool:
    with Image.open(one) as first, Image.open(other) as second:
        return ImageChops.difference(first, second).getbbox() is None
