"""Scenes told in words, together with what each word says and of what: what the text encoders learn from.

Half of the captions are the world's own; the others are paraphrased, named ("a red sks circle"), cut off or shuffled.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from sd3tune.nano.world import CLASS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, Thing, random_scene

_RARE = "sks ohwx zwx ukj xjy qpl vrk tok zorp blorp wug dax bixby rex momo luna kiki mochi nemo"
_COMMON = (
    "heart dog cat bird horse bear fox fish duck toy plush backpack boot vase can clock candle bowl robot monster "
    "man woman face flower tree car boat house ball apple hat moon diamond arrow leaf"
)
RARE_NAMES, NOUNS = tuple(_RARE.split()), tuple(_COMMON.split())
"""What a thing can be called beside or instead of its shape."""
OTHER_NAME = "other"
"""Stands for every name of letters that make no word of the vocabulary."""
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
}
"""What a caption can say, and the values; the first, "", is what is left unsaid."""
OWNERS = ("", "thing", "other", "background")
"""Of what a word speaks; "" for articles and the like."""

_WORDS = tuple((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split())
_GRAMMAR = {word for values in SLOTS.values() for value in values for word in value.split()} | {"background"}
_IDLE_WORDS = tuple(word for word in _WORDS if word not in _GRAMMAR)
_MEDIA = ("photo", "picture", "image", "painting", "drawing", "illustration", "sketch", "photograph", "render")
_STYLES = ("oil", "watercolor", "cartoon", "pixel", "vintage", "abstract", "minimal", "simple", "beautiful", "bright")
_SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_CLASS_WORDS = (CLASS, CLASS, "thing", "object", "figure")


@dataclass
class Caption:
    """Words, of what each speaks (`OWNERS`), and per slot that is said, which word says it and the value."""

    words: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)
    said: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def say(self, text: str, owner: str = "", slot: str = "", value: str = "") -> None:
        """Append words; the last of them says that the slot has the value."""
        words = text.split()
        self.words += words
        self.owners += [owner] * len(words)
        if slot and value:
            self.said[slot] = (len(self.words) - 1, value)

    def cut(self, length: int) -> None:
        """Keep the first `length` words, and what they say."""
        del self.words[length:], self.owners[length:]
        self.said = {slot: (word, value) for slot, (word, value) in self.said.items() if word < length}


def plainly(scene: Scene) -> Caption:
    """`Scene.caption`, word for word."""
    told = Caption()
    _tell_thing(told, scene.thing, "thing")
    told.say(scene.place, "thing", "place", scene.place)
    if scene.other:
        told.say(scene.relation, "thing", "relation", scene.relation)
        _tell_thing(told, scene.other, "other")
    _tell_background(told, scene.background)
    return told


def freely(scene: Scene, random: random.Random) -> Caption:
    """Another way to tell the scene: an opening, a name, synonyms, another order, a style, or only a part of it."""
    told = Caption()
    told.say(_opening(random))
    background_first = random.random() < 0.1
    if background_first:
        _tell_background(told, scene.background)
    _tell_thing(told, scene.thing, "thing", random, _name(random) if random.random() < 0.5 else "")
    told.say(scene.place, "thing", "place", scene.place)
    if scene.other:
        to_the = "to the " if scene.relation.endswith("of") and random.random() < 0.3 else ""
        told.say(to_the + scene.relation, "thing", "relation", scene.relation)
        _tell_thing(told, _dressed(scene.other, random), "other", random)
    if not background_first and random.random() < 0.8:
        _tell_background(told, scene.background)
    if random.random() < 0.15:
        _tell_style(told, random)
    if random.random() < 0.15:
        told.cut(random.randint(1, len(told.words)))
    if told.words and random.random() < 0.1:
        told.words[0] = told.words[0].capitalize()
    return told


def idle_words(random: random.Random) -> Caption:
    """Words of the vocabulary that say nothing of a scene, in any order."""
    told = Caption()
    told.say(" ".join(random.choices(_IDLE_WORDS, k=random.randint(1, 12))))
    return told


def random_caption(random: random.Random, held_out: bool = False) -> Caption:
    """One of the training mix: 50 % the world's own captions, 40 % paraphrases, 8 % idle words, 2 % empty.

    With `held_out` of scenes that training never sees, and never empty or idle.
    """
    draw = 0.9 * random.random() if held_out else random.random()
    if draw >= 0.98:
        return Caption()
    if draw >= 0.9:
        return idle_words(random)
    scene = random_scene(random, held_out)
    return plainly(scene) if draw < 0.5 else freely(scene, random)


def _tell_background(told: Caption, colour: str) -> None:
    if colour:
        told.say(f"on {_article(colour)}")
        told.say(colour, "background", "background", colour)
        told.say("background", "background")


def _tell_thing(told: Caption, thing: Thing, owner: str, random: random.Random | None = None, name: str = "") -> None:
    """An adjective for all that is said of the thing, then its name, its shape or both; freely with `random`."""
    prefix = "" if owner == "thing" else "other_"
    nouns = _nouns(thing.shape, name, random)
    words = [(_synonym(thing.size, random), "size", thing.size), (thing.texture, "texture", thing.texture)]
    words += [(thing.colour, "colour", thing.colour), *nouns]
    words = [word for word in words if word[0]]
    article = _article(words[0][0])
    if random and random.random() < 0.25:
        article = random.choice(("", "the", "one"))
    told.say(article)
    for word, slot, value in words:
        told.say(word, owner, prefix + slot, value)


def _nouns(shape: str, name: str, random: random.Random | None) -> list[tuple[str, str, str]]:
    """Word, slot and value of "circle", "sks circle", "sks shape", "sks" or "dog"."""
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
        return "sks"  # the name that guides use most
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
    style = random.choice(_STYLES) if draw > 0.85 else ""
    article = random.choice((_article(style or medium), "the", ""))
    return f"{article} {style} {medium} of"


def _tell_style(told: Caption, random: random.Random) -> None:
    """Words at the end: a style, often one with a name, which then is the name that the caption has."""
    if "name" in told.said or random.random() < 0.4:
        told.say(f"in {random.choice(_STYLES)} style")
        return
    name = _name(random)
    told.say("in")
    told.say(name, "", "name", name if name in SLOTS["name"] else OTHER_NAME)
    told.say("style")


def _dressed(thing: Thing, random: random.Random) -> Thing:
    """Return the second thing of the world's pairs is plain and of medium size; here it need not be."""
    return Thing(thing.colour, thing.shape, random.choice(SIZES), random.choice(TEXTURES))


def _article(word: str) -> str:
    return "an" if word[:1] in tuple("aeiou") else "a"
