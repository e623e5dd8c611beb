"""`sd3tune lora resize`: reduce the rank of an adapter, and report the loss."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from sd3tune.adapter.derived import check_out, contract_of_ranks, form_of, losses, notes_of, write_form
from sd3tune.adapter.embedding import left_behind
from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.kinds import require_lora
from sd3tune.adapter.low_rank import truncate
from sd3tune.errors import ConfigError


def resize_lora(
    source: Path, out: Path, rank: int | None, energy: float | None, *, transformer_only: bool = False
) -> list[str]:
    """Write the nearest adapter of `rank`, or with the share `energy` of each module's |BA|^2, in the source's layout.

    Returns lines that report the loss. Raises ConfigError, AdapterError, and RunError when `out` exists.
    """
    if (rank is None) == (energy is None):
        raise ConfigError("give either --rank R or --energy E, such as --energy 0.99")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy {energy:g}: a share above 0 and up to 1, such as 0.99")
    check_out(out)
    adapter = read_adapter(source, transformer_only=transformer_only)
    require_lora(adapter, "lora resize")
    found = {module: truncate(pair, rank, energy) for module, pair in adapter.whole().items()}
    factors = {module: truncated.pair for module, truncated in found.items()}
    highest = max(len(down) for down, _ in factors.values())
    write_form(out, form_of(adapter), factors, contract_of_ranks(adapter.contract, highest), adapter.metadata)
    before = Counter(len(down) for down, _ in adapter.whole().values())
    after = Counter(len(down) for down, _ in factors.values())
    return [
        f"{out}: {len(found)} modules, rank {_ranks(before)} -> {_ranks(after)}",
        *losses(found),
        *notes_of(adapter),
        *left_behind([adapter]),
    ]


def _ranks(counts: Counter[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
