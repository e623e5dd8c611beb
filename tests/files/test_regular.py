"""Files of others: regular ones of a size that fits into memory, and nothing else."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from sd3tune.files.regular import Refused, complaint, open_regular, read_regular, sha256_of


def refusal(path: object, **limit: int) -> str:
    with pytest.raises(OSError) as caught:  # noqa: PT011  which one, the words say
        read_regular(path, **limit)
    return complaint(caught.value)


def test_files_and_links_to_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "empty").touch()
    for name in ("a", "link"):
        assert read_regular(tmp_path / name) == b"content"
        assert sha256_of(tmp_path / name) == hashlib.sha256(b"content").hexdigest()
    assert read_regular(tmp_path / "empty") == b""


def test_what_blocks_or_has_no_end_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "pipe").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # the system wants a short name
        listening.bind("socket")
    assert (
        refusal(tmp_path / "fifo") == refusal(tmp_path / "pipe") == "is a named pipe, not a file; replace or remove it"
    )
    assert refusal(tmp_path / "zero") == refusal("/dev/zero") == "is a device, not a file; replace or remove it"
    assert refusal(tmp_path / "folder").startswith("is a folder, not a file")
    assert refusal(tmp_path / "socket").startswith("is a socket, not a file")
    assert refusal("a\0b").startswith("is no name that a file can have")
    assert refusal(tmp_path / "none") == "cannot be read (No such file or directory)"
    with pytest.raises(Refused):
        sha256_of(tmp_path / "fifo")


@pytest.mark.skipif(not Path("/proc/kmsg").exists(), reason="no /proc")
def test_files_without_a_size_are_not_opened() -> None:
    """Reading the kernel's messages waits for the next one."""
    with open_regular("/proc/kmsg") as file:
        assert file.read() == b""


def test_a_file_beyond_the_limit_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)  # with a hole: nothing is written
    assert refusal(tmp_path / "large") == (
        "has 1,099,511,627,776 bytes, and at most 1,073,741,824 are read; replace or remove it"
    )
    (tmp_path / "small").write_bytes(b"12345")
    assert refusal(tmp_path / "small", largest=4).startswith("has 5 bytes, and at most 4 are read")
    assert read_regular(tmp_path / "small", largest=5) == b"12345"
