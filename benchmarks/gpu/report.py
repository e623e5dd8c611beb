"""The environment, the table, and the files `gpu.json` and `gpu.md`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.cells import SIDES
from benchmarks.gpu.device import Device
from benchmarks.report import environment as common
from benchmarks.report import provenance
from sd3tune.errors import ConfigError
from sd3tune.files.atomic import write_json, write_text
from sd3tune.forecast.gpus import find_gpu

_HEADINGS = [
    "base, square, batch, precision",
    "s per step: example, sd3tune",
    "images/s: example, sd3tune",
    "ratio",
    "MFU, %",
    "of the GEMM, %",
    "peak, GB",
    "kernels",
    "first step, s",
]


def environment(device: Device) -> dict[str, Any]:
    libraries = {}
    for name in ("bitsandbytes", "torchao", "torchvision"):
        try:
            libraries[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found = common()
    return {
        **found,
        "versions": {**found["versions"], **libraries},
        "device": device.name,
        "cuda": torch.version.cuda,
        "published_tflops": _published_tflops(device.name),
    }


def _published_tflops(device: str) -> float | None:
    try:
        return find_gpu(device).tflops
    except ConfigError:
        return None


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    where, ceilings = results["environment"], results["ceilings"]
    lines = [_HEADINGS, ["---"] * len(_HEADINGS)]
    lines += [_row(row, where["published_tflops"], ceilings.get("gemm_tflops")) for row in results["cells"]]
    cut = results["not_measured"]
    return "\n".join(
        [
            *provenance({**where, "gpu": where["device"]}),
            f"CUDA {where['cuda']}. {', '.join(_ceilings(ceilings))}.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            *(["", f"Not measured, for want of time: {'; '.join(cut)}."] if cut else []),
            *(["", results["script"]["summary"]] if results.get("script") else []),
        ]
    )


def _ceilings(found: dict[str, Any]) -> Iterator[str]:
    if "gemm_tflops" in found:
        yield f"bf16 products {found['gemm_tflops']:.3g} TFLOP/s"
    if "copy_gbs" in found:
        yield f"copies {found['copy_gbs']:.3g} GB/s"
    if "attention_tflops" in found:
        yield (
            f"attention {found['attention_tflops']:.3g} TFLOP/s ({found['attention_ms']:.3g} ms forward and backward)"
        )
    yield from (f"{name} {outcome}" for name, outcome in found.get("failed", {}).items())


def write(results: dict[str, Any], folder: Path) -> None:
    """Write both files atomically."""
    write_json(folder / "gpu.json", results)
    write_text(folder / "gpu.md", table(results) + "\n")


def _row(row: dict[str, Any], published: float | None, gemm: float | None) -> list[str]:
    sides = [row[name] for name in SIDES]

    def share(peak: float | None) -> str:
        return "" if peak is None else _both(sides, lambda side: f"{100 * row['tflop'] / side['step_s'] / peak:.3g}")

    return [
        row["cell"],
        _both(sides, lambda side: f"{side['step_s']:.3g}", failed=lambda side: side["outcome"]),
        _both(sides, lambda side: f"{side['images_per_s']:.3g}"),
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        share(published),
        share(gemm),
        _both(sides, lambda side: f"{side['peak_bytes'] / 1e9:.3g}"),
        _both(sides, lambda side: str(side["kernels"] or "-")),
        _both(sides, lambda side: f"{side['first_step_s']:.3g}"),
    ]


def _both(
    sides: list[dict[str, Any]],
    shown: Callable[[dict[str, Any]], str],
    failed: Callable[[dict[str, Any]], str] = lambda side: "-",
) -> str:
    return ", ".join(shown(side) if side["outcome"] == "measured" else failed(side) for side in sides)
