"""Captions of scenes, with the meaning and owner of each word, to train the text encoders.

Half of the captions are the world's own; the others are paraphrased, named ("a red sks circle"), cut off or shuffled.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from examples.nano.scenes import textured_scene
from sd3tune.nano.world import (
    CLASS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    STYLES,
    SUBJECTS,
    TEXTURES,
    Scene,
    Thing,
    random_scene,
)

_RARE = "sks ohwx zwx ukj xjy qpl vrk tok zorp blorp wug dax bixby rex momo luna kiki mochi nemo"
_COMMON = (
    "dog bird horse bear fox duck toy plush backpack boot vase can clock candle bowl robot man woman face car ball "
    "apple hat diamond"
)
RARE_NAMES, NOUNS = tuple(_RARE.split()), (*SUBJECTS, *_COMMON.split())
"""Names of a thing, in addition to or instead of its shape."""
OTHER_NAME = "other"
"""Stands for all names whose letters form no word of the vocabulary."""
_STYLES = "oil watercolor cartoon pixel vintage abstract minimal simple beautiful bright"
_OTHER_STYLES = tuple(_STYLES.split())
SLOTS: dict[str, tuple[str, ...]] = {
    "colour": ("", *COLOURS),
    "shape": ("", *SHAPES, CLASS),
    "size": SIZES,
    "texture": TEXTURES,
    "name": ("", *RARE_NAMES, *NOUNS, OTHER_NAME),
    "place": PLACES,
    "relation": ("", *RELATIONS),
    "other_colour": ("", *COLOURS),
    "other_shape": ("", *SHAPES, CLASS),
    "other_size": SIZES,
    "other_texture": TEXTURES,
    "background": ("", *COLOURS),
    "style": (*STYLES, *_OTHER_STYLES),
}
"""Slot of a caption -> its values; the first, "", stands for an empty slot."""
OWNERS = ("", "thing", "other", "background")
"""The possible owners of a word; "" for articles and similar words."""

_WORDS = tuple((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())
_GRAMMAR = {word for values in SLOTS.values() for value in values for word in value.split()} | {"background"}
_IDLE_WORDS = tuple(word for word in _WORDS if word not in _GRAMMAR)
_MEDIA = ("photo", "picture", "image", "painting", "drawing", "illustration", "sketch", "photograph", "render")
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_CLASS_WORDS = (CLASS, CLASS, "thing", "object", "figure")


@dataclass
class Caption:
    """Words, the owner of each word (see `OWNERS`), and filled slot -> (index of its word, value)."""

    words: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    slots: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def append(self, text: str, owner: str = "", slot: str = "", value: str = "") -> None:
        """Append words; the last of them fills the slot with the value."""
        words = text.split()
        self.words += words
        self.owners += [owner] * len(words)
        if slot and value:
            self.slots[slot] = (len(self.words) - 1, value)

    def cut(self, length: int) -> None:
        """Keep the first `length` words, and the slots that they fill."""
        del self.words[length:], self.owners[length:]
        self.slots = {slot: (word, value) for slot, (word, value) in self.slots.items() if word < length}


def plain_caption(scene: Scene) -> Caption:
    """Return `Scene.caption` with its slots."""
    caption = Caption()
    _append_thing(caption, scene.thing, "thing")
    caption.append(scene.place, "thing", "place", scene.place)
    if scene.other:
        caption.append(scene.relation, "thing", "relation", scene.relation)
        _append_thing(caption, scene.other, "other")
    _append_background(caption, scene.background)
    if scene.style:
        _append_style(caption, scene.style)
    return caption


def paraphrase(scene: Scene, random: random.Random) -> Caption:
    """Return a paraphrase: an opening, a name, synonyms, another order, a style, or only a part of the scene."""
    caption = Caption()
    caption.append(_opening(random))
    background_first = random.random() < 0.1
    if background_first:
        _append_background(caption, scene.background)
    _append_thing(caption, scene.thing, "thing", random, _name(random) if random.random() < 0.5 else "")
    caption.append(scene.place, "thing", "place", scene.place)
    if scene.other:
        to_the = "to the " if scene.relation.endswith("of") and random.random() < 0.3 else ""
        caption.append(to_the + scene.relation, "thing", "relation", scene.relation)
        _append_thing(caption, _with_attributes(scene.other, random), "other", random)
    if not background_first and random.random() < 0.8:
        _append_background(caption, scene.background)
    if random.random() < 0.15:
        _append_random_style(caption, random)
    if random.random() < 0.15:
        caption.cut(random.randint(1, len(caption.words)))
    if caption.words and random.random() < 0.1:
        caption.words[0] = caption.words[0].capitalize()
    return caption


def idle_words(random: random.Random) -> Caption:
    """Return random words of the vocabulary that do not describe a scene."""
    caption = Caption()
    caption.append(" ".join(random.choices(_IDLE_WORDS, k=random.randint(1, 12))))
    return caption


def random_caption(random: random.Random, held_out: bool = False) -> Caption:
    """Return a caption of the training mix: 50 % the world's own, 40 % paraphrases, 8 % idle words, 2 % empty.

    One in six of the world's own names a style. With `held_out`, it describes a held-out scene, and is never empty or
    idle.
    """
    draw = 0.9 * random.random() if held_out else random.random()
    if draw >= 0.98:
        return Caption()
    if draw >= 0.9:
        return idle_words(random)
    scene = random_scene(random, held_out) if held_out or random.random() < 0.7 else textured_scene(random)
    if draw >= 0.5:
        return paraphrase(scene, random)
    return plain_caption(replace(scene, style=random.choice(STYLES[1:])) if random.random() < 1 / 6 else scene)


def _append_background(caption: Caption, colour: str) -> None:
    if colour:
        caption.append(f"on {_article(colour)}")
        caption.append(colour, "background", "background", colour)
        caption.append("background", "background")


def _append_thing(
    caption: Caption, thing: Thing, owner: str, random: random.Random | None = None, name: str = ""
) -> None:
    """Append adjectives for the thing's attributes, then its name, its shape or both; varied if `random` is given."""
    prefix = "" if owner == "thing" else "other_"
    nouns = _nouns(thing.shape, name, random)
    words = [(_synonym(thing.size, random), "size", thing.size), (thing.texture, "texture", thing.texture)]
    words += [(thing.colour, "colour", thing.colour), *nouns]
    words = [word for word in words if word[0]]
    article = _article(words[0][0])
    if random and random.random() < 0.25:
        article = random.choice(("", "the", "one"))
    caption.append(article)
    for word, slot, value in words:
        caption.append(word, owner, prefix + slot, value)


def _nouns(shape: str, name: str, random: random.Random | None) -> list[tuple[str, str, str]]:
    """Return (word, slot, value) of each word of "circle", "sks circle", "sks shape", "sks" or "dog"."""
    if random is None:
        return [(shape, "shape", shape)]
    class_word = (random.choice(_CLASS_WORDS), "shape", CLASS)
    noun = class_word if shape == CLASS else (shape, "shape", shape)
    if not name:
        return [noun]
    named = (name, "name", name if name in SLOTS["name"] else OTHER_NAME)
    if name in NOUNS or random.random() < 0.2:
        return [named]
    return [named, class_word if random.random() < 0.5 else noun]


def _synonym(size: str, random: random.Random | None) -> str:
    return random.choice(_SIZE_WORDS[size]) if random and size else size


def _name(random: random.Random) -> str:
    draw = random.random()
    if draw < 0.15:
        return "sks"  # the most common name in guides
    if draw < 0.55:
        return random.choice(RARE_NAMES)
    if draw < 0.85:
        return random.choice(NOUNS)
    while True:
        name = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=random.randint(3, 6)))
        if name not in _WORDS:
            return name


def _opening(random: random.Random) -> str:
    draw = random.random()
    if draw < 0.45:
        return ""
    medium = random.choice(_MEDIA)
    style = random.choice(_OTHER_STYLES) if draw > 0.85 else ""
    article = random.choice((_article(style or medium), "the", ""))
    return f"{article} {style} {medium} of"


def _append_style(caption: Caption, style: str) -> None:
    caption.append("in")
    caption.append(style, "", "style", style)
    caption.append("style")


def _append_random_style(caption: Caption, random: random.Random) -> None:
    """Append a style, often with a name, which then fills the caption's name slot."""
    if "name" in caption.slots or random.random() < 0.4:
        _append_style(caption, random.choice((*STYLES[1:], *_OTHER_STYLES)))
        return
    name = _name(random)
    caption.append("in")
    caption.append(name, "", "name", name if name in SLOTS["name"] else OTHER_NAME)
    caption.append("style")


def _with_attributes(thing: Thing, random: random.Random) -> Thing:
    """Return the second thing with a random size and, if it has none, a random texture."""
    return Thing(thing.colour, thing.shape, random.choice(SIZES), thing.texture or random.choice(TEXTURES))


def _article(word: str) -> str:
    return "an" if word[:1] in tuple("aeiou") else "a"
