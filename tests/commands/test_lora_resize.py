"""`sd3tune lora resize`: the nearest adapter of a lower rank, and what is said of the loss."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.adapter.file import read_adapter, write_adapter
from sd3tune.adapter.low_rank import truncate
from sd3tune.adapter.rearrange import arrange
from sd3tune.cli.main import run
from sd3tune.commands.lora_resize import resize_lora
from sd3tune.errors import ConfigError, RunError

QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    drawn = torch.randn(columns, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T


def with_values(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A pair whose product has these singular values."""
    down, up = orthonormal(len(values), 64, seed), orthonormal(len(values), 48, seed + 1).T
    return down.float(), (up * torch.tensor(values, dtype=torch.float64)).float()


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[1].double() @ pair[0].double()


def test_a_rank_keeps_the_largest_singular_values() -> None:
    pair = with_values([4.0, 3.0, 2.0, 1.0])
    found = truncate(pair, rank=2)
    assert found.pair[0].shape == (2, 64)
    torch.testing.assert_close(torch.linalg.svdvals(product(found.pair))[:3], torch.tensor([4.0, 3.0, 0.0]).double())
    assert (found.lost, found.total) == (pytest.approx(5.0), pytest.approx(30.0))
    assert (product(found.pair) - product(pair)).square().sum().item() == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize(("energy", "rank"), [(16 / 30 - 1e-4, 1), (16 / 30 + 1e-4, 2), (0.9, 3), (1.0, 4)])
def test_an_energy_keeps_as_few_as_hold_it(energy: float, rank: int) -> None:
    assert len(truncate(with_values([4.0, 3.0, 2.0, 1.0]), energy=energy).pair[0]) == rank


def test_a_zero_adapter_a_rank_above_its_own_and_a_rank_above_the_layers_sizes() -> None:
    zero = (torch.ones(3, 64), torch.zeros(48, 3))
    for asked in ({"rank": 2}, {"energy": 0.9}):
        found = truncate(zero, **asked)
        assert (found.lost, found.total) == (0.0, 0.0)
        assert not product(found.pair).any()
    pair = with_values([2.0, 1.0])
    torch.testing.assert_close(product(truncate(pair, rank=9).pair), product(pair), rtol=0, atol=1e-6)
    wide = (torch.randn(80, 64), torch.randn(48, 80))
    torch.testing.assert_close(product(truncate(wide, rank=80).pair), product(wide), rtol=0, atol=1e-3)


PATTERNS = {"rank_pattern": {"x": 1}, "alpha_pattern": {"x": 2.0}, "rslora": True}


def test_a_file_keeps_its_layout_and_contract_and_the_loss_is_said(tmp_path: Path) -> None:
    pairs = {QUERY: with_values([3.0, 4.0, 0.0]), KEY: with_values([1.0, 1.0], 5)}
    flat = {f"{name}.lora_{letter}": pair["AB".index(letter)] for name, pair in pairs.items() for letter in "AB"}
    write_adapter(tmp_path, flat, {"base": "tiny", "rank": 3, "alpha": 6.0, "trigger": "sks", **PATTERNS})
    lines = resize_lora(tmp_path, tmp_path / "out.safetensors", 1, None)
    assert lines == [
        f"{tmp_path / 'out.safetensors'}: 2 modules, rank 2 to 3 -> 1",
        f"lost: {(10 / 27) ** 0.5:.3%} of the weight update's norm, at most {0.5**0.5:.3%} in one module ({KEY})",
    ]
    contract = read_adapter(tmp_path / "out.safetensors").contract
    assert contract == {"contract_version": 1, "base": "tiny", "rank": 1, "alpha": 1, "trigger": "sks"}


@pytest.mark.parametrize(("form", "layout"), [("kohya", "kohya"), ("comfyui", "ComfyUI")])
def test_a_file_of_another_tool_stays_one(form: str, layout: str, tmp_path: Path) -> None:
    save_file(arrange({QUERY: with_values([3.0, 4.0, 0.0])}, form), tmp_path / "in.safetensors")
    resize_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", None, 0.999)
    found = read_adapter(tmp_path / "out.safetensors")
    assert (found.layout, found.contract) == (layout, {})
    torch.testing.assert_close(product(found.folded()[QUERY]), product(with_values([3.0, 4.0, 0.0])), rtol=0, atol=1e-5)
    assert len(found.factors[QUERY][0]) == 2


def test_what_makes_no_sense_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out.safetensors"
    for rank, energy in ((None, None), (2, 0.9), (0, None), (None, 0.0), (None, 1.5), (None, float("nan"))):
        with pytest.raises(ConfigError):
            resize_lora(tmp_path / "in.safetensors", out, rank, energy)
    with pytest.raises(RunError, match="name it"):
        resize_lora(tmp_path / "in.safetensors", tmp_path / "out", 2, None)
    monkeypatch.setattr(
        sys, "argv", ["sd3tune", "lora", "resize", str(tmp_path / "gone"), "--out", str(out), "--rank", "2"]
    )
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone'}: no such file or folder\n"
