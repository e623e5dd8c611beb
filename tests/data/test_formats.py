"""Which files are pictures, and what the others are."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from PIL import Image, features

from sd3tune.data.formats import EXTENSIONS, FORMATS, is_picture
from sd3tune.data.images import check_header, read_image, upright_size
from sd3tune.errors import DataError


def encoded(name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 24), "orange").save(buffer, name, **options)
    return buffer.getvalue()


def complaint(call, path: Path) -> str:
    with pytest.raises(DataError) as caught:
        call(path)
    (line,) = caught.value.problems
    return line


def test_what_is_read_is_what_this_pillow_can_decode() -> None:
    assert {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".tif", ".tiff", ".bmp", ".gif", ".mpo"} <= set(EXTENSIONS)
    for name, suffix in (("AVIF", ".avif"), ("WEBP", ".webp")):
        assert (name in FORMATS) == (suffix in EXTENSIONS) == features.check(name.lower())
    assert not {"EPS", "PDF", "JPEG2000"} & set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_under_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / "called.jpg"
    path.write_bytes(encoded(name))
    assert read_image(path)[0].size == (40, 24)
    assert upright_size(path) == (24, 40)
    check_header(path)


@pytest.mark.parametrize("name", ["a.HEIC", "a.heif", "a.jxl", "a.JP2", "a.psd", "a.dng", "a.CR2", "a.avif", "a.tga"])
def test_pictures_are_known_by_their_names(name: str) -> None:
    assert is_picture(name)


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.pdf", "a.npz", "a.h5", "a.mp4", "a.eps", "a", "heic"])
def test_other_files_are_no_pictures(name: str) -> None:
    assert not is_picture(name)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2\n"
MIF1_OF_HEIC = b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf" + bytes(40)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LFS, "is a Git LFS pointer and not the picture; fetch it with `git lfs pull`"),
        (b"/annex/objects/SHA256E-s1--ab.jpg\n", "is a git-annex pointer"),
        (b"<!DOCTYPE html>\n<html lang=en><head>", "is a web page (HTML) and not a picture"),
        (b"\n  <HTML><body>404</body></HTML>", "is a web page (HTML) and not a picture"),
        (b"<!-- saved from -->\n<html>", "is a web page (HTML) and not a picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "is a HEIC picture"),
        (b"\0\0\0\x18ftyphevc\0\0\0\0mif1heic" + bytes(40), "is a HEIC picture"),
        (MIF1_OF_HEIC, "is a HEIC picture"),
        (b"\xff\x0a" + bytes(40), "is a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "is a JPEG XL picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "is a JPEG 2000 picture"),
        (b"8BPS\0\1" + bytes(40), "is a Photoshop document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "is an SVG drawing"),
        (b"%PDF-1.7\n" + bytes(40), "is a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF\n", "is a PostScript document"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2" + bytes(40), "is a video and not a picture"),
        (b"PK\x03\x04" + bytes(40), "is a ZIP archive"),
        (b"II*\0" + b"x" * 40, "is a picture in TIFF format, damaged or of an unusual kind"),
        (b"a dog on a beach\n", "is not an image, whatever its name says"),
        (b"", "is empty (0 bytes)"),
    ],
)
def test_what_is_called_a_photo_and_is_none_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    lines = {complaint(call, path) for call in (read_image, check_header, upright_size)}
    (line,) = lines
    assert line.startswith(f"{path}: {said}")


def test_avif_without_its_codec_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photo.jpg").write_bytes(encoded("AVIF"))
    monkeypatch.setattr("PIL.AvifImagePlugin.SUPPORTED", False)
    assert "is a picture in AVIF format, which this installation of Pillow cannot read" in complaint(
        read_image, tmp_path / "photo.jpg"
    )


def test_pillow_says_nothing_by_itself(tmp_path, caplog):
    """It would not name the file."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "TIFF")
    samples = struct.pack("<HHI", 277, 3, 1)
    (tmp_path / "many.tif").write_bytes(content.getvalue().replace(samples + b"\3\0", samples + b"\xc8\0"))
    with pytest.raises(DataError, match=r"many\.tif: is a picture in TIFF format, damaged"):
        read_image(tmp_path / "many.tif")
    assert caplog.records == []
