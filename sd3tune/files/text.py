"""Text of other programs: UTF-8, or UTF-16 with a byte-order mark."""

from __future__ import annotations

import codecs
import re


class NotText(ValueError):
    """Bytes that are not readable as text; the message names the file and the way out."""


_WEIGHT = re.compile(r"\([^()\n]{1,100}:\s{0,3}(?:\d{1,6}(?:\.\d{1,6})?|\.\d{1,6})\s{0,3}\)", re.ASCII)
_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decode(data: bytes, name: object) -> str:
    """Decode the bytes of a text file, without changing line ends. Raises NotText, whose message begins with `name`.

    Accepts UTF-8 with or without a mark, and UTF-16 with a mark, as PowerShell writes it. NUL bytes show that the data
    is binary, or UTF-16 without its mark.
    """
    encoding = _MARKS.get(data[:2], "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise NotText(f"{name}: is cut short or damaged UTF-16; save it as UTF-8") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise NotText(
            f"{name}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
            if b"\0" not in data
            else _with_nul(data, name)
        ) from None
    if "\0" in text:
        raise NotText(_with_nul(data, name))
    return text


def flaw(text: str) -> str | None:
    """Return the reason why no tokenizer can read a text, such as `holds NUL characters`; None if it is readable."""
    if "\0" in text:
        return "holds NUL characters"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character ({ascii(text[error.start])[1:-1]}); write it as UTF-8"
    return None


def weighted_words(text: str) -> str | None:
    """Return the first prompt weight in a text, such as `(dog:1.3)`, which other programs interpret; else None."""
    found = _WEIGHT.search(text)
    return found[0] if found else None


def _with_nul(data: bytes, name: object) -> str:
    """Return a message: UTF-16 of Latin text has its NULs only at even or only at odd places, binary data at both."""
    utf16 = len(data) % 2 == 0 and (0 in data[::2]) != (0 in data[1::2])
    return f"{name}: looks like UTF-16; save it as UTF-8" if utf16 else f"{name}: holds binary data, not text"
