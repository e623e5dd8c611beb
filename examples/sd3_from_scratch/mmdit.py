"""4. The diffusion transformer, MMDiT (Esser et al. 2024): from a noisy latent and a prompt, which way the noise lies.

Picture and text are two streams of tokens with weights of their own, which attend to each other in every block. The
noise level and the prompt's one vector set the scale and shift of every layer (adaptive layer norm, "adaLN").
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projections(nn.Module):
    """Queries, keys and values of one stream in one matrix, norms of queries and keys (SD3.5), and the way back."""

    def __init__(self, width: int, heads: int, normed: bool, returns: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, 1e-6) if normed else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width) if returns else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, dim=-1))
        return self.norm_q(q), self.norm_k(k), v


def attention(*streams: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return [B, all tokens, width]: the streams' tokens attend to all tokens."""
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise every token, then scale and shift it; noise level and prompt decide how."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Stream(nn.Module):
    """One stream's weights in a block. `second`: a second attention of the picture to itself (SD3.5 medium, "-X")."""

    def __init__(self, width: int, heads: int, normed: bool, second: bool = False, last: bool = False) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, width * (2 if last else 9 if second else 6))
        self.attention = Projections(width, heads, normed, returns=not last)
        self.second = Projections(width, heads, normed) if second else None
        self.up, self.down = (None, None) if last else (nn.Linear(width, 4 * width), nn.Linear(4 * width, width))

    def after_attention(self, x: Tensor, read: Tensor, m: tuple[Tensor, ...]) -> Tensor:
        """Add what the attention read, then the output of a small network. Gates let a block begin as the identity."""
        own = m[8][:, None] * self.second.out(attention(self.second(modulated(x, m[6], m[7])))) if self.second else 0
        x = x + m[2][:, None] * self.attention.out(read) + own
        h = modulated(x, m[3], m[4])
        return x + m[5][:, None] * self.down(F.gelu(self.up(h), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, normed: bool, second: bool, last: bool) -> None:
        super().__init__()
        self.image = Stream(width, heads, normed, second)
        self.text = Stream(width, heads, normed, last=last)  # quirk: the last block's text is read and then dropped

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        of_image, of_text = (
            stream.modulation(condition).chunk(stream.modulation.out_features // condition.shape[-1], dim=-1)
            for stream in (self.image, self.text)
        )
        asked = self.image.attention(modulated(image, *of_image[:2]))
        read = attention(asked, self.text.attention(modulated(text, *of_text[:2])))
        image_read, text_read = read.split([image.shape[1], text.shape[1]], dim=1)
        image = self.image.after_attention(image, image_read, of_image)
        if self.text.attention.out is not None:
            text = self.text.after_attention(text, text_read, of_text)
        return image, text


class MMDiT(nn.Module):
    """The whole transformer. `config` is that of a diffusers folder."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        heads, blocks = config["num_attention_heads"], config["num_layers"]
        width, second = heads * config["attention_head_dim"], config.get("dual_attention_layers", ())
        self.patch, self.channels = config["patch_size"], config["out_channels"] or config["in_channels"]
        self.grid = config["pos_embed_max_size"]
        self.register_buffer("positions", grid_of_positions(width, self.grid, config["sample_size"] // self.patch))
        self.patches = nn.Conv2d(config["in_channels"], width, self.patch, stride=self.patch)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.pooled = nn.Sequential(
            nn.Linear(config["pooled_projection_dim"], width), nn.SiLU(), nn.Linear(width, width)
        )
        self.text = nn.Linear(config["joint_attention_dim"], width)
        normed = config.get("qk_norm") is not None
        self.blocks = nn.ModuleList(
            Block(width, heads, normed, second=n in second, last=n == blocks - 1) for n in range(blocks)
        )
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, self.patch**2 * self.channels)
        streams = [stream for block in self.blocks for stream in (block.image, block.text)]
        for layer in (self.out, self.modulation, *(stream.modulation for stream in streams)):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)  # training begins with blocks that do nothing

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        """Return the velocity, in the latents' shape [B, c, h, w]; noise levels `sigma` [B] run from 0 to 1."""
        condition = F.silu(self.time(waves(1000 * sigma)) + self.pooled(pooled))
        x = self.patches(latents)
        size = x.shape[2:]
        top, left = ((self.grid - side) // 2 for side in size)  # a small picture lies in the middle of the grid
        places = self.positions[top : top + size[0], left : left + size[1]]
        x, text = x.flatten(2).transpose(1, 2) + places.flatten(0, 1), self.text(text)
        for block in self.blocks:
            x, text = block(x, text, condition)
        x = self.out(modulated(x, *self.modulation(condition).chunk(2, dim=-1)))
        x = x.unflatten(1, size).unflatten(3, (self.patch, self.patch, self.channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def waves(time: Tensor, width: int = 256) -> Tensor:
    """Return [B, width]: cosines and sines of the time, from fast to slow ones, so that near times look alike."""
    slower = torch.exp(-math.log(10000) * torch.arange(width // 2, device=time.device) / (width // 2))
    angle = time[:, None].float() * slower
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_of_positions(width: int, side: int, base: int) -> Tensor:
    """Return [side, side, width]: waves of column and row, stretched as if `base` patches filled the grid."""
    slower = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = (torch.arange(side) / (side / base)).double()
    along = torch.cat([torch.sin(place[:, None] * slower), torch.cos(place[:, None] * slower)], dim=1)
    columns, rows = along[None].expand(side, -1, -1), along[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).float()
