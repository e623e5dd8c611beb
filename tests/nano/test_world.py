"""The grammar, what is held out of it, and drawing."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from sd3tune.nano.world import (
    CLASS,
    COLOURS,
    SHAPES,
    SUBJECT,
    Scene,
    Thing,
    complete,
    held_out,
    is_held_out,
    parse,
    plain_scenes,
    random_scene,
    render,
)


def scenes(count, **which):
    chance = random.Random(1)
    return [random_scene(chance, **which) for _ in range(count)]


def test_a_caption_reads():
    thing, other = Thing("orange", "ring", "small", "striped"), Thing("red", SUBJECT)
    assert Scene("white", thing, "at the top").caption == "a small striped orange ring at the top on a white background"
    assert Scene("orange", other, "", "below", Thing("orange", "star")).caption == (
        "a red heart below an orange star on an orange background"
    )
    assert Scene("", Thing("", CLASS)).caption == "a shape"


def test_every_plain_caption_stands_for_its_scene():
    for scene in plain_scenes(held_out=False) + plain_scenes(held_out=True):
        assert parse(scene.caption) == scene


def test_captions_of_the_training_mix_stand_for_their_scenes():
    for scene in scenes(3000) + scenes(500, held_out=True):
        assert parse(scene.caption) == scene


@pytest.mark.parametrize(
    ("caption", "complaint"),
    [
        ("a red blob on a blue background", "'blob' is not of this world"),
        ("a red circle on a pink background", "'pink' is not of this world"),
        ("red circle a on blue background", "not its grammar"),
        ("", "not its grammar"),
    ],
)
def test_a_caption_that_is_not_understood_is_an_error_that_says_why(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(caption)


def test_one_plain_scene_in_twelve_is_held_out():
    seen, unseen = plain_scenes(held_out=False), plain_scenes(held_out=True)
    assert len(seen) + len(unseen) == len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1)
    assert not set(seen) & set(unseen)
    assert len(unseen) / (len(seen) + len(unseen)) == pytest.approx(1 / 12, abs=0.02)


def test_of_each_held_out_scene_every_two_words_are_seen_together():
    def pairs(scene):
        words = (scene.thing.colour, scene.thing.shape, f"{scene.background} background")
        return set(itertools.combinations(words, 2))

    seen = set().union(*map(pairs, plain_scenes(held_out=False)))
    assert all(pairs(scene) <= seen for scene in plain_scenes(held_out=True))


def test_every_shape_and_every_background_has_held_out_scenes():
    unseen = plain_scenes(held_out=True)
    assert {scene.thing.shape for scene in unseen} == set(SHAPES)
    assert {scene.background for scene in unseen} == set(COLOURS)


def test_training_draws_nothing_that_is_held_out_and_never_the_subject():
    chance = random.Random(2)
    for scene in scenes(3000):
        drawn = complete(scene, chance)
        assert not is_held_out(drawn)
        assert all(thing.shape in SHAPES and thing.colour != drawn.background for thing in drawn.things)


def test_held_out_scenes_have_a_held_out_thing():
    for scene in scenes(300, held_out=True):
        assert any(held_out(thing, scene.background) for thing in scene.things)


def test_the_training_mix_has_its_shares():
    drawn = scenes(4000)
    count = Counter("pair" if scene.other else "rich" if is_rich(scene) else "plain" for scene in drawn)
    shares = {kind: count[kind] / len(drawn) for kind in count}
    assert shares == pytest.approx({"plain": 0.45, "rich": 0.30, "pair": 0.25}, abs=0.03)
    assert all(scene.thing != scene.other for scene in drawn)


def is_rich(scene):
    return bool(scene.place or scene.thing.size or scene.thing.texture)


def test_filling_in_words_keeps_those_that_are_there():
    chance = random.Random(3)
    for scene in scenes(500):
        filled = complete(scene, chance)
        for open_thing, thing in zip(scene.things, filled.things, strict=True):
            assert open_thing.colour in ("", thing.colour)
            assert open_thing.shape in (CLASS, thing.shape)
        assert scene.background in ("", filled.background)
        assert complete(filled, chance) == filled


def test_a_seed_draws_one_picture():
    for scene in scenes(20):
        first, again, other = (np.asarray(render(scene, seed)) for seed in (5, 5, 6))
        assert first.shape == (64, 64, 3)
        assert (first == again).all()
        assert (first != other).any()


def test_a_picture_of_another_size_is_the_same_picture():
    scene = parse("a striped red star on a blue background")
    small, large = render(scene, 1), render(scene, 1, side=128)
    apart = np.asarray(large.resize((64, 64)), np.float32) - np.asarray(small, np.float32)
    assert np.abs(apart).mean() < 2


@pytest.mark.parametrize("background", COLOURS)
def test_colours_are_drawn_nearest_to_their_names(background):
    for colour in COLOURS.keys() - {background}:
        for seed in range(5):
            pixels = np.asarray(render(Scene(background, Thing(colour, "circle")), seed), np.float32)
            assert nearest_in_rgb(pixels[32, 32]) == colour
            assert nearest_in_rgb(pixels[0, 0]) == background


def nearest_in_rgb(pixel):
    return min(COLOURS, key=lambda name: float(np.abs(pixel - np.array(COLOURS[name])).sum()))
