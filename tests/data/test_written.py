"""Several captions an image and captions per encoder, in every place where captions are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.records import Record, Scan, scan_records
from sd3tune.data.sources.dataset import write_parquet
from sd3tune.data.sources.metadata import write_csv
from sd3tune.data.written import Caption, Written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    path.mkdir()
    Image.new("RGB", (32, 32)).save(path / "a.png")
    return path


def scanned(folder: Path, trigger: str | None = None, seed: int = 0, **source: object) -> Scan:
    data = DataConfig(sources=[{"kind": "folder", "path": str(folder), **source}], trigger=trigger, resolution=64)
    return scan_records(data, seed)


def the_record(folder: Path, **more: object) -> Record:
    scan = scanned(folder, **more)
    assert scan.problems == []
    (record,) = scan.records
    return record


def texts(folder: Path, **more: object) -> list[str]:
    return [caption.text for caption in the_record(folder, **more).drawn]


def test_lines_of_a_caption_file_are_captions(folder: Path) -> None:
    (folder / "a.txt").write_text("a dog\r\n\r\n  a puppy \n")
    assert texts(folder, captions="lines") == ["a dog", "a puppy"]
    assert texts(folder, captions="lines", trigger="sks") == ["sks, a dog", "sks, a puppy"]
    assert the_record(folder, captions="lines").caption == "a dog"
    assert scanned(folder, captions="lines").warnings == []
    assert texts(folder) == ["a dog\n\n  a puppy"]
    (folder / "a.txt").unlink()
    assert texts(folder, captions="lines", caption="one\ntwo") == ["one", "two"]
    assert texts(folder, captions="lines", caption="") == [""]


def test_a_list_in_the_metadata_holds_captions(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["a dog", " ", "a\npuppy"]}))
    assert texts(folder) == ["a dog", "a\npuppy"]
    assert texts(folder, captions="lines") == ["a dog", "a", "puppy"]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["a dog"]}))
    assert the_record(folder) == the_record_of_one(folder)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": ["a dog", 3]}))
    assert scanned(folder).problems == [f"{folder}/metadata.jsonl:1: text is 3, not text; put it in quotes"]


def the_record_of_one(folder: Path) -> Record:
    return Record(folder / "a.png", "a dog", 1, 0)


def test_lines_of_a_cell_are_captions(folder: Path) -> None:
    write_csv(folder / "metadata.csv", [("a.png", "a dog\na puppy")])
    assert texts(folder, captions="lines") == ["a dog", "a puppy"]


@pytest.mark.parametrize("place", ["columns", "files"])
def test_clip_and_t5_read_texts_of_their_own(folder: Path, place: str) -> None:
    if place == "columns":
        row = {"file_name": "a.png", "text_clip": "sks dog", "text_t5": "A long text."}
        (folder / "metadata.jsonl").write_text(json.dumps(row))
    else:
        (folder / "a.clip.txt").write_text("sks dog\n")
        (folder / "A.T5.TXT").write_text("A long text.\n")
    record = the_record(folder, template="{caption}!")
    (caption,) = record.drawn
    assert [caption.read_by(encoder) for encoder in ("clip_l", "clip_g", "t5")] == ["sks dog!"] * 2 + ["A long text.!"]
    assert record.caption == "A long text.!"
    assert scanned(folder).warnings == []


def test_an_encoder_without_a_text_of_its_own_reads_the_caption(folder: Path) -> None:
    (folder / "a.t5.txt").write_text("A long text.")
    assert scanned(folder).problems == [
        f"{folder}/a.png: has no caption; write one to a.txt or set the source's caption"
    ]
    assert the_record(folder, caption="a dog").drawn == (Caption("a dog", t5="A long text."),)
    (folder / "a.txt").write_text("beside")
    assert the_record(folder, caption="a dog").drawn == (Caption("beside", t5="A long text."),)


def test_the_caption_file_of_another_image_is_no_text_of_an_encoder(folder: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(folder / "a.clip.png")
    (folder / "a.clip.txt").write_text("a hair clip")
    assert [record.drawn for record in scanned(folder, caption="c").records] == [
        (Caption("a hair clip"),), (Caption("c"),)
    ]  # fmt: skip


def test_captions_of_encoders_are_paired_in_order(folder: Path) -> None:
    row = {
        "file_name": "a.png",
        "text_clip": ["dog", "puppy"],
        "text_t5": ["A dog.", "A puppy."],
        "text": "one for all",
    }
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert the_record(folder).drawn == (
        Caption("one for all", "dog", "A dog."), Caption("one for all", "puppy", "A puppy.")
    )  # fmt: skip
    (folder / "metadata.jsonl").write_text(json.dumps({**row, "text_clip": ["a", "b", "c"]}))
    assert scanned(folder).problems == [
        f"{folder}/a.png: has 2 in text_t5 and 3 in another column; give each as many captions, or one"
    ]


@pytest.mark.parametrize("lists", [True, False])
def test_columns_of_a_dataset(folder: Path, lists: bool) -> None:
    data = (folder / "a.png").read_bytes()
    written = Written(("a", "b") if lists else ("a\nb",), t5=("A.", "B.") if lists else ("A.\nB.",))
    rows = [("a.png", data, written), ("b.png", data, "c")]
    write_parquet(folder / "x.parquet", rows, {"text": lists, "text_t5": lists})
    scan = scanned(folder / "x.parquet", kind="dataset", captions="lines")
    assert scan.problems == []
    assert [record.drawn for record in scan.records] == [
        (Caption("a", t5="A."), Caption("b", t5="B.")), (Caption("c"),)
    ]  # fmt: skip
    named = scanned(folder / "x.parquet", kind="dataset", captions="lines", t5_column="text", caption="s")
    assert named.records[0].drawn == (Caption("a", t5="a"), Caption("b", t5="b"))
    (problem,) = scanned(folder / "x.parquet", kind="dataset", clip_column="gone").problems
    assert problem.startswith(f"{folder}/x.parquet: has no column 'gone'; set clip_column: the columns are image, text")


def test_numbers_of_classes_become_captions_by_names_and_a_template(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    image = (folder / "a.png").read_bytes()
    table = pyarrow.table({"image": [image] * 3, "label": pyarrow.array([1, 0, None], pyarrow.uint8())})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    settings = {"kind": "dataset", "caption_column": "label", "template": "a photo of a {caption}", "caption": "thing"}
    scan = scanned(folder / "x.parquet", **settings, class_names=["cat", "dog"])
    assert [record.caption for record in scan.records] == [f"a photo of a {name}" for name in ("dog", "cat", "thing")]
    assert scanned(folder / "x.parquet", **settings, class_names=["cat"]).problems == [
        f"{folder}/x.parquet[0]: has the class 1, and class_names ends at 0; add its name"
    ]
    (problem,) = scanned(folder / "x.parquet", **settings).problems
    assert "column 'label' holds uint8, not text; set class_names for numbers; the columns are" in problem


def test_the_trigger_is_never_dropped_and_the_first_caption_is_as_written(folder: Path) -> None:
    settings = {"caption": "{red|blue}, sks, dog", "wildcards": True, "trigger": "sks", "tags": {"dropout": 0.5}}
    record = the_record(folder, **settings, variants=50)
    assert len(record.drawn) == 50
    assert all("sks" in caption.text for caption in record.drawn)
    assert record.caption == "red, sks, dog"
    assert the_record(folder, **settings, variants=50, seed=1).drawn != record.drawn


def test_prompt_weights_are_named_once(folder: Path) -> None:
    for name in "bcd":
        Image.new("RGB", (32, 32)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a (red:1.3) dog, (small:0.5)")
    (folder / "b.txt").write_text("(best quality:1.2)")
    (folder / "c.txt").write_text("a dog (at 10:30 in Rome), a ratio (of 3:4x)")
    scan = scanned(folder, caption="a dog")
    assert scan.warnings == [
        f"{folder}: 2 captions have prompt weights such as '(red:1.3)', which are read as plain text; remove them"
    ]
    assert scan.records[0].caption == "a (red:1.3) dog, (small:0.5)"


def test_a_wildcard_without_a_brace_is_named(folder: Path) -> None:
    (folder / "a.txt").write_text("a {red|blue dog")
    assert scanned(folder, wildcards=True).problems == [
        f"{folder}/a.png: its caption has a wildcard without one of its braces: 'red|blue dog'; close it"
    ]
    assert not scanned(folder).problems
