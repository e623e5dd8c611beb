"""Text as other programs write it."""

from __future__ import annotations

import pytest

from sd3tune.files.text import NotText, decode, flaw

TEXT = "ein Hund, müde\r\n小明 on a beach\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_utf_8_and_utf_16_with_its_mark_are_read(encoding: str) -> None:
    assert decode(TEXT.encode(encoding), "a.txt") == TEXT


def test_utf_16_of_the_other_byte_order_is_read() -> None:
    assert decode(b"\xfe\xff" + TEXT.encode("utf-16-be"), "a.txt") == TEXT
    assert decode(b"", "a.txt") == ""


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a photo".encode("utf-16-le"), "a.txt: looks like UTF-16; save it as UTF-8"),
        ("a photo".encode("utf-16-be"), "a.txt: looks like UTF-16; save it as UTF-8"),
        ("Ein müder Hund".encode("utf-16-le"), "a.txt: looks like UTF-16; save it as UTF-8"),
        ("собака на пляже".encode("utf-16-le"), "a.txt: looks like UTF-16; save it as UTF-8"),
        (b"\xff\xfea\0b", "a.txt: is cut short or damaged UTF-16; save it as UTF-8"),
        (b"one\ntwo caf\xe9\n", "a.txt:2: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a.txt: holds binary data, not text"),
        (b"a dog\0\0 and more", "a.txt: holds binary data, not text"),
    ],
)
def test_what_is_no_text_is_named_with_the_way_out(data: bytes, said: str) -> None:
    with pytest.raises(NotText) as caught:
        decode(data, "a.txt")
    assert str(caught.value) == said


def test_text_that_tokenizers_cannot_read() -> None:
    assert flaw("ein Hund, 小明 \x1b 👩") is None
    assert flaw("a\0b") == "holds NUL characters"
    assert flaw("a \ud800") == r"holds half a character (\ud800); write it as UTF-8"
    assert flaw("caf\udce9") == r"holds half a character (\udce9); write it as UTF-8"
