"""8. From a prompt to a picture.

python -m examples.sd3_from_scratch.generate FOLDER "a red circle on a blue background" --out circle.png
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from examples.sd3_from_scratch import flow
from examples.sd3_from_scratch.checkpoint import load
from examples.sd3_from_scratch.lora import merge_lora
from examples.sd3_from_scratch.text import join
from examples.sd3_from_scratch.tokenizers import ClipTokenizer, T5Tokenizer


def use_accelerator() -> None:
    """Make new tensors and models on the accelerator that torch finds, of whatever make."""
    if torch.accelerator.is_available():
        torch.set_default_device(torch.accelerator.current_accelerator())


@torch.no_grad()
def conditions(folder: Path, prompts: list[str], t5_length: int = 256) -> tuple[Tensor, Tensor]:
    """Return the prompts' tokens [B, 77 + t5_length, w] and vectors [B, p]. One encoder is in memory at a time."""

    def run(part: str, tokenizer: ClipTokenizer | T5Tokenizer, length: int):
        return load(folder, part)(torch.tensor([tokenizer(text, length) for text in prompts]))

    clip_l = run("text_encoder", ClipTokenizer(folder / "tokenizer"), 77)
    clip_g = run("text_encoder_2", ClipTokenizer(folder / "tokenizer_2"), 77)
    return join(clip_l, clip_g, run("text_encoder_3", T5Tokenizer(folder / "tokenizer_3"), t5_length))


def shift_of(folder: Path) -> float:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["shift"]


def picture(pixels: Tensor) -> Image.Image:
    """[3, h, w] in -1..1 -> a picture."""
    levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.frombytes("RGB", (levels.shape[1], levels.shape[0]), bytes(levels.flatten().tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a diffusers folder of SD3 or SD3.5, or nano's")
    parser.add_argument("prompt")
    parser.add_argument("--negative", default="", help="what to steer away from")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, a multiple of 16 (64; SD3.5: 1024)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, help="a LoRA in diffusers' names")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    asked = parser.parse_args()
    use_accelerator()
    tokens, pooled = conditions(asked.folder, [asked.prompt, asked.negative])
    transformer, sigmas = load(asked.folder, "transformer"), flow.drawing_sigmas(asked.steps, shift_of(asked.folder))
    if asked.lora:
        merge_lora(transformer, asked.lora)
    predict = flow.guided(transformer, (tokens[:1], pooled[:1]), (tokens[1:], pooled[1:]), asked.guidance)
    torch.manual_seed(asked.seed)
    noise = torch.randn(1, transformer.channels, asked.size // 8, asked.size // 8)
    latents = flow.draw(predict, noise, sigmas, lambda step: print(f"\rstep {step} of {asked.steps}", end=""))
    with torch.no_grad():
        picture(load(asked.folder, "vae").decode(latents)[0]).save(asked.out)
    print(f"\n{asked.out}")


if __name__ == "__main__":
    main()
