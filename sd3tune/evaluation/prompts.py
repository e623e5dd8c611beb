"""The prompts of an evaluation: from a file, of the DreamBooth protocol, or made for the run's subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune.errors import ConfigError
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.subject import Subject, plain, with_article
from sd3tune.inference.prompts_file import read_prompts
from sd3tune.measures.dreambooth import dreambooth
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
_NANO_SCENES = ((3, 8), (5, 4))
"""Prompts in nano's world: steps from the colour of a thing to that of its background, and how many have it."""
_OWN_TEXTS = ("prompt_clip_l", "prompt_clip_g", "prompt_t5")


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


def choose_prompts(request: EvalRequest, subject: Subject, previews: Sequence[str], nano: bool) -> Prompts:
    """Return the prompts of an evaluation. Raises ConfigError if there is none.

    `previews` are the prompts of the run's previews. `nano` chooses default prompts of nano's world.
    """
    if request.prompts is not None:
        asked = _from_file(request.prompts)
    elif request.protocol == "dreambooth":
        asked = [(text, {}) for text in _of_dreambooth(request, subject)]
    else:
        asked = [(text, {}) for text in default_prompts(subject, previews, nano)]
    asked = [one for number, one in enumerate(asked) if one not in asked[:number]]
    scored = [
        Prompt(text, subject.without_name(text) or text, values)
        for text, values in asked
        if not subject.was_trained(text)
    ]
    left_out = [text for text, _ in asked if subject.was_trained(text)]
    if not scored:
        where = f"--prompts {request.prompts}: " if request.prompts else ""
        raise ConfigError(
            f"{where}every prompt is one that the training used, such as {left_out[0]!r}, and those are not scored; "
            "give others with --prompts FILE"
        )
    of_class, trained = _class_prompts(subject, scored)
    return Prompts(scored, of_class, [*left_out, *trained])


def default_prompts(subject: Subject, previews: Sequence[str], nano: bool) -> list[str]:
    """Return the prompts of the previews that ask for the subject, then the built-in scenes with it.

    Raises ConfigError if the captions name no subject and there are no previews.
    """
    if subject.phrase is None:
        if not previews:
            raise ConfigError("the captions share no words, so no prompts can be made; give --prompts FILE")
        return list(dict.fromkeys(previews))
    scenes = _nano_scenes(subject.phrase) if nano else [scene.format(subject.phrase) for scene in SCENES]
    return list(dict.fromkeys([*(prompt for prompt in previews if subject.is_in(prompt)), *scenes]))


def _nano_scenes(phrase: str) -> list[str]:
    colours = list(COLOURS)
    pairs = [
        (colour, colours[(number + step) % len(colours)])
        for step, count in _NANO_SCENES
        for number, colour in enumerate(colours[:count])
    ]
    return [f"{with_article(colour)} {phrase} on {with_article(ground)} background" for colour, ground in pairs]


def _from_file(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    found = list[tuple[str, Mapping[str, Any]]]()
    for line in read_prompts(path):
        values = dict(line.values)
        found.append((values.pop("prompt"), {key: value for key, value in values.items() if key != "name"}))
    return found


def _of_dreambooth(request: EvalRequest, subject: Subject) -> list[str]:
    if subject.phrase is None:
        raise ConfigError(
            "--protocol dreambooth: its prompts need the subject's name, and the captions share none; "
            "give --prompts FILE instead"
        )
    protocol = dreambooth()
    kind = request.kind or protocol.kind_of(subject.noun or subject.phrase)
    return protocol.prompts("live" if kind == "live" else "object", subject.phrase)


def _class_prompts(subject: Subject, scored: Sequence[Prompt]) -> tuple[list[Prompt], list[str]]:
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
    every = list(found.values())
    count = min(len(every), MOST_CLASS_PROMPTS)
    return [every[number * len(every) // count] for number in range(count)], list(dict.fromkeys(trained))
