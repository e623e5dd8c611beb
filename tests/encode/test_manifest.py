"""The manifest only explains: one that somebody damaged or edited is no manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sd3tune.data.colour import Reading
from sd3tune.encode.manifest import ImageFacts, Manifest

FACTS = ImageFacts("d", (64, 96), Reading("range", True, ""))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Manifest.add(tmp_path, images={"\udcff.png": FACTS}, captions={"\udcff.png": "a dog"}, texts=["a dog"])
    return tmp_path


def test_what_was_added_is_read_whatever_bytes_a_name_has(folder: Path) -> None:
    found = Manifest.load(folder)
    assert found.images == {"\udcff.png": FACTS}
    assert found.captions == {"\udcff.png": "a dog"}
    assert found.knows_text("a dog")


@pytest.mark.parametrize(
    "changed",
    [
        {"images": []}, {"images": {"a": ["d", "64", 96]}}, {"images": {"a": [[], 64, 96]}},
        {"images": {"a": ["d", 0, 96]}}, {"images": {"a": ["d", True, 96]}}, {"images": {"a": 1}},
        {"captions": {"a": 1}}, {"captions": None}, {"texts": [[]]}, {"texts": [1]}, {"texts": 1}, {"readings": []},
        {"readings": {"d": [1, 2, 3]}}, {"readings": {"d": ["", False]}}, {"preprocessing": None, "captions": 3},
    ],
)  # fmt: skip
def test_an_edited_one_is_none(folder: Path, changed: dict[str, Any]) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    assert Manifest.load(folder) == Manifest()
    Manifest.add(folder, texts=["a cat"])
    assert Manifest.load(folder).knows_text("a cat")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"images": ' + b"[" * 100_000])
def test_a_damaged_one_is_none(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    assert Manifest.load(folder) == Manifest()
