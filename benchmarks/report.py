"""The environment, the table, and the files: `results/trainer.json`, and the README between markers."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from sd3tune.files.atomic import write_json, write_text
from sd3tune.runtime.device import versions

_ROOT = Path(__file__).parent.parent
_HEADINGS = [
    "cell",
    "bare, images/s",
    "trainer, images/s",
    "ratio",
    "CPU-time ratio",
    "overhead, CPU ms per step",
    "peak of tensors, MB: bare, trainer",
    "rounds of steps",
    "target",
]


def environment() -> dict[str, Any]:
    """Return the environment: machine, libraries and commit."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "sd3tune", "benchmarks/*.py")),
        "versions": versions(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *(_table_row(row) for row in results["cells"])]
    return "\n".join(
        [
            *provenance(results["environment"]),
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            *_encoding(results.get("encoding")),
            *_starts(results.get("starts")),
        ]
    )


def _encoding(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return []
    verdict = "met" if result["ratio"]["median"] >= result["target"] else "missed"
    ratio = _spread(result["ratio"], ".3f")
    return [
        "",
        f"Encoding {result['images']} images of {result['pixels']} px with their captions: {result['bare_per_s']:.3g} "
        f"per second by the bare encoders, {result['sd3tune_per_s']:.3g} by sd3tune, ratio {ratio}; "
        f"target {result['target']} {verdict}.",
    ]


def _starts(result: dict[str, Any] | None) -> list[str]:
    if result is None:
        return []
    cold, warm = (
        f"{start['first_step_s']:.1f} s, {start['without_imports_s']:.2f} s of it not imports, "
        f"{start['peak_bytes'] / 1e6:.0f} MB"
        for start in (result["cold"], result["warm"])
    )
    return [
        "",
        f"From the command to the end of the first step on `tiny`, and the peak of the process: {cold} with nothing "
        f"encoded; {warm} with all of it.",
    ]


def write(results: dict[str, Any], folder: Path) -> None:
    """Write `folder/results/trainer.json`, and the table in `folder/README.md`."""
    write_json(folder / "results" / "trainer.json", results)
    replace_between(folder / "README.md", "results", table(results))


def provenance(where: dict[str, Any]) -> list[str]:
    """Return machine, libraries and commit in two lines."""
    libraries = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "diffusers", "peft"))
    return [
        f"{where['gpu'] or where['cpu']}, {where['cores']} cores, {where['threads']} threads.",
        f"{libraries}. Commit {commit_of(where)}.",
    ]


def commit_of(where: dict[str, Any]) -> str:
    return (where["commit"] or "unknown")[:10] + (" with changes" if where["uncommitted_changes"] else "")


def replace_between(readme: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name -->` and `<!-- end of name -->`."""
    markers = re.compile(rf"(<!-- {name} -->\n).*(<!-- end of {name} -->)", re.DOTALL)
    found = readme.read_text(encoding="utf-8")
    write_text(readme, markers.sub(lambda match: f"{match[1]}{text}\n{match[2]}", found))


def _table_row(row: dict[str, Any]) -> list[str]:
    target = row["target"]
    verdict = "met" if target is not None and row["ratio"]["median"] >= target else "missed"
    return [
        row["cell"],
        f"{row['bare_images_per_s']:.3g}",
        f"{row['trainer_images_per_s']:.3g}",
        _spread(row["ratio"], ".3f"),
        _spread(row["cpu_ratio"], ".3f"),
        _spread(row["cpu_overhead_ms_per_step"], ".1f"),
        ", ".join(f"{row['peak_bytes'][side] / 1e6:.3g}" for side in ("bare", "trainer")),
        f"{row['rounds']} of {row['steps_per_round']}",
        "" if target is None else f"{target} {verdict}",
    ]


def _spread(value: dict[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
