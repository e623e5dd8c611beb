"""Subfolders of a source: `recursive: true`, and kohya's `10_name class` folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.records import Scan, sample_indices, scan_records
from sd3tune.data.sources.metadata import write_jsonl


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (sum(path.name.encode()) % 256, 0, 0)).save(path)


def scanned(folder: Path, **source: object) -> Scan:
    scan = scan_records(DataConfig(sources=[{"kind": "folder", "path": str(folder), **source}], resolution=64))
    scan.warnings = [line.removeprefix(f"{folder}: ") for line in scan.warnings]
    return scan


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """`tree/` with pictures of the same name in several folders, and hidden ones."""
    folder = tmp_path / "tree"
    for name in ("a.png", "x/a.png", "x/deep/a.png", "y/a.png", ".hidden/a.png", "x/.hidden/a.png", "y/.a.png"):
        picture(folder / name)
    (folder / "empty").mkdir()
    return folder


def test_subfolders_are_read_with_names_that_stay_unique(tree: Path) -> None:
    scan = scanned(tree, recursive=True, caption="a dog")
    assert [record.image.name for record in scan.records] == ["a.png", "x/a.png", "x/deep/a.png", "y/a.png"]
    assert (scan.problems, scan.warnings) == ([], [])


def test_each_subfolder_has_captions_of_its_own(tree: Path) -> None:
    (tree / "x" / "a.txt").write_text("beside it")
    write_jsonl(tree / "x" / "deep" / "metadata.jsonl", [("a.png", "in its folder")])
    write_jsonl(tree / "metadata.jsonl", [("y/a.png", "in the folder above")])
    scan = scanned(tree, recursive=True, caption="of the source")
    assert [record.caption for record in scan.records] == [
        "of the source", "beside it", "in its folder", "in the folder above"
    ]  # fmt: skip
    write_jsonl(tree / "y" / "metadata.jsonl", [("a.png", "again")])
    (problem,) = scanned(tree, recursive=True, caption="c").problems
    assert problem == (
        f"{tree}/y/metadata.jsonl: names {tree}/y/a.png, as {tree}/metadata.jsonl does; keep one of the two rows"
    )


def test_a_missing_caption_is_told_with_its_file(tree: Path) -> None:
    for folder in ("", "x", "x/deep"):
        (tree / folder / "a.txt").write_text("a dog")
    (problem,) = scanned(tree, recursive=True).problems
    assert problem == f"{tree}/y/a.png: has no caption; write one to a.txt or set the source's caption"


def test_links_to_folders_are_named_and_not_followed(tree: Path) -> None:
    os.symlink("/", tree / "x" / "everything")
    os.symlink(tree, tree / "y" / "again")
    scan = scanned(tree, recursive=True, caption="c")
    assert len(scan.records) == 4
    assert scan.warnings == [
        "2 links to folders are not followed: everything, again; name the folder as a source of its own"
    ]


def test_what_is_passed_over_in_a_subfolder_is_named(tree: Path) -> None:
    (tree / "x" / "b.jxl").write_bytes(b"x")
    (tree / "y" / "notes.tags").write_text("x")
    assert scanned(tree, recursive=True, caption="c").warnings == [
        f"{tree}/x: 1 picture is passed over: b.jxl; convert to JPEG or PNG",
        f"{tree}/y: 1 file looks like captions and is not read: notes.tags; write NAME.txt beside the picture, or "
        "metadata.jsonl",
    ]


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    for name in ("3_sks dog/a.png", "3_sks dog/b.png", "012_a_b/a.png", "1_/c.png"):
        picture(folder / name)
    (folder / "3_sks dog" / "b.txt").write_text("sks dog in the snow")
    return folder


def test_kohyas_folders_are_repeats_and_captions(kohya: Path) -> None:
    scan = scanned(kohya, layout="kohya", caption="of the source")
    found = {record.image.name: (record.repeats, record.caption) for record in scan.records}
    assert found == {
        "3_sks dog/a.png": (3, "sks dog"),
        "3_sks dog/b.png": (3, "sks dog in the snow"),
        "012_a_b/a.png": (12, "a_b"),
        "1_/c.png": (1, "of the source"),
    }
    assert (scan.problems, scan.warnings) == ([], [])
    assert len(sample_indices(scan.records)) == 3 + 3 + 12 + 1
    assert {r.repeats for r in scanned(kohya, layout="kohya", caption="c", repeats=2).records} == {6, 24, 2}


def test_what_kohyas_layout_passes_over_is_named(kohya: Path) -> None:
    for name in ("loose.png", "log/a.png", "0_none/a.png", "3_sks dog/more/a.png", ".cache/a.png"):
        picture(kohya / name)
    (kohya / "captions.json").write_text("{}")
    scan = scanned(kohya, layout="kohya", caption="c")
    assert len(scan.records) == 4
    assert scan.warnings == [
        "1 picture outside the subfolders is not read: loose.png",
        "2 subfolders with pictures are not read: 0_none, log; layout: kohya reads names such as `10_sks dog`",
        f"{kohya}/3_sks dog: 1 subfolder with pictures is not read: more; name each as a source, such as "
        f"{kohya}/3_sks dog/more, or set recursive: true",
        "1 file looks like captions and is not read: captions.json; write NAME.txt beside the picture, or "
        "metadata.jsonl",
    ]
    scan = scanned(kohya, layout="kohya", caption="c", recursive=True)
    assert (3, "sks dog") in [(r.repeats, r.caption) for r in scan.records if r.image.name == "3_sks dog/more/a.png"]


def test_a_folder_without_kohyas_subfolders_is_an_error(tree: Path) -> None:
    (problem,) = scanned(tree, layout="kohya", caption="c").problems
    assert problem == (
        f"{tree}: has no subfolder named like `10_sks dog`, which layout: kohya reads; 1 picture outside the "
        "subfolders is not read: a.png; 2 subfolders with pictures are not read: x, y; layout: kohya reads names such "
        "as `10_sks dog`"
    )
