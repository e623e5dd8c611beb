"""Assemble nano: the trained transformer's pipeline folder with all parts in fp16. Prints its size.

python examples/nano/assemble.py data/nano/run/model sd3tune/assets/nano
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

MEGABYTE = 10**6
LARGEST = 24 * MEGABYTE


def assemble(model: Path, out: Path) -> int:
    """Copy the pipeline folder `model` to `out` with its tensors in fp16. Return the size in bytes."""
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(model, temporary)
    for file in temporary.rglob("*.safetensors"):
        to_fp16(file)
    size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    if size > LARGEST:
        raise SystemExit(f"{temporary}: {size / MEGABYTE:.1f} MB; at most {LARGEST / MEGABYTE:.0f} MB may ship")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return size


def to_fp16(file: Path) -> None:
    """Round the tensors of a safetensors file to fp16; the config.json beside it then names fp32 for computing."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, file, metadata)
    config = file.with_name("config.json")
    described = json.loads(config.read_text(encoding="utf-8"))
    # transformers computes in this dtype, diffusers in fp32: a pipeline without a given dtype needs them to agree.
    for key in ("torch_dtype", "dtype"):
        if key in described:
            described[key] = "float32"
    config.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    print(f"{options.out}: {assemble(options.model, options.out) / MEGABYTE:.1f} MB")


if __name__ == "__main__":
    main()
