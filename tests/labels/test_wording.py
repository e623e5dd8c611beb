"""Captions are made of a model's answers: one line, the trigger first, and no phrases of a chat."""

from __future__ import annotations

import pytest

from sd3tune.labels.wording import caption_of, instruction

DESCRIPTION = "lying on a red sofa, soft light from the left"


@pytest.mark.parametrize(
    "answer",
    [
        "lying on a red sofa, soft light from the left",
        "  lying on a red sofa,\n soft light from the left.\n",
        "The image shows lying on a red sofa, soft light from the left.",
        "This photo depicts lying on a red sofa, soft light from the left",
        "Sure! Here is a caption for your training set:\n\n\"lying on a red sofa, soft light from the left\"",
        "Certainly. **Caption:** lying on a red sofa, soft light from the left.",
        "- lying on a red sofa,\n- soft light from the left",
        "1. lying on a red sofa,\n2. soft light from the left",
        "In this picture, we can see lying on a red sofa, soft light from the left",
        "<think>The dog is brown.\nSkip it.</think>\nlying on a red sofa, soft light from the left",
        "The dog is lying on a red sofa, soft light from the left.",
        "A picture of a dog, lying on a red sofa, soft light from the left",
        "\u201clying on a red sofa, soft light\u00a0from the left\u201d",
    ],
)  # fmt: skip
def test_what_is_no_description_is_left_out(answer: str) -> None:
    assert caption_of(answer, True, "sks", "dog") == f"sks dog, {DESCRIPTION}"


@pytest.mark.parametrize(
    ("trigger", "subject", "start"),
    [("sks", None, "sks, "), (None, "dog", "dog, "), (None, None, ""), ("a b", "c\n", "a b c, ")],
)
def test_the_name_of_the_subject_comes_first(trigger: str | None, subject: str | None, start: str) -> None:
    assert caption_of(DESCRIPTION, True, trigger, subject) == start + DESCRIPTION


@pytest.mark.parametrize(
    "answer", ["here are two dogs", "a hot dog is on the table", "the dogs are running", "okra in a bowl"]
)
def test_words_that_only_look_like_such_a_phrase_stay(answer: str) -> None:
    assert caption_of(answer, True, None, "dog") == f"dog, {answer}"


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("on a lawn, in the sun. Behind it a hou", "on a lawn, in the sun"),
        ("on a lawn, in the su", "on a lawn"),
        ("on a very long lawn with a hou", "on a very long lawn with a"),
        ("<think>It never stops thinking", None),
        ("lawn", None),
    ],
)
def test_an_answer_that_was_cut_ends_with_a_whole_phrase(answer: str, kept: str | None) -> None:
    assert caption_of(answer, False, None, None) == kept


@pytest.mark.parametrize(
    "answer", ["", " \n", "...", "!!!!!!!!", "I'm sorry, but I can't help with that.", "I cannot see a picture"]
)
def test_no_caption_is_made_of_a_refusal(answer: str) -> None:
    assert caption_of(answer, True, "sks", "dog") is None


def test_the_model_is_asked_for_everything_but_the_subject() -> None:
    asked = instruction("dog")
    assert "Say nothing about how the dog itself looks" in asked
    assert "at most 40 words" in asked
    assert "main subject" in instruction(None)
