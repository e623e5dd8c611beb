"""The benchmark of measures: its rates on features made up for it, and its way through a folder and a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import separation
from benchmarks.separation import classes_of, distances, main, photos_of

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def around(centre: int, count: int, spread: float) -> Tensor:
    drawn = torch.Generator().manual_seed(centre)
    return unit(torch.eye(8)[centre] + spread * torch.randn(count, 8, generator=drawn))


def test_subjects_apart_are_told_apart_and_equal_ones_are_not() -> None:
    apart = separation.separation({str(centre): around(centre, 5, 0.1) for centre in range(4)})
    assert list(apart.values())[:3] == [1, 1, 1]
    mixed = separation.separation({str(seed): unit(torch.randn(20, 8)) for seed in range(4)})
    assert mixed["nearer to its own subject than to another one"] < 0.75
    assert mixed["nearest to its own subject of all"] < 0.6


def test_a_class_is_nearer_to_itself_than_to_another_one() -> None:
    found = distances({str(centre): around(centre, 40, 0.1) for centre in range(3)}, side=20, splits=2)
    assert {name: len(values) for name, values in found.items()} == {"itself": 6, "another": 6}
    for column in (0, 1):
        assert max(one[column] for one in found["itself"]) < min(one[column] for one in found["another"])


class MeanColour:
    name, source = "efficientnet", "here"

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        return unit(
            torch.stack([torch.from_numpy(np.array(one.convert("RGB"), np.float32)).mean((0, 1)) for one in pictures])
        )


def noisy(colour: tuple[int, int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-25, 25, (6, 6, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def test_photos_and_classes_are_measured_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for name, colour in COLOURS.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            noisy(colour, number).save(tmp_path / "photos" / name / f"{number}.png")
            stream = io.BytesIO()
            noisy(colour, 10 + number).save(stream, format="PNG")
            rows += 2 * [{"image": {"bytes": stream.getvalue(), "path": None}, "text": name}]
    (tmp_path / "photos" / "alone").mkdir()
    noisy((9, 9, 9), 0).save(tmp_path / "photos" / "alone" / "0.png")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "classes.parquet")
    assert {name: len(photos) for name, photos in photos_of(tmp_path / "photos").items()} == dict.fromkeys(COLOURS, 4)
    assert {name: len(images) for name, images in classes_of(tmp_path / "classes.parquet", 3).items()} == dict.fromkeys(
        COLOURS, 3
    )
    monkeypatch.setattr(separation, "EfficientNetLite", lambda **options: MeanColour())
    arguments = [
        str(tmp_path / "photos"),
        "--classes",
        str(tmp_path / "classes.parquet"),
        "--sides",
        "4",
        "--splits",
        "1",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 12 photos of 3 subjects | |" in printed
    assert "| nearer to its own subject than to another one | 1.000 |" in printed
    assert "| left out, as it is | " in printed
    assert "| mirrored | 12 of 12 |" in printed
    assert "\n| 4 | " in printed
