"""Measure the spread of brightness of a LoRA on nano, with and without the offset in its starting noise.

The training pictures have one colour each, from black to white. `python -m examples.nano.measure_noise_offset OUT`
trains for some minutes on one core and prints a line per strength, the source of figures in docs/flow-matching.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

from PIL import Image, ImageStat

from sd3tune.commands.train import run_training
from sd3tune.config.loader import parse_config
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.model.base.contract import spread_without_offset
from sd3tune.sampling.sampler import SamplerSettings

SIDE, TOKENS, CAPTION = 64, 16, "a plain grey picture"


def write_pictures(folder: Path, count: int = 32) -> list[float]:
    """Write pictures of one colour, from black to white. Return their brightness, from 0 to 255."""
    folder.mkdir(parents=True, exist_ok=True)
    levels = [round(255 * number / (count - 1)) for number in range(count)]
    for level in levels:
        Image.new("RGB", (SIDE, SIDE), (level, level, level)).save(folder / f"{level:03d}.png")
    return [float(level) for level in levels]


def train(out: Path, pictures: Path, strength: float, steps: int) -> Path:
    run = out / f"offset-{strength:g}"
    values = {
        "output_dir": str(run.absolute()),
        "model": {"base": "nano", "max_sequence_length": TOKENS},
        "method": {"kind": "lora", "rank": 16, "alpha": 16.0, "targets": "attention+mlp"},
        "data": {"sources": [{"path": str(pictures.absolute()), "caption": CAPTION}], "resolution": SIDE},
        "flow": {"noise_offset": strength},
        "optimizer": {"lr": 2e-3},
        "train": {"steps": steps, "batch_size": 8},
    }
    run_training(parse_config(values, ()).config)
    return run


def brightness(image: Image.Image) -> float:
    return fmean(ImageStat.Stat(image.convert("RGB")).mean)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 0.1, 0.5])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=96)
    options = parser.parse_args()
    expected_spread = pstdev(write_pictures(options.out / "pictures"))
    plain = ImagePipeline("nano", SamplerSettings(20, 1.0, SIDE, SIDE), t5_length=TOKENS)
    prompts_and_seeds = [(CAPTION, seed) for seed in range(options.pictures)]
    for strength in options.strengths:
        run = train(options.out, options.out / "pictures", strength, options.steps)
        shares = []
        for start in dict.fromkeys((strength, 0.0)):
            plain.settings = replace(plain.settings, noise_offset=start)
            drawn = [brightness(image) for image in plain.draw(prompts_and_seeds, run)]
            shares.append(f"{100 * pstdev(drawn) / expected_spread:.0f} % from offset {start:g}")
        expected = 100 * spread_without_offset(strength, SIDE)
        print(
            f"RESULT offset {strength:g}: {', '.join(shares)}; without it {expected:.0f} % in closed form", flush=True
        )


if __name__ == "__main__":
    main()
