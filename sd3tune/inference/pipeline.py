"""A base kept in memory to draw many images, with one adapter after another: for demos and measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import Adapter, read_adapter
from sd3tune.inference.image_request import Texts
from sd3tune.inference.prompts import Prompt, encode_prompts
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_scheduler, load_transformer, load_vae
from sd3tune.reporting import progress_bar
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, sample_latents, to_image

PromptAndSeed = tuple[str, int]

_ADAPTER = "adapter"


class ImagePipeline:
    """A base in memory. An image depends only on prompt, seed and adapter, except for rounding within a batch."""

    def __init__(
        self,
        base: str,
        settings: SamplerSettings,
        *,
        t5_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        """Load the base; `batch_size` images are denoised at once. Raises ModelError."""
        self.device, self.dtype = device or torch.device("cpu"), dtype
        self.settings, self.t5_length, self.batch_size = settings, t5_length, batch_size
        self.base = resolve_base(base)
        self.transformer = load_transformer(self.base, dtype, self.device)
        self.vae = load_vae(self.base, dtype, self.device)
        self.scheduler = load_scheduler(self.base)
        self._encoded: dict[str, Conditioning] = {}

    def draw(
        self, prompts_and_seeds: Sequence[PromptAndSeed], adapter: Path | None = None, activity: str = "drawing"
    ) -> list[Image.Image]:
        """Draw an image for each prompt and seed, with an adapter file or folder, or with the base alone."""
        read = None if adapter is None else read_adapter(adapter)
        encoded = self._encode(["", *(prompt for prompt, _ in prompts_and_seeds)], read)
        if read is not None:
            attach(self.transformer, read, _ADAPTER)
        images: list[Image.Image] = []
        try:
            with progress_bar(total=len(prompts_and_seeds), desc=activity, unit="picture", leave=False, delay=2) as bar:
                for start in range(0, len(prompts_and_seeds), self.batch_size):
                    images += self._draw_batch(prompts_and_seeds[start : start + self.batch_size], encoded)
                    bar.update(len(images) - bar.n)
        finally:
            if adapter is not None:
                self.transformer.delete_adapters(_ADAPTER)
        return images

    def _draw_batch(
        self, prompts_and_seeds: Sequence[PromptAndSeed], encoded: Mapping[str, Conditioning]
    ) -> list[Image.Image]:
        latents = sample_latents(
            self.transformer,
            self.scheduler,
            _joined([encoded[prompt] for prompt, _ in prompts_and_seeds]),
            _joined([encoded[""]]),
            self.settings,
            [seed for _, seed in prompts_and_seeds],
        )
        return [to_image(self.vae, one[None]) for one in latents]

    def _encode(self, prompts: Sequence[str], adapter: Adapter | None) -> Mapping[str, Conditioning]:
        """Return prompt -> conditioning; prompts are encoded once, unless the adapter changes the text encoders."""
        adapters = [adapter] if adapter is not None and adapter.text_parts else []
        known = {} if adapters else self._encoded
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        if new:
            asked = [Prompt(Texts(prompt), ((0, 1.0),) if adapters else ()) for prompt in new]
            place = (self.t5_length, self.dtype, self.device)
            encoded = encode_prompts(self.base, ENCODERS, asked, *place, adapters=adapters)
            known |= dict(zip(new, encoded, strict=True))
        return known


def _joined(several: Sequence[Conditioning]) -> Conditioning:
    return Conditioning(
        torch.cat([one.prompt_embeds for one in several]), torch.cat([one.pooled_prompt_embeds for one in several])
    )
