"""How captions name a subject, and prompts for its class alone."""

from __future__ import annotations

import pytest

from sd3tune.measures.subject import bare, read_subject

DOGS = ("a photo of sks dog on grass", "sks dog in a room", "A close-up of SKS dog")
NANO = ("a red sks shape on a white background", "a blue sks shape on a black background")


@pytest.mark.parametrize(
    ("captions", "priors", "trigger", "noun", "phrase", "name", "of_class"),
    [
        (["a photo of sks dog"], ["a photo of a dog"], None, None, "sks dog", "sks", "dog"),
        (["a photo of sks dog"], [], None, None, "sks dog", None, None),
        (["a photo of sks dog"], [], None, "dog", "sks dog", "sks", "dog"),
        (DOGS, ["a dog"], None, None, "sks dog", "sks", "dog"),
        (DOGS, [], "sks", None, "sks", "sks", None),
        (DOGS, [], None, None, "sks dog", None, None),
        (NANO, [], None, None, "sks shape", None, None),
        (["a cat", "a dog"], [], None, None, None, None, None),
        (NANO, ["a shape", "a circle"], None, None, "sks shape", "sks", "shape"),
        (["a photo of sks old corgi dog"], ["a dog"], None, None, "sks old corgi dog", "sks old corgi", "dog"),
        (["sks, a dog on a beach", "sks, a dog"], ["a dog"], "sks", None, "sks dog", "sks", "dog"),
        (["sks dog, grass", "sks dog, sea"], [], "sks dog", "dog", "sks dog", "sks dog", "dog"),
        (["a photo of a dog"], ["a photo of a dog"], None, None, "dog", None, "dog"),
        ([], [], "sks", "dog", "sks dog", "sks", "dog"),
        ([], [], None, None, None, None, None),
    ],
)
def test_the_subject_is_named_as_the_captions_do(captions, priors, trigger, noun, phrase, name, of_class) -> None:
    subject = read_subject(captions, priors, trigger, noun)
    assert (subject.phrase, subject.name, subject.noun) == (phrase, name, of_class)
    assert subject.has_drift == (name is not None and of_class is not None)


@pytest.mark.parametrize(
    ("prompt", "without"),
    [
        ("a photo of sks dog on a beach", "a photo of a dog on a beach"),
        ("a sks dog in the jungle", "a dog in the jungle"),
        ("a shiny SKS Dog", "a shiny dog"),
        ("sks dog at night", "a dog at night"),
        ("a portrait of sks", "a portrait of a dog"),
        ("my sksdog", None),
        ("a cat", None),
    ],
)
def test_the_class_takes_the_place_of_the_subject(prompt: str, without: str | None) -> None:
    subject = read_subject(["a photo of sks dog"], ["a photo of a dog"])
    assert subject.without_name(prompt) == without
    assert subject.is_in(prompt) == (without is not None)


def test_a_vowel_takes_an() -> None:
    assert read_subject(["sks owl"], ["an owl"]).without_name("a photo of sks owl") == "a photo of an owl"


def test_without_a_class_there_are_no_class_prompts() -> None:
    assert read_subject(["a photo of sks dog"]).without_name("a photo of sks dog") is None


def test_captions_and_prompts_of_priors_are_trained_in_any_case_and_spacing() -> None:
    subject = read_subject(["a photo of  sks dog"], ["a dog", "a puppy"])
    assert [subject.was_trained(text) for text in ("A photo of sks dog", "a puppy ", "a kitten")] == [True, True, False]


def test_a_caption_without_its_medium_and_article() -> None:
    texts = ("a photo of a dog", "photo of sks dog", "an oil painting of the sea", "A dog", "the close-up picture of x")
    assert [bare(text) for text in texts] == ["dog", "sks dog", "sea", "dog", "x"]
