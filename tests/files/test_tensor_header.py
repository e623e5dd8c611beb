"""The header of a safetensors file: what safetensors writes is read, and anything else is refused by its reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd3tune.files.tensor_header import MOST_BYTES, BadHeader, read_header

PLAIN = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def write(path: Path, header: Any, data: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    tensors = {str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in (*dtypes, torch.int64, torch.uint8, torch.bool)}
    save_file({**tensors, "none": torch.zeros(0, 4), "one": torch.tensor(1.0)}, tmp_path / "a", metadata={"k": "v"})
    header = read_header(tmp_path / "a")
    assert header.metadata == {"k": "v"}
    assert {name: tensor["shape"] for name, tensor in header.tensors.items()} == {
        **{name: [3, 2] for name in tensors},
        "none": [0, 4],
        "one": [],
    }
    first, last = (pick(tensor["data_offsets"] for tensor in header.tensors.values()) for pick in (min, max))
    assert last[1] == (tmp_path / "a").stat().st_size
    assert first[0] == 8 + int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")


def test_a_header_is_written_as_safetensors_writes_it(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "é\n\x1f\x7f": torch.zeros(0)}
    for metadata in (None, {"k": '犬\t"\\\b'}):
        save_file(tensors, tmp_path / "a", metadata)
        header, content = read_header(tmp_path / "a"), (tmp_path / "a").read_bytes()
        assert header.encode() == content[: header.length]
        longer = replace(header, metadata={**header.metadata, "more": "x" * 13}).encode()
        (tmp_path / "b").write_bytes(longer + content[header.length :])
        assert read_header(tmp_path / "b").metadata == {**(metadata or {}), "more": "x" * 13}
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "b").items())


def changed(**fields: Any) -> dict[str, Any]:
    return {"a": {**PLAIN["a"], **fields}}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({}, "its header describes "),
        ([], "expected a JSON object"),
        (b"{", "no valid header: Expecting property name"),
        (b'{"a":' * 5000, "nested too deeply"),
        (b'{"a\\u0000": 1}', "a NUL character"),
        (b'{"a": 1, "a": 2}', "comes twice"),
        ({"a": 1}, "'a' has no shape or no place"),
        (changed(shape=None), "has no shape"),
        (changed(shape=[2.0, 3]), "has no shape"),
        (changed(shape=[True, 6]), "has no shape"),
        (changed(shape=[-2, -3]), "has no shape"),
        (changed(shape=[6] + [1] * 9), "has no shape"),
        (changed(data_offsets=[0, 24, 24]), "or no place"),
        (changed(data_offsets=[24, 0]), "other bytes than its shape needs"),
        (changed(data_offsets=[0, 20]), "other bytes than its shape needs"),
        (changed(shape=[10**18, 10**18]), "other bytes than its shape needs"),
        (changed(dtype="F33"), "unknown dtype 'F33'"),
        (changed(dtype=[]), "unknown dtype"),
        (changed(data_offsets=[4, 28]), "leave a gap"),
        ({**PLAIN, "b": PLAIN["a"]}, "overlap"),
        ({**PLAIN, "__metadata__": {"a": 1}}, "its metadata"),
        ({**PLAIN, "__metadata__": [1]}, "its metadata"),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(header: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(BadHeader) as caught:
        read_header(write(tmp_path / "a", header))
    assert says in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", (2**63).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"])
def test_a_file_cut_short_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(BadHeader):
        read_header(tmp_path / "a")


def test_a_long_header_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.write((MOST_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MOST_BYTES + 100)  # a hole takes no room
    with pytest.raises(BadHeader, match="more than the"):
        read_header(tmp_path / "a")
    with pytest.raises(BadHeader, match="it is a folder, not a file"):
        read_header(tmp_path)
