"""Headers of images are remembered for planning, by path, length and time of change."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data import headers as module
from sd3tune.data.headers import Headers
from sd3tune.data.images import check_header, read_picture
from sd3tune.data.records import load_records
from sd3tune.encode import inspect
from sd3tune.errors import DataError
from sd3tune.run.encoding import check_pictures
from sd3tune.run.preflight import make_plan


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Return a function that counts the headers that loading a folder opens; all are remembered."""
    monkeypatch.setattr(module, "_FEWEST", 1)
    folder, opened = tmp_path / "photos", list[str]()
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40 + number, 64)).save(folder / f"{number}.png")

    def counted(image):
        opened.append(image.name)
        return check_header(image)

    monkeypatch.setattr(module, "check_header", counted)

    def load(store: Path | None = tmp_path / "store"):
        opened.clear()
        data = DataConfig(sources=[{"kind": "folder", "path": str(folder), "caption": "a dog"}], resolution=64)
        records = load_records(data, store=store)
        return [record.upright_size for record in records], sorted(opened)

    return load


SIZES = [(64, 40), (64, 41), (64, 42)]


def test_a_second_plan_opens_no_image(photos) -> None:
    assert photos() == (SIZES, ["0.png", "1.png", "2.png"])
    assert photos() == (SIZES, [])


def test_nothing_is_remembered_without_a_store(photos) -> None:
    assert photos(None) == photos(None) == (SIZES, ["0.png", "1.png", "2.png"])


def test_a_changed_file_is_opened_again(photos, tmp_path) -> None:
    photos()
    file = tmp_path / "photos" / "1.png"
    before = file.stat()
    Image.new("RGB", (41, 128)).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert photos() == ([(64, 40), (128, 41), (64, 42)], ["1.png"])


def test_a_broken_header_is_never_remembered(photos, tmp_path) -> None:
    (tmp_path / "photos" / "1.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError, match=r"1\.png: is not an image"):
            photos()


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff" * 40])
def test_a_damaged_file_counts_as_missing(photos, tmp_path, damage) -> None:
    photos()
    (tmp_path / "store" / "headers.safetensors").write_bytes(damage)
    assert photos() == (SIZES, ["0.png", "1.png", "2.png"])
    assert photos() == (SIZES, [])


def test_few_headers_are_not_written(photos, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_FEWEST", 4)
    photos()
    assert not (tmp_path / "store").exists()


def test_decoded_files_are_known_by_their_state(photos, tmp_path) -> None:
    photos()
    file, store = tmp_path / "photos" / "0.png", tmp_path / "store"
    headers = Headers(store)
    headers.add_decoded(headers.key_of(file))
    headers.save()
    again = Headers(store)
    assert again.is_decoded(again.key_of(file))
    assert not again.is_decoded(again.key_of(tmp_path / "photos" / "1.png"))
    os.utime(file, ns=(0, 0))
    assert not again.is_decoded(again.key_of(file))


def test_a_dry_run_decodes_a_file_once(quick_config, tmp_path, monkeypatch) -> None:
    """Except for a picture that needs a warning, and a broken one."""
    monkeypatch.setattr(module, "_FEWEST", 1)
    folder, decoded = tmp_path / "photos", list[str]()
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (64, 64)).save(folder / f"{name}.png")
    Image.new("RGBA", (64, 64)).save(folder / "clear.png")
    (folder / "torn.png").write_bytes(broken_png())
    sources = f"data.sources=[{{path: {folder}, caption: a dog}}]"
    plan = make_plan(
        quick_config(tmp_path / "run", sources, f"data.cache_dir={tmp_path / 'store'}"), torch.device("cpu"), None
    )

    def counted(image):
        decoded.append(image.name)
        return read_picture(image)

    monkeypatch.setattr(inspect, "read_picture", counted)
    for expected in (["a.png", "b.png", "clear.png", "torn.png"], ["clear.png", "torn.png"]):
        decoded.clear()
        with pytest.raises(DataError, match=r"torn\.png: cannot be decoded"):
            check_pictures(plan, progress=False)
        assert sorted(decoded) == expected


def broken_png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(file, "PNG")
    return file.getvalue()[:-60]
