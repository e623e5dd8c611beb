"""The DreamBooth protocol as package data."""

from __future__ import annotations

import pytest

from sd3tune.measures.dreambooth import dreambooth


def test_there_are_25_prompts_for_each_kind_with_one_place_for_the_subject() -> None:
    protocol = dreambooth()
    for kind in ("object", "live"):
        prompts = protocol.templates(kind)
        assert len(set(prompts)) == 25
        assert all(prompt.count("{}") == 1 for prompt in prompts)
    shared = {*protocol.object} & {*protocol.live}
    assert len(shared) == 15
    assert "a {} wearing a santa hat" in protocol.live
    assert "a {} floating in an ocean of milk" in protocol.object
    assert protocol.seeds == 4


def test_prompts_are_made_with_the_name_and_without() -> None:
    named, plain = (dreambooth().prompts("live", subject) for subject in ("sks dog", "dog"))
    assert "a sks dog in the jungle" in named
    assert plain == [prompt.replace("sks ", "") for prompt in named]


@pytest.mark.parametrize(
    ("class_word", "kind"),
    [
        ("dog", "live"),
        ("Corgi Dog", "live"),
        ("stuffed animal", "object"),
        ("animal", "live"),
        ("teapot", "object"),
        ("toy", "object"),
        ("old man", "live"),
        ("", "object"),
    ],
)
def test_the_kind_follows_from_the_class(class_word: str, kind: str) -> None:
    assert dreambooth().kind_of(class_word) == kind


def test_the_papers_figures_are_data() -> None:
    photos, trained = dreambooth().reference
    assert (photos.dino, photos.clip_i, photos.clip_t) == (0.774, 0.885, None)
    assert (trained.dino, trained.clip_i, trained.clip_t) == (0.668, 0.803, 0.305)
