"""Files of tensors: equal content, equal bytes; damage changes the digest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sd3tune.files.tensors import digest, save_sorted, tensors_sha256

METADATA = {
    "format": "pt",
    "sd3tune": '{"trigger": "犬 \\"é\\" \\u0000\\n\\u001f"}',
    "ß\n\x7f": "\x00",
    **dict.fromkeys("zyxw", ""),
}


def test_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.zeros(0)}
    for number in range(8):  # safetensors writes metadata in another order each time
        save_sorted(tmp_path / str(number), tensors, METADATA)
    assert len({(tmp_path / str(number)).read_bytes() for number in range(8)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == METADATA
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_a_digest_depends_on_bytes_dtype_and_shape_alone() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert digest(tensor) == digest(tensor.clone()) == digest(tensor.t().contiguous().t())
    changed = tensor.clone()
    changed[2, 3] = torch.nextafter(changed[2, 3], torch.tensor(0.0))
    others = [changed, tensor.reshape(4, 3), tensor.view(torch.int32), tensor.t(), tensor[:2]]
    assert len({digest(other) for other in [tensor, *others]}) == 6


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.zeros(0), torch.tensor([True]), torch.ones(1).bfloat16()])
def test_any_tensor_has_a_digest(tensor: torch.Tensor) -> None:
    assert len(digest(tensor)) == 32


def test_the_digest_of_a_files_tensors_ignores_its_metadata(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "none": torch.zeros(0)}

    def digest_of(tensors: dict[str, torch.Tensor], **metadata: str) -> str:
        save_sorted(tmp_path / "file", tensors, metadata)
        return tensors_sha256(tmp_path / "file")

    same = digest_of(tensors)
    assert digest_of(dict(reversed(tensors.items())), title="of a person", format="pt") == same
    others = (
        {**tensors, "b": torch.arange(4.0) + 1e-7}, {**tensors, "b": torch.arange(4.0).reshape(2, 2)},
        {**tensors, "b": torch.arange(4.0).view(torch.int32)}, {**tensors, "c": torch.zeros(0)},
        {"c" if name == "b" else name: tensor for name, tensor in tensors.items()},
    )  # fmt: skip
    assert len({digest_of(other) for other in others} | {same}) == len(others) + 1
