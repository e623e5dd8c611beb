"""Only pictures that a run drew, by their names and by what they say of themselves, are for others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.files.png_recipe import RECIPE_KEY
from sd3tune.publish.files import pictures_left_out, pictures_of_run
from sd3tune.publish.previews import preview_recipe

PREVIEW = {"prompt": "a dog", "steps": 2, "guidance": 4.5, "seed": 0, "weights": "ema"}
SHEET = [["base-0.png", None], "a dog"]


def draw(path: Path, recipe: Any = None, text: str | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    info = PngInfo()
    if recipe is not None or text is not None:
        info.add_itxt(RECIPE_KEY, json.dumps(recipe) if text is None else text)
    Image.new("RGB", (2, 2)).save(path, format="PNG", pnginfo=info)
    return path


def test_pictures_are_known_by_name_and_recipe_and_others_are_named(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    for name in ("base-0.png", "step-000000-0.png", "step-000012-3.png", "step-1000000-12.png"):
        draw(samples / name, PREVIEW)
    draw(samples / "over_time.png", SHEET)
    ours = {path.name for path in samples.iterdir()}

    draw(samples / "private.png", PREVIEW)
    draw(samples / "base-1.png")
    draw(samples / "step-000001-0.png", PREVIEW | {"weights": "x"})
    draw(samples / "step-000001-1.png", {"prompt": "of infer", "base": "nano"})
    draw(samples / "step-000001-2.jpg.png", PREVIEW)
    (samples / "step-000001-3.png").write_text("root:x:0:0")
    (samples / "step-000001-4.png").symlink_to(samples / "base-0.png")
    draw(samples / ".step-000001-5.png", PREVIEW)
    os.mkfifo(samples / "step-000001-6.png")
    others = {path.name for path in samples.iterdir()} - ours

    assert {Path(name).name for name in pictures_of_run(tmp_path)} == ours
    assert set(pictures_left_out(tmp_path)) == {f"samples/{name}" for name in others}


def test_a_sheet_without_its_recipe_is_left_out(tmp_path: Path) -> None:
    for recipe in (None, PREVIEW, {"rows": []}, [1, 2]):
        draw(tmp_path / "samples" / "over_time.png", recipe)
        assert pictures_of_run(tmp_path) == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": 1}, {"prompt": ["a"]}, {"steps": "2"}, {"steps": True}, {"steps": 2.5}, {"guidance": None},
        {"seed": {}}, {"weights": None}, {"weights": []}, {"noise_offset": "0"},
    ],
)  # fmt: skip
def test_a_recipe_of_other_types_is_none(tmp_path: Path, changed: dict[str, Any]) -> None:
    assert preview_recipe(draw(tmp_path / "a.png", PREVIEW | {"noise_offset": 0.1})) is not None
    assert preview_recipe(draw(tmp_path / "a.png", PREVIEW | changed)) is None


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "null", '"prompt"', "1" * 5000, ""])
def test_other_text_is_no_recipe(tmp_path: Path, text: str) -> None:
    assert preview_recipe(draw(tmp_path / "a.png", text=text)) is None


def test_a_picture_too_large_to_open_is_no_preview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = draw(tmp_path / "a.png", PREVIEW)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert preview_recipe(file) is None
