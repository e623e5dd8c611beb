"""The prompts of a measurement: those that ask for the subject, and those that ask for its class alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sd3tune.measures.subject import Subject, plain, with_article
from sd3tune.nano.world import COLOURS

SCENES = (
    "a photo of {} on a beach",
    "a photo of {} in the snow",
    "a photo of {} on a wooden floor",
    "a photo of {} in a forest at sunset",
    "a photo of {} in front of a brick wall",
    "a photo of {} on a city street in the rain",
    "a close-up photo of {} at night",
    "a photo of {} seen from above",
    "an oil painting of {}",
    "a pencil drawing of {}",
)
"""Default prompts, besides those of the run's previews; `{}` is the subject. Intervals need at least ten prompts."""
MOST_CLASS_PROMPTS = 10
MOST_NANO_PROMPTS = 32
"""Most prompts of each kind in nano's world, whose figures vary with the prompt and whose pictures take 0.3 seconds."""
_NANO_GROUNDS = (3, 5, 2, 6)
"""Prompts in nano's world: steps from the colour of a thing to that of its background."""
_OWN_TEXTS = ("prompt_clip_l", "prompt_clip_g", "prompt_t5")

One = TypeVar("One")


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the other fields of an image request that its line in a prompt file sets."""

    text: str
    scored_as: str
    """The text that prompt fidelity compares with: the class instead of the name, which no encoder knows."""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompts:
    """The prompts to draw."""

    scored: Sequence[Prompt]
    """They ask for the subject."""
    of_class: Sequence[Prompt]
    """They ask for the class alone, for drift; empty without a name and a class."""
    left_out: Sequence[str]
    """Prompts that the training used, which are not scored."""


def sort_prompts(
    asked: Sequence[tuple[str, Mapping[str, Any]]], subject: Subject, most_of_class: int = MOST_CLASS_PROMPTS
) -> Prompts:
    """Return the prompts, each a text with its fields, once each; `scored` is empty if the training used them all."""
    once = [one for number, one in enumerate(asked) if one not in asked[:number]]
    scored = [
        Prompt(text, subject.without_name(text) or text, values)
        for text, values in once
        if not subject.was_trained(text)
    ]
    of_class, trained = _class_prompts(subject, scored, most_of_class)
    return Prompts(scored, of_class, [*(text for text, _ in once if subject.was_trained(text)), *trained])


def default_prompts(subject: Subject, previews: Sequence[str], nano: bool) -> list[str]:
    """Return the prompts of the previews that ask for the subject, then the built-in scenes with it.

    For a subject without a phrase, return all prompts of the previews, which may be none.
    """
    if subject.phrase is None:
        return list(dict.fromkeys(previews))
    scenes = _nano_scenes(subject.phrase) if nano else [scene.format(subject.phrase) for scene in SCENES]
    return list(dict.fromkeys([*(prompt for prompt in previews if subject.is_in(prompt)), *scenes]))


def _nano_scenes(phrase: str) -> list[str]:
    colours = list(COLOURS)
    pairs = [
        (colour, colours[(number + step) % len(colours)])
        for step in _NANO_GROUNDS
        for number, colour in enumerate(colours)
    ]
    return [f"{with_article(colour)} {phrase} on {with_article(ground)} background" for colour, ground in pairs]


def _class_prompts(subject: Subject, scored: Sequence[Prompt], most: int) -> tuple[list[Prompt], list[str]]:
    """Return prompts for the class, evenly chosen from the scored ones, and those that the training used."""
    found: dict[str, Prompt] = {}
    trained = list[str]()
    for prompt in scored:
        text = subject.without_name(prompt.text)
        if text is None or any(name in prompt.values for name in _OWN_TEXTS):
            continue
        if subject.was_trained(text):
            trained.append(text)
        else:
            found.setdefault(plain(text), Prompt(text, text, prompt.values))
    return evenly(list(found.values()), most), list(dict.fromkeys(trained))


def evenly(every: Sequence[One], most: int) -> list[One]:
    """Return at most `most` entries, evenly spaced, the first one included."""
    count = min(len(every), most)
    return [every[number * len(every) // count] for number in range(count)]
