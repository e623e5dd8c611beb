import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig, DatasetSource
from sd3tune.data.images import check_header, image_bytes, read_image, upright_size
from sd3tune.data.records import load_records
from sd3tune.data.sources.dataset import is_dataset, list_rows, write_parquet
from sd3tune.errors import DataError

FASHION = Path(__file__).resolve().parents[4] / "shared" / "data" / "fashion_mnist" / "test.parquet"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows") / "photos"
    folder.mkdir()
    for number, suffix in enumerate((".png", ".jpg", ".webp")):
        Image.new("RGB", (40 + number, 32), (80 * number, 10, 0)).save(folder / f"{number}{suffix}")
    return folder


@pytest.fixture(scope="module")
def files(photos):
    return sorted(photos.glob("[0-9].*"))


@pytest.fixture(scope="module")
def saved(photos, files, tmp_path_factory):
    """A folder of `save_to_disk` with three rows and a column of labels."""
    import datasets

    folder = tmp_path_factory.mktemp("rows") / "saved"
    columns = {"picture": [str(path) for path in files], "words": ["a", None, " c\r\n"], "label": [0, 1, 2]}
    datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image()).save_to_disk(str(folder))
    return folder


@pytest.fixture
def parquet(files, tmp_path):
    write_parquet(tmp_path / "photos.parquet", [(path.name, path.read_bytes(), f"text {path.stem}") for path in files])
    return tmp_path / "photos.parquet"


def rows(path, **more):
    return list_rows(DatasetSource(kind="dataset", path=str(path), **more))


def saved_rows(path, **more):
    return rows(path, image_column="picture", caption_column="words", **more)


def problem(path, **more):
    with pytest.raises(DataError) as caught:
        rows(path, **more)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def test_a_parquet_file_gives_the_bytes_of_the_files(parquet, files):
    found = rows(parquet)
    assert [text for _, text in found] == ["text 0", "text 1", "text 2"]
    for number, (path, (row, _)) in enumerate(zip(files, found, strict=True)):
        assert row.read_bytes() == path.read_bytes()
        assert row.file_name == path.name
        assert row.name == f"photos.parquet[{number}]"
        assert str(row) == f"{parquet}[{number}]"
        assert read_image(row)[1] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert read_image(row)[0].tobytes() == read_image(path)[0].tobytes()
        assert upright_size(row) == upright_size(path)


def test_others_read_the_parquet_file_as_images(parquet):
    import datasets

    dataset = datasets.load_dataset("parquet", data_files=str(parquet), split="train")
    assert isinstance(dataset.features["image"], datasets.Image)
    assert [image.size for image in dataset["image"]] == [(40, 32), (41, 32), (42, 32)]


def test_several_parquet_files_by_a_pattern(parquet):
    shutil.copy(parquet, parquet.with_name("photos-2.parquet"))
    assert [text for _, text in rows(parquet.with_name("photos*.parquet"))] == ["text 0", "text 1", "text 2"] * 2


def test_a_saved_dataset_with_columns_of_other_names(saved, files):
    found = saved_rows(saved)
    assert [row.read_bytes() for row, _ in found] == [path.read_bytes() for path in files]
    assert [text for _, text in found] == ["a", None, "c"]
    assert is_dataset(saved)


def test_rows_without_a_text_take_the_sources_caption(saved):
    source = {"kind": "dataset", "path": str(saved), "image_column": "picture", "caption_column": "words"}
    data = DataConfig(sources=[{**source, "caption": "fallback"}], resolution=64)
    assert [record.caption for record in load_records(data)] == ["a", "fallback", "c"]
    with pytest.raises(DataError, match=r"saved:train\[1\]: has no caption; fill its column or set the source's"):
        load_records(DataConfig(sources=[source], resolution=64))
    unread = {**source, "caption_column": None, "caption": "one for all"}
    assert {record.caption for record in load_records(DataConfig(sources=[unread], resolution=64))} == {"one for all"}


def test_class_labels_are_their_names(files, tmp_path):
    import datasets

    labels = datasets.ClassLabel(names=["T - shirt / top", "Ankle boot"])
    dataset = datasets.Dataset.from_dict({"image": [str(path) for path in files], "label": [1, 0, -1]})
    dataset.cast_column("image", datasets.Image()).cast_column("label", labels).to_parquet(tmp_path / "labels.parquet")
    found = rows(tmp_path / "labels.parquet", caption_column="label")
    assert [text for _, text in found] == ["Ankle boot", "T - shirt / top", None]


def test_a_folder_of_images_as_a_dataset(photos, files, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "folder")
    lines = [json.dumps({"file_name": path.name, "text": path.stem}) for path in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert not is_dataset(folder)
    assert [(row.read_bytes(), text) for row, text in rows(folder)] == [(p.read_bytes(), p.stem) for p in files]


def test_splits_of_a_saved_dataset(saved, tmp_path):
    import datasets

    whole = datasets.load_from_disk(str(saved))
    datasets.DatasetDict({"big": whole, "small": whole.select([2])}).save_to_disk(str(tmp_path / "both"))
    assert len(saved_rows(tmp_path / "both", split="big")) == 3
    ((row, text),) = saved_rows(tmp_path / "both", split="small")
    assert (row.name, text) == ("both:small[0]", "c")
    assert problem(tmp_path / "both").endswith("both: has no split 'train'; set split: it has big, small")


def test_raw_bytes_without_a_description_are_images_too(files, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": [path.read_bytes() for path in files], "text": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "raw.parquet")
    assert [row.read_bytes() for row, _ in rows(tmp_path / "raw.parquet")] == [path.read_bytes() for path in files]
    assert rows(tmp_path / "raw.parquet")[0][0].file_name is None


def test_a_dataset_keeps_no_format_of_its_owner(saved, tmp_path):
    import datasets

    datasets.load_from_disk(str(saved)).with_format("torch").save_to_disk(str(tmp_path / "torch"))
    assert [text for _, text in saved_rows(tmp_path / "torch")] == ["a", None, "c"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "has no column 'image'; set image_column: the columns are picture, words, label"),
        ({"image_column": "words"}, "column 'words' holds string, not images; the columns are picture, words, label"),
        ({"image_column": "label"}, "column 'label' holds int64, not images"),
        ({"image_column": "picture"}, "has no column 'text'; set caption_column: the columns are"),
        ({"image_column": "picture", "caption_column": "label"}, "column 'label' holds int64, not text"),
        ({"image_column": "picture", "caption_column": "picture"}, "column 'picture' holds Image, not text"),
    ],
)
def test_a_wrong_column_lists_those_that_there_are(saved, columns, says):
    line = problem(saved, **columns)
    assert line.startswith(f"{saved}:train: {says}")


def test_what_cannot_be_read_is_one_line(photos, tmp_path, monkeypatch):
    assert "no such file" in problem(tmp_path / "gone.parquet")
    assert "no such file" in problem(tmp_path / "gone-*.parquet")
    assert "no such folder" in problem(tmp_path / "gone")
    assert "is a file of another kind" in problem(photos / "0.png")
    (tmp_path / "bad.parquet").write_text("hello")
    assert "bad.parquet: cannot be read as a dataset (Parquet file size is 5 bytes" in problem(tmp_path / "bad.parquet")
    (tmp_path / "empty").mkdir()
    assert "empty: cannot be read as a dataset" in problem(tmp_path / "empty")
    assert "has no split 'nope'; set split: it has train" in problem(photos, split="nope")


def test_a_hub_dataset_without_a_network(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = problem("nobody/has-such-a-dataset")
    assert line.startswith(
        "nobody/has-such-a-dataset: no such folder here; if it is a dataset, the Hub cannot be reached"
    )


def test_an_empty_cell_and_broken_bytes_are_named_with_their_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    cells = [{"bytes": b"hello", "path": None}, None, {"bytes": None, "path": "nowhere/a.png"}]
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": ["a", "b", "c"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError) as caught:
        load_records(DataConfig(sources=[{"kind": "dataset", "path": str(tmp_path / "x.parquet")}], resolution=64))
    first, second, third = caught.value.problems
    assert "x.parquet[0]: is not an image" in first
    assert "x.parquet[1]: column 'image' is empty; remove the row" in second
    assert "x.parquet[2]: cannot be read (No such file or directory)" in third


@pytest.fixture
def naming(tmp_path, files):
    """`naming(path)` -> the row of a dataset in `tmp_path/own` that names this file and embeds nothing."""
    import pyarrow
    import pyarrow.parquet

    own = tmp_path / "own"
    (own / "sub").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    shutil.copy(files[0], own / "a.png")
    shutil.copy(files[1], own / "sub" / "b.jpg")
    shutil.copy(files[0], tmp_path / "private" / "passport.png")
    (own / "link.png").symlink_to(tmp_path / "private" / "passport.png")
    (own / "out").symlink_to(tmp_path / "private")
    (own / "circle").symlink_to(own / "circle")
    os.mkfifo(own / "fifo.png")

    def naming(path):
        cells = pyarrow.array([{"bytes": None, "path": path}], type=pyarrow.struct(
            [("bytes", pyarrow.binary()), ("path", pyarrow.string())]
        ))  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table({"image": cells, "text": ["a"]}), own / "x.parquet")
        return rows(own / "x.parquet")[0][0]

    return naming


@pytest.mark.parametrize("path", ["a.png", "sub/b.jpg", "sub/../a.png"])
def test_a_row_may_name_a_file_in_the_folder_of_its_dataset(naming, path, monkeypatch):
    monkeypatch.chdir("/")  # it is not relative to the working directory
    assert read_image(naming(path))[0].size in ((40, 32), (41, 32))


@pytest.mark.parametrize(
    "path",
    [
        "{private}/passport.png", "{own}/a.png", "zip://a.png::{own}/photos.zip", "link.png",
        "../private/passport.png", "sub/../../private/passport.png",
        "out/passport.png", "/dev/zero", "/proc/kmsg", "/proc/self/mem", "~/passport.png/../../../x", "a\0.png",
        "zip://a.png::{private}/photos.zip", "zip://a.png::file://{private}/photos.zip",
    ],
)  # fmt: skip
@pytest.mark.parametrize("read", [read_image, check_header, upright_size, image_bytes])
def test_a_row_that_names_a_file_elsewhere_is_refused(naming, tmp_path, path, read):
    with pytest.raises(
        DataError, match=r"x\.parquet\[0\]: (column 'image' names the file .*the dataset's folder; put)"
    ):
        read(naming(path.format(private=tmp_path / "private", own=tmp_path / "own")))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("fifo.png", "is a named pipe, not a file; replace or remove it"),
        ("sub", "is a folder, not a file"),
        ("circle", "names the file circle|cannot be read"),
        ("none.png", "No such file"),
        ("http://x.invalid/a.png::/b", "No such file"),
    ],
)
def test_a_row_names_no_pipe_and_no_folder(naming, path, why):
    with pytest.raises(DataError, match=rf"x\.parquet\[0\]: .*({why})"):
        read_image(naming(path))


def test_rows_hold_no_images(parquet):
    """A row travels with its place in the mapped file, not with the picture."""
    row, _ = rows(parquet)[0]
    assert row == type(row)(None, row.column, row.place, row.index)
    assert len(pickle.dumps((row.column, row.place, row.index))) < 500


def test_many_rows_are_written_in_parts(tmp_path, files, monkeypatch):
    import pyarrow.parquet

    monkeypatch.setattr("sd3tune.data.sources.dataset._BATCH_ROWS", 2)
    write_parquet(tmp_path / "x.parquet", [(f"{n}.png", files[0].read_bytes(), str(n)) for n in range(5)])
    assert pyarrow.parquet.ParquetFile(tmp_path / "x.parquet").num_row_groups == 3
    assert [text for _, text in rows(tmp_path / "x.parquet")] == ["0", "1", "2", "3", "4"]


@pytest.mark.skipif(not FASHION.is_file(), reason="the real dataset is not here")
def test_a_real_parquet_file():
    data = DataConfig(sources=[{"kind": "dataset", "path": str(FASHION), "max_samples": 40}], resolution=32)
    records = load_records(data)
    assert len(records) == 40
    assert records[0].caption.startswith("a photo of a")
    assert {read_image(record.image)[0].size for record in records} == {(28, 28)}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A folder that `datasets` saved of the pictures in `photos.zip`, which lie in there still."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "photos.zip", "w") as file:
        for number, name in enumerate(("a.png", "sub/b.png")):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 0, 0)).save(buffer, "PNG")
            file.writestr(name, buffer.getvalue())
        rows = [{"file_name": name, "text": f"caption of {name}"} for name in ("a.png", "sub/b.png")]
        file.writestr("metadata.jsonl", "\n".join(map(json.dumps, rows)))
    datasets.load_dataset(str(tmp_path / "zipped"), split="train").save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "zipped" / "photos.zip"


def test_a_folder_with_a_zip_is_read(archive):
    found = rows(archive.parent)
    assert [text for _, text in found] == ["caption of a.png", "caption of sub/b.png"]
    assert [read_image(row)[0].getpixel((0, 0)) for row, _ in found] == [(0, 0, 0), (1, 0, 0)]
    assert [row.file_name for row, _ in found] == ["a.png", "sub/b.png"]


@pytest.mark.usefixtures("archive")
def test_an_archive_outside_the_datasets_folder_is_refused(tmp_path):
    row, text = rows(tmp_path / "saved")[0]
    assert (text, row.file_name) == ("caption of a.png", "a.png")
    with pytest.raises(
        DataError, match=r"saved:train\[0\]: column 'image' names the file .*photos.zip, which is no path"
    ):
        read_image(row)


def test_an_archive_that_is_gone_or_damaged_is_named(archive):
    row, _ = rows(archive.parent)[1]
    content = archive.read_bytes()
    for damaged, why in ((content[:-30], "not a zip file"), (content.replace(b"sub/b", b"sub/c"), "no item named")):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"zipped:train\[1\]: cannot be read \(photos.zip: .*{why}"):
            read_image(row)
    archive.unlink()
    with pytest.raises(DataError, match=r"zipped:train\[1\]: cannot be read \(No such file"):
        read_image(row)


def test_a_name_that_is_nearly_that_of_a_folder_here(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "dog").mkdir(parents=True)
    assert problem("data/dogs").startswith(
        "data/dogs: no such folder here (did you mean data/dog?); if it is a dataset, the Hub cannot"
    )
