"""Encode prompts, with one text encoder in memory at a time."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from sd3tune.adapter.embedding import Embedding, as_read, attach_embeddings
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.text_encoders import attach_text, use_adapters
from sd3tune.encode.resources import release
from sd3tune.inference.image_request import Texts
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import LABELS
from sd3tune.model.load.components import empty_transformer
from sd3tune.model.load.quantized import load_text_encoder_in
from sd3tune.model.load.text import assemble
from sd3tune.reporting import progress_bar, say
from sd3tune.sampling.sampler import Conditioning

Loras = tuple[tuple[int, float], ...]
"""(index of an adapter, weight)."""


class Prompt(NamedTuple):
    """A prompt, and the adapters that its text encoders use."""

    texts: Texts
    loras: Loras = ()


def encode_prompts(
    base: Base,
    encoders: Sequence[str],
    prompts: Sequence[Prompt],
    t5_length: int,
    dtype: torch.dtype,
    device: torch.device,
    eight_bit: Collection[str] = (),
    adapters: Sequence[Adapter] = (),
    embeddings: Sequence[Embedding] = (),
    own: Mapping[int, Embedding] = {},
) -> list[Conditioning]:
    """Return the conditioning of each prompt, as in `StableDiffusion3Pipeline`. Each text is encoded once, by itself.

    Encoders named in `eight_bit` are loaded in 8 bits. Warns of texts that are cut off. `adapters` are indexed by
    `Prompt.loras`; each encoder uses its own part of them. For the tokens of `embeddings`, T5 reads other words. `own`
    are the embeddings of adapters, by index, for prompts that use the adapter.
    """
    entries: dict[str, dict[tuple[str, Loras], dict[str, torch.Tensor]]] = {}
    for name in progress_bar(encoders, desc="encoding prompts", unit="encoder", leave=False, delay=2):
        form = "int8" if name in eight_bit else "none"
        encoder = load_text_encoder_in(form, base, name, dtype, device, t5_length)
        for number, adapter in enumerate(adapters):
            if tensors := attach_text(name, encoder.model, adapter, str(number)):
                say(f"{adapter.label}: {tensors} tensors loaded into {LABELS[name]}")
        if (known := [*embeddings, *own.values()]) and name != "t5":
            attach_embeddings(encoder, known)
        entries[name], cut = {}, dict[str, int]()
        for loras in dict.fromkeys(prompt.loras for prompt in prompts):
            use_adapters(encoder.model, {str(number): weight for number, weight in loras})
            used = [*embeddings, *(own[number] for number, _ in loras if number in own)]
            read = partial(as_read, name, embeddings=used)
            texts = list(dict.fromkeys(prompt.texts.read_by(name) for prompt in prompts if prompt.loras == loras))
            encoded = encoder.encode([read(text) for text in texts])
            entries[name] |= {(text, loras): entry for text, entry in zip(texts, encoded, strict=True)}
            cut |= {text: lost for text in texts if (lost := encoder.truncated(read(text)))}
        for text, lost in cut.items():
            shown = textwrap.shorten(text, 60, placeholder=" ...")
            say(f"warning: {name} reads {encoder.max_length} tokens; the last {lost} of {shown!r} are cut off")
        del encoder
        release(device)
    width = empty_transformer(base).config.joint_attention_dim

    def conditioning(prompt: Prompt) -> Conditioning:
        entries_of_prompt = {name: entry[prompt.texts.read_by(name), prompt.loras] for name, entry in entries.items()}
        batch = {name: {key: value[None] for key, value in entry.items()} for name, entry in entries_of_prompt.items()}
        t5 = batch["t5"]["hidden"] if "t5" in batch else None
        return Conditioning(*assemble(batch["clip_l"], batch["clip_g"], t5, t5_length, width))

    return [conditioning(prompt) for prompt in prompts]
