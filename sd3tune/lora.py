"""`sd3tune.lora`: adapter files, as `sd3tune lora` reads and writes them.

An adapter is a run, a file or a folder. The functions that write one return its path, and report what they did.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sd3tune.reporting import Lines, result

Adapter = str | os.PathLike[str]
Weighted = Adapter | tuple[Adapter, float]
"""An adapter, or an adapter and its weight."""

__all__ = ["convert", "inspect", "merge", "merge_into_base", "resize", "verify"]


def inspect(adapter: Adapter, /) -> Lines:
    """Return lines that describe an adapter: its layout, base, ranks, modules, norms, settings, and its problems.

    Raises AdapterError for what is no LoRA of SD3 at all.
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
) -> Path:
    """Write an adapter to the new file `out` in another tool's layout, `to`: diffusers, kohya or comfyui.

    `thumbnail` is the picture that UIs show: a file, True for the run's last preview, False for none.
    `transformer_only` leaves out tensors for the text encoders. Raises UserError.
    """
    from sd3tune.commands.lora_convert import convert_lora

    picture = None if isinstance(thumbnail, bool) else Path(thumbnail)
    result(*convert_lora(Path(adapter), to, Path(out), picture, thumbnail is not False,
                         transformer_only=transformer_only))  # fmt: skip
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
    """Load an adapter into a fresh diffusers pipeline, and return lines that say what was checked.

    `base` is by default the one that the adapter names; `preview` also draws what the training drew, and compares.
    Raises AdapterError unless all of it matches and changes what the base predicts.
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
    """Add adapters up, each with its weight (1 by default), into the new file `out`.

    `method` is concat, which is exact and adds the ranks up, or svd, the nearest adapter of `rank`. Raises UserError.
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
    """Write a base with adapters added to its weights to the new folder `out`. Raises UserError."""
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


def _as_typed(adapters: Sequence[Weighted]) -> list[str]:
    """Return adapters as the command line takes them, `PATH@WEIGHT`."""
    weighted = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    return [f"{os.fspath(path)}@{weight}" for path, weight in weighted]
