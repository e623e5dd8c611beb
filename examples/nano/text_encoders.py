"""nano's three text encoders and tokenizers, with the structure of the real ones, and captions as their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from examples.nano.captions import OWNERS, SLOTS, Caption
from sd3tune.model.base.progress_bars import no_progress_bars
from sd3tune.model.base.tokenizers import make

ENCODERS = {  # name: (folder of its tokenizer, folder of its weights)
    "clip_l": ("tokenizer", "text_encoder"),
    "clip_g": ("tokenizer_2", "text_encoder_2"),
    "t5": ("tokenizer_3", "text_encoder_3"),
}
CLIP_WIDTHS = {"clip_l": 48, "clip_g": 64}
JOINT_WIDTH = 128
CLIP_LENGTH, T5_LENGTH = 77, 16
LAYERS, HEADS = 3, 4
OWN = ("colour", "shape", "size", "texture", "name")
"""The slots of a token's own thing, which its state can contain."""

_SLOT = {slot: n for n, slot in enumerate(SLOTS)}
_NEVER = 10_000  # later than any token


def write_tokenizer(encoder: str, folder: Path) -> None:
    """Write the tokenizer of `words.txt`, one token per word; other words become bytes (CLIP) or letters (T5)."""
    words = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()
    if encoder == "t5":
        make.t5_files(folder, words)
    else:
        make.clip_files(folder, words, pad=make.EOS if encoder == "clip_l" else "!")


def load_tokenizer(encoder: str, folder: Path) -> Any:
    return (T5TokenizerFast if encoder == "t5" else CLIPTokenizer).from_pretrained(folder, local_files_only=True)


def load_encoder(encoder: str, folder: Path) -> nn.Module:
    model_class = T5EncoderModel if encoder == "t5" else CLIPTextModelWithProjection
    with no_progress_bars():
        model: nn.Module = model_class.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def new_encoder(encoder: str, tokenizer: Any) -> nn.Module:
    """Return an untrained encoder for that tokenizer."""
    if encoder == "t5":
        return _new_t5(len(tokenizer))
    width = CLIP_WIDTHS[encoder]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="quick_gelu" if encoder == "clip_l" else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    for embedding in (model.text_model.embeddings.token_embedding, model.text_model.embeddings.position_embedding):
        nn.init.normal_(embedding.weight, std=0.5)  # at CLIP's 0.02, so small a model trains slowly at first
    return model


def _new_t5(vocabulary: int) -> nn.Module:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=JOINT_WIDTH,
        d_kv=JOINT_WIDTH // HEADS,
        d_ff=2 * JOINT_WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def states(encoder: str, model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the MMDiT's inputs for ids [B, T]: states [B, T, D], penultimate for CLIP, and CLIP's pooled [B, P]."""
    if encoder == "t5":
        return model(ids)[0], None
    output = model(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


@dataclass
class Tokens:
    """Captions as tokens with their meaning: N captions of L tokens, S slots.

    ids [N, L] are padded; lengths [N] count the special tokens; owners [N, L] index OWNERS; values [N, S] index
    the slots' values, and filled_at [N, S] is the index of the token that fills them.
    """

    ids: Tensor
    lengths: Tensor
    owners: Tensor
    values: Tensor
    filled_at: Tensor
    eos: int
    causal: bool

    def batch(self, rows: Tensor, length: int) -> Batch:
        """Return the captions of these rows, truncated or padded to `length` tokens, as the tokenizer would."""
        ids, lengths = self.ids[rows, :length].clone(), self.lengths[rows].clamp(max=length)
        ends = lengths - 1
        ids[torch.arange(len(rows)), ends] = self.eos
        filled_at = self.filled_at[rows]
        filled_at = torch.where(filled_at < ends[:, None], filled_at, _NEVER)
        position = torch.arange(length)
        visible_from = filled_at[:, None] if self.causal else (filled_at[:, None] == _NEVER) * _NEVER
        seen = torch.where(position[None, :, None] >= visible_from, self.values[rows][:, None], 0)
        first = 1 if self.causal else 0  # CLIP's starts with a special token
        is_word = (position >= first) & (position < ends[:, None])
        owners = torch.where(is_word, self.owners[rows, :length], 0)
        return Batch(ids, ends, is_word, owners, seen)


@dataclass
class Batch:
    """A batch of token sequences: ids, is_word and owners [B, T]; ends [B], the index of </s>.

    seen [B, T, S] holds the slot values that a token's state can contain, 0 for others.
    """

    ids: Tensor
    ends: Tensor
    is_word: Tensor
    owners: Tensor
    seen: Tensor

    @property
    def whole(self) -> Tensor:
        """The values of the whole caption, [B, S]."""
        return self.seen[:, -1]

    @property
    def own(self) -> Tensor:
        """The values of its own thing that each token can contain, [B, T, len(OWN)]."""
        slots = _OWN_SLOTS[self.owners]
        return torch.where(slots >= 0, self.seen.gather(2, slots.clamp(min=0)), 0)


_OWN_SLOTS = torch.tensor(
    [
        [-1] * len(OWN),
        [_SLOT[slot] for slot in OWN],
        [_SLOT.get(f"other_{slot}", -1) for slot in OWN],
        [_SLOT["background"] if slot == "colour" else -1 for slot in OWN],
    ]
)


def tokenize(captions: Sequence[Caption], encoder: str, tokenizer: Any) -> Tokens:
    """Tokenize captions word by word, which gives the same result with both kinds of tokenizer."""
    first, known = (0 if encoder == "t5" else 1), {}
    shape = (len(captions), CLIP_LENGTH)
    ids = torch.full(shape, tokenizer.pad_token_id)
    lengths, owners = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    values = torch.zeros(shape[0], len(SLOTS), dtype=torch.long)
    filled_at = torch.full_like(values, _NEVER)
    for n, caption in enumerate(captions):
        row = [tokenizer.bos_token_id] if first else []
        ends = []
        for word, owner in zip(caption.words, caption.owners, strict=True):
            if word not in known:
                known[word] = tokenizer(word, add_special_tokens=False).input_ids
            owners[n, len(row) : len(row) + len(known[word])] = OWNERS.index(owner)
            row += known[word]
            ends.append(len(row) - 1)
        row = [*row[: CLIP_LENGTH - 1], tokenizer.eos_token_id]
        ids[n, : len(row)] = torch.tensor(row)
        lengths[n] = len(row)
        for slot, (word, value) in caption.slots.items():
            filled_at[n, _SLOT[slot]] = ends[word]
            values[n, _SLOT[slot]] = SLOTS[slot].index(value)
    return Tokens(ids, lengths, owners, values, filled_at, tokenizer.eos_token_id, causal=encoder != "t5")
