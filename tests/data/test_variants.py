"""Variants of captions: wildcards and tags, as functions of the seed, in their stated distribution."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping

import pytest

from sd3tune.config.sections.data import FolderSource
from sd3tune.data.variants import as_first, resolved, unclosed, variants_of
from sd3tune.data.written import Caption
from sd3tune.files.text import weighted_words

MANY = 4000


def source(**more: object) -> FolderSource:
    return FolderSource(path="x", **more)


def drawn(text: str, count: int = MANY, seed: int = 0, **more: object) -> list[str]:
    return [caption.text for caption in variants_of([Caption(text)], source(variants=count, **more), seed)]


def chi_square(found: Counter[Hashable], expected: Mapping[Hashable, float]) -> float:
    """Pearson's statistic, for shares that add up to 1."""
    assert found.keys() <= expected.keys()
    total = sum(found.values())
    return sum((found[kind] - share * total) ** 2 / (share * total) for kind, share in expected.items())


def test_all_orders_of_the_tags_are_equally_likely_and_the_first_stay_first() -> None:
    found = Counter(drawn("sks, a,b ,, c", tags={"keep": 1}))
    orders = {", ".join(("sks", *order)): 1 / 6 for order in itertools.permutations("abc")}
    assert chi_square(found, orders) < 20.5  # 5 degrees of freedom: 0.1 %


def test_each_tag_is_dropped_with_its_probability_independently() -> None:
    found = Counter(drawn("sks, a, b", tags={"keep": 1, "shuffle": False, "dropout": 0.3}))
    shares = {"sks, a, b": 0.49, "sks, a": 0.21, "sks, b": 0.21, "sks": 0.09}
    assert chi_square(found, shares) < 16.3  # 3 degrees of freedom: 0.1 %
    assert set(drawn("sks, a, b", 3, tags={"dropout": 1.0})) == {""}
    assert set(drawn("sks, a, b", 3, tags={"shuffle": False})) == {"sks, a, b"}


def test_alternatives_are_equally_likely_and_wildcards_independent() -> None:
    found = Counter(drawn("a {red|blue|} {dog|cat}", wildcards=True))
    colours, animals = ("red", "blue", ""), ("dog", "cat")
    assert chi_square(found, {f"a {colour} {animal}": 1 / 6 for colour in colours for animal in animals}) < 20.5


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("{a|b}", "a", "b"),
        ("{a|{b|c}} d", "a d", "c d"),
        ("{a} {} | {b", "{a} {} | {b", "{a} {} | {b"),
        ("{{a|b}}", "{a}", "{b}"),
        ("{|x}y", "y", "xy"),
    ],
)
def test_wildcards_are_what_users_of_other_programs_know(text: str, first: str, last: str) -> None:
    assert resolved(text, lambda number, count: 0) == first
    assert resolved(text, lambda number, count: count - 1) == last


def test_endless_nesting_and_numbers_take_no_time() -> None:
    """Quadratic in their lengths they would take hours."""
    deep = "{a|" * 20_000 + "b" + "}" * 20_000
    assert len(resolved(deep, lambda number, count: 1)) == len(deep) - 16 * len("{a|}")
    assert weighted_words("(a:" + "1" * 1_000_000) is None
    assert weighted_words("(" * 100_000 + "a:1.3)") == "(a:1.3)"


def test_variants_depend_on_the_seed_and_the_text_alone() -> None:
    settings = source(tags={}, variants=5)
    captions = [Caption("a, b, c, d"), Caption("e, f, g, h")]
    both = variants_of(captions, settings, 1)
    assert both == variants_of(captions[:1], settings, 1) + variants_of(captions[1:], settings, 1)
    assert both[:3] == variants_of(captions, source(tags={}, variants=3), 1)[:3]
    assert both != variants_of(captions, settings, 2)


def test_where_nothing_varies_there_is_one_caption() -> None:
    assert variants_of([Caption("a, b"), Caption("c")], source(), 0) == ()
    assert drawn("a dog", tags={}) == ["a dog"]
    assert drawn("a {dog}", wildcards=True) == ["a {dog}"]
    assert drawn("{a|b}", 1) == []


def test_the_caption_without_variants_has_the_first_alternatives_and_its_tags_in_order() -> None:
    caption = Caption("a, {b|c}", t5="A {b|c}.")
    assert as_first(caption, source(wildcards=True, tags={})) == Caption("a, b", t5="A b.")
    assert as_first(caption, source(tags={})) == caption


def test_the_texts_of_encoders_choose_alike_and_t5s_own_text_is_not_shuffled() -> None:
    caption = Caption("x", clip="sks, {red|blue}, toy", t5="A {red|blue} toy, which is small, on a table.")
    found = variants_of([caption], source(wildcards=True, tags={}, variants=80), 0)
    assert {variant.t5 for variant in found} == {f"A {of} toy, which is small, on a table." for of in ("red", "blue")}
    assert all(("red" in str(variant.clip)) == ("red" in str(variant.t5)) for variant in found)
    assert len({variant.clip for variant in found}) == 12


@pytest.mark.parametrize(
    ("separator", "text", "expected"), [(";", "a; b", "a; b"), (" ", "a  b", "a b"), (". ", "a. b", "a. b")]
)
def test_tags_are_joined_by_their_separator(separator: str, text: str, expected: str) -> None:
    settings = source(tags={"separator": separator, "shuffle": False, "dropout": 0.5}, variants=50)
    assert expected in [caption.text for caption in variants_of([Caption(text)], settings, 0)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a {red|blue} dog | cat {x}", None), ("a {photo|{big|small} of x", "photo|big of x"),
        ("red|blue} dog", "red|blue"),
        ("{a|{b|c}}", None), ("a | b", None), ("{", None), ("} a | b {", None), ("{a {b} | c}", "| c"),
    ],
)  # fmt: skip
def test_a_wildcard_without_a_brace_is_found(text: str, part: str | None) -> None:
    assert unclosed(text) == part
