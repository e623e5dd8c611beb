"""Shards: patterns, samples of a tar, captions in each form, and faults that are named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.stream.reader import ShardReader, shards_of
from sd3tune.data.stream.shards import expanded
from sd3tune.errors import DataError
from tests.shards import picture, write_shards, write_tar


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}/{2..1}.tar", ["a/2.tar", "a/1.tar", "b/2.tar", "b/1.tar"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, names) -> None:
    assert expanded(pattern) == names


def read_one(tmp_path: Path, files: Mapping[str, bytes], **source):
    """Return the samples of a shard with these files, and the warnings."""
    tar = write_tar(tmp_path / "a.tar", files)
    data = DataConfig(sources=[{"kind": "webdataset", "path": str(tar), **source}], resolution=64)
    warnings = list[str]()
    reader = ShardReader(data, 0, shards_of(data), tmp_path / "copies", warnings.append)
    return reader.read(0), warnings


def captions(found) -> list[list[str]]:
    return [[caption.text for caption in one.record.drawn] for one in found if one]


def test_captions_come_from_texts_json_and_classes(tmp_path) -> None:
    files = {
        "b/1.png": picture(1), "b/1.txt": b" a red thing\n",
        "b/2.png": picture(2), "b/2.json": json.dumps({"caption": ["one", "two"], "width": 64}).encode(),
        "b/3.jpg": picture(3), "b/3.cls": b"1",
        "b/4.png": picture(4),
        "c/4.seg.png": picture(5), "c/4.txt": b"of another folder",
    }  # fmt: skip
    found, warnings = read_one(tmp_path, files, class_names=["shirt", "shoe"], caption="none of its own")
    assert captions(found) == [["a red thing"], ["one", "two"], ["shoe"], ["none of its own"], ["of another folder"]]
    assert warnings == []
    assert [one.record.upright_size for one in found] == [(64, 64)] * 5


def test_texts_of_single_encoders_and_another_field(tmp_path) -> None:
    row = json.dumps({"text": "a dog", "text_t5": "a small brown dog on a lawn"}).encode()
    found, _ = read_one(tmp_path, {"1.png": picture(1), "1.json": row}, caption_field="text")
    (caption,) = found[0].record.drawn
    assert (caption.text, caption.t5) == ("a dog", "a small brown dog on a lawn")


def test_broken_samples_are_named_and_have_a_place(tmp_path) -> None:
    files = {
        "1.png": b"no image", "1.txt": b"a",
        "2.txt": b"a text alone",
        "3.png": picture(3), "3.json": b"{",
        "4.png": picture(4), "4.cls": b"7",
        "5.png": picture(5), "5.txt": b"sound",
        "6.png": picture(6, (2000, 10)), "6.txt": b"narrow",
        "7.png": picture(7),
    }  # fmt: skip
    found, warnings = read_one(tmp_path, files, class_names=["shirt"])
    assert [one is not None for one in found] == [False, False, False, False, True, False, False]
    expected = [
        "1.png: is not an image",
        "2: has no image, only .txt",
        "3.json: is no JSON object",
        "4.cls: the class is '7'",
    ]
    expected += ["6.png: is 2000 x 10 px, too narrow", "7.png: has no caption"]
    assert len(warnings) == len(expected)
    for part in expected:
        assert any(f"a.tar/{part}" in line for line in warnings), (part, warnings)


def test_a_cut_off_shard_is_read_up_to_the_fault(tmp_path) -> None:
    write_shards(tmp_path, 1, 5)
    tar = tmp_path / "shard-000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    data = DataConfig(sources=[{"kind": "webdataset", "path": str(tar)}], resolution=64)
    warnings = list[str]()
    found = ShardReader(data, 0, shards_of(data), tmp_path, warnings.append).read(0)
    assert any(found)
    assert any("is no whole tar file" in line or "ends early" in line for line in warnings)


def test_a_file_that_is_no_tar_counts_as_broken(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    data = DataConfig(sources=[{"kind": "webdataset", "path": str(tmp_path)}], stream={"max_broken": 0}, resolution=64)
    with pytest.raises(DataError, match=r"max_broken: 1 samples are broken.*a\.tar: is no whole tar file"):
        ShardReader(data, 0, shards_of(data), tmp_path, print).read(0)
