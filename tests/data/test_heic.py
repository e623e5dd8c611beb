"""HEIC pictures: read with pillow-heif, and one line that names the extra without it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.formats import EXTENSIONS, is_picture
from sd3tune.data.images import check_header, read_image, read_picture, upright_size
from sd3tune.data.records import scan_records
from sd3tune.errors import DataError

WITHOUT = """
import sys
sys.modules["pillow_heif"] = None
from sd3tune.config.sections.data import DataConfig
from sd3tune.data.records import scan_records
data = DataConfig(sources=[{"kind": "folder", "path": sys.argv[1], "caption": "a dog"}], resolution=64)
scan = scan_records(data)
print(*scan.problems, *scan.warnings, sep="\\n")
"""


def heic(path: Path, **options: object) -> Path:
    pytest.importorskip("pillow_heif")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24] = 200  # the upper half is grey
    Image.fromarray(pixels).save(path, "HEIF", quality=100, **options)
    return path


def test_a_heic_picture_is_read_like_any_other(tmp_path: Path) -> None:
    found = np.asarray(read_image(heic(tmp_path / "IMG_1.HEIC"))[0], int)
    assert found.shape == (48, 64, 3)
    assert abs(found[:20] - 200).max() < 12
    assert found[28:].max() < 12
    heic(tmp_path / "called.jpg")
    data = DataConfig(sources=[{"kind": "folder", "path": str(tmp_path), "caption": "a dog"}], resolution=64)
    scan = scan_records(data)
    assert (scan.problems, scan.warnings) == ([], [])
    assert [record.image.name for record in scan.records] == ["IMG_1.HEIC", "called.jpg"]
    assert {".heic", ".heif"} <= set(EXTENSIONS)


def test_a_turned_heic_picture_is_turned_once(tmp_path: Path) -> None:
    """HEIC keeps the rotation itself; a copy in EXIF does not count."""
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = 6
    path = heic(tmp_path / "a.heic", exif=exif)
    stored = pillow_heif.open_heif(path.read_bytes())
    assert upright_size(path) == read_picture(path).size == stored.size[::-1]
    check_header(path)


def test_a_profile_and_transparency_of_a_heic_picture_are_followed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "a.heic", "HEIF", quality=100)
    picture = read_picture(tmp_path / "a.heic")
    assert picture.reading.transparent
    assert np.asarray(picture.image).min() > 250


def test_a_damaged_heic_picture_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    whole = heic(tmp_path / "a.heic").read_bytes()
    for cut in (len(whole) // 2, 40):
        (tmp_path / "a.heic").write_bytes(whole[:cut])
        with pytest.raises(DataError) as caught:
            read_image(tmp_path / "a.heic")
        (line,) = caught.value.problems
        assert line.startswith(f"{tmp_path}/a.heic: ")
        assert "\n" not in line


def test_without_the_extra_it_is_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    for name in ("IMG_1.HEIC", "called.jpg"):
        (tmp_path / name).write_bytes(content)
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path}/called.jpg: is a HEIC picture, which needs pillow-heif: pip install 'sd3tune[heic]', or convert "
        "it to JPEG or PNG",
        f"{tmp_path}: 1 picture is passed over: IMG_1.HEIC; convert to JPEG or PNG; HEIC needs pip install "
        "'sd3tune[heic]'",
    ]
    assert is_picture("IMG_1.HEIC")
