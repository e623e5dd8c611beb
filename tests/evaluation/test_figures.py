"""Figures of rows against numpy; what they do not depend on; and which pictures count as copies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd3tune.errors import MeasureUnavailable
from sd3tune.evaluation.judge import judge, new_copies
from sd3tune.evaluation.measuring import Measured, measure
from sd3tune.evaluation.photos import Photos
from sd3tune.evaluation.pictures import Picture
from sd3tune.evaluation.rows import Row, RowName, rows_of, tables_of
from sd3tune.measures.encoders import EncoderSpec, register, unregister
from sd3tune.measures.intervals import interval, paired
from tests.evaluation.conftest import Draw, SmallPictures

CPU = torch.device("cpu")
SPEC = EncoderSpec("small", "pixels", None, ("subject", "prompt"))
ROWS = [RowName("base", "base"), RowName("step 2", "trained", 2)]
TEXTS = ("a dog at sea", "a dog at home")


@pytest.fixture
def photos(tmp_path: Path, noise_pictures: Draw) -> Photos:
    """Four photos and two held-out ones that are more like each other than other pictures."""
    files = sorted(noise_pictures(tmp_path / "all", 7).iterdir())
    with Image.open(files.pop()) as common:
        for file in files:
            with Image.open(file) as own:
                Image.blend(own, common, 0.6).save(file)
    return Photos(files[:4], files[4:])


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """Two rows of two prompts and two class prompts, with two seeds; each is a picture of its own."""
    source, found = np.random.default_rng(1), []
    for row in ("base", "step 2"):
        for kind in ("prompt", "class"):
            for number in range(2):
                for seed in range(2):
                    file = tmp_path / f"{row}-{kind}-{number}-{seed}.png"
                    Image.fromarray(source.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
                    found.append(Picture(row, kind, number, seed, file, TEXTS[number], TEXTS[number]))
    return found


def features(files: Sequence[Path]) -> np.ndarray:
    """What `SmallPictures` makes, by numpy."""
    pixels = np.stack([np.asarray(Image.open(file), dtype=np.float64) for file in files])
    narrow = np.floor(pixels.reshape(-1, 16, 8, 2, 3).mean(3) + 0.5)  # Pillow rounds after each direction
    flat = np.floor(narrow.reshape(-1, 8, 2, 8, 3).mean(2) + 0.5).reshape(len(files), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def of(pictures: Sequence[Picture], row: str, kind: str) -> np.ndarray:
    """Features of a row's pictures: [prompts, seeds, d]."""
    mine = [picture.file for picture in pictures if picture.row == row and picture.kind == kind]
    return features(mine).reshape(2, 2, -1)


def test_figures_are_those_of_numpy(pictures: list[Picture], photos: Photos, small_encoder: SmallPictures) -> None:
    measured = measure(pictures, photos, [SPEC], CPU)
    known, held_out = features(photos.training), features(photos.held_out)
    texts = small_encoder.texts(TEXTS).numpy()
    drawn, of_class, base_class = (
        of(pictures, row, kind) for row, kind in (("step 2", "prompt"), ("step 2", "class"), ("base", "class"))
    )
    expected = {
        ("subject", "small"): (drawn @ known.T).mean(-1),
        ("held_out", "small"): (drawn @ held_out.T).mean(-1),
        ("nearest", "small"): (drawn @ known.T).max(-1),
        ("prompt", "small"): np.einsum("psd,pd->ps", drawn, texts),
        ("diversity", "small"): 1 - np.einsum("pd,pd->p", drawn[:, 0], drawn[:, 1])[:, None],
        ("class_subject", "small"): (of_class @ known.T).mean(-1),
        ("moved", "small"): 1 - np.einsum("psd,psd->ps", of_class, base_class),
    }
    tables = tables_of(measured, "step 2")
    assert tables.keys() == expected.keys() | {("nearest", "pixels")}
    for key, table in expected.items():
        np.testing.assert_allclose(tables[key].numpy(), table, atol=2e-6, err_msg=str(key))

    row = {row.name: row for row in rows_of(measured, ROWS)}
    among = known @ known.T
    own = (among.sum(1) - 1) / 3
    base = (of(pictures, "base", "prompt") @ known.T).mean(-1)
    assert row["photos"].figures["subject", "small"].interval.mean == pytest.approx(own.mean(), abs=1e-6)
    assert row["photos"].figures["nearest", "small"].interval.mean == pytest.approx(
        np.where(np.eye(4, dtype=bool), -1, among).max(1).mean(), abs=1e-6
    )
    likeness = row["step 2"].figures["subject", "small"]
    assert likeness.interval == interval(tables["subject", "small"])
    assert likeness.against_base == paired(tables["subject", "small"], tables_of(measured, "base")["subject", "small"])
    assert likeness.share == pytest.approx(
        (expected["subject", "small"].mean() - base.mean()) / (own.mean() - base.mean()), rel=1e-3
    )
    assert row["base"].figures["subject", "small"].against_base is None
    assert [row[name].figures["subject", "small"].share for name in ("base", "photos")] == [0, 1]


@pytest.mark.usefixtures("small_encoder")
def test_figures_do_not_depend_on_the_order_of_the_pictures(pictures: list[Picture], photos: Photos) -> None:
    shuffled = list(pictures)
    random.Random(0).shuffle(shuffled)
    assert shuffled != pictures

    def by_place(measured: Measured) -> dict[tuple[object, ...], object]:
        return {
            (picture.row, picture.kind, picture.number, picture.seed): values
            for picture, values in zip(measured.pictures, measured.values, strict=True)
        }

    first, second = (measure(order, photos, [SPEC], CPU) for order in (pictures, shuffled))
    assert by_place(first) == by_place(second)


@pytest.mark.usefixtures("small_encoder")
def test_a_missing_seed_leaves_a_gap(pictures: list[Picture], photos: Photos) -> None:
    few = [picture for picture in pictures if (picture.row, picture.number, picture.seed) != ("step 2", 1, 1)]
    table = tables_of(measure(few, photos, [SPEC], CPU), "step 2")["subject", "small"]
    assert table.isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.usefixtures("small_encoder")
def test_one_photo_has_no_likeness_of_its_own_and_gives_no_verdict(pictures: list[Picture], photos: Photos) -> None:
    measured = measure(pictures, Photos(photos.training[:1]), [SPEC], CPU)
    rows = rows_of(measured, ROWS)
    assert rows[0].figures == {}
    found = judge(measured, ROWS, rows[0], "dog")
    assert (found.kind, found.best) == ("none", None)
    assert found.sentence == "no verdict: the photos' own likeness needs at least two photos"


def test_an_encoder_that_cannot_be_loaded_is_named_and_the_rest_is_measured(
    pictures: list[Picture], photos: Photos, small_encoder: SmallPictures, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(spec: EncoderSpec, device: torch.device) -> SmallPictures:
        raise MeasureUnavailable(f"{spec.name}: gated; name a local folder for it")

    gated = EncoderSpec("gated", "user/gated", None, ("subject",))
    register(gated, refuse)
    try:
        measured = measure(pictures, photos, [gated, SPEC], CPU)
        nothing = measure(pictures, photos, [gated], CPU)
    finally:
        unregister("gated")
    assert "warning: not measured: gated: gated; name a local folder for it\n" in capsys.readouterr().out
    assert measured.unavailable == {"gated": "gated: gated; name a local folder for it"}
    assert ("subject", "small") in tables_of(measured, "base")
    assert tables_of(nothing, "base").keys() == {("nearest", "pixels")}
    assert (
        "no encoder of likeness could be loaded"
        in judge(nothing, ROWS, Row("photos", "photos", None, {}), None).sentence
    )


@pytest.mark.usefixtures("small_encoder")
def test_a_copy_counts_unless_the_base_draws_it_too(pictures: list[Picture], photos: Photos) -> None:
    """Two of the photos are almost equal, and copies of them are found all the same."""
    with Image.open(photos.training[0]) as photo:  # type: ignore[arg-type]
        twin = photo.copy()
        twin.paste("black", (0, 0, 2, 2))
        twin.save(photos.training[1])  # type: ignore[arg-type]
        for picture in pictures:
            if picture.kind == "prompt" and picture.number == 0 and (picture.row, picture.seed) != ("base", 0):
                photo.save(picture.file)
    measured = measure(pictures, photos, [SPEC], CPU)
    rows = {row.name: row.copies for row in rows_of(measured, ROWS)}
    assert (rows["base"], rows["step 2"]) == (1, 2)
    assert new_copies(measured, "step 2") == 1
    assert measured.nearest_photo[next(i for i, one in enumerate(pictures) if one.row == "step 2"), "small"] == 0
