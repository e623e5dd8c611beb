"""The report on a folder or configuration: what would be trained on, and each thing that is wrong with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from sd3tune.commands import data_check
from sd3tune.commands.data_check import run_data_check
from sd3tune.config import Config, parse_config
from sd3tune.data import ahead
from sd3tune.data.images import ImageRef, Picture, read_picture
from sd3tune.errors import DataError, RunError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_tokenizer
from sd3tune.run.describe import describe
from sd3tune.run.preflight import make_plan


def paint(path: Path, size: tuple[int, int], number: int = 0) -> None:
    image = Image.new("RGB", size, (40 * number, 200 - 30 * number, 90))
    ImageDraw.Draw(image).ellipse((5 + 7 * number, 5, 50 + 5 * number, 40), fill=(255, 40 * number, 0))
    image.save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(((96, 64), (96, 64), (64, 64), (128, 256))):
        paint(folder / f"{number}.png", size, number)
    return folder


def configured(folder: Path, *overrides: str, **source: object) -> Config:
    values = {
        "model": {"base": "tiny", "max_sequence_length": 16},
        "data": {"sources": [{"path": str(folder), "caption": "a dog", **source}], "resolution": 64},
    }
    return parse_config(values, overrides).config


@pytest.fixture
def check(tmp_path: Path, capsys):
    """`check(config)` -> the printed lines and the problems."""

    def check(config: Config, sheet: Path | None = None) -> tuple[list[str], list[str]]:
        problems: list[str] = []
        try:
            run_data_check(config, sheet or tmp_path / "sheet.png")
        except DataError as error:
            problems = list(error.problems)
        return capsys.readouterr().out.splitlines(), problems

    return check


def test_a_sound_folder_is_told_in_full(photos: Path, check, tmp_path: Path) -> None:
    lines, problems = check(configured(photos, "data.trigger=sks", "data.buckets=false", repeats=2, weight=0.5))
    assert problems == []
    assert lines[0] == f"source 0  {photos}: 4 images, x 2, weight 0.5"
    assert "captions  1 different; the first: 'sks, a dog'" in lines
    assert any(line.startswith("tokens    CLIP: at most") and line.endswith("of 77") for line in lines)
    assert any(line.startswith("tokens    T5: at most") and line.endswith("of 16") for line in lines)
    assert [line.split() for line in lines if " x " in line and "64 x 64 " in line] == [
        ["96", "x", "64", "2", "64", "x", "64", "1.00x", "33%"],
        ["64", "x", "64", "1", "64", "x", "64", "1.00x", "0%"],
        ["128", "x", "256", "1", "64", "x", "64", "0.50x", "50%"],
    ]
    assert not any(line.startswith("warning") for line in lines)
    assert lines[-1] == "trainable: 4 images, 8 per epoch"
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


def test_masks_are_counted_named_and_shown(tmp_path: Path, check) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), "white").save(photos / f"{number}.png")
    for number, side in ((0, 32), (1, 16), (3, 0)):
        mask = Image.new("L", (64, 64) if number < 3 else (64, 32))
        mask.paste(255, (0, 0, side, 64))
        mask.save(photos / f"{number}_mask.png")
    lines, problems = check(configured(photos))
    assert problems == [
        f"{photos / '3_mask.png'}: the mask has no inside, its brightest value is 0 of 255; paint the "
        "subject white, or delete the mask"
    ]
    assert lines[0] == f"source 0  {photos}: 4 images"
    place = lines.index("masks     2 of 4 images, 38% of the area on average")
    assert lines[place + 1] == "          without a mask: 2.png, 3.png"
    with Image.open(tmp_path / "sheet.png") as sheet:
        inside, outside, unmasked = (sheet.getpixel(at) for at in ((30, 90), (150, 90), (8 + 2 * 184 + 150, 90)))
    assert (inside, outside, unmasked) == ((255,) * 3, (63,) * 3, (255,) * 3)


def test_the_buckets_are_those_of_a_run(photos: Path, check, tmp_path: Path) -> None:
    config = configured(photos)
    lines, _ = check(config)
    plan = make_plan(config.model_copy(update={"output_dir": str(tmp_path / "run")}), torch.device("cpu"), None)
    (planned,) = (line for line in describe(plan, 1) if line.startswith("buckets"))
    assert planned in lines
    assert any(line.split()[:7] == ["96", "x", "64", "2", "80", "x", "48"] for line in lines)


def test_everything_that_is_wrong_comes_at_once(photos: Path, check) -> None:
    (photos / "text.png").write_text("hello")
    (photos / "cut.png").write_bytes((photos / "3.png").read_bytes()[:150])
    (photos / "2.txt").write_text("a cat")
    lines, problems = check(configured(photos, caption=None))
    told = [line.removeprefix(f"{photos}/") for line in problems]
    assert {line.split(".png")[0] for line in told if "has no caption; write one to" in line} == {"0", "1", "3", "cut"}
    assert any(line.startswith("text.png: is not an image") for line in told)
    assert any(line.startswith("cut.png: cannot be decoded") for line in told)
    assert len(problems) == 6
    assert lines[0].endswith("photos: 4 images")
    assert lines[-1] == "not trainable: 6 problems"


def test_duplicates_are_named(photos: Path, check) -> None:
    shutil.copy(photos / "0.png", photos / "copy.png")
    with Image.open(photos / "3.png") as image:
        image.resize((64, 128)).save(photos / "smaller.jpg", quality=60)
    lines, problems = check(configured(photos))
    assert problems == []
    warnings = [line for line in lines if line.startswith("warning")]
    assert warnings == [
        "warning: the same image, byte for byte: 0.png, copy.png",
        "warning: nearly the same picture: 3.png, smaller.jpg",
    ]


def test_small_images_and_long_captions_are_warned_of(photos: Path, check) -> None:
    (photos / "1.txt").write_text("a dog " * 50)
    lines, problems = check(configured(photos, "data.resolution=128"))
    assert problems == []
    warnings = [line for line in lines if line.startswith("warning")]
    assert any("1 caption beyond 77 CLIP tokens: of 'a dog a dog" in line for line in warnings)
    assert any("1 caption beyond 16 T5 tokens" in line for line in warnings)
    assert any("3 of 4 are enlarged, which blurs the result: 0.png, 1.png, 2.png" in line for line in warnings)
    lines, _ = check(configured(photos, "model.extra_t5_lengths=[77, 12]"))
    assert any("1 caption beyond 12 T5 tokens" in line for line in lines), "the shortest length cuts most"
    lines, _ = check(configured(photos, "model.t5=false"))
    assert not any("T5" in line for line in lines)


def test_without_the_tokenizers_it_is_said(photos: Path, check, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    lines, problems = check(configured(photos, "model.base=stabilityai/stable-diffusion-3.5-large"))
    assert problems == []
    told = "tokens    not counted: the tokenizers of stabilityai/stable-diffusion-3.5-large are not on this machine yet"
    assert told in lines


def test_a_base_that_is_none_does_not_hide_the_report(photos: Path, check, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    lines, problems = check(configured(photos, f"model.base={tmp_path / 'base'}"))
    assert problems == []
    assert any(line.startswith("warning: tokens were not counted: ") for line in lines)


def test_a_source_that_is_not_there_is_not_trainable(photos: Path, check, tmp_path: Path) -> None:
    lines, problems = check(configured(tmp_path / "gone"))
    assert lines == [f"source 0  {tmp_path / 'gone'}: 0 images", "not trainable: 1 problem"]
    assert "no such folder" in problems[0]
    assert not (tmp_path / "sheet.png").exists()


def test_long_lists_are_cut_short(tmp_path: Path, check) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (64 + number % 20, 64), (4 * number, 0, 0)).save(folder / f"{number:02}.png")
    lines, _ = check(configured(folder))
    assert sum(line.startswith("          ") for line in lines) == 11
    assert any("and 10 more sizes, 30 images" in line for line in lines)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height < 6 * 260


def test_the_contact_sheet_replaces_itself_and_nothing_else(photos: Path, check, tmp_path: Path) -> None:
    check(configured(photos))
    first = (tmp_path / "sheet.png").read_bytes()
    check(configured(photos, caption="another"))
    assert (tmp_path / "sheet.png").read_bytes() != first
    for name in ("0.png", "notes.txt"):
        if not (photos / name).exists():
            (photos / name).write_text("mine")
        before = (photos / name).read_bytes()
        with pytest.raises(RunError, match="exists and is not a contact sheet"):
            check(configured(photos), photos / name)
        assert (photos / name).read_bytes() == before


def test_what_is_passed_over_or_read_in_a_way_that_may_surprise_is_named(photos: Path, check) -> None:
    (photos / "IMG_1.JXL").write_bytes(b"\xff\x0a")
    (photos / "0.txt").write_text("a dog\nasleep")
    (photos / "metadata.json1").write_text("{}")
    Image.new("RGBA", (96, 64), (0, 0, 255, 0)).save(photos / "clear.png")
    Image.new("RGB", (96, 64), "lime").save(photos / "profile.png", icc_profile=b"not a profile")
    lines, problems = check(configured(photos))
    assert problems == []
    assert [line.removeprefix(f"warning: {photos}") for line in lines if line.startswith("warning")] == [
        ": 1 picture is passed over: IMG_1.JXL; convert to JPEG or PNG",
        ": 1 file looks like captions and is not read: metadata.json1; write NAME.txt beside the picture, or "
        "metadata.jsonl",
        ": 1 caption file has several lines, which are joined with spaces into one caption: 0.txt; "
        "captions: lines reads each line as a caption",
        "warning: 1 image has transparent parts, which are laid on white: clear.png; masks: alpha uses them as masks",
        "/profile.png: its colour profile is damaged; its colours are taken as sRGB",
    ]


def test_lines_of_a_caption_are_joined_by_every_tokenizer() -> None:
    for part in ("clip_l", "clip_g", "t5"):
        tokenizer = load_tokenizer(resolve_base("tiny"), part)
        assert tokenizer("sks dog\non grass").input_ids == tokenizer("sks dog on grass").input_ids


def test_a_folder_is_checked_without_torch(photos: Path, tmp_path: Path) -> None:
    """Which takes seconds to import, and half a gigabyte."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'torchvision', 'transformers', 'diffusers', 'datasets'))\n"
        "from sd3tune.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code, "data", "check", str(photos), "--caption", "a", "--sheet", "sheet.png"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "trainable: 4 images, 4 per epoch"), done.stderr
    assert (tmp_path / "sheet.png").is_file()


def test_pictures_are_not_kept(photos: Path, check, tmp_path: Path, monkeypatch) -> None:
    decoded: list[weakref.ref[Image.Image]] = []
    most = 0

    def counted(image: ImageRef, **more: int) -> Picture:
        nonlocal most
        picture = read_picture(image, **more)
        decoded.append(weakref.ref(picture.image))
        most = max(most, sum(image() is not None for image in decoded))
        return picture

    for number in range(4, 40):
        paint(photos / f"{number}.png", (64, 64), number % 4)
    monkeypatch.setattr(data_check, "read_picture", counted)
    check(configured(photos))
    assert 0 < most <= ahead._THREADS + 1


def test_names_that_are_not_utf8_reach_report_and_sheet(photos: Path, check, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\x1b[2J.png")
    shutil.copy(photos / "0.png", photos / name)
    lines, problems = check(configured(photos))
    assert not problems
    assert r"warning: the same image, byte for byte: 0.png, caf\xe9\x1b[2J.png" in lines
    (photos / name).write_bytes(b"x")
    assert [line.removeprefix(f"{photos}/") for line in check(configured(photos))[1]] == [
        r"caf\xe9\x1b[2J.png: is not an image, whatever its name says; replace or remove it"
    ]


def test_several_captions_and_texts_of_single_encoders_are_told(photos: Path, check) -> None:
    (photos / "0.txt").write_text("a dog\na puppy")
    (photos / "0.t5.txt").write_text("A long text that is for T5 alone, of many words.")
    lines, problems = check(configured(photos, captions="lines", caption="one"))
    assert problems == []
    (told,) = (number for number, line in enumerate(lines) if line.startswith("captions"))
    count = int(lines[told].split()[1])
    assert lines[told].endswith("; the first: 'a dog'")
    assert lines[told + 1] == (
        "          T5 reads texts of its own; the first: 'A long text that is for T5 alone, of many words.'"
    )
    assert lines[told + 2].startswith("tokens    CLIP: at most ")
    assert count >= 2
