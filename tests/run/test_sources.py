"""The same pictures in every form that data can have: the same encodings, and the same adapter."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.data_convert import convert as convert_data
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.data.images import image_bytes
from sd3tune.data.records import load_records
from sd3tune.data.sources.dataset import write_parquet
from sd3tune.data.sources.from_path import source_of
from sd3tune.data.store import Store
from sd3tune.errors import RunError

FORMS = ("sidecar", "jsonl", "csv", "parquet")
FASHION = Path(__file__).resolve().parents[3] / "shared" / "data" / "fashion_mnist" / "train.parquet"


def convert(what: Path, form: str, out: Path) -> Path:
    data = parse_config({"data": {"sources": [source_of(str(what))]}}).config.data
    convert_data(data, form, out)
    return out


@pytest.fixture(scope="module")
def twelve(tmp_path_factory) -> Path:
    """Twelve captioned photos of several formats and sizes with masks, one of them turned by EXIF."""
    folder = tmp_path_factory.mktemp("forms") / "photos"
    folder.mkdir()
    for number in range(12):
        image = Image.new("RGB", (64 + 4 * number, 72), (20 * number, 100, 255 - 20 * number))
        ImageDraw.Draw(image).ellipse((number, 4, 40 + number, 60), fill="white")
        exif = Image.Exif()
        exif[0x0112] = 6
        name = f"{number:02}{('.png', '.jpg', '.webp')[number % 3]}"
        image.save(folder / name, **({"exif": exif} if number == 4 else {}))
        (folder / name).with_suffix(".txt").write_text(f'picture {number}, "small"\nof sks dog')
        mask = Image.new("L", image.size, 8 * number)
        ImageDraw.Draw(mask).ellipse((number, 4, 40 + number, 60), fill=255 - number)
        mask = mask.transpose(Image.Transpose.ROTATE_270) if number == 4 else mask
        mask.save(folder / f"{number:02}_mask{('.png', '.webp')[number % 2]}", lossless=True)
    return folder


@pytest.fixture(scope="module")
def forms(twelve: Path, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Each form as an entry of `data.sources`."""
    import datasets

    root = tmp_path_factory.mktemp("forms")
    places = {form: convert(twelve, form, root / (form if form != "parquet" else "x.parquet")) for form in FORMS}
    saved = datasets.load_dataset("parquet", data_files=str(places["parquet"]), split="train")
    saved.save_to_disk(str(root / "saved"))
    shutil.copytree(places["jsonl"], root / "imagefolder")
    shutil.copytree(twelve, root / "apart")
    (root / "masks").mkdir()
    for mask in (root / "apart").glob("*_mask.*"):
        mask.rename(root / "masks" / mask.name.replace("_mask", ""))
    return {
        "folder": {"path": str(twelve)},
        **{form: source_of(str(place)) for form, place in places.items()},
        "saved": source_of(str(root / "saved")),
        "imagefolder": {"kind": "dataset", "path": str(root / "imagefolder")},
        "apart": {"path": str(root / "apart"), "masks": str(root / "masks")},
    }


def train(source: dict[str, Any], root: Path, quick_config) -> tuple[Path, dict[str, dict[str, torch.Tensor]]]:
    """The run, and the store that it filled alone."""
    overrides = [f"data.sources={json.dumps([source])}", f"data.cache_dir={root / 'store'}", "data.flip=true"]
    run_training(quick_config(root / "run", *overrides, "train.steps=4", "train.batch_size=2", "data.crop_variants=2"))
    store = Store(root / "store")
    return root / "run", {key: store.get(key) for key in store._index}


def test_every_form_gives_the_same_store_and_the_same_adapter(forms, quick_config, tmp_path, assert_equal_runs) -> None:
    expected_run, expected = train(forms["folder"], tmp_path / "folder", quick_config)
    assert len(expected) > 12 * 3 + 12 * 3  # some of the cuts coincide
    kinds = Counter(tuple(entry) for entry in expected.values())
    assert kinds[("mask",)] == kinds["mean", "std"]
    for name in ("sidecar", "jsonl", "csv", "parquet", "saved", "imagefolder", "apart"):
        run, store = train(forms[name], tmp_path / name, quick_config)
        assert store.keys() == expected.keys(), name
        for key, entry in expected.items():
            assert all(torch.equal(entry[part], store[key][part]) for part in entry)
        assert_equal_runs(expected_run, run)


def test_an_encoding_is_reused_by_another_form(forms, quick_config, tmp_path, capsys) -> None:
    train(forms["folder"], tmp_path, quick_config)
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run")
    train(forms["parquet"], tmp_path, quick_config)
    printed = capsys.readouterr().out
    assert "images: 12 x 4 variants, all reused" in printed
    assert "captions: 12 texts x 3 encoders, all reused" in printed


def test_the_size_is_announced_before_it_is_written(forms, quick_config, tmp_path, capsys) -> None:
    train(forms["csv"], tmp_path, quick_config)
    lines = capsys.readouterr().out.splitlines()
    announced = [line for line in lines if "to encode" in line]
    assert announced[0].startswith("captions: 36 entries to encode, ")
    assert re.match(rf"masks: \d+ entries to encode, 0\.0 MB in {tmp_path / 'store'} \(\d", announced[1])
    assert re.match(rf"images: \d+ entries to encode, 0\.4 MB in {tmp_path / 'store'} \(\d", announced[2])
    (done,) = (line for line in lines if line.startswith("images: 12 x"))
    assert lines.index(announced[2]) < lines.index(done)


def test_several_sources_are_one_run_with_trigger_templates_and_weights(
    forms, twelve, quick_config, tmp_path, lines_of
) -> None:
    sources = [
        {**forms["parquet"], "max_samples": 3, "template": "{trigger}: {caption}", "weight": 0.5},
        {**forms["folder"], "max_samples": 2, "repeats": 2},
    ]
    overrides = [f"data.sources={json.dumps(sources)}", "data.trigger=tok", "train.steps=7"]
    run_training(quick_config(tmp_path / "run", *overrides))
    adapter = read_adapter(tmp_path / "run")
    assert adapter.contract["trigger"] == "tok"
    assert "`tok`: it is in every caption" in (tmp_path / "run" / "README.md").read_text()
    seen = [line["loss"] / next(iter(line["loss_by_sigma"].values())) for line in lines_of(tmp_path / "run")]
    assert sorted(seen) == pytest.approx([0.5] * 3 + [1.0] * 4)


def test_resuming_with_another_weight_is_refused(twelve, quick_config, tmp_path) -> None:
    source = f"data.sources=[{{path: {twelve}, weight: %s}}]"
    run_training(quick_config(tmp_path, source % 1.0, "train.steps=1"))
    with pytest.raises(RunError) as caught:
        run_training(quick_config(tmp_path, source % 2.0, "train.steps=2"), resume=True)
    assert "data.weights" in caught.value.problems[0]


@pytest.mark.skipif(not FASHION.is_file(), reason="the real dataset is not here")
def test_a_large_real_parquet_file(quick_config, tmp_path, capsys) -> None:
    source = {"kind": "dataset", "path": str(FASHION), "max_samples": 24}
    overrides = [f"data.sources={json.dumps([source])}", f"data.cache_dir={tmp_path / 'store'}", "data.resolution=32"]
    run_training(quick_config(tmp_path / "run", *overrides, "train.steps=1"))
    printed = capsys.readouterr().out
    assert "data      24 images, 32 px" in printed
    assert "24 images are enlarged to fill the crop" in printed


# Converting.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_there_and_back_leaves_everything_as_it_was(forms, first: str, second: str, tmp_path: Path) -> None:
    start = Path(forms[first]["path"])
    name = {"parquet": "x.parquet"}
    there = convert(start, second, tmp_path / "there" / name.get(second, second))
    back = convert(there, first, tmp_path / "back" / name.get(first, first))
    if first == "parquet":
        start, back = convert(start, "jsonl", tmp_path / "a"), convert(back, "jsonl", tmp_path / "b")
    assert contents(back) == contents(start)


def test_the_bytes_of_images_are_not_touched(twelve: Path, forms) -> None:
    for form in ("sidecar", "jsonl", "csv"):
        written = contents(Path(forms[form]["path"]))
        for path in twelve.iterdir():
            if path.suffix != ".txt":
                assert written[path.name] == path.read_bytes()


def test_files_in_subfolders_keep_their_names_and_are_laid_flat_beside_sidecars(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    lines = []
    for number, name in enumerate(("a.png", "sub/a.png", "sub/deep/b.png", "sub-a.webp")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (9 * number, 0, 0)).save(photos / name)
        lines.append(json.dumps({"file_name": name, "text": f"caption {number}"}))
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    parquet = convert(photos, "parquet", tmp_path / "x.parquet")
    back = contents(convert(parquet, "csv", tmp_path / "back"))
    assert set(back) == {"a.png", "sub/a.png", "sub/deep/b.png", "sub-a.webp", "metadata.csv"}
    flat = contents(convert(parquet, "sidecar", tmp_path / "flat"))
    pairs = {name: flat[str(Path(name).with_suffix(".txt"))].decode() for name in flat if not name.endswith(".txt")}
    assert pairs == {
        "a.png": "caption 0\n",
        "sub-a.png": "caption 1\n",
        "sub-a-2.webp": "caption 3\n",
        "sub-deep-b.png": "caption 2\n",
    }


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_names_that_a_dataset_remembers_never_lead_elsewhere(tmp_path: Path) -> None:

    names = ["/etc/cron.d/a.png", "../../b.png", "noending", "A.png", "", ".hidden.png", "metadata.csv"]
    write_parquet(tmp_path / "x.parquet", [(name, png(n), f"c {n}") for n, name in enumerate(names)])
    found = contents(convert(tmp_path / "x.parquet", "jsonl", tmp_path / "out"))
    del found["metadata.jsonl"]
    assert list(found) == sorted(
        ["a.png", "b.png", "noending.png", "A-2.png", "000004.png", "hidden.png", "metadata.csv.png"]
    )
    assert convert(tmp_path / "out", "sidecar", tmp_path / "again").is_dir()


@pytest.mark.parametrize(
    ("form", "out", "message"),
    [
        ("zip", "new", "--to zip: one of sidecar, jsonl, csv, parquet"),
        ("parquet", "new", "writes a file: name it *.parquet"),
        ("csv", "new.parquet", "--to csv writes a folder"),
        ("csv", "full", "exists already, and nothing is overwritten"),
        ("parquet", "old.parquet", "exists already, and nothing is overwritten"),
        ("csv", "full/kept.txt", "exists already, and nothing is overwritten"),
    ],
)
def test_nothing_is_overwritten(twelve: Path, tmp_path: Path, form: str, out: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    (tmp_path / "old.parquet").write_text("kept")
    before = contents(tmp_path)
    with pytest.raises(RunError) as caught:
        convert(twelve, form, tmp_path / out)
    assert message in caught.value.problems[0]
    assert contents(tmp_path) == before


def test_a_failure_leaves_nothing_behind(twelve: Path, tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd3tune.commands.data_convert.write_jsonl", fail)
    with pytest.raises(RunError, match="No space left"):
        convert(twelve, "jsonl", tmp_path / "out")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("form", FORMS)
def test_names_that_are_not_text_or_no_names_are_converted(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    names = ["nul\0.png", "line\nbreak.png", "../.." + "/etc" * 3 + "/x.png", "é" * 300 + ".png", "..", "/", ""]
    write_parquet(tmp_path / "x.parquet", [(name, content, f"text {n}") for n, name in enumerate(names)])
    (tmp_path / "photos").mkdir()
    for name in (b"caf\xe9.png", b"caf\xe8.png"):
        (tmp_path / "photos" / os.fsdecode(name)).write_bytes(content)
        (tmp_path / "photos" / os.fsdecode(name)).with_suffix(".txt").write_text("a café")
    for number, (what, count) in enumerate(((tmp_path / "x.parquet", len(names)), (tmp_path / "photos", 2))):
        out = tmp_path / (f"{number}.parquet" if form == "parquet" else f"out{number}")
        source = source_of(str(convert(what, form, out)))
        records = load_records(parse_config({"data": {"sources": [source]}}).config.data)
        assert len(records) == count
        assert {image_bytes(record.image) for record in records} == {content}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["a.png", "x.parquet", "photos", *(["0.parquet", "1.parquet"] if form == "parquet" else ["out0", "out1"])]
    )
