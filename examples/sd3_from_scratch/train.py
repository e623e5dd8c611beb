"""9. Learn to draw.

python -m examples.sd3_from_scratch.train FASHION --out fashion                     # from nothing, 28 x 28 gray pixels
python -m examples.sd3_from_scratch.train PICTURES --base NANO --out mine           # from nothing, in NANO's latents
python -m examples.sd3_from_scratch.train PICTURES --base NANO --lora 16 --out rex  # a LoRA on NANO itself
"""

import argparse
import gzip
import json
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.sd3_from_scratch import flow
from examples.sd3_from_scratch.checkpoint import load
from examples.sd3_from_scratch.generate import conditions, picture, shift_of, use_accelerator
from examples.sd3_from_scratch.lora import add_lora, save_lora
from examples.sd3_from_scratch.mmdit import MMDiT

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def read_pictures(folder: Path, side: int = 0) -> tuple[Tensor, list[str]]:
    """Return pixels [n, c, h, w] in -1..1 and n captions: of Fashion-MNIST's files, or of pictures with text files."""
    idx = sorted(folder.glob("*train-images-idx3-ubyte*"))
    if idx:
        labels = _read_idx(Path(str(idx[0]).replace("images-idx3", "labels-idx1")))
        pixels = F.pad(_read_idx(idx[0])[:, None], (2, 2, 2, 2))  # 32 x 32
        captions = [CLASSES[label] for label in labels]
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        pixels = torch.stack([_square(Image.open(file).convert("RGB"), side) for file in files])
        captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    return pixels.to(torch.get_default_device()) / 127.5 - 1, captions


def _read_idx(file: Path) -> Tensor:
    """Read an array of bytes: the fourth byte is the number of axes, then come their lengths, then the array."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    shape = struct.unpack_from(f">{data[3]}I", data, 4)
    return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).reshape(shape)


def _square(image: Image.Image, side: int) -> Tensor:
    size = (side or min(image.size),) * 2
    levels = bytearray(ImageOps.fit(image, size).tobytes())  # scaled, and cropped in the middle
    return torch.frombuffer(levels, dtype=torch.uint8).reshape(*size, 3).permute(2, 0, 1)


@dataclass
class Data:
    """The encoded training data. Conditions of the empty caption come last: they replace one in ten."""

    latents: Tensor  # [n, c, h, w]
    caption: Tensor  # [n], the number of each picture's caption
    tokens: Tensor  # [captions + 1, t, w]
    pooled: Tensor  # [captions + 1, p]
    shift: float
    config: dict  # of the transformer
    decode: Callable[[Tensor], Tensor]


def prepare(folder: Path, base: Path | None, side: int) -> Data:
    """Encode pictures and captions with the base. Without one, pixels are latents, and classes are random vectors."""
    pixels, captions = read_pictures(folder, side if base else 0)
    names = sorted(set(captions))
    caption = torch.tensor([names.index(one) for one in captions])
    if base is None:
        config = {
            "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "patch_size": 4, "in_channels": 1,
            "out_channels": 1, "sample_size": 32, "pos_embed_max_size": 8, "pooled_projection_dim": 64,
            "joint_attention_dim": 64, "qk_norm": "rms_norm", "dual_attention_layers": [0],
        }  # fmt: skip
        table = torch.randn(len(names) + 1, 64)
        return Data(pixels, caption, table[:, None], table, 1.0, config, lambda latents: latents)
    vae, config = load(base, "vae"), json.loads((base / "transformer" / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        latents = torch.cat([vae.encode(some) for some in pixels.split(64)])
    return Data(latents, caption, *conditions(base, [*names, ""], t5_length=16), shift_of(base), config, vae.decode)


def train_step(model: MMDiT, optimizer: torch.optim.Optimizer, data: Data, chosen: Tensor) -> Tensor:
    """Improve the model on some pictures; return the loss."""
    latents, sigma = data.latents[chosen], flow.training_sigmas(len(chosen), data.shift)
    noise, empty = torch.randn_like(latents), len(data.tokens) - 1
    caption = torch.where(torch.rand(len(chosen)) < 0.1, empty, data.caption[chosen])
    predicted = model(flow.line(latents, noise, sigma), sigma, data.tokens[caption], data.pooled[caption])
    loss = flow.velocity_loss(predicted, latents, noise)
    loss.backward()
    nn.utils.clip_grad_norm_([parameter for parameter in model.parameters() if parameter.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(model: MMDiT, parameters: list[nn.Parameter], data: Data, steps: int, batch: int, lr: float) -> None:
    """Train the parameters, and leave their moving average in the model: it draws better than any single step's."""
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01)
    averages, began, told = [parameter.detach().clone() for parameter in parameters], time.monotonic(), 0.0
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 50, 2 * (1 - step / (steps + 1)))
        loss = train_step(model, optimizer, data, torch.randint(len(data.latents), (batch,)))
        for average, parameter in zip(averages, parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - min(0.998, step / (10 + step)))
        if time.monotonic() - told > 1 or step == steps:
            left = ((told := time.monotonic()) - began) / step * (steps - step)
            print(f"\rstep {step} of {steps}, loss {loss.item():.3f}, {left:.0f} s left ", end="", flush=True)
    for average, parameter in zip(averages, parameters, strict=True):
        parameter.data.copy_(average)
    print()


@torch.no_grad()
def drawn(model: MMDiT, data: Data, caption: Tensor, steps: int = 25, guidance: float = 3.0) -> Tensor:
    """Return a picture for each number of a caption, [n, 3, h, w]."""
    none = torch.full_like(caption, len(data.tokens) - 1)
    positive, negative = ((data.tokens[which], data.pooled[which]) for which in (caption, none))
    noise = torch.randn(len(caption), *data.latents.shape[1:])
    predict = flow.guided(model, positive, negative, guidance)
    return data.decode(flow.draw(predict, noise, flow.drawing_sigmas(steps, data.shift))).expand(-1, 3, -1, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="pictures with captions in text files, or Fashion-MNIST's files")
    parser.add_argument("--base", type=Path, help="folder whose autoencoder and text encoders are used")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA on the base's transformer")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (64)")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    use_accelerator()
    torch.manual_seed(0)
    data = prepare(asked.pictures, asked.base, asked.size)
    model = load(asked.base, "transformer") if asked.lora else MMDiT(data.config)
    parameters = add_lora(model, asked.lora) if asked.lora else list(model.parameters())
    print(f"{len(data.latents)} pictures, {sum(parameter.numel() for parameter in parameters):,} numbers to train")
    train(model, parameters, data, asked.steps, asked.batch, asked.lr)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.lora:
        save_lora(model, asked.out / "pytorch_lora_weights.safetensors")
    else:
        save_file(model.state_dict(), asked.out / "transformer.safetensors")
    captions = torch.arange(min(10, len(data.tokens) - 1)).repeat_interleave(10)
    rows = drawn(model, data, captions).split(10)
    picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)).save(asked.out / "grid.png")
    print(asked.out / "grid.png")


if __name__ == "__main__":
    main()
