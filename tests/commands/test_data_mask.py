"""`data mask`: masks fit the photos as training sees them; what is there is never touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd3tune.cli.main import app
from sd3tune.commands import data_mask
from sd3tune.commands.data_mask import MaskRequest, run_data_mask
from sd3tune.data.images import read_picture
from sd3tune.errors import DataError, ModelError, RunError
from sd3tune.labels.photos import photos_in
from sd3tune.labels.segmenter import Found, Segmenter
from tests.labels.small_models import save_segmenter

Mask = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.radial_gradient("L").crop((0, 0, 200, 90)).save(folder / "0.png")
    Image.new("RGB", (48, 80), "blue").save(folder / "1.jpg")
    Image.new("RGB", (96, 64), "red").save(folder / "2.png")
    return folder


@pytest.fixture
def mask(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Mask:
    """`mask(folder, **request)` -> the printed lines."""

    def run(folder: Path, dry_run: bool = False, **request: Any) -> list[str]:
        values = {"prompt": "dog", "model": str(model), "threshold": 0.5, "sheet": tmp_path / "sheet.png", **request}
        run_data_mask(MaskRequest(folder, **values), dry_run)
        return capsys.readouterr().out.splitlines()

    return run


def masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*mask*"))}


def test_each_photo_gets_a_mask_of_its_size_and_a_second_call_nothing(photos: Path, mask: Mask, tmp_path: Path) -> None:
    lines = mask(photos)
    assert list(masks(photos)) == ["0-masklabel.png", "1-masklabel.png", "2-masklabel.png"]
    assert [Image.open(photos / name).size for name in masks(photos)] == [(200, 90), (48, 80), (96, 64)]
    assert any(line.startswith("coverage  ") and line.count("%") == 3 for line in lines)
    assert f"wrote 3 masks in {photos}, kept 0" in lines
    assert lines[-2].endswith(f" data check {photos}")
    before = masks(photos)
    lines = mask(photos, prompt="cat")
    assert "kept      3 photos with a mask: 0.png, 1.jpg, 2.png" in lines
    assert f"wrote 0 masks in {photos}, kept 3" in lines
    assert masks(photos) == before
    assert len(photos_in(photos, recursive=False)[0]) == 3  # a mask is no photo


def test_a_mask_fits_the_upright_photo(photos: Path, mask: Mask, tmp_path: Path) -> None:
    upright = Image.open(photos / "0.png").convert("RGB").resize((1400, 630))
    turned, exif = tmp_path / "turned", Image.Exif()
    turned.mkdir()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    sideways.save(turned / "a.png", exif=exif)
    sideways.save(turned / "b.jpg", exif=exif, quality=95)  # decoded at half its size
    upright.save(turned / "c.png")
    mask(turned)
    a, b, c = (Image.open(turned / name) for name in masks(turned))
    for name, of in (("a.png", a), ("b.jpg", b)):
        assert of.size[::-1] == read_picture(turned / name).size == (630, 1400)
        assert of.getexif() == {}
    assert a.tobytes() == c.tobytes()
    difference = np.abs(np.asarray(b, dtype=int) - np.asarray(c, dtype=int))
    assert difference.mean() < 5  # JPEG's loss; the mirrored mask is far off:
    assert np.abs(np.asarray(b, dtype=int)[:, ::-1] - np.asarray(c, dtype=int)).mean() > 4 * difference.mean()


def test_a_mask_that_exists_in_any_form_stays(photos: Path, mask: Mask) -> None:
    Image.new("L", (200, 90), 255).save(photos / "0_mask.png")
    Image.new("L", (48, 80), 255).save(photos / "1-MaskLabel.WEBP", lossless=True)
    before = masks(photos) | {"1-MaskLabel.WEBP": (photos / "1-MaskLabel.WEBP").read_bytes()}
    lines = mask(photos)
    assert f"wrote 1 mask in {photos}, kept 2" in lines
    assert {name: (photos / name).read_bytes() for name in before} == before
    assert {path.name for path in photos.iterdir()} == {*before, "0.png", "1.jpg", "2.png", "2-masklabel.png"}


def test_a_photo_where_nothing_is_found_is_named_and_gets_no_mask(
    photos: Path, mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest: dict[tuple[int, int], float] = {}
    find = Segmenter.find

    def watch(self: Segmenter, picture: Image.Image, *arguments: Any) -> Found:
        found = find(self, picture, *arguments)
        highest[picture.size] = found.likeliest
        return found

    monkeypatch.setattr(Segmenter, "find", watch)
    lines = mask(photos, threshold=0.9999999)
    assert masks(photos) == {}
    assert any(line.startswith("warning: 'dog' is not in 3 photos: 0.png (1.00), ") for line in lines)
    least, *others = sorted(highest.values())
    lines = mask(photos, threshold=(least + min(others)) / 2)
    assert f"wrote 2 masks in {photos}, kept 0" in lines
    assert any(line.startswith("warning: 'dog' is not in 1 photo: ") for line in lines)


def test_the_sheet_dims_what_is_outside(photos: Path, mask: Mask, tmp_path: Path) -> None:
    half = Image.new("L", (96, 64), 0)
    half.paste(255, (0, 0, 48, 64))
    half.save(photos / "2_mask.png")
    for name in ("0.png", "1.jpg"):
        (photos / name).unlink()
    lines = mask(photos)
    assert f"sheet     {tmp_path / 'sheet.png'}" in lines
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    bright, dim = (sheet == (255, 0, 0)).all(-1).sum(), (sheet == (63, 0, 0)).all(-1).sum()
    assert bright > 4000
    assert 0.8 < dim / bright < 1.25
    other = tmp_path / "other.png"
    Image.new("RGB", (8, 8)).save(other)
    with pytest.raises(RunError, match="exists and is not a contact sheet"):
        mask(photos, sheet=other)


def test_an_interrupted_command_goes_on(photos: Path, mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    mask(photos)
    whole = masks(photos)
    for name in whole:
        (photos / name).unlink()
    save, count = Image.Image.save, 0

    def stop(image: Image.Image, *arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        save(image, *arguments, **options)
        if count == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            mask(photos)
    assert len(masks(photos)) == 1
    assert f"wrote 2 masks in {photos}, kept 1" in mask(photos)
    assert masks(photos) == whole
    assert not list(photos.glob(".*"))


def test_what_is_wrong_is_one_line(photos: Path, mask: Mask, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for wrong, says in (
        ({"prompt": " "}, "--prompt: is empty; name the subject, such as dog"),
        ({"prompt": "a\0"}, "--prompt: holds NUL characters"),
        ({"threshold": 1.0}, "--threshold 1: is a probability; give one between 0 and 1, such as 0.4"),
    ):
        with pytest.raises(RunError) as caught:
            mask(photos, **wrong)
        assert caught.value.problems == (says,)
    Image.new("RGB", (64, 64)).save(photos / "0.jpg")
    with pytest.raises(DataError, match=r"0-masklabel\.png: would be the mask of several photos: 0\.jpg, 0\.png; "):
        mask(photos)
    (photos / "0.jpg").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"^CIDAS/clipseg-rd64-refined: not on this machine, .* --model FOLDER$"):
        mask(photos, model=None)
    (photos / "1.jpg").write_bytes((photos / "1.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match=r"1\.jpg"):
        mask(photos)
    assert list(masks(photos)) == ["0-masklabel.png", "2-masklabel.png"]


def test_the_command_line(photos: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "data",
        "mask",
        str(photos),
        "--prompt",
        "dog",
        "--model",
        str(model),
        "--sheet",
        str(tmp_path / "s.png"),
    ]
    app([*command, "--dry-run"], standalone_mode=False)
    assert capsys.readouterr().out.endswith(f"dry run: {model} was not loaded, and nothing was written\n")
    assert masks(photos) == {}
    app([*command, "--threshold", "0.6"], standalone_mode=False)
    assert f"wrote 3 masks in {photos}, kept 0" in capsys.readouterr().out
    assert data_mask.MaskRequest(photos, "dog").threshold == 0.4
