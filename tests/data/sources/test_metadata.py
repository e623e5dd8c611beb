import json
import os

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.names import Names
from sd3tune.data.records import load_records
from sd3tune.data.sources.metadata import read_metadata, write_csv, write_jsonl
from sd3tune.errors import DataError

TRICKY = [
    ("a.png", 'a dog, "sitting"'),
    ("b c.png", "zwei\nZeilen, müde"),
    ("sub/d.png", "{braces} and \\backslash"),
]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number, (name, _) in enumerate(TRICKY):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / name)
    return folder


def records(folder, **more):
    return load_records(DataConfig(sources=[{"kind": "folder", "path": str(folder), **more}], resolution=64))


def problems(folder, **more):
    with pytest.raises(DataError) as caught:
        records(folder, **more)
    return [line.replace(f"{folder}/", "") for line in caught.value.problems]


@pytest.mark.parametrize(("name", "write"), [("metadata.jsonl", write_jsonl), ("metadata.csv", write_csv)])
def test_what_is_written_is_read(folder, name, write):
    write(folder / name, TRICKY)
    assert [(str(r.image.relative_to(folder)), r.caption) for r in records(folder)] == TRICKY


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '\ufeff{"file_name": "a.png", "text": " a dog\\r\\nhere ", "id": 7}\r\n\r\n'),
        ("metadata.csv", '\ufefftext, file_name,id\r\n" a dog\r\nhere ",a.png,7\r\n\r\n'),
    ],
)
def test_marks_blank_lines_and_further_columns_do_no_harm(folder, name, content):
    (folder / name).write_text(content, encoding="utf-8", newline="")
    assert read_metadata(folder, Names()).captions == {folder / "a.png": "a dog\nhere"}


def test_the_metadata_wins_over_a_sidecar_and_a_sidecar_over_the_sources_caption(folder):
    for name in ("a", "b c"):
        (folder / f"{name}.txt").write_text("from the sidecar")
    write_jsonl(folder / "metadata.jsonl", [("a.png", "from the metadata"), ("b c.png", ""), ("sub/d.png", " ")])
    assert [record.caption for record in records(folder, caption="from the source")] == [
        "from the metadata",
        "from the sidecar",
        "from the source",
    ]


def test_a_row_with_null_falls_back_too(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": null}\n{"file_name": "b c.png", "text": "x"}\n{"file_name": "sub/d.png"}\n'
    )
    assert [record.caption for record in records(folder, caption="c")] == ["c", "x", "c"]


def test_images_that_the_metadata_does_not_name_are_not_lost(folder):
    write_jsonl(folder / "metadata.jsonl", [("sub/d.png", "named")])
    assert [record.caption for record in records(folder, caption="not named")] == ["not named", "not named", "named"]
    assert problems(folder) == [
        f"{name}.png: has no caption; write one to {name}.txt or set the source's caption" for name in ("a", "b c")
    ]


def test_the_order_of_the_rows_does_not_matter(folder):
    write_csv(folder / "metadata.csv", TRICKY)
    expected = records(folder)
    write_csv(folder / "metadata.csv", reversed(TRICKY))
    assert records(folder) == expected


@pytest.mark.parametrize(
    ("file_name", "says"),
    [
        ("gone.png", "gone.png does not exist in"),
        ("sub", "sub does not exist in"),
        ("../other/a.png", "../other/a.png leads out of the folder"),
        ("sub/../../other/a.png", "leads out of the folder"),
        ("sub/../a.png", "leads out of the folder"),
        ("/etc/hostname", "/etc/hostname is an absolute path"),
        ("C:\\photos\\a.png", "is an absolute path"),
        ("C:/photos/a.png", "is an absolute path"),
        ("a\0.png", "does not exist in"),
        ("", "has no file_name"),
        ("./a.png", "./a.png was named on line 1 already"),
    ],
)
def test_a_wrong_file_name_is_told_with_its_line(folder, file_name, says):
    (folder.parent / "other").mkdir()
    Image.new("RGB", (32, 32)).save(folder.parent / "other" / "a.png")
    write_jsonl(folder / "metadata.jsonl", [("a.png", "x"), (file_name, "y")])
    (line,) = problems(folder, caption="c")
    assert line.startswith("metadata.jsonl:2: ")
    assert says in line


def test_all_wrong_rows_come_at_once(folder):
    write_csv(folder / "metadata.csv", [("a.png", "a\nb"), ("gone.png", "x"), ("/a.png", "y")])
    assert [line.split(": ")[0] for line in problems(folder)] == ["metadata.csv:4", "metadata.csv:5"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"', "metadata.jsonl:1: is not JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n["a.png"]', "metadata.jsonl:2: is no object"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}', "metadata.jsonl:1: text is 5, not text"),
        ("metadata.jsonl", '{"file_name": 5, "text": "x"}', "metadata.jsonl:1: has no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}', "has no column 'text'; its columns are file_name"),
        ("metadata.jsonl", '{"file": "a.png", "text": "x"}', "has no column 'file_name'; its columns are file, text"),
        ("metadata.jsonl", "\n", "metadata.jsonl: has no rows"),
        ("metadata.csv", "file_name,text\n", "metadata.csv: has no rows"),
        ("metadata.csv", "file_name,caption\na.png,x\n", "has no column 'text'; its columns are file_name, caption"),
        ("metadata.csv", "file_name;text\na.png;x\n", "has no column 'file_name'; its columns are file_name;text"),
        ("metadata.csv", 'file_name,text\n"a.png",x, y\n', "metadata.csv:2: 3 columns where the header has 2"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "metadata.csv:2: is not CSV"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_file_is_one_line(folder, name, content, says):
    (folder / name).write_text(content)
    (line,) = problems(folder, caption="c")
    assert says in line


def test_other_encodings_are_refused(folder):
    (folder / "metadata.csv").write_bytes("file_name,text\na.png,fâché\n".encode("latin-1"))
    (line,) = problems(folder, caption="c")
    assert "metadata.csv:2: byte 0xe2 is not UTF-8" in line


def test_both_files_are_one_too_many(folder):
    write_csv(folder / "metadata.csv", TRICKY)
    write_jsonl(folder / "metadata.jsonl", TRICKY)
    with pytest.raises(DataError, match=r"holds both metadata\.jsonl and metadata\.csv"):
        records(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(folder):
    write_csv(folder / "metadata.csv", TRICKY)
    (folder / "metadata.csv").chmod(0)
    (line,) = problems(folder)
    assert "metadata.csv: cannot be read (Permission denied)" in line


def test_names_are_written_as_json_that_others_read(folder):
    write_jsonl(folder / "metadata.jsonl", TRICKY)
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [text for _, text in TRICKY]
