"""Previews: what `infer` would draw from the weights as they would be exported now. They change nothing of the run."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from sd3tune.atomic import new_file
from sd3tune.encode.resources import release
from sd3tune.jobs.drawing import NEGATIVE_PROMPT, load_decoder, stored_conditioning
from sd3tune.jobs.encoding import Encoded
from sd3tune.jobs.preflight import Plan
from sd3tune.jobs.run_folder import SAMPLES
from sd3tune.model.components import load_scheduler
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, sample_latents, to_image
from sd3tune.train.loop import Processes, View


class Previews:
    """A training callback: every `preview.every` steps, and before the first and after the last, one image a prompt."""

    def __init__(self, plan: Plan, encoded: Encoded, processes: Processes) -> None:
        self.plan, self.encoded, self.processes = plan, encoded, processes
        self.settings = plan.config.preview
        self.folder = plan.run / SAMPLES
        self.seconds = 0.0
        self._drawn: set[int] = set()

    def __call__(self, view: View) -> None:
        due = view.step % self.settings.every == 0 or view.last
        if not due or not self.processes.is_main or view.step in self._drawn:
            return
        if all(self._path(view.step, number).exists() for number in range(len(self.settings.prompts))):
            return  # an earlier attempt drew them
        started = time.monotonic()
        self._drawn.add(view.step)
        with view.method.as_exported(view.transformer, view.weights):
            images = self._draw(view)
        for number, image in enumerate(images):
            _save(image, self._path(view.step, number))
        self._write_sheet()
        self.seconds += time.monotonic() - started

    def _draw(self, view: View) -> list[Image.Image]:
        """The denoising first, all prompts; then the VAE visits for the decoding and leaves."""
        side, settings = self.plan.config.data.resolution, self.settings
        sampler = SamplerSettings(settings.steps, settings.guidance, side, side)
        scheduler = load_scheduler(self.plan.base)
        negative = self._conditioning(NEGATIVE_PROMPT, view)
        total = settings.steps * len(settings.prompts)
        with tqdm(total=total, desc=f"preview at step {view.step}", unit="step", leave=False, delay=2) as bar:
            latents = [
                sample_latents(
                    view.transformer,
                    scheduler,
                    self._conditioning(prompt, view),
                    negative,
                    sampler,
                    settings.seed + number,
                    on_step=bar.update,
                )
                for number, prompt in enumerate(settings.prompts)
            ]
        vae = load_decoder(self.plan)
        images = [to_image(vae, latent) for latent in latents]
        del vae
        release(self.plan.device)
        return images

    def _conditioning(self, prompt: str, view: View) -> Conditioning:
        return stored_conditioning(self.plan, self.encoded.store, self.encoded.captions, prompt, view.transformer)

    def _path(self, step: int, number: int) -> Path:
        return self.folder / f"step-{step:06d}-{number}.png"

    def _write_sheet(self) -> None:
        """One row a prompt, one column a step; a prompt that was added later has no early pictures."""
        steps = sorted({int(path.name.split("-")[1]) for path in self.folder.glob("step-*.png")})
        paths = [[self._path(step, row) for step in steps] for row in range(len(self.settings.prompts))]
        images = [[Image.open(path) if path.exists() else None for path in row] for row in paths]
        sheet = contact_sheet(images, columns=[f"step {step}" for step in steps], rows=self.settings.prompts)
        _save(sheet, self.folder / "over_time.png")


def _save(image: Image.Image, path: Path) -> None:
    with new_file(path) as temporary:
        image.save(temporary, format="PNG")
