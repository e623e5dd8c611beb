"""The stand-in itself: it must be able to show each kind of fault."""

from __future__ import annotations

import pytest

from tests.nullgpu.build import CannotBuild, _include_folders

PROBE = """
import torch
from tests.nullgpu.counts import counting, fact

x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)


class Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        torch.cuda.synchronize()  # synchronised
        return gradient


def step():
    (x @ x).sum().backward()
    return x + 1


step()
with counting() as seen:
    step()
seen.steady()
fact("step", {"launches": seen.launches, "products": seen.products, "kernels": list(seen.kernels)})

with counting() as seen:
    x.sum().item()  # read
    torch.ones(3).cuda()  # copied
    torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    Wait.apply(x).sum().backward()
fact("waits", list(seen.waits))
fact("pageable", [seen.pageable, seen.pageable_bytes])
try:
    seen.steady()
except AssertionError as error:
    fact("message", str(error))

try:
    x + torch.ones(64, 64)
except RuntimeError as error:
    fact("mixed", str(error))

kept = torch.arange(5, device="cuda")
fact("survives", [kept.cpu().tolist(), torch.tensor([1.5, 2.0]).cuda().tolist()])
before = torch.cuda.mem_get_info()
block = torch.empty(int(1e9), dtype=torch.uint8, device="cuda")
after = torch.cuda.mem_get_info()
fact("memory", [before, after, torch.cuda.max_memory_allocated()])
try:
    torch.empty(int(0.5e9), dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError as error:
    fact("full", str(error))
fact("device", [torch.cuda.device_count(), torch.cuda.get_device_capability()])
"""


def line(comment: str) -> str:
    """The line of `PROBE` with that comment, as a process shows it that got it by `-c`."""
    (number,) = (at for at, text in enumerate(PROBE.splitlines(), start=1) if text.endswith(f"# {comment}"))
    return f"<string>:{number}"


def test_it_counts_names_lines_and_has_a_limit(null_gpu) -> None:
    facts = null_gpu("-c", PROBE, gb=2, count=2, capability=89).succeeded().facts
    assert facts["step"]["products"] == 3
    assert facts["step"]["launches"] > 3
    assert any("reduce_kernel" in name for name in facts["step"]["kernels"])
    assert facts["waits"] == [
        f"wait for a stream at {line('read')}",
        f"pageable copy to the device at {line('copied')}",
        f"wait for a stream at {line('copied')}",
        f"wait for the device at {line('synchronised')}",
    ]
    assert facts["pageable"] == [1, 12]
    assert f"1 x pageable copy to the device at {line('copied')}" in facts["message"]
    assert "two devices, cuda:0 and cpu" in facts["mixed"]
    assert facts["survives"] == [[0] * 5, [1.5, 2.0]]  # a kernel writes nothing, a copy does
    (free, total), (later, _), peak = facts["memory"]
    assert total == 2e9
    assert 1e9 <= free - later < 1.01e9
    assert 1e9 <= peak < 1.01e9
    assert "out of memory" in facts["full"]
    assert facts["device"] == [2, [8, 9]]


def test_a_missing_tool_is_a_reason(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotBuild, match="gcc, nm is missing"):
        _include_folders()
