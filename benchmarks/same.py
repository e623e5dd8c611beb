"""Check that a change alters no result: `python -m benchmarks.same BEFORE AFTER`, each a checkout of the project.

Runs a fixed list of commands in each checkout, offline and on the CPU, and compares their results: every tensor and
all metadata of every safetensors file, the pixels of every picture, JSON and YAML files, and exit codes. Exits with 1
and a list if there are differences. Differences in the output are listed too, with durations and rates masked, but do
not count, as wording may change.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open

TINY = "configs/tiny_smoke.yaml"
SMALL = ["train.steps=4", "checkpoint.every=2", "preview.every=2", "preview.steps=2", "preview.prompts=[a red cup]"]
HELD_OUT = ["validation.every=2", "validation.holdout=2"]
NANO = ["model.base=nano", "model.max_sequence_length=16", "data.resolution=64", "optimizer.lr=1e-3", "flow.shift=3.0"]

STORIES: dict[str, list[list[str]]] = {
    "lora": [
        ["train", TINY, *SMALL, *HELD_OUT, "output_dir=run"],
        ["train", TINY, *SMALL, *HELD_OUT, "train.steps=6", "output_dir=run", "--resume"],
        ["infer", "--lora", "run", "--prompt", "a blue cup", "--seed", "3", "--steps", "3", "--out", "drawn"],
        ["infer", "--from", "drawn", "--out", "again"],
        ["lora", "inspect", "run"],
        ["lora", "convert", "run", "--to", "kohya", "--out", "kohya.safetensors"],
        ["lora", "convert", "kohya.safetensors", "--to", "comfyui", "--out", "comfyui.safetensors"],
        ["lora", "resize", "run", "--rank", "2", "--out", "small.safetensors"],
        ["lora", "merge", "run", "small.safetensors", "--out", "sum.safetensors"],
        ["lora", "verify", "run"],
    ],
    "prior": [
        [
            "train",
            TINY,
            *SMALL,
            "output_dir=run",
            "data.sources.0.prior={prompt: a cup, images: 4, steps: 2}",
            "flow.weighting={kind: min_snr}",
            "optimizer={kind: prodigy, lr: 1.0}",
            "data.caption_dropout=0.5",
        ]
    ],
    "selective": [
        ["train", TINY, *SMALL, "output_dir=run", "train.gradient_checkpointing=selective", "model.dtype=bf16"],
        ["train", TINY, *SMALL, "output_dir=int8", "optimizer={kind: adamw8bit, lr: 1e-3}", "model.quantize=int8"],
    ],
    "full": [
        ["train", TINY, *SMALL, "output_dir=run", "method={kind: full}", "optimizer.lr=1e-5"],
        ["infer", "--base", "run/model", "--prompt", "a blue cup", "--steps", "2", "--out", "drawn"],
        ["train", "configs/tiny_scratch.yaml", *SMALL, "output_dir=scratch"],
    ],
    "nano": [
        ["train", TINY, *NANO, "train.steps=12", "output_dir=run", "preview.steps=4"],
        ["infer", "--lora", "run", "--prompt", "a red circle", "--seed", "1", "--out", "drawn"],
        ["infer", "--base", "nano", "--prompt", "a green star", "--grid", "seed=1,2 steps=3,5", "--out", "grid"],
    ],
    "plans": [
        ["plan", TINY],
        ["plan", "configs/sd35_medium_12gb.yaml"],
        ["plan", "configs/sd3_medium_lora.yaml", "method.rank=64"],
        ["plan", "configs/nano_base.yaml"],
        ["train", TINY, "--dry-run"],
        ["config", "show", "configs/dreambooth_sd35_medium.yaml"],
        ["config", "schema"],
        ["config", "list"],
        ["data", "check", "sd3tune/assets/demo"],
    ],
    "mistakes": [
        ["train", TINY, "train.stepz=4"],
        ["train", TINY, "optimizer.lr=fast", "method.rank=0"],
        ["train", "no-such.yaml"],
        ["train", TINY, "model.base=sd35-mediun"],
        ["train", TINY, "data.sources.0.path=nowhere"],
        ["infer", "--lora", "nowhere", "--prompt", "a cup"],
        ["lora", "convert", "nowhere.safetensors", "--to", "kohya", "--out", "x.safetensors"],
        ["infer", "--base", "tiny", "--prompt", "a cup", "--steps", "0"],
    ],
}
MASKS = (
    (re.compile(r"\d+(\.\d+)? (ms|s|min|h)\b|\d+:\d\d(:\d\d)?"), "TIME"),
    (re.compile(r"\d+(\.\d+)? ?((it|text|image|step)/s|s/(it|text|image|step)|per second)"), "RATE"),
    (re.compile(r"\d+(\.\d+)? GB (free|of memory|in all)"), "ROOM"),
)
TIMED = {"timings", "seconds", "started", "finished", "git_commit", "argv", "time", "images_per_second", "step_seconds"}
"""Keys of JSON files that differ from run to run."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--out", type=Path, default=Path("same"), help="results are kept here, and used again")
    parser.add_argument("--only", nargs="*", default=list(STORIES), choices=list(STORIES))
    asked = parser.parse_args()
    changed = False
    for story in asked.only:
        sides = (("before", asked.before.resolve()), ("after", asked.after.resolve()))
        folders = [make(story, checkout, asked.out / side) for side, checkout in sides]
        results = [results_of(folder, checkout) for folder, (_, checkout) in zip(folders, sides, strict=True)]
        different = compare(*results)
        changed |= bool(different)
        print(f"{story:<10} {len(results[0])} results, {len(different) or 'none'} different", flush=True)
        print(*(f"  {line}" for line in different), sep="\n", end="\n" if different else "")
        print(*printed_differently(*folders), sep="\n")
    return int(changed)


def make(story: str, checkout: Path, out: Path) -> Path:
    """Run the commands of a story with a checkout's code, unless it was run already. Return its folder."""
    folder = (out / story).absolute()
    if (folder / "printed.txt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "SD3TUNE_CACHE": str(out.absolute() / "cache"),
        "COLUMNS": "120",
    }
    lines = []
    for command in STORIES[story]:
        words = [str(checkout / word) if word.startswith(("configs/", "sd3tune/")) else word for word in command]
        ended = subprocess.run(
            [sys.executable, "-m", "sd3tune", *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        lines += [f"$ sd3tune {' '.join(command)}", ended.stdout, ended.stderr, f"exit code {ended.returncode}"]
    text = "\n".join(lines).replace(str(checkout), "CHECKOUT").replace(str(folder), "HERE")
    text = text.replace(str(out.absolute()), "OUT")
    (folder / "printed.txt").write_text(text, encoding="utf-8")
    return folder


def results_of(folder: Path, checkout: Path) -> dict[str, str]:
    """Return relative path with key or tensor name -> digest or value, with the places of both masked."""

    def masked(text: str) -> str:
        return text.replace(str(folder), "HERE").replace(str(checkout), "CHECKOUT")

    found: dict[str, str] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as opened:
                found |= {f"{name}: metadata {key}": value for key, value in (opened.metadata() or {}).items()}
                offsets = opened.keys()
            found |= {f"{name}: {key}": _digest_of(file, key) for key in offsets}
        elif file.suffix == ".png":
            found[name] = hashlib.sha256(np.asarray(Image.open(file)).tobytes()).hexdigest()
        elif file.suffix in (".json", ".jsonl"):
            texts = (
                [file.read_text(encoding="utf-8")] if file.suffix == ".json" else file.read_text("utf-8").splitlines()
            )
            values = [_without_times(json.loads(text)) for text in texts]
            found[name] = masked(json.dumps(values, sort_keys=True))
        elif file.suffix == ".yaml":
            found[name] = masked(file.read_text(encoding="utf-8"))
    exits = [line for line in (folder / "printed.txt").read_text("utf-8").splitlines() if line.startswith("exit code")]
    return found | {"exit codes": " ".join(exits)}


def _digest_of(file: Path, key: str) -> str:
    with safe_open(file, "pt") as opened:
        tensor = opened.get_tensor(key)
    return (
        f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bytes(tensor.flatten().untyped_storage())).hexdigest()}"
    )


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(held) for key, held in value.items() if key not in TIMED}
    return [_without_times(held) for held in value] if isinstance(value, list) else value


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return a line for each result that differs or is missing on one side."""
    return [
        f"{name}: {before.get(name, 'missing')[:90]} -> {after.get(name, 'missing')[:90]}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name)
    ]


def printed_differently(before: Path, after: Path) -> list[str]:
    texts = []
    for folder in (before, after):
        text = (folder / "printed.txt").read_text(encoding="utf-8")
        for mask, word in MASKS:
            text = mask.sub(word, text)
        texts.append([" ".join(line.split()) for line in text.splitlines() if "%|" not in line])
    lines = difflib.unified_diff(texts[0], texts[1], lineterm="", n=0)
    return [f"    {line}" for line in lines if not line.startswith(("---", "+++", "@@"))]


if __name__ == "__main__":
    sys.exit(main())
