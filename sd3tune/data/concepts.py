"""The concepts of a run, such as two subjects, and how often each is drawn. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from sd3tune.config.sections.data import DataConfig

_Bucket = TypeVar("_Bucket", bound=Hashable)


@dataclass(frozen=True)
class Concept:
    """The sources of one name, or one source without a name."""

    name: str
    """The name; without one, its trigger word or the number of its source."""
    sources: tuple[int, ...]
    """Indices of its sources."""
    triggers: tuple[str, ...]
    """Its trigger words, at most one per source."""


def concepts_of(data: DataConfig) -> list[Concept]:
    """Return the concepts in the order of their first sources."""
    grouped: dict[str | int, list[int]] = {}
    for number, source in enumerate(data.sources):
        grouped.setdefault(number if source.name is None else source.name, []).append(number)
    found = []
    for numbers in grouped.values():
        name = data.sources[numbers[0]].name
        triggers = dict.fromkeys(trigger for number in numbers if (trigger := data.trigger_of(number)))
        shown = name or next(iter(triggers), f"source {numbers[0]}")
        found.append(Concept(shown, tuple(numbers), tuple(triggers)))
    return found


def are_told_apart(data: DataConfig) -> bool:
    """Return True if the data has several concepts, and names or triggers that tell them apart."""
    concepts = concepts_of(data)
    named, triggers = any(source.name for source in data.sources), {concept.triggers for concept in concepts}
    return len(concepts) > 1 and (named or len(triggers) > 1)


def concept_numbers(data: DataConfig) -> list[int]:
    """Return the index of each source's concept, in the order of the sources."""
    of = {number: index for index, concept in enumerate(concepts_of(data)) for number in concept.sources}
    return [of[number] for number in range(len(data.sources))]


def shares_of_concepts(data: DataConfig) -> list[Fraction] | None:
    """Return the relative share of each concept; None if every image is drawn as often."""
    if data.balance is None:
        return None
    given = {} if data.balance == "equal" else data.balance
    names = [data.sources[concept.sources[0]].name or "" for concept in concepts_of(data)]
    return [Fraction(repr(given.get(name, 1))) for name in names]


def balanced(
    buckets: Mapping[_Bucket, Sequence[int]], shares: Sequence[Fraction]
) -> dict[_Bucket, tuple[tuple[int, Fraction], ...]]:
    """Return bucket -> (number of samples, how many of them an epoch draws) of each concept in it, ascending.

    `buckets` has the concept of each sample. An epoch draws as many samples as there are; each concept has its share of
    them, whatever its number of samples, divided over the buckets in proportion to its samples there.
    """
    sizes = Counter(concept for concepts in buckets.values() for concept in concepts)
    unit = sum(sizes.values()) / sum((shares[concept] for concept in sizes), Fraction())
    return {
        bucket: tuple(
            (n, unit * shares[concept] * Fraction(n, sizes[concept])) for concept, n in sorted(Counter(of).items())
        )
        for bucket, of in buckets.items()
    }
