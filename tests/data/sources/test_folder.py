"""What a folder holds: pictures, their captions, and what is passed over and therefore named."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.records import Scan, scan_records
from sd3tune.data.sources.metadata import write_jsonl
from sd3tune.errors import DataError

JXL = b"\xff\x0a" + bytes(40)


def scanned(folder: Path, **source: object) -> Scan:
    scan = scan_records(DataConfig(sources=[{"kind": "folder", "path": str(folder), **source}], resolution=64))
    scan.warnings = [line.removeprefix(f"{folder}: ") for line in scan.warnings]
    return scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`photos/` with `0.jpg` and `1.jpg`."""
    path = tmp_path / "photos"
    path.mkdir()
    for number in range(2):
        picture(path / f"{number}.jpg", number)
    return path


def picture(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(file, "AVIF" if path.suffix == ".avif" else "JPEG")


def captions(folder: Path) -> dict[str, str]:
    scan = scanned(folder, caption="of the source")
    assert scan.problems == []
    return {record.image.name: record.caption for record in scan.records}


def test_all_that_pillow_reads_is_read(folder: Path) -> None:
    for name in ("a.jfif", "b.JPE", "c.avif", "d.JPEG", "e.mpo"):
        picture(folder / name)
    scan = scanned(folder, caption="a dog")
    assert [record.image.name for record in scan.records] == sorted(path.name for path in folder.iterdir())
    assert (scan.problems, scan.warnings) == ([], [])


def test_pictures_that_cannot_be_read_are_named(folder: Path) -> None:
    for name in ("IMG_1.JXL", "a.jxl", "b.jp2", "c.dng", "d.psd", "e.CR2", "f.jxl"):
        (folder / name).write_bytes(JXL)
    (folder / ".hidden.jxl").write_bytes(JXL)
    (folder / "notes.md").write_text("x")
    scan = scanned(folder, caption="a dog")
    assert len(scan.records) == 2
    assert scan.warnings == [
        "7 pictures are passed over: IMG_1.JXL, a.jxl, b.jp2, c.dng, d.psd, ...; convert to JPEG or PNG"
    ]


def test_links_that_lead_nowhere_are_named(folder: Path) -> None:
    os.symlink("/nowhere/x.jpg", folder / "gone.jpg")
    os.symlink(folder / "0.jpg", folder / "sound.jpg")
    scan = scanned(folder, caption="a dog")
    assert [record.image.name for record in scan.records] == ["0.jpg", "1.jpg", "sound.jpg"]
    assert scan.warnings == ["1 link leads nowhere: gone.jpg; link or copy again"]


def test_subfolders_with_pictures_are_named(folder: Path) -> None:
    picture(folder / "10_sks dog" / "a.jpg")
    picture(folder / "2024" / "summer" / "b.jpg")
    (folder / "jxl").mkdir()
    (folder / "jxl" / "IMG_1.JXL").write_bytes(JXL)
    (folder / "empty").mkdir()
    picture(folder / ".thumbnails" / "a.jpg")
    picture(folder / "__MACOSX" / "._a.jpg")
    assert scanned(folder, caption="a dog").warnings == [
        "3 subfolders with pictures are not read: 10_sks dog, 2024, jxl; "
        f"name each as a source, such as {folder / '10_sks dog'}, or set recursive: true, or layout: kohya"
    ]


def test_a_subfolder_that_the_metadata_names_is_read(folder: Path) -> None:
    picture(folder / "more" / "a.jpg")
    write_jsonl(folder / "metadata.jsonl", [("more/a.jpg", "a dog")])
    scan = scanned(folder, caption="c")
    assert [record.caption for record in scan.records] == ["c", "c", "a dog"]
    assert scan.warnings == []


@pytest.mark.parametrize("kind", ["jxl", "link", "subfolder", "empty"])
def test_where_nothing_else_is_left_it_is_an_error(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    if kind == "jxl":
        (folder / "IMG_1.JXL").write_bytes(JXL)
    if kind == "link":
        os.symlink("/nowhere/x.jpg", folder / "a.jpg")
    if kind == "subfolder":
        picture(folder / "more" / "a.jpg")
    (problem,) = scanned(folder, caption="c").problems
    assert problem.startswith(f"{folder}: holds no images (JPEG, PNG, ")
    assert {
        "jxl": "; 1 picture is passed over: IMG_1.JXL; convert to JPEG or PNG",
        "link": "; 1 link leads nowhere: a.jpg; link or copy again",
        "subfolder": f"; 1 subfolder with pictures is not read: more; name each as a source, such as {folder}/more",
        "empty": "; put pictures into it, or name another folder",
    }[kind] in problem


@pytest.mark.parametrize(
    "name", ["0.txt", "0.TXT", "0.Txt", "0.caption", "0.CAPTION", "0.jpg.txt", "0.JPG.TXT", "0.jpg.caption"]
)
def test_a_caption_file_is_read_whatever_tool_wrote_it(folder: Path, name: str) -> None:
    (folder / name).write_text("sks dog on grass")
    assert captions(folder) == {"0.jpg": "sks dog on grass", "1.jpg": "of the source"}
    assert scanned(folder, caption="c").warnings == []


def test_of_several_caption_files_the_first_kind_is_read_and_the_others_are_named(folder: Path) -> None:
    for name in ("0.txt", "0.jpg.txt", "0.caption", "1.caption"):
        (folder / name).write_text(f"from {name}")
    assert captions(folder) == {"0.jpg": "from 0.txt", "1.jpg": "from 1.caption"}
    assert scanned(folder, caption="c").warnings == [
        "2 caption files are not read: 0.caption (0.txt is), 0.jpg.txt (0.txt is)"
    ]
    (folder / "0.txt").unlink()
    assert captions(folder)["0.jpg"] == "from 0.jpg.txt"


def test_the_name_as_it_stands_wins_over_other_cases(folder: Path) -> None:
    (folder / "0.TXT").write_text("upper")
    (folder / "0.txt").write_text("lower")
    assert captions(folder)["0.jpg"] == "lower"
    assert scanned(folder, caption="c").warnings == ["1 caption file is not read: 0.TXT (0.txt is)"]


def test_a_caption_file_beside_the_metadata_is_named(folder: Path) -> None:
    write_jsonl(folder / "METADATA.JSONL", [("0.jpg", "from the metadata")])
    (folder / "0.txt").write_text("from the sidecar")
    (folder / "1.txt").write_text("from the sidecar")
    assert captions(folder) == {"0.jpg": "from the metadata", "1.jpg": "from the sidecar"}
    assert scanned(folder).warnings == ["1 caption file is not read: 0.txt (METADATA.JSONL is)"]


@pytest.mark.parametrize(
    "name", ["metadata.json1", "meta_cap.json", "0.json", "5.txt", "0.tags", "metadata.parquet", "captions.tsv"]
)
def test_what_looks_like_captions_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text('{"0.jpg": {"caption": "a dog"}}')
    assert captions(folder)["0.jpg"] == "of the source"
    assert scanned(folder, caption="c").warnings == [
        f"1 file looks like captions and is not read: {name}; write NAME.txt beside the picture, or metadata.jsonl"
    ]


@pytest.mark.parametrize(("image", "text"), [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
def test_names_match_whatever_their_unicode_form(tmp_path: Path, image: str, text: str) -> None:
    picture(tmp_path / unicodedata.normalize(image, "café.jpg"))
    (tmp_path / unicodedata.normalize(text, "café.txt")).write_text("sks dog")
    assert list(captions(tmp_path).values()) == ["sks dog"]
    (tmp_path / unicodedata.normalize(text, "café.txt")).unlink()
    write_jsonl(tmp_path / "metadata.jsonl", [(unicodedata.normalize(text, "café.jpg"), "a dog")])
    assert list(captions(tmp_path).values()) == ["a dog"]


def test_several_lines_are_one_caption_and_that_is_said(folder: Path) -> None:
    (folder / "0.txt").write_text("sks dog on grass\nsks dog asleep\n")
    (folder / "1.caption").write_bytes(b"one\r\n\r\ntwo")
    assert captions(folder) == {"0.jpg": "sks dog on grass\nsks dog asleep", "1.jpg": "one\n\ntwo"}
    assert scanned(folder).warnings == [
        "2 caption files have several lines, which are joined with spaces into one caption: 0.txt, 1.caption; "
        "captions: lines reads each line as a caption"
    ]
    (folder / "0.txt").write_text("one line\n\n")
    (folder / "1.caption").unlink()
    assert scanned(folder, caption="c").warnings == []


def test_utf_16_is_read_with_its_mark_and_an_error_without(folder: Path) -> None:
    (folder / "0.txt").write_bytes("a müde dog".encode("utf-16"))
    (folder / "1.caption").write_bytes("a müde dog".encode("utf-16-le"))
    scan = scanned(folder)
    assert scan.records[0].caption == "a müde dog"
    assert scan.problems == [f"{folder}/1.caption: looks like UTF-16; save it as UTF-8"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", b'{"file_name": "0.jpg", "text": "a\\u0000 dog"}\n', "0.jpg: its caption holds NUL"),
        ("metadata.csv", "file_name,text\n0.jpg,a dog\n".encode("utf-16-le"), "metadata.csv: looks like UTF-16"),
        ("metadata.jsonl", '{"file_name": "0.jpg", "text": "x"}'.encode("utf-16-be"), "metadata.jsonl: looks like"),
    ],
)
def test_nul_is_an_error_wherever_captions_are(folder: Path, name: str, content: bytes, says: str) -> None:
    (folder / name).write_bytes(content)
    (problem,) = scanned(folder, caption="c").problems
    assert problem.startswith(f"{folder}/{says}")
    (folder / name).unlink()
    assert len(scanned(folder, caption="a\0 dog").problems) == 2


def test_metadata_in_utf_16_with_its_mark_is_read(folder: Path) -> None:
    (folder / "metadata.csv").write_bytes('file_name,text\n0.jpg,"a\ndog"\n1.jpg,b\n'.encode("utf-16"))
    assert captions(folder) == {"0.jpg": "a\ndog", "1.jpg": "b"}
    assert scanned(folder).warnings == []  # a quoted line break is meant


def test_a_folder_that_is_two_sources_is_warned_of_once(folder: Path) -> None:
    (folder / "IMG_1.JXL").write_bytes(JXL)
    source = {"kind": "folder", "path": str(folder), "caption": "c"}
    assert len(scan_records(DataConfig(sources=[source, source], resolution=64)).warnings) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(folder: Path) -> None:
    folder.chmod(0)
    with pytest.raises(DataError, match=r"photos: cannot be listed \(Permission denied\)"):
        raise DataError(*scanned(folder, caption="c").problems)


@pytest.mark.parametrize(
    ("name", "target", "what"),
    [
        ("0.txt", None, "is a named pipe, not a file"),
        ("0.jpg.caption", None, "is a named pipe, not a file"),
        ("0.txt", "/dev/zero", "is a device, not a file"),
        ("0.txt", ".", "is a folder, not a file"),
        ("0.txt", "nowhere", "cannot be read (No such file or directory)"),
        ("metadata.jsonl", None, "is a named pipe, not a file"),
        ("metadata.csv", "/dev/zero", "is a device, not a file"),
    ],
)
def test_captions_and_metadata_are_regular_files(folder: Path, name: str, target: str | None, what: str) -> None:
    os.mkfifo(folder / name) if target is None else (folder / name).symlink_to(target)
    assert scanned(folder, caption="a").problems[0].startswith(f"{folder / name}: {what}")


def test_pictures_that_are_no_files_are_named(folder: Path) -> None:
    os.mkfifo(folder / "2.jpg")
    (folder / "3.png").symlink_to("/dev/zero")
    (folder / "4.png").symlink_to("4.png")
    (folder / "5.jpg").symlink_to("0.jpg")
    scan = scanned(folder, caption="a")
    assert [record.image.name for record in scan.records] == ["0.jpg", "1.jpg", "5.jpg"]
    assert "2 are pipes, sockets or devices: 2.jpg, 3.png; remove or replace" in scan.warnings
    assert "1 link leads nowhere: 4.png; link or copy again" in scan.warnings
    write_jsonl(folder / "metadata.jsonl", [("2.jpg", "a")])
    assert f"{folder}/2.jpg: is a named pipe, not a file; replace or remove it" in scanned(folder, caption="a").problems


def test_names_that_are_not_utf8_are_read(folder: Path) -> None:
    """As ZIP files of earlier days leave them."""
    name = os.fsdecode(b"caf\xe9")
    picture(folder / f"{name}.jpg")
    (folder / f"{name}.txt").write_text("a café")
    (folder / os.fsdecode(b"left\xff.txt")).write_text("nobody's")
    scan = scanned(folder, caption="a")
    assert {record.image.name: record.caption for record in scan.records}[f"{name}.jpg"] == "a café"
    (folder / f"{name}.txt").write_bytes(b"\xe9")
    with pytest.raises(DataError, match=r"/caf\\xe9\.txt:1: byte 0xe9 is not UTF-8"):
        raise DataError(*scanned(folder, caption="a").problems)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"file_name": "0.jpg", "text": "a \\ud800 cat"}', r"0.jpg: its caption holds half a character (\ud800)"),
        ('{"file_name": "0.jpg", "text": "a \\u0000 cat"}', "0.jpg: its caption holds NUL characters"),
        (
            '{"file_name": "0.jpg", "text": "' + "word " * 30_000 + '"}',
            "0.jpg: its caption has 149,999 characters, and",
        ),
        ('{"file_name": "0.jpg", "text": ' + "[" * 100_000, "metadata.jsonl:1: is not JSON (it is nested too deeply"),
        ('{"file_name": "0.jpg", "text": ' + "1" * 5000 + "}", "metadata.jsonl:1: text is Infinity, not text"),
        (
            '{"file_name": "0.jpg", "text": "a", "text": "b"}',
            "metadata.jsonl:1: is not JSON (the key 'text' comes twice",
        ),
        ('{"file_name": "0\\u0000.jpg", "text": "a"}', "does not exist in"),
        ('{"file_name": "\\ud800.jpg", "text": "a"}', "does not exist in"),
    ],
)
def test_text_that_no_tokenizer_takes_is_named(folder: Path, row: str, said: str) -> None:
    (folder / "metadata.jsonl").write_text(row + "\n")
    assert said in scanned(folder, caption="a").problems[0]
