import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3tune.data.crops import cover, crops, pixels
from sd3tune.data.duplicates import LEAST_SIDE, thumbnail
from sd3tune.data.images import (
    check_header,
    file_digest,
    is_smaller,
    open_image,
    read_image,
    read_picture,
    upright_size,
)
from sd3tune.errors import DataError

DIGEST = "5f" * 32


def noise(height=48, width=64, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def only_line(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(noise())
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_the_upright_size_is_known_without_decoding(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.fromarray(noise(48, 64)).save(path, **({} if suffix == "bmp" else {"exif": exif}))
    image = open_image(path)
    assert upright_size(path) == (image.height, image.width)
    if suffix not in ("tif", "webp"):  # theirs may stand at the end
        path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
        assert upright_size(path) == (image.height, image.width)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_reduced_jpeg_is_the_same_picture_and_says_its_whole_size(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(noise(6, 8)).resize((2406, 1803), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", exif=exif, quality=95)
    smooth.save(tmp_path / "a.png", exif=exif)
    for name, reduction in {"a.jpg": 4, "a.png": 1}.items():
        whole, reduced = read_picture(tmp_path / name), read_picture(tmp_path / name, at_least=LEAST_SIDE)
        assert whole.size == reduced.size == (whole.image.height, whole.image.width)
        assert reduced.image.width == -(-whole.image.width // reduction)
        assert (reduced.digest, reduced.reading) == (whole.digest, whole.reading)
        difference = thumbnail(whole.image).astype(float) - thumbnail(reduced.image)
        assert np.sqrt((difference**2).mean()) < 1  # of the 3 at which pictures count as nearly the same
    assert read_picture(tmp_path / "a.jpg", at_least=1804).image.size == read_picture(tmp_path / "a.jpg").image.size
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(DataError, match="cannot be decoded"):
        read_picture(tmp_path / "a.jpg", at_least=LEAST_SIDE)


def test_exif_rotation_of_a_16_bit_grey(tmp_path):
    grey = (noise(channels=1).astype(np.uint16)) * 257
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey[::-1, ::-1].copy()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png"))[..., 0], grey // 257)


def test_alpha_is_laid_on_white(tmp_path):
    rgba = noise(channels=4)
    rgba[:, :32, 3], rgba[:, 32:, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = np.asarray(open_image(tmp_path / "a.png"))
    assert (image[:, :32] == 255).all()
    assert np.array_equal(image[:, 32:], rgba[:, 32:, :3])


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 100, 128)).save(tmp_path / "a.png")
    expected = [round(value * 128 / 255 + 255 * 127 / 255) for value in (200, 0, 100)]
    assert np.abs(np.asarray(open_image(tmp_path / "a.png")).astype(int) - expected).max() <= 1


def test_grey_with_alpha_is_laid_on_white(tmp_path):
    image = Image.new("LA", (4, 4), (40, 0))
    image.putpixel((1, 1), (40, 255))
    image.save(tmp_path / "a.png")
    pixels_ = np.asarray(open_image(tmp_path / "a.png"))
    assert pixels_[1, 1].tolist() == [40, 40, 40]
    assert pixels_[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("transparent", [False, True])
def test_palette_with_and_without_transparency(tmp_path, transparent):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", **({"transparency": 0} if transparent else {}))
    first, second = np.asarray(open_image(tmp_path / "a.png"))[0].tolist()
    assert first == ([255, 255, 255] if transparent else [10, 20, 30])
    assert second == [200, 100, 50]


def test_rgb_with_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    image.save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert np.asarray(open_image(tmp_path / "a.png"))[0].tolist() == [[255, 255, 255], [9, 9, 9]]


def test_cmyk(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red, green, blue = np.asarray(open_image(tmp_path / "a.jpg"))[8, 8].tolist()
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_greys_are_scaled_and_not_clipped(tmp_path, name):
    Image.fromarray(np.array([[0, 257, 300, 32896, 65535]], dtype=np.uint16)).save(tmp_path / name)
    image = open_image(tmp_path / name)
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_1_bit(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    Image.fromarray(noise()).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{suffix}")), noise())


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (4, 4), 70000).save(tmp_path / "a.tif")
    assert "save it with 8 or 16 bits" in only_line(open_image, tmp_path / "a.tif")


def broken_text(path):
    path.write_text("not an image at all\n" * 50)


def broken_empty(path):
    path.write_bytes(b"")


def broken_truncated(path):
    buffer = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(buffer, "JPEG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def broken_bomb(path):
    Image.new("1", (14000, 14000)).save(path, "PNG")


def test_a_large_photo_passes_without_a_word_of_the_library(tmp_path):
    """In a process of its own: pytest has its own rules for warnings."""
    Image.new("1", (10000, 9000)).save(tmp_path / "large.png")
    code = f"""
from pathlib import Path
from sd3tune.data.images import upright_size
assert upright_size(Path({str(tmp_path)!r}, "large.png")) == (9000, 10000)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (broken_text, "is not an image"),
        (broken_empty, "is empty"),
        (broken_truncated, "truncated"),
        (broken_bomb, "more pixels than is safe"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, damage, says):
    path = tmp_path / "bad.png"
    damage(path)
    line = only_line(open_image, path)
    assert line.startswith(f"{path}: ")
    assert says in line
    if damage is not broken_truncated:  # its beginning is sound
        assert only_line(check_header, path) == line


def test_a_missing_file_is_one_line(tmp_path):
    assert "No such file" in only_line(open_image, tmp_path / "gone.png")
    assert "gone.png" in only_line(check_header, tmp_path / "gone.png")


def test_a_strip_that_no_crop_can_show_is_refused(tmp_path):
    Image.new("RGB", (2000, 10)).save(tmp_path / "strip.png")
    assert "2000 x 10 px" in only_line(check_header, tmp_path / "strip.png")


def test_the_digest_is_that_of_the_bytes_whatever_the_name(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    digest = read_image(tmp_path / "a.png")[1]
    assert digest == read_image(tmp_path / "b.png")[1] == file_digest(tmp_path / "b.png")


def test_the_first_crop_is_centred_and_the_others_lie_inside_at_different_places():
    found = crops((64, 200), (64, 64), variants=6, flip=False, digest=DIGEST)
    assert found[0].box == (68, 0, 132, 64)
    assert all(left >= 0 and right <= 200 and right - left == 64 for left, _, right, _ in (c.box for c in found))
    assert len({crop.box for crop in found}) > 3


def test_crops_depend_on_the_image_alone_and_more_of_them_begin_with_the_fewer():
    few = crops((300, 200), (64, 64), 3, True, DIGEST)
    assert crops((300, 200), (64, 64), 5, True, DIGEST)[: len(few)] == few
    assert crops((300, 200), (64, 64), 3, True, "a0" * 32)[2:] != few[2:]


def test_flip_doubles_the_variants_with_the_mirror_image_of_each():
    found = crops((64, 100), (64, 64), 3, True, DIGEST)
    assert [crop.flip for crop in found] == [False, True] * 3
    assert [crop.box for crop in found[::2]] == [crop.box for crop in found[1::2]]
    image = Image.fromarray(noise(64, 100))
    assert torch.equal(pixels(image, found[3]), pixels(image, found[2]).flip(-1))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (1000, 667), (31, 33), (64, 64), (129, 4000)])
def test_pixels_equal_the_pipelines_own_preprocessing_bit_for_bit(height, width):
    image = Image.fromarray(noise(height, width))
    scaled = cover(image, (64, 64))
    assert min(scaled.size) == 64
    for crop in crops((height, width), (64, 64), 2, False, DIGEST):
        expected = VaeImageProcessor(vae_scale_factor=8).preprocess(scaled.crop(crop.box))
        found = pixels(image, crop)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()  # else the VAE's convolutions round otherwise
        assert torch.equal(pixels(scaled, crop), expected)


def test_an_image_is_scaled_until_it_just_covers_the_target():
    scaled = cover(Image.new("RGB", (400, 300)), (100, 100))
    assert scaled.size == (133, 100)
    assert is_smaller((90, 300), (100, 100))
    assert not is_smaller((100, 300), (100, 100))


@pytest.mark.parametrize("orientation", [0, 9, 10, 65535])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(48, 64)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert open_image(tmp_path / f"a.{suffix}").size == (64, 48)
    assert upright_size(tmp_path / f"a.{suffix}") == (48, 64)


def test_damaged_exif_data_turns_nothing(tmp_path):
    Image.fromarray(noise(48, 64)).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage and more of it")
    assert open_image(tmp_path / "a.jpg").size == (64, 48)
    assert upright_size(tmp_path / "a.jpg") == (48, 64)


@pytest.mark.parametrize("international", [False, True])
def test_a_png_with_megabytes_of_compressed_text_is_a_picture(tmp_path, international):
    info = PngInfo()
    text = "x" * 3_000_000
    info.add_itxt("workflow", text, zip=True) if international else info.add_text("workflow", text, zip=True)
    Image.fromarray(noise()).save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), noise())
    check_header(tmp_path / "a.png")
