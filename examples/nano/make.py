"""Rebuild nano from scratch: pictures, text encoders, VAE, transformer, and the shipped folder.

python -m examples.nano.make

Existing results are kept, and an interrupted training is resumed: run it again until it is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from examples.nano.assemble import assemble
from sd3tune.config import load_config
from sd3tune.files.atomic import write_text
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.model.base.parts import MODEL_INDEX

ROOT = Path(__file__).parents[2]
CONFIG, LONG_CONFIG = ROOT / "configs" / "nano_base.yaml", ROOT / "configs" / "nano_long.yaml"
WORK, SHIPPED = ROOT / "data" / "nano", ROOT / "sd3tune" / "assets" / "nano"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.make", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value for the transformer's training")
    overrides = parser.parse_args(arguments).overrides
    parts, run, long_run = WORK / "parts", WORK / "run", WORK / "run_long"
    _run_unless_exists(WORK / "held_out.parquet", "examples.nano.render", "--out", WORK)
    _run_unless_exists(parts / "text_encoder_3", "examples.nano.train_text_encoders", "--out", parts)
    _run_unless_exists(parts / "vae", "examples.nano.train_vae", "--out", parts / "vae")
    _write_frame(parts)
    _python("sd3tune", "train", CONFIG, f"output_dir={run}", *overrides, "--resume")
    _python("sd3tune", "train", LONG_CONFIG, f"output_dir={long_run}", "--resume")
    size = assemble(long_run / "model", SHIPPED)
    shutil.copy(run / "model" / CONTRACT_FILE, SHIPPED)  # 16 T5 tokens are enough, and cheaper
    print(f"{SHIPPED}: {size / 10**6:.1f} MB")


def _run_unless_exists(path: Path, module: str, *arguments: object) -> None:
    if path.exists():
        print(f"{path}: there already")
    else:
        _python(module, *arguments)


def _python(module: str, *arguments: object) -> None:
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def _write_frame(parts: Path) -> None:
    """Write the files that make the parts a pipeline folder: its index, and the scheduler with the training's shift."""
    FlowMatchEulerDiscreteScheduler(shift=load_config(CONFIG).config.flow.shift).save_pretrained(parts / "scheduler")
    write_text(parts / "model_index.json", json.dumps(MODEL_INDEX, indent=2) + "\n")


if __name__ == "__main__":
    main()
