"""2. Prompts become vectors: the three text encoders, and how SD3 joins their outputs.

CLIP's two encoders were trained beside image encoders, to give a picture and its caption the same vector; T5 was
trained to fill gaps in texts. All are transformers: stacks of layers in which every token looks at others (attention)
and then is changed on its own (a small network).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(qkv: Tensor, heads: int, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return what each token reads from the others: [B, n, 3 w] -> [B, n, w].

    Every head compares a token's query with all keys, and averages the values with weights softmax(scale q k + mask).
    """
    q, k, v = (one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in qkv.chunk(3, dim=-1))
    read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return read.transpose(1, 2).flatten(2)


class ClipLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.heads, self.quick = heads, quick
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.out(attend(self.qkv(self.norm1(x)), self.heads, mask))
        h = self.up(self.norm2(x))
        return x + self.down(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))  # CLIP-L's GELU is a rough one


class ClipText(nn.Module):
    """CLIP's text encoder with its projection. A token sees only the tokens before it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.end = config["hidden_size"], config["eos_token_id"]
        self.tokens = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        shape = (width, config["intermediate_size"], config["num_attention_heads"])
        quick = config["hidden_act"] == "quick_gelu"
        self.layers = nn.ModuleList(ClipLayer(*shape, quick) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config["projection_dim"], bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n] -> the states before the last layer [B, n, w], and the prompt as one vector [B, p]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -math.inf, device=ids.device).triu(1)
        for layer in self.layers:
            before_last, x = x, layer(x, mask)
        # Quirk: released configs say that the end token is 2, which it is not; its number is the highest.
        end = ids.argmax(1) if self.end == 2 else (ids == self.end).int().argmax(1)
        return before_last, self.projection(self.norm(x)[torch.arange(len(ids)), end])


class T5Layer(nn.Module):
    def __init__(self, width: int, head_width: int, heads: int, inner: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.out(attend(self.qkv(self.norm1(x)), self.heads, bias, scale=1.0))  # quirk: products unscaled
        h = self.norm2(x)
        return x + self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))


class T5Text(nn.Module):
    """T5's encoder. Tokens see all others, padding too; distances between them are part of the attention."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        heads, eps = config["num_heads"], config["layer_norm_epsilon"]
        self.buckets = config["relative_attention_num_buckets"]
        self.farthest = config["relative_attention_max_distance"]
        self.tokens = nn.Embedding(config["vocab_size"], config["d_model"])
        self.distances = nn.Embedding(self.buckets, heads)
        shape = (config["d_model"], config["d_kv"], heads, config["d_ff"], eps)
        self.layers = nn.ModuleList(T5Layer(*shape) for _ in range(config["num_layers"]))
        self.norm = nn.RMSNorm(config["d_model"], eps)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, n] -> [B, n, w]."""
        x, places = self.tokens(ids), torch.arange(ids.shape[1], device=ids.device)
        bias = self.distances(self._bucket(places[None] - places[:, None])).permute(2, 0, 1)[None]
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x)

    def _bucket(self, distance: Tensor) -> Tensor:
        """Return each distance's bucket: half of them for either side, of these half exact, the rest ever wider."""
        side = self.buckets // 2
        exact, far = side // 2, distance.abs()
        wide = (far.clamp(min=1).float() / exact).log() / math.log(self.farthest / exact) * (side - exact)
        return (distance > 0) * side + torch.where(far < exact, far, (exact + wide.long()).clamp(max=side - 1))


def join(clip_l: tuple[Tensor, Tensor], clip_g: tuple[Tensor, Tensor], t5: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prompt's tokens [B, 77 + n, w] and its one vector [B, p]. CLIP's tokens lie beside each other, filled
    up with zeros to T5's width w; T5's tokens come after them."""
    clip = torch.cat([clip_l[0], clip_g[0]], dim=-1)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], dim=1), torch.cat([clip_l[1], clip_g[1]], dim=-1)
