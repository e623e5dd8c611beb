"""Many pictures from a base that stays in memory, with one adapter after another: to show, and to measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sd3tune.adapter.file import attach, read_adapter
from sd3tune.inference.image_request import Texts
from sd3tune.inference.prompts import encode_prompts
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_scheduler, load_transformer, load_vae
from sd3tune.reporting import progress_bar
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, sample_latents, to_image

Wish = tuple[str, int]
"""A prompt and a seed."""

_ADAPTER = "adapter"


class Painter:
    """A base in memory. A picture follows from prompt, seed and adapter, but for rounding, whatever is drawn beside."""

    def __init__(
        self,
        base: str,
        settings: SamplerSettings,
        *,
        t5_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        together: int = 32,
    ) -> None:
        """`together` is the number of pictures that are denoised at once."""
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self.settings, self.t5_length, self.together = settings, t5_length, together
        self.base = resolve_base(base)
        self.transformer = load_transformer(self.base, dtype, self.device)
        self.vae = load_vae(self.base, dtype, self.device)
        self.scheduler = load_scheduler(self.base)
        self._known: dict[str, Conditioning] = {}

    def draw(self, wishes: Sequence[Wish], adapter: Path | None = None, what: str = "drawing") -> list[Image.Image]:
        """A picture per wish, with the adapter of that file or folder, or with the base alone."""
        self._learn(["", *(prompt for prompt, _ in wishes)])
        if adapter is not None:
            attach(self.transformer, read_adapter(adapter), _ADAPTER)
        images: list[Image.Image] = []
        try:
            with progress_bar(total=len(wishes), desc=what, unit="picture", leave=False, delay=2) as bar:
                for start in range(0, len(wishes), self.together):
                    images += self._drawn(wishes[start : start + self.together])
                    bar.update(len(images) - bar.n)
        finally:
            if adapter is not None:
                self.transformer.delete_adapters(_ADAPTER)
        return images

    def _drawn(self, wishes: Sequence[Wish]) -> list[Image.Image]:
        latents = sample_latents(
            self.transformer,
            self.scheduler,
            self._conditioning([prompt for prompt, _ in wishes]),
            self._conditioning([""]),
            self.settings,
            [seed for _, seed in wishes],
        )
        return [to_image(self.vae, one[None]) for one in latents]

    def _conditioning(self, prompts: Sequence[str]) -> Conditioning:
        known = [self._known[prompt] for prompt in prompts]
        return Conditioning(
            torch.cat([one.prompt_embeds for one in known]), torch.cat([one.pooled_prompt_embeds for one in known])
        )

    def _learn(self, prompts: Sequence[str]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        if new:
            texts = [Texts(prompt) for prompt in new]
            found = encode_prompts(self.base, ENCODERS, texts, self.t5_length, self.dtype, self.device)
            self._known |= dict(zip(new, found, strict=True))
