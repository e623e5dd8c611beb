"""Convert decoded pixels of any kind to sRGB with 8 bits per channel, without transparency."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

_SAVE_AGAIN = "save it with 8 or 16 bits per channel"
_SAME_LEVELS = 2
"""Tolerance, in levels of 255, for a profile that counts as sRGB: tables and rounding differ by 1."""
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of its pixels."""


@dataclass(frozen=True)
class Reading:
    """Differences from the way that earlier versions read pixels."""

    mark: str = ""
    """Part of the store key: the differences from version 1 of the preprocessing; empty if the pixels are equal."""
    transparent: bool = False
    """True if transparency was replaced by white."""
    trouble: str = ""
    """Fault of a colour profile that was not applied; empty if there is none."""


def to_rgb(image: Image.Image) -> tuple[Image.Image, Reading]:
    """Return the image as RGB, and the reading.

    An embedded ICC profile that is not sRGB is converted to it, relative colorimetric with black point compensation.
    Transparency becomes white. 16-bit greys are divided by 257. 32-bit integers count as 16 bits, or as 8 bits if none
    is above 255. Floating-point pixels range from 0 to 1, or are such integers. Raises ValueError for other values.
    """
    profile, marks, trouble = image.info.get("icc_profile"), list[str](), ""
    if image.mode == "F" or image.mode.startswith("I"):
        image, rescaled = _levels(image)
        marks += ["range"] * rescaled
    has_alpha, transparent = image.has_transparency_data, False
    mode = "RGBA" if has_alpha else "RGB"
    rgb = image if image.mode == mode else image.convert(mode)  # which would copy it
    if profile:
        try:
            converted = _converted(image, rgb, bytes(profile))
        except _ProfileTrouble as error:
            trouble = str(error)
        except ImageCms.PyCMSError as error:
            trouble = f"cannot be applied ({error})"
        else:
            marks += ["sRGB"] * (converted is not None)
            rgb = converted or rgb
    if has_alpha:
        transparent = bool(np.asarray(rgb.getchannel("A")).min() < 255)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb, Reading("+".join(marks), transparent, trouble)


def alpha_of(image: Image.Image) -> Image.Image:
    """Return the alpha channel as greys of 8 bits: white where nothing is transparent, as `to_rgb` reads the image."""
    deep = image.mode == "F" or image.mode.startswith("I")  # `to_rgb` ignores their transparent value
    if deep or not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


class _ProfileTrouble(Exception):
    """A colour profile that cannot be applied."""


def _converted(image: Image.Image, rgb: Image.Image, profile: bytes) -> Image.Image | None:
    """Return the image in sRGB, in the mode of `rgb`; None if the profile is sRGB."""
    space, transform = _to_srgb(profile)
    grey = image.mode in ("1", "L", "LA") and space == "L"  # a profile for RGB also fits greys
    described = "CMYK" if image.mode == "CMYK" else "L" if grey else "RGB"
    if described != space:
        raise _ProfileTrouble(f"is for {_named(space)} and the picture is {_named(described)}")
    if transform is None:
        return None
    converted = ImageCms.applyTransform((rgb if described == "RGB" else image).convert(described), transform)
    assert converted is not None  # None is only returned for transforms in place
    if rgb.mode == "RGBA":
        converted.putalpha(rgb.getchannel("A"))
    return converted


@functools.lru_cache(maxsize=8)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of a profile's pixels, and its transform to sRGB; None if the profile is sRGB."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(opened.profile.xcolor_space.strip())
        if mode is None:
            raise _ProfileTrouble(f"is for {opened.profile.xcolor_space.strip()}, not for pictures of this kind")
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError):
        raise _ProfileTrouble("is damaged") from None
    if mode == "CMYK":
        return mode, transform
    steps = np.linspace(0, 255, 256 if mode == "L" else 18, dtype=np.uint8)
    probe = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3)
    before = Image.fromarray(probe)
    after = ImageCms.applyTransform(before, transform)
    off = np.abs(np.asarray(after, int) - np.asarray(before.convert("RGB"), int)).max()
    return mode, transform if off > _SAME_LEVELS else None


def _named(mode: str) -> str:
    return "grey" if mode == "L" else mode


def _levels(image: Image.Image) -> tuple[Image.Image, bool]:
    """Reduce greys of more than 8 bits to 8. Also return True if version 1 of the preprocessing differs."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # also true for NaN
        raise ValueError(f"pixels from {low:g} to {high:g}; {_SAVE_AGAIN}")
    if image.mode == "F" and high <= 1:
        return Image.fromarray(np.round(values * 255).astype(np.uint8)), True
    if image.mode == "F" and (values != np.round(values)).any():
        raise ValueError(f"floating-point pixels up to {high:g}, neither 0 to 1 nor whole numbers; {_SAVE_AGAIN}")
    # PIL opens signed and 32-bit greys alike, and its own conversion clips at 255.
    wide = image.mode == "F" or (image.mode == "I" and getattr(image, "tag_v2", {}).get(258) == (32,))
    if wide and high <= 255:
        return Image.fromarray(values.astype(np.uint8)), True
    return Image.fromarray(np.round(values / 257).astype(np.uint8)), image.mode == "F"
