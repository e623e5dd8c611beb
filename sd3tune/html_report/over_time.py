"""The previews of a run by prompt: the base's picture, and one for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sd3tune.html_report.pictures import Album, Embedded, spread
from sd3tune.html_report.read import RunFiles


@dataclass
class Prompt:
    """A prompt of the previews."""

    text: str
    settings: str
    """Steps, guidance and seed."""
    before: Embedded | None
    """Drawn by the base."""
    after: dict[int, Embedded] = field(default_factory=dict)
    """Step -> picture, in the order of the steps."""

    @property
    def last(self) -> tuple[int, Embedded] | None:
        return next(reversed(self.after.items()), None)


def prompts_of(run: RunFiles, album: Album, only_last: bool = False) -> list[Prompt]:
    """Return the prompts with their pictures; where the album is full, the least telling steps are left out."""
    newest = {preview.number: preview for preview in run.previews}
    prompts = {}
    for number, preview in sorted(newest.items()):
        recipe, base = preview.recipe, run.base_picture(number)
        settings = f"{recipe['steps']} steps, guidance {recipe['guidance']:g}, seed {recipe['seed']}"
        prompts[number] = Prompt(recipe["prompt"], settings, album.add(base) if base else None)
    steps = sorted({preview.step for preview in run.previews})
    by_step = {step: [preview for preview in run.previews if preview.step == step] for step in steps}
    for step in spread(steps)[: 1 if only_last else None]:
        for preview in by_step[step]:
            if picture := album.add(preview.path):
                prompts[preview.number].after[step] = picture
    for prompt in prompts.values():
        prompt.after = dict(sorted(prompt.after.items()))
    return list(prompts.values())


def steps_of(prompts: Sequence[Prompt]) -> list[int]:
    """Return the steps that have a picture."""
    return sorted({step for prompt in prompts for step in prompt.after})
