"""Encode prompts, with one text encoder in memory at a time."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

import torch

from sd3tune.encode.resources import release
from sd3tune.inference.image_request import Texts
from sd3tune.model.base.base import Base
from sd3tune.model.load.components import empty_transformer
from sd3tune.model.load.quantized import load_text_encoder_in
from sd3tune.model.load.text import assemble
from sd3tune.reporting import progress_bar, say
from sd3tune.sampling.sampler import Conditioning


def encode_prompts(
    base: Base,
    encoders: Sequence[str],
    prompts: Sequence[Texts],
    t5_length: int,
    dtype: torch.dtype,
    device: torch.device,
    eight_bit: Collection[str] = (),
) -> list[Conditioning]:
    """Return the conditioning of each prompt, as in `StableDiffusion3Pipeline`. Each text is encoded once, by itself.

    Encoders named in `eight_bit` are loaded in 8 bits. Warns of texts that are cut off.
    """
    entries: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name in progress_bar(encoders, desc="encoding prompts", unit="encoder", leave=False, delay=2):
        form = "int8" if name in eight_bit else "none"
        encoder = load_text_encoder_in(form, base, name, dtype, device, t5_length)
        texts = list(dict.fromkeys(prompt.read_by(name) for prompt in prompts))
        entries[name] = dict(zip(texts, encoder.encode(texts), strict=True))
        for text in texts:
            lost = encoder.truncated(text)
            if lost:
                shown = textwrap.shorten(text, 60, placeholder=" ...")
                say(f"warning: {name} reads {encoder.max_length} tokens; the last {lost} of {shown!r} are cut off")
        del encoder
        release(device)
    width = empty_transformer(base).config.joint_attention_dim

    def conditioning(prompt: Texts) -> Conditioning:
        entries_of_prompt = {name: entry[prompt.read_by(name)] for name, entry in entries.items()}
        batch = {name: {key: value[None] for key, value in entry.items()} for name, entry in entries_of_prompt.items()}
        t5 = batch["t5"]["hidden"] if "t5" in batch else None
        return Conditioning(*assemble(batch["clip_l"], batch["clip_g"], t5, t5_length, width))

    return [conditioning(prompt) for prompt in prompts]
