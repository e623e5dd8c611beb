"""Shards in WebDataset's format for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    """Write a tar with these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def picture(number: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a PNG of a colour of its own; `size` is (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number * 7 % 256, number * 31 % 256)).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, shards: int, each: int, broken: tuple[int, ...] = ()) -> str:
    """Write shards of samples `00000`, `00001`, ...: two shapes, captions as texts and JSON. Return their pattern."""
    for shard in range(shards):
        files = {}
        for number in range(shard * each, (shard + 1) * each):
            image = picture(number, (64, 64) if number % 3 else (96, 64))
            files[f"{number:05d}.png"] = image[: len(image) // 2] if number in broken else image
            if number % 2:
                files[f"{number:05d}.json"] = json.dumps({"caption": [f"thing {number}", "a thing"]}).encode()
            else:
                files[f"{number:05d}.txt"] = f"thing {number}".encode()
        write_tar(folder / f"shard-{shard:03d}.tar", files)
    return f"{folder}/shard-{{000..{shards - 1:03d}}}.tar"
