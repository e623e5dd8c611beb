"""The subject of a training, read from its captions: how prompts name it, its class, and the trained texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MEDIUM = r"(?:photo|photograph|picture|image|painting|drawing|illustration|rendering|portrait)"
_OPENING = re.compile(rf"^(?:(?:an?|the)\s+)?(?:[\w-]+\s+)?{_MEDIUM}\s+of\s+", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:an?|the|one)\s+", re.IGNORECASE)
_PREPOSITIONS = ("of", "with", "by", "from", "for", "like", "as", "and", "or", "to", "is", "shows", "beside", "near")
_COMMON = {"a", "an", "the", "of", "in", "on", "at", "with", "and", "photo", "photograph", "picture", "image"}


@dataclass(frozen=True)
class Subject:
    """How captions name the subject of a training."""

    phrase: str | None
    """The subject with its class, such as `sks dog`; None if the captions share no name."""
    name: str | None = None
    """The part of the phrase that is not the class, such as `sks`."""
    noun: str | None = None
    """The class, such as `dog`; None if neither a prior nor the user names one."""
    trained: frozenset[str] = frozenset()
    """Captions and prompts that the training used, as `plain` writes them."""

    @property
    def has_drift(self) -> bool:
        """True if prompts can be written that ask for the class but not for the subject."""
        return self.noun is not None and self.name is not None

    def is_in(self, prompt: str) -> bool:
        """Return True if the prompt asks for the subject."""
        return any(text is not None and _find(text, prompt) for text in (self.phrase, self.name))

    def without_name(self, prompt: str) -> str | None:
        """Return the prompt with the class in place of the subject; None if that is not possible.

        `a photo of sks dog` becomes `a photo of a dog`, and `a red sks shape` becomes `a red shape`.
        """
        if self.noun is None or not self.has_drift:
            return None
        for text in (self.phrase, self.name):
            found = _find(text, prompt) if text else None
            if found:
                before = prompt[: found.start()].split()
                bare = not before or before[-1].lower() in _PREPOSITIONS
                return (
                    prompt[: found.start()] + (with_article(self.noun) if bare else self.noun) + prompt[found.end() :]
                )
        return None

    def was_trained(self, prompt: str) -> bool:
        """Return True if the training used this text as a caption or a prior's prompt."""
        return plain(prompt) in self.trained


def read_subject(
    captions: Sequence[str], priors: Sequence[str] = (), trigger: str | None = None, noun: str | None = None
) -> Subject:
    """Return the subject of a training with these captions, prompts of priors, and trigger; `noun` is its class."""
    noun = noun.strip() if noun is not None else bare(priors[0]) if priors else None
    trained = frozenset(map(plain, [*captions, *priors]))
    single = bare(captions[0]) if len(set(captions)) == 1 and captions[0] else None
    name = trigger or (_special_words(captions, [*priors, noun], noun) if noun else None)
    if name is None:
        return Subject(single or _shared_words(captions), None, noun, trained)
    if noun is None or _find(noun, name):
        return Subject(name if single is None or noun else single, name, noun, trained)
    words = rf"(?<!\w){re.escape(name)}(?:\s+[\w-]+){{0,3}}?\s+{re.escape(noun)}(?!\w)"
    between = re.search(words, captions[0] if captions else "", re.IGNORECASE)
    return Subject(between[0] if between else f"{name} {noun}", name, noun, trained)


def plain(text: str) -> str:
    """Return a text in lower case with single spaces, for comparison."""
    return " ".join(text.casefold().split())


def bare(caption: str) -> str:
    """Return a caption without `a photo of` and without its article: `a photo of a dog` becomes `dog`."""
    return _ARTICLE.sub("", _OPENING.sub("", caption.strip(), count=1)).strip()


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _special_words(captions: Sequence[str], others: Iterable[str], noun: str) -> str | None:
    """Return the words that all captions share and that none of the other texts has; None without any.

    Words right before the noun are preferred, because captions also share words about the setting.
    """
    known = _COMMON.union(*(plain(other).split() for other in others))
    first, *rest = (plain(caption).split() for caption in captions) if captions else ([],)
    special = [word not in known and all(word in words for words in rest) for word in first]
    start = end = first.index(plain(noun)) if plain(noun) in first else 0
    while start > 0 and special[start - 1]:
        start -= 1
    words = first[start:end] or [word for word, is_special in zip(first, special, strict=True) if is_special]
    return " ".join(words) or None


def _shared_words(captions: Sequence[str]) -> str | None:
    """Return the longest sequence of words that all captions share, without common words; None without any."""
    if not captions:
        return None
    first = plain(captions[0]).split()
    texts = [f" {plain(caption)} " for caption in captions]
    sequences = (first[start:end] for start in range(len(first)) for end in range(start + 1, len(first) + 1))
    shared = [
        " ".join(words)
        for words in sequences
        if not _COMMON.intersection(words) and all(f" {' '.join(words)} " in text for text in texts)
    ]
    return max(shared, key=lambda words: words.count(" "), default=None)


def _find(text: str, prompt: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt, re.IGNORECASE)
