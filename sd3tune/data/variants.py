"""Variants of captions: wildcards such as `{a|b}` and tags, shuffled and dropped, as functions of a seed."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Sequence

from sd3tune.config.sections.data import SourceConfig, TagsConfig
from sd3tune.data.seeds import SEEDS, derive
from sd3tune.data.written import Caption

_WILDCARD = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
"""A choice without another one inside; the innermost is resolved first."""

_DEEPEST = 16
"""Limit on wildcards inside wildcards; deeper ones are text."""

Choose = Callable[[int, int], int]
"""(number of the wildcard in its text, number of alternatives) -> index of an alternative."""


def as_first(caption: Caption, source: SourceConfig) -> Caption:
    """Return the caption with the first alternative of each wildcard, its tags as written."""
    if not source.wildcards:
        return caption
    return caption.map(lambda text: resolved(text, lambda number, count: 0))


def variants_of(captions: Sequence[Caption], source: SourceConfig, seed: int) -> tuple[Caption, ...]:
    """Return `source.variants` variants of each caption, equally likely; empty if the source has none.

    They depend on the seed and the caption's text, not on the image or its place. Equal variants are kept, as they
    count in draws; if all are equal, there is one.
    """
    if source.tags is None and not source.wildcards:
        return ()
    found = [
        _variant(caption, source, derive(seed, "caption variant", caption.text, number))
        for caption in captions
        for number in range(source.variants)
    ]
    return tuple(found) if len(set(found)) > 1 else tuple(found[:1])


def _variant(caption: Caption, source: SourceConfig, seed: int) -> Caption:
    """Return one variant. All texts choose alike in wildcards with as many alternatives; tags of T5's own text stay."""
    if source.wildcards:
        caption = caption.map(
            lambda text: resolved(text, lambda number, count: derive(seed, "wildcard", number) % count)
        )
    if source.tags is None:
        return caption
    mixed = functools.partial(mixed_tags, tags=source.tags, seed=seed)
    return Caption(mixed(caption.text), caption.clip and mixed(caption.clip), caption.t5)


def resolved(text: str, choose: Choose) -> str:
    """Return the text with one alternative for each `{a|b}`; braces without `|` are text."""
    numbers = itertools.count()

    def alternative(match: re.Match[str]) -> str:
        alternatives = match[1].split("|")
        return alternatives[choose(next(numbers), len(alternatives))]

    for _ in range(_DEEPEST):
        text = _WILDCARD.sub(alternative, text)
    return text


def unclosed(text: str) -> str | None:
    """Return the part of the text that looks like a wildcard without one of its braces; None without any."""
    parts = re.split(r"([{}])", resolved(text, lambda number, count: 0))
    around = zip(["", *parts[1::2]], parts[::2], [*parts[1::2], ""], strict=True)
    return next((part.strip() for left, part, right in around if "|" in part and (left == "{" or right == "}")), None)


def mixed_tags(text: str, tags: TagsConfig, seed: int) -> str:
    """Return the text with its tags after the first `tags.keep` dropped and shuffled, as configured."""
    separator = tags.separator
    found = [tag for part in text.split(separator) if (tag := part.strip())]
    kept, others = found[: tags.keep], list(enumerate(found[tags.keep :]))
    others = [one for one in others if derive(seed, "tag dropout", one[0]) >= tags.dropout * SEEDS]
    if tags.shuffle:
        others.sort(key=lambda one: derive(seed, "tag order", one[0]))
    joint = separator if separator.isspace() else f"{separator.strip()} "
    return joint.join([*kept, *(tag for _, tag in others)])
