"""3. Pictures become small: the autoencoder. A latent has an eighth of the picture's height and width, and 16 channels.

Trained to give back the picture that went in, it keeps what the eye sees and drops the rest. This small space has a
twelfth of the numbers, and a 64th of the places.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.sd3_from_scratch.text import attend


class Residual(nn.Module):
    """Two convolutions, whose result is added to the input."""

    def __init__(self, before: int, after: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, eps=1e-6), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after, eps=1e-6), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every place looks at every other: at the lowest resolution only, as the cost grows with their number squared."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).transpose(1, 2)
        return x + self.out(attend(self.qkv(places), heads=1)).transpose(1, 2).unflatten(2, x.shape[2:])


class Resize(nn.Module):
    """Convolve every second place, having padded right and below; or repeat every place, and convolve."""

    def __init__(self, width: int, double: bool) -> None:
        super().__init__()
        self.double = double
        self.conv = nn.Conv2d(width, width, 3, padding=1) if double else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.double else F.pad(x, (0, 1, 0, 1)))


def _stages(widths: Sequence[int], blocks: int, groups: int, double: bool) -> nn.ModuleList:
    """Return the stages, each of residual blocks and, except for the last, a change of resolution."""
    stages = []
    for before, width in zip([widths[0], *widths], widths, strict=False):
        residuals = [Residual(before if n == 0 else width, width, groups) for n in range(blocks)]
        resize = nn.Identity() if len(stages) == len(widths) - 1 else Resize(width, double)
        stages.append(nn.ModuleDict({"blocks": nn.ModuleList(residuals), "resize": resize}))
    return nn.ModuleList(stages)


class Coder(nn.Module):
    """Either half of the autoencoder: the encoder goes down and then through the middle, the decoder the other way."""

    def __init__(self, config: dict[str, Any], encodes: bool) -> None:
        super().__init__()
        widths, groups, latent = config["block_out_channels"], config["norm_num_groups"], config["latent_channels"]
        blocks, self.encodes = config["layers_per_block"], encodes
        if encodes:
            self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
            self.stages = _stages(widths, blocks, groups, double=False)
        else:
            self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
            self.stages = _stages(widths[::-1], blocks + 1, groups, double=True)
        deep, end = widths[-1], widths[-1] if encodes else widths[0]
        self.middle = nn.Sequential(Residual(deep, deep, groups), Attention(deep, groups), Residual(deep, deep, groups))
        self.norm_out = nn.GroupNorm(groups, end, eps=1e-6)
        self.conv_out = nn.Conv2d(end, 2 * latent if encodes else 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        x = x if self.encodes else self.middle(x)
        for stage in self.stages:
            for block in stage["blocks"]:
                x = block(x)
            x = stage["resize"](x)
        x = self.middle(x) if self.encodes else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Vae(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.shift, self.scale = config["shift_factor"], config["scaling_factor"]
        self.encoder, self.decoder = Coder(config, encodes=True), Coder(config, encodes=False)

    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, h, w] in -1..1 -> mean and standard deviation of the latents, [B, 16, h / 8, w / 8] each."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30, 20))

    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents for the diffusion, about standard normal: a sample, shifted and scaled."""
        mean, deviation = self.distribution(pixels)
        return (mean + deviation * torch.randn_like(mean) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Return the picture, [B, 3, h, w], about -1..1."""
        return self.decoder(latents / self.scale + self.shift)
