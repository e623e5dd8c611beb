"""`plan` and `train --dry-run` of 100,000 small images beside the same commands with ten.

    python -m benchmarks.planning [FOLDER]

Each command runs twice: first with nothing remembered, then with the headers of the first run. The result goes to
benchmarks/results/planning.json, and a table is printed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

RESULT = Path(__file__).parent / "results" / "planning.json"
COMMANDS = {"plan": ("plan",), "dry run": ("train", "--dry-run")}
_COUNTS = (10, 100_000)


def write_images(folder: Path, count: int) -> None:
    """Write different JPEGs of 64 px, each with a caption file."""
    folder.mkdir(parents=True)
    file = io.BytesIO()
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(file, "JPEG")
    picture = file.getvalue()
    for number in range(count):
        comment = f"{number:08d}".encode()
        segment = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment
        (folder / f"{number:06d}.jpg").write_bytes(picture[:2] + segment + picture[2:])
        (folder / f"{number:06d}.txt").write_text(f"picture {number}")


def measure(images: Path, where: Path, command: tuple[str, ...]) -> dict[str, float]:
    """Return wall and CPU seconds of a command, and its largest resident memory in MB."""
    config = where / "run.yaml"
    settings = {
        "output_dir": str(where / "run"),
        "model": {"base": "tiny"},
        "data": {"sources": [{"path": str(images)}], "resolution": 64, "cache_dir": str(where / "store")},
        "train": {"steps": 10},
    }
    config.write_text(json.dumps(settings))  # JSON is YAML
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "sd3tune", command[0], str(config), *command[1:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command} failed: {status}")
    wall = time.perf_counter() - began
    return {"wall_s": round(wall, 1), "cpu_s": round(used.ru_utime + used.ru_stime, 1), "mb": used.ru_maxrss // 1024}


def main(where: Path) -> None:
    """Measure, write the result, and print a table."""
    found: dict[str, dict[str, float]] = {}
    for count in _COUNTS:
        images = where / f"images-{count}"
        write_images(images, count)
        for name, command in COMMANDS.items():
            shutil.rmtree(where / "store", ignore_errors=True)
            for again in ("", ", again"):
                found[f"{name}, {count} images{again}"] = measure(images, where, command)
                print(f"{name}, {count} images{again}", found[f"{name}, {count} images{again}"], flush=True)
    load = round(os.getloadavg()[0], 1)
    RESULT.write_text(json.dumps({"cores": os.cpu_count(), "load": load, "commands": found}, indent=2) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
