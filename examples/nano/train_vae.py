"""Train nano's VAE: 64 x 64 pixels to 16 channels of 8 x 8 and back, like SD3's, on pictures drawn by rules.

python -m examples.nano.train_vae --out data/nano/parts/vae

A stopped training continues from its checkpoint, a file beside the folder.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from examples.nano.muon import MuonAndAdamW
from examples.nano.pictures import SIDE, pictures_in, training_pictures
from examples.nano.resume import Checkpoint
from sd3tune.files.atomic import new_folder

LEARNING_RATE, WARMUP = 1e-2, 50
EDGES_WEIGHT = 1.0
KL_WEIGHT = 2e-3  # higher means more noise in the latents
MEASURED, HELD_OUT = 2048, 256  # number of pictures for the latents' mean and spread, and for PSNR


def build_vae(seed: int) -> AutoencoderKL:
    """Return SD3's autoencoder at about an eighth of its width, with one layer less per block: 1.75 M parameters."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIDE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train(
    vae: AutoencoderKL,
    pictures: Tensor,
    steps: int,
    batch_size: int,
    seed: int,
    bf16: bool = True,
    checkpoint: Path | None = None,
) -> Tensor:
    """Train in place on uint8 pictures [N, 3, 64, 64]. Return the loss of each step of this call.

    A file `checkpoint` is continued from, and replaced at intervals.
    """
    torch.manual_seed(seed)
    optimizer = MuonAndAdamW(vae.train(), LEARNING_RATE)
    state = Checkpoint(checkpoint, vae=vae, optimizer=optimizer)
    start = state.load()
    losses = torch.zeros(steps - start)
    progress = tqdm(range(start, steps), desc="vae", unit=" steps", mininterval=1)
    for step in progress:
        chosen = torch.randint(len(pictures), (batch_size,))
        pixels = as_pixels(pictures[chosen].to(vae.device))
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=bf16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(decoded.float(), pixels) + KL_WEIGHT * kl
        loss.backward()
        optimizer.step(learning_rate_share(step, steps))
        done = step - start
        losses[done] = loss.detach()
        state.save(step + 1)
        if done % 20 == 0:
            progress.set_postfix_str(f"loss {losses[max(0, done - 19) : done + 1].mean():.4f}", refresh=False)
    vae.eval()
    return losses


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean absolute error of pixels [B, 3, H, W] and of the differences between neighbouring pixels."""
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGES_WEIGHT * edges


def learning_rate_share(step: int, steps: int) -> float:
    """Return the share of the learning rate: from 0 to 1 in the first steps, then along a cosine to 0."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def as_pixels(pictures: Tensor) -> Tensor:
    """Convert uint8 to floats in [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def calibrate(vae: AutoencoderKL, pictures: Tensor) -> tuple[float, float]:
    """Set the factors by which latents of these pictures have mean 0 and standard deviation 1.

    Return the standard deviation of the latents, and the posterior's contribution to it.
    """
    moments = [vae.encode(as_pixels(part.to(vae.device))).latent_dist for part in pictures.split(64)]
    mean = torch.cat([posterior.mean for posterior in moments])
    noise = torch.cat([posterior.var for posterior in moments]).mean()
    spread = float((mean.var() + noise).sqrt())
    vae.register_to_config(scaling_factor=1 / spread, shift_factor=float(mean.mean()))
    return spread, float(noise.sqrt()) / spread


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Encode uint8 [N, 3, 64, 64] to the posterior's mean, and decode to uint8 on the CPU."""
    parts = []
    for part in pictures.split(64):
        latents = vae.encode(as_pixels(part.to(vae.device))).latent_dist.mode()
        decoded = vae.decode(latents).sample
        parts.append(((decoded + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8))
    return torch.cat(parts)


def psnr(pictures: Tensor, reconstructed: Tensor) -> float:
    """Return the mean over the pictures of 10 log10(255^2 / mean squared error), in dB."""
    squared = (pictures.float() - reconstructed.float()).square().flatten(1).mean(1).clamp(min=0.01)
    return float((10 * torch.log10(255**2 / squared)).mean())


def stack(pixels: np.ndarray) -> Tensor:
    """Convert [N, 64, 64, 3] to a tensor [N, 3, 64, 64]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _pictures(images: Path | None, count: int, seed: int) -> Tensor:
    """Return HELD_OUT pictures, followed by the training pictures."""
    if images is None:
        return stack(np.concatenate([training_pictures(HELD_OUT, seed + 1), training_pictures(count, seed)]))
    return stack(pictures_in(images, HELD_OUT + count))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.train_vae", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, in diffusers' layout")
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pictures", type=int, default=25_000, help="how many are drawn or read, and kept in memory")
    parser.add_argument("--images", type=Path, help="a .parquet file whose images to learn instead of drawn ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true", help="without bfloat16, for processors that are slow at it")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = _pictures(options.images, options.pictures, options.seed)
    unseen, pictures = drawn[:HELD_OUT], drawn[HELD_OUT:]
    vae = build_vae(options.seed).to(device)
    checkpoint = options.out.with_name(options.out.name + ".training")
    losses = train(vae, pictures, options.steps, options.batch_size, options.seed, not options.fp32, checkpoint)
    spread, noise = calibrate(vae, pictures[:MEASURED])
    with new_folder(options.out) as folder:
        vae.save_pretrained(folder)
    checkpoint.unlink(missing_ok=True)

    print(f"parameters         {vae.num_parameters() / 1e6:.2f} M")
    print(f"loss               {losses[:20].mean():.4f} -> {losses[-100:].mean():.4f}")
    print(f"PSNR, new pictures {psnr(unseen, reconstruct(vae, unseen)):.1f} dB")
    print(f"latents            std {spread:.3f}, of which the posterior's noise {noise:.3f}")
    print(f"scaling_factor     {vae.config.scaling_factor:.4f}")
    print(f"shift_factor       {vae.config.shift_factor:.4f}")
    print(f"written            {options.out}")


if __name__ == "__main__":
    main()
