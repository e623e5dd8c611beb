"""Build nano from scratch: pictures, text encoders, VAE, transformer, and its pipeline folder, data/nano/nano.

python -m examples.nano.make            # then: python -m examples.nano.make --ship

Existing results are kept, and an interrupted training is resumed: run it again until it is done. It ends with a
measurement of what the new nano draws right; `--ship` then copies it over the packaged one.
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
from examples.nano.text_encoders import ENCODERS
from sd3tune.config import load_config
from sd3tune.files.atomic import write_text
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.model.base.offline import NANO, name_of_version, offline_folder
from sd3tune.model.base.parts import MODEL_INDEX
from sd3tune.model.base.resolve import resolve_base

ROOT = Path(__file__).parents[2]
CONFIG, LONG_CONFIG = ROOT / "configs" / "nano_base.yaml", ROOT / "configs" / "nano_long.yaml"
WORK, ASSETS = ROOT / "data" / "nano", ROOT / "sd3tune" / "assets"
BUILT, SHIPPED, CLIP = WORK / "nano", ASSETS / "nano", ASSETS / "nano_clip"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.make", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="key=value for the transformer's training")
    parser.add_argument("--ship", action="store_true", help="copy the finished nano over the packaged one")
    options = parser.parse_args(arguments)
    if options.ship:
        _ship()
        return
    parts, run, long_run = WORK / "parts", WORK / "run", WORK / "run_long"
    _run_unless_exists(WORK / "held_out.parquet", "examples.nano.render", "--out", WORK)
    for encoder, (_, folder) in ENCODERS.items():
        _run_unless_exists(parts / folder, "examples.nano.train_text_encoders", "--out", parts, "--only", encoder)
    _run_unless_exists(CLIP, "examples.nano.train_clip", "--out", CLIP)
    _run_unless_exists(parts / "vae", "examples.nano.train_vae", "--out", parts / "vae")
    _write_frame(parts)
    _python("sd3tune", "train", CONFIG, f"output_dir={run}", *options.overrides, "--resume")
    _python("sd3tune", "train", LONG_CONFIG, f"output_dir={long_run}", "--resume")
    size = assemble(long_run / "model", BUILT)
    shutil.copy(run / "model" / CONTRACT_FILE, BUILT)  # 16 T5 tokens are enough, and cheaper
    print(f"{BUILT}: {size / 10**6:.1f} MB")
    _python("examples.nano.measure_nano", BUILT)


def _ship() -> None:
    """Replace the packaged nano. Raises SystemExit without a new one, or without a copy of the old weights."""
    if not (BUILT / "model_index.json").is_file():
        raise SystemExit(f"{BUILT}: not built yet; run without --ship")
    packaged = resolve_base(NANO).fingerprint("transformer") if SHIPPED.exists() else None
    if packaged is not None and offline_folder(name_of_version(NANO, packaged)) == SHIPPED:
        raise SystemExit(
            f"{SHIPPED}: runs and adapters name these weights; move them to sd3tune/assets/nano-N, and give their "
            f"fingerprint, {packaged}, that name and folder in sd3tune/model/base/offline.py"
        )
    shutil.rmtree(SHIPPED, ignore_errors=True)
    shutil.copytree(BUILT, SHIPPED)
    print(f"{SHIPPED}: replaced")


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
