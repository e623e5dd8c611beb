"""Which file is the mask of which photo, in each form of the data; a mask is never a photo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.images import image_bytes
from sd3tune.data.records import Scan, scan_records
from sd3tune.data.sources.dataset import write_parquet


def picture(path: Path, colour: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (colour, colour, colour)).save(path)


def scanned(folder: Path, **source: object) -> Scan:
    values = {"kind": "folder", "path": str(folder), "caption": "a dog", **source}
    return scan_records(DataConfig(sources=[values], resolution=64))


def masks(scan: Scan) -> dict[str, str | None]:
    assert scan.problems == []
    return {
        record.image.name: (record.mask.image.name, "alpha")[record.mask.is_alpha] if record.mask else None
        for record in scan.records
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dog.jpg", "dog_mask.png", "cat.webp", "Cat-maskLabel.PNG", "plain.png"):
        picture(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_masks_next_to_photos_are_found_and_are_no_photos(folder: Path) -> None:
    scan = scanned(folder)
    assert masks(scan) == {"cat.webp": "Cat-maskLabel.PNG", "dog.jpg": "dog_mask.png", "plain.png": None}
    assert scan.warnings == []


@pytest.mark.parametrize(("value", "mask"), [("off", None), ("alpha", "alpha")])
def test_masks_that_are_not_used_are_no_photos_either(folder: Path, value: str, mask: str | None) -> None:
    scan = scanned(folder, masks=value)
    assert masks(scan) == dict.fromkeys(("cat.webp", "dog.jpg", "plain.png"), mask)
    assert scan.warnings == []


def test_without_its_photo_a_file_is_a_photo_and_is_named(folder: Path) -> None:
    (folder / "dog.jpg").unlink()
    scan = scanned(folder)
    assert masks(scan) == {"cat.webp": "Cat-maskLabel.PNG", "dog_mask.png": None, "plain.png": None}
    assert scan.warnings == [
        f"{folder}: 1 file is named like a mask, but its photo is not there; it is read as a photo: dog_mask.png"
    ]


def test_the_mask_of_a_mask_is_no_photo(folder: Path) -> None:
    picture(folder / "dog_mask_mask.png")
    scan = scanned(folder)
    assert masks(scan) == {"cat.webp": "Cat-maskLabel.PNG", "dog.jpg": "dog_mask.png", "plain.png": None}


def test_of_two_masks_one_is_named(folder: Path) -> None:
    picture(folder / "dog-masklabel.png")
    scan = scanned(folder)
    assert masks(scan)["dog.jpg"] == "dog_mask.png"
    assert scan.warnings == [f"{folder}: 1 second mask is not read: dog-masklabel.png"]


def test_a_folder_of_masks_has_the_photos_names(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "cats/a.jpg", "c.jpg"):
        picture(tmp_path / "photos" / name)
    for name in ("a.png", "b_mask.png", "cats/a.jpg.webp", "cats/c.png"):
        picture(tmp_path / "photos" / "masks" / name)
    root = tmp_path / "photos"
    scan = scanned(root, recursive=True, masks=str(root / "masks"))
    assert masks(scan) == {"a.jpg": "a.png", "b.jpg": "b_mask.png", "c.jpg": None, "cats/a.jpg": "a.jpg.webp"}
    assert scan.warnings == [f"{root / 'masks'}: 1 mask belongs to no photo: c.png"]
    scan = scanned(root, masks=str(root / "masks"))
    assert list(masks(scan)) == ["a.jpg", "b.jpg", "c.jpg"]
    assert not any("masks: 1 subfolder" in line or "not read: masks" in line for line in scan.warnings)


def test_a_folder_of_masks_of_kohya_folders(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "10_dog" / "1.jpg")
    picture(tmp_path / "train" / "masks" / "10_dog" / "1.png")
    scan = scanned(tmp_path / "train", layout="kohya", masks=str(tmp_path / "train" / "masks"))
    assert masks(scan) == {"10_dog/1.jpg": "1.png"}
    assert scan.warnings == []


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        ("nowhere", "nowhere: no such folder of masks; check masks in data.sources"),
        ("photos", "photos: is the folder of the photos; leave masks out, as masks next to photos are found"),
        ("others", "others: has no mask for any photo in {photos}; name them like the photos, such as dog.png"),
    ],
)
def test_a_folder_without_masks_is_refused(folder: Path, tmp_path: Path, masks: str, says: str) -> None:
    picture(tmp_path / "others" / "cow.png")
    (problem,) = scanned(folder, masks=str(tmp_path / masks)).problems
    assert problem.startswith(f"{tmp_path}/{says.format(photos=folder)}")


@pytest.mark.parametrize("column", ["mask", "mask_file_name"])
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_metadata_names_masks(folder: Path, form: str, column: str) -> None:
    """Before those next to the photos. An image that the metadata describes is a photo, whatever its name."""
    picture(folder / "drawn.png")
    picture(folder / "plain_mask.png")
    rows = [{"file_name": "dog.jpg", column: "drawn.png"}, {"file_name": "plain_mask.png", column: ""}]
    text = "\n".join(json.dumps({**row, "text": "described"}) for row in rows)
    if form == "csv":
        text = f"file_name,text,{column}\n" + "\n".join(f"{row['file_name']},described,{row[column]}" for row in rows)
    (folder / f"metadata.{form}").write_text(text)
    scan = scanned(folder)
    assert masks(scan) == {
        "cat.webp": "Cat-maskLabel.PNG", "dog.jpg": "drawn.png", "plain.png": None, "plain_mask.png": None,
    }  # fmt: skip
    assert scan.warnings == [f"{folder}: 1 second mask is not read: dog_mask.png"]
    assert masks(scanned(folder, masks="off")) == dict.fromkeys(["cat.webp", "dog.jpg", "plain.png", "plain_mask.png"])


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("gone.png", "gone.png does not exist in {folder}"),
        ("../x.png", "../x.png leads out of the folder"),
        (1, "mask is 1, not a file's name; or set masks: off"),
    ],
)
def test_a_mask_that_metadata_names_must_be_there_unless_masks_are_off(folder: Path, cell: object, says: str) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "dog.jpg", "mask": cell}))
    (problem,) = scanned(folder).problems
    assert problem.startswith(f"{folder / 'metadata.jsonl'}:1: {says.format(folder=folder)}")
    assert scanned(folder, masks="off").problems == []


def test_photos_that_metadata_names_in_a_subfolder_have_neighbours(folder: Path) -> None:
    for name in ("x.jpg", "x_mask.png"):
        picture(folder / "sub" / name)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "sub/x.jpg", "text": "x"}))
    scan = scanned(folder)
    assert masks(scan)["x.jpg"] == "x_mask.png"
    assert scan.warnings == []


def test_columns_of_a_dataset(folder: Path, tmp_path: Path) -> None:
    """Images, or paths below the dataset's folder; an empty cell is no mask, and a column of something else none."""
    import datasets

    photo, mask = ((folder / name).read_bytes() for name in ("dog.jpg", "dog_mask.png"))
    rows = [("a.jpg", photo, "a"), ("b.jpg", photo, "b"), ("c.jpg", photo, "c")]
    file = tmp_path / "data" / "x.parquet"
    file.parent.mkdir()
    write_parquet(file, rows, masks={"b.jpg": lambda: mask})
    scan = scanned(file, kind="dataset")
    assert [record.mask and image_bytes(record.mask.image) for record in scan.records] == [None, mask, None]
    assert [str(record.mask) for record in scan.records if record.mask] == [f"{file}:mask[1]"]
    assert [record.mask for record in scanned(file, kind="dataset", masks="off").records] == [None] * 3
    assert all(record.mask and record.mask.is_alpha for record in scanned(file, kind="dataset", masks="alpha").records)

    (file.parent / "m.png").write_bytes(mask)
    loaded = datasets.load_dataset("parquet", data_files=str(file), split="train").remove_columns("mask")
    loaded = loaded.cast_column("image", datasets.Image(decode=False))
    paths = loaded.add_column("mask", ["", None, "m.png"])
    paths.add_column("region", [[1], [2], [3]]).to_parquet(str(file.parent / "paths.parquet"))
    of_paths = str(file.parent / "paths.parquet")
    scan = scanned(Path(of_paths), kind="dataset")
    assert [record.mask and image_bytes(record.mask.image) for record in scan.records] == [None, None, mask]
    (problem,) = scanned(Path(of_paths), kind="dataset", mask_column="region").problems
    assert "column 'region' holds" in problem
    loaded.add_column("mask", [[0, 1]] * 3).to_parquet(str(file.parent / "others.parquet"))
    scan = scanned(file.parent / "others.parquet", kind="dataset")
    assert (scan.problems, [record.mask for record in scan.records]) == ([], [None] * 3)
