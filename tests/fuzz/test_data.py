"""Doors: the pictures, captions and metadata of a folder, through `data check`, `data convert` and what trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from hypothesis import strategies as st

from sd3tune.commands.data_check import run_data_check
from sd3tune.commands.data_convert import convert
from sd3tune.config import Config, parse_config
from sd3tune.data.images import read_picture
from sd3tune.data.records import load_records
from tests.fuzz import pictures
from tests.fuzz.bounds import OUTSIDE
from tests.fuzz.door import try_door
from tests.fuzz.pieces import NAMES, TEXTS, changed, damaged, in_encodings

GOOD = pictures.encoded("PNG", "RGB", (70, 64))


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def configured(folder: Path, **source: object) -> Config:
    model = {"base": "tiny", "max_sequence_length": 16}
    return parse_config(
        {"model": model, "data": {"sources": [{"path": str(folder), **source}], "resolution": 64}}
    ).config


def checked(folder: Path, **source: object) -> None:
    """Run `data check`; where it finds no problem, what training reads has none, and is plain text and RGB."""
    config = configured(folder, **source)
    sheet = folder.parent / "sheet.png"
    sheet.unlink(missing_ok=True)
    run_data_check(config, sheet)
    for record in load_records(config.data):
        record.caption.encode()
        assert "\0" not in record.caption
        picture = read_picture(record.image).image
        assert picture.mode == "RGB"
        assert min(picture.size) > 0


def test_a_picture(tmp_path: Path) -> None:
    folder = tmp_path / "photos"

    def call(file: tuple[str, bytes]) -> None:
        (emptied(folder) / f"a{file[0]}").write_bytes(file[1])
        checked(folder, caption="a dog")

    try_door("pictures", pictures.files(), call, tmp_path)


def test_a_caption_file(tmp_path: Path) -> None:
    folder = tmp_path / "photos"

    def call(given: tuple[bytes, str, dict[str, Any]]) -> None:
        (emptied(folder) / "a.png").write_bytes(GOOD)
        (folder / given[1]).write_bytes(given[0])
        checked(folder, **given[2])

    names = st.sampled_from(["a.txt", "a.txt", "a.png.txt", "a.caption", "a.TXT"])
    sources = st.fixed_dictionaries(
        {}, optional={"caption": TEXTS, "template": st.just("a {caption}, {trigger}") | TEXTS}
    )
    found = [(b"a dog", "a.txt", {"template": template}) for template in ("\0", "\ud800")]
    try_door("captions", st.tuples(in_encodings(TEXTS), names, st.just({}) | sources), call, tmp_path, known=found)


ROW = {"file_name": "a.png", "text": "a dog"}
FILES = st.sampled_from(
    ["a.png", "b/c.png", "B/C.PNG", f"../{OUTSIDE}/x.png", "/etc/passwd", "pipe.png", "loop.png", "a.png/x"]
)


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    found = [{"file_name": draw(FILES | NAMES), "text": draw(TEXTS)} for _ in range(draw(st.integers(0, 2)))]
    found.append(dict(ROW))
    return [draw(changed(row, ("more",))) if not draw(st.integers(0, 3)) else row for row in found]


def as_jsonl(found: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in found).encode()


def as_csv(found: list[dict[str, Any]]) -> bytes:
    lines = ["file_name,text", *(f'{row.get("file_name")},"{row.get("text")}"' for row in found)]
    return "\r\n".join(lines).encode(errors="surrogatepass")


def test_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    outside = tmp_path / OUTSIDE
    outside.mkdir()
    (outside / "x.png").write_bytes(GOOD)

    def call(given: tuple[str, bytes, str]) -> None:
        (emptied(folder) / "b").mkdir()
        for name in ("a.png", "b/c.png"):
            (folder / name).write_bytes(GOOD)
        (folder / "loop.png").symlink_to("loop.png")
        (folder / given[0]).write_bytes(given[1])
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert(configured(folder, caption="a dog").data, given[2], tmp_path / "out")
        checked(folder, caption="a dog")

    tables = rows().map(as_jsonl) | rows().map(as_jsonl).flatmap(damaged)
    as_text = rows().map(as_csv) | rows().map(as_csv).flatmap(damaged)
    files = st.tuples(st.just("metadata.jsonl"), tables) | st.tuples(st.just("metadata.csv"), as_text)
    forms = st.sampled_from(["sidecar", "jsonl", "csv"])
    elsewhere = [f"../{OUTSIDE}/x.png", str(outside / "x.png"), "/etc/passwd"]
    found = [("metadata.jsonl", as_jsonl([{**ROW, "file_name": name}]), "jsonl") for name in elsewhere]
    found.append(("metadata.jsonl", b'{"' + b"[" * 2000 + b'": 1}', "jsonl"))
    try_door("metadata", st.tuples(files, forms).map(lambda both: (*both[0], both[1])), call, tmp_path, known=found)


@st.composite
def cells(draw: st.DrawFn) -> dict[str, Any]:
    """The row of a dataset: embedded bytes or a path, and a caption."""
    data = draw(st.none() | st.just(GOOD) | st.just(b"") | pictures.files().map(lambda file: file[1]))
    path = draw(st.none() | FILES | NAMES | st.just("zip://a.png::/etc/passwd") | st.just("zip://../a::photos.zip"))
    return {"image": draw(st.none() | st.just({"bytes": data, "path": path})), "text": draw(st.none() | TEXTS)}


def test_rows_of_a_dataset(tmp_path: Path) -> None:
    """The rows are what `datasets` mapped from the disk; it would read the files that they name when it saves them."""
    schema = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}).arrow_schema
    folder, out = tmp_path / "dataset", tmp_path / "out"
    outside = tmp_path / OUTSIDE
    outside.mkdir()
    (outside / "x.png").write_bytes(GOOD)
    datasets.Dataset(pyarrow.Table.from_pylist([{"image": None, "text": ""}], schema=schema)).save_to_disk(folder)
    (folder / "a.png").write_bytes(GOOD)
    (stored,) = folder.glob("*.arrow")
    config = configured(folder, kind="dataset", image_column="image", caption_column="text", caption="a dog")

    def call(given: tuple[list[dict[str, Any]], str]) -> None:
        table = pyarrow.Table.from_pylist(given[0], schema=schema)
        stored.unlink()
        with pyarrow.ipc.new_stream(stored, schema) as file:
            file.write_table(table)
        shutil.rmtree(out, ignore_errors=True)
        convert(config.data, given[1], out)
        run_data_check(config, tmp_path / "sheet.png")

    def encodable(row: dict[str, Any]) -> bool:
        try:
            pyarrow.Table.from_pylist([row], schema=schema)
        except (UnicodeError, pyarrow.ArrowException):
            return False
        return True

    tables = st.lists(cells().filter(encodable), min_size=1, max_size=3)
    elsewhere = [f"../{OUTSIDE}/x.png", str(outside / "x.png"), "/etc/passwd", f"zip://a.png::{outside}/x.png"]
    found = [([{"image": {"bytes": None, "path": path}, "text": "a dog"}], "jsonl") for path in elsewhere]
    forms = st.sampled_from(["sidecar", "jsonl", "csv"])
    try_door("dataset", st.tuples(tables, forms), call, tmp_path, known=found, few=10)
