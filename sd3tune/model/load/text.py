"""Encode prompts, bit-equal to `StableDiffusion3Pipeline.encode_prompt`.

Padding is never masked or zeroed: the MMDiT attends to it, so the T5 length is part of the conditioning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sd3tune.errors import ModelError
from sd3tune.model.load.learned_tokens import LearnedEmbedding

TOKENS = "tokens"
"""Name of a text's tokens beside its embeddings, for an encoder that is trained."""


class TextEncoder:
    """One text encoder and its tokenizer: `clip_l`, `clip_g` or `t5`."""

    def __init__(self, name: str, tokenizer: Any, model: nn.Module, max_length: int) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.model = model
        self.max_length = max_length
        """Number of tokens per prompt, with special tokens and padding; a longer prompt is truncated."""
        self.learned: LearnedEmbedding | None = None
        """Learned tokens beyond the vocabulary; None without any."""

    @torch.no_grad()
    def encode(self, texts: list[str]) -> list[dict[str, Tensor]]:
        """Return `{"hidden": [T, D]}` per text, for CLIP also `{"pooled": [P]}`; in the encoder's dtype, on the CPU.

        Prompts are encoded one at a time: a batch would change the last bits. CLIP's hidden state is its penultimate.
        Raises ModelError for embeddings that are not finite.
        """
        return [self._finite(text, self._encode(text)) for text in texts]

    def truncated(self, text: str) -> int:
        """Return the number of tokens of the text that are cut off; 0 if it fits."""
        return max(0, count_tokens(self.tokenizer, text) - self.max_length)

    def _finite(self, text: str, entry: dict[str, Tensor]) -> dict[str, Tensor]:
        if not all(embedding.isfinite().all() for embedding in entry.values()):
            form = str(self.model.dtype).removeprefix("torch.")
            raise ModelError(
                f"{self.name}: NaN or infinity in the embedding of {text[:60]!r} (computed in {form}); "
                "use model.dtype: bf16 or fp32, and model.t5_quantize: none"
            )
        return entry

    def _encode(self, text: str) -> dict[str, Tensor]:
        computed = self.compute(tokenize(self.tokenizer, text, self.max_length)[None])
        return {name: batch[0].cpu().contiguous() for name, batch in computed.items()}

    def compute(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return `encode`'s tensors for `tokens` [B, T], as a batch on the encoder's device, with their gradients."""
        ids = tokens.to(next(self.model.parameters()).device, non_blocking=True)
        ids = ids if self.learned is None else self.learned.take(ids)
        if self.name == "t5":
            return {"hidden": self.model(ids)[0].to(self.model.dtype)}
        output = self.model(ids, output_hidden_states=True)
        return {"hidden": output.hidden_states[-2].to(self.model.dtype), "pooled": output[0].to(self.model.dtype)}


def tokenize(tokenizer: Any, text: str, length: int) -> Tensor:
    """Return the text's tokens [length], int64, truncated or padded."""
    tokens = tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids[0]
    return ids


def on_device(entry: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return an encoder's tensors on the device, but for `tokens`, which are compared without waiting for it."""
    return {name: tensor if name == TOKENS else tensor.to(device, non_blocking=True) for name, tensor in entry.items()}


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of the whole text, with special tokens."""
    return len(tokenizer(text).input_ids)


def assemble(
    clip_l: Mapping[str, Tensor], clip_g: Mapping[str, Tensor], t5: Tensor | None, t5_length: int, joint_dim: int
) -> tuple[Tensor, Tensor]:
    """Return the transformer's conditioning, prompt_embeds [B, 77+T5, joint_dim] and pooled [B, P], from batches.

    `clip_l` and `clip_g` contain "hidden" [B, 77, D] and "pooled" [B, P]. `t5` is [B, t5_length, joint_dim], or None
    for zeros, as in the pipeline without T5. CLIP is zero-padded in width and precedes T5.
    """
    clip = torch.cat([clip_l["hidden"], clip_g["hidden"]], dim=-1)
    if t5 is None:
        t5 = clip.new_zeros(len(clip), t5_length, joint_dim)
    elif t5.shape[1:] != (t5_length, joint_dim):
        raise ValueError(f"t5 embeddings are {tuple(t5.shape)}, expected [B, {t5_length}, {joint_dim}]")
    prompt_embeds = torch.cat([F.pad(clip, (0, joint_dim - clip.shape[-1])), t5], dim=1)
    return prompt_embeds, pool(clip_l, clip_g)


def pool(clip_l: Mapping[str, Tensor], clip_g: Mapping[str, Tensor]) -> Tensor:
    """Return only the pooled part of `assemble`, [B, P]."""
    return torch.cat([clip_l["pooled"], clip_g["pooled"]], dim=-1)
