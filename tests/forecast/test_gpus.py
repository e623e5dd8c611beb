"""GPUs are known by the names that people and drivers give them."""

from __future__ import annotations

import pytest

from sd3tune.errors import ConfigError
from sd3tune.forecast.gpus import GPUS, find_gpu

SPELLINGS = [
    ("rtx 4090", "4090", 24),
    ("RTX3090", "3090", 24),
    ("rtx_3090", "3090", 24),
    ("NVIDIA GeForce RTX 3060", "3060", 12),
    ("3060 12gb", "3060", 12),
    ("3060 8 GB", "3060", 8),
    ("RTX 4060 Ti (16 GB)", "4060 ti", 16),
    ("4060ti 16g", "4060 ti", 16),
    ("4070 Ti Super", "4070 ti super", 16),
    ("RTX 4070 Ti SUPER 16GB", "4070 ti super", 16),
    ("RTX 4070 SUPER", "4070 super", 12),
    ("2080Ti", "2080 ti", 11),
    ("RTX 2060 12GB", "2060", 12),
    ("A100-80GB", "a100", 80),
    ("a100-40", "a100", 40),
    ("NVIDIA A100-SXM4-40GB", "a100", 40),
    ("NVIDIA A100 80GB PCIe", "a100", 80),
    ("NVIDIA H100 80GB HBM3", "h100", 80),
    ("H200", "h200", 141),
    ("T4", "t4", 16),
    ("Tesla T4", "t4", 16),
    ("NVIDIA L4", "l4", 24),
    ("L40S", "l40s", 48),
    ("NVIDIA A10G", "a10g", 24),
    ("Tesla V100-SXM2-32GB", "v100", 32),
    ("RTX A6000", "a6000", 48),
    ("NVIDIA RTX 6000 Ada Generation", "6000 ada", 48),
    ("TITAN RTX", "titan rtx", 24),
    ("NVIDIA GeForce RTX 4060 Laptop GPU", "4060 laptop", 8),
    ("rtx 3080 mobile 16gb", "3080 laptop", 16),
    ("3050 laptop", "3050 laptop", 4),
]


@pytest.mark.parametrize(("written", "name", "memory"), SPELLINGS)
def test_a_card_is_known_as_it_is_written(written: str, name: str, memory: float) -> None:
    card = find_gpu(written)
    assert (card.name, card.memory) == (name, memory)
    assert card.tflops == GPUS[name].tflops


def test_every_card_of_the_table_is_found_by_its_own_name() -> None:
    assert len(GPUS) > 60
    assert [name for name, card in GPUS.items() if find_gpu(name) != card] == []
    assert {name for name, card in GPUS.items() if not card.bf16} >= {"t4", "v100", "2060", "2080 ti"}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("4091", "--card 4091: unknown; did you mean 4090? Or give its memory with --memory GB"),
        ("GTX 1080", "--card GTX 1080: unknown; give its memory with --memory GB"),
        ("7900 XTX 24GB", "--card 7900 XTX 24GB: unknown; give its memory with --memory GB"),
        ("", "--card : unknown; give its memory with --memory GB"),
    ],
)
def test_an_unknown_card_is_one_line(written: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_gpu(written)
    assert caught.value.problems == (said,)
