"""`sd3tune.lora`: adapter files, as `sd3tune lora` reads and writes them.

An adapter is given as a run, a file or a folder. Functions that write an adapter return its path and print a summary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sd3tune.reporting import Lines, result

Adapter = str | os.PathLike[str]
Weighted = Adapter | tuple[Adapter, float]
"""An adapter, or an adapter and its weight."""

__all__ = ["convert", "extract", "inspect", "merge", "merge_into_base", "resize", "verify"]


def inspect(adapter: Adapter, /) -> Lines:
    """Return lines that describe an adapter: its layout, base, ranks, modules, norms, settings, and its problems.

    Raises AdapterError if the file is not a LoRA for SD3 at all.
    """
    from sd3tune.commands.lora_inspect import inspect_lora

    return Lines(inspect_lora(Path(adapter)))


def convert(
    adapter: Adapter,
    /,
    *,
    to: str,
    out: str | os.PathLike[str],
    thumbnail: str | os.PathLike[str] | bool = True,
    transformer_only: bool = False,
    rank: int | None = None,
    base: str | None = None,
) -> Path:
    """Write an adapter to the new file `out` in another tool's layout, `to`: diffusers, kohya, comfyui or lycoris.

    `rank` writes the nearest LoRA of that rank of a DoRA, LoHa or LoKr; `base` is by default the adapter's.

    `thumbnail` is the picture for UIs: a file, True for the run's last preview, False for none.
    `transformer_only` leaves out tensors for the text encoders. Raises UserError.
    """
    from sd3tune.commands.lora_convert import convert_lora

    picture = None if isinstance(thumbnail, bool) else Path(thumbnail)
    result(*convert_lora(Path(adapter), to, Path(out), picture, thumbnail is not False,
                         transformer_only=transformer_only, rank=rank, base=base))  # fmt: skip
    return Path(out)


def verify(
    adapter: Adapter,
    /,
    *,
    base: str | None = None,
    dtype: str = "auto",
    preview: bool = True,
    transformer_only: bool = False,
) -> Lines:
    """Load an adapter into a fresh diffusers pipeline, and return lines that list the checks.

    `base` is by default the base named by the adapter; `preview` also draws a preview of the run again, and compares.
    Raises AdapterError unless the whole adapter loads and changes the base's prediction.
    """
    from sd3tune.commands.lora_verify import verify_lora

    return Lines(verify_lora(Path(adapter), base, dtype, preview, transformer_only=transformer_only))


def merge(
    adapters: Sequence[Weighted],
    /,
    *,
    out: str | os.PathLike[str],
    to: str = "diffusers",
    method: str = "concat",
    rank: int | None = None,
    transformer_only: bool = False,
) -> Path:
    """Write the weighted sum of adapters (weight 1 by default) to the new file `out`.

    `method` is concat, which is exact and adds up the ranks, or svd, the nearest adapter of `rank`. Raises UserError.
    """
    from sd3tune.commands.lora_merge import merge_loras

    result(*merge_loras(_as_typed(adapters), Path(out), to, method, rank, transformer_only=transformer_only))
    return Path(out)


def merge_into_base(
    adapters: Sequence[Weighted],
    /,
    *,
    out: str | os.PathLike[str],
    base: str | None = None,
    transformer_only: bool = False,
) -> Path:
    """Merge adapters into the weights of their base, and write it to the new folder `out`. Raises UserError."""
    from sd3tune.commands.lora_merge import merge_into_base as merge_whole

    result(*merge_whole(_as_typed(adapters), Path(out), base, transformer_only=transformer_only))
    return Path(out)


def resize(
    adapter: Adapter,
    /,
    *,
    out: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    transformer_only: bool = False,
) -> Path:
    """Write the nearest adapter of a lower rank to the new file `out`.

    Give either `rank`, or `energy`, the share of each module's squared norm to keep, such as 0.99. Raises UserError.
    """
    from sd3tune.commands.lora_resize import resize_lora

    result(*resize_lora(Path(adapter), Path(out), rank, energy, transformer_only=transformer_only))
    return Path(out)


def extract(base: str, tuned: str, /, *, rank: int, out: str | os.PathLike[str], to: str = "diffusers") -> Path:
    """Write the difference of two models, `tuned` - `base`, as a LoRA of `rank` to the new file `out`.

    Each is a folder, a single file or a Hub id. Raises UserError.
    """
    from sd3tune.commands.lora_extract import extract_lora

    result(*extract_lora(base, tuned, rank, Path(out), to))
    return Path(out)


def _as_typed(adapters: Sequence[Weighted]) -> list[str]:
    """Return adapters in the command line's form, `PATH@WEIGHT`."""
    weighted = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    return [f"{os.fspath(path)}@{weight}" for path, weight in weighted]
