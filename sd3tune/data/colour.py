"""From decoded pixels of any kind to RGB in 8 bits per channel, in sRGB, without transparency."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

_SAVE_AGAIN = "save it with 8 or 16 bits per channel"
_SAME_LEVELS = 2
"""Levels of 255 by which a profile's colours may differ from sRGB's and be sRGB: tables and rounding differ by 1."""
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of the pixels that it describes."""


@dataclass(frozen=True)
class Reading:
    """How pixels were read, beyond the reading of earlier versions."""

    mark: str = ""
    """Part of the store key: what version 1 of the preprocessing did otherwise; empty where the pixels are its own."""
    transparent: bool = False
    """True if transparency was replaced by white."""
    trouble: str = ""
    """The fault of a colour profile that was not applied."""


def to_rgb(image: Image.Image) -> tuple[Image.Image, Reading]:
    """Return the picture as RGB, and how it was read.

    An embedded ICC profile that is not sRGB is converted to it, relative colorimetric with black point compensation.
    Transparency becomes white. 16-bit greys are divided by 257. 32-bit integers count as 16 bits, or as 8 bits if none
    is above 255; floating-point pixels are 0 to 1, or such integers. Raises ValueError.
    """
    profile, marks, trouble = image.info.get("icc_profile"), list[str](), ""
    if image.mode == "F" or image.mode.startswith("I"):
        image, rescaled = _levels(image)
        marks += ["range"] * rescaled
    transparent = image.has_transparency_data
    mode = "RGBA" if transparent else "RGB"
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
    if transparent:
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb, Reading("+".join(marks), transparent, trouble)


class _ProfileTrouble(Exception):
    """A colour profile that cannot be applied."""


def _converted(image: Image.Image, rgb: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture in sRGB, in the mode of `rgb`; None where the profile is sRGB."""
    space, transform = _to_srgb(profile)
    grey = image.mode in ("1", "L", "LA") and space == "L"  # a profile for RGB fits greys, too
    described = "CMYK" if image.mode == "CMYK" else "L" if grey else "RGB"
    if described != space:
        raise _ProfileTrouble(f"is for {_named(space)} and the picture is {_named(described)}")
    if transform is None:
        return None
    converted = ImageCms.applyTransform((rgb if described == "RGB" else image).convert(described), transform)
    assert converted is not None  # it is for transforms in place
    if rgb.mode == "RGBA":
        converted.putalpha(rgb.getchannel("A"))
    return converted


@functools.lru_cache(maxsize=8)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode that a profile describes, and the way from it to sRGB; None where there is nothing to do."""
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
    """Greys of more than 8 bits in 8, and whether version 1 of the preprocessing read them otherwise."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # NaN is neither
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
