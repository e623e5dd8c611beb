"""Which prompts are drawn: given ones, the protocol's, or those made for the subject."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd3tune.errors import ConfigError
from sd3tune.evaluation.prompts import choose_prompts
from sd3tune.evaluation.request import EvalRequest
from sd3tune.measures.prompts import MOST_CLASS_PROMPTS, MOST_NANO_PROMPTS, SCENES
from sd3tune.measures.subject import read_subject
from sd3tune.nano.world import parse

DOG = read_subject(["a photo of sks dog"], ["a photo of a dog"])


def test_prompts_are_made_for_the_subject_after_the_previews_that_show_it() -> None:
    previews = ["a sks dog swimming", "a cat", "a photo of sks dog"]
    prompts = choose_prompts(EvalRequest("run"), DOG, previews, nano=False)
    assert [prompt.text for prompt in prompts.scored] == [
        "a sks dog swimming", *(scene.format("sks dog") for scene in SCENES),
    ]  # fmt: skip
    assert prompts.scored[1].scored_as == "a photo of a dog on a beach"
    assert prompts.left_out == ["a photo of sks dog"]
    assert len(prompts.of_class) == MOST_CLASS_PROMPTS < len(prompts.scored)
    assert prompts.of_class[0].text == "a dog swimming"


def test_nano_gets_prompts_of_its_own_world() -> None:
    heart = read_subject(["a red sks shape on a white background"], ["a shape"])
    prompts = choose_prompts(EvalRequest("run"), heart, [], nano=True)
    assert (len(prompts.scored), len(prompts.of_class)) == (MOST_NANO_PROMPTS, MOST_NANO_PROMPTS)
    assert len({prompt.text for prompt in prompts.scored}) == MOST_NANO_PROMPTS
    for prompt in prompts.scored:
        assert "sks" in prompt.text
        assert parse(prompt.scored_as).thing.shape == "shape"


def test_the_protocol_has_25_prompts_for_the_kind_of_the_class() -> None:
    found = {}
    for kind in (None, "object", "live"):
        request = EvalRequest("run", protocol="dreambooth", kind=kind)
        found[kind] = [prompt.text for prompt in choose_prompts(request, DOG, [], nano=False).scored]
        assert len(found[kind]) == 25
    assert found[None] == found["live"] != found["object"]
    assert found["object"][0] == "a sks dog in the jungle"


def test_a_file_sets_more_than_the_text_and_class_prompts_have_it_too(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(
        "prompt,steps,prompt_t5\nsks dog at sea,3,\nsks dog at home,,sks dog indoors\n"
        "sks dog at sea,3,\na photo of a dog,,\n"
    )
    prompts = choose_prompts(EvalRequest("run", prompts=file), DOG, [], nano=False)
    assert [(prompt.text, dict(prompt.values)) for prompt in prompts.scored] == [
        ("sks dog at sea", {"steps": 3}), ("sks dog at home", {"prompt_t5": "sks dog indoors"}),
    ]  # fmt: skip
    assert [(prompt.text, dict(prompt.values)) for prompt in prompts.of_class] == [("a dog at sea", {"steps": 3})]
    assert prompts.left_out == ["a photo of a dog"]


def test_class_prompts_that_the_prior_used_are_left_out() -> None:
    subject = read_subject(["a photo of sks dog"], ["a dog", "a photo of a dog on a beach"])
    prompts = choose_prompts(EvalRequest("run"), subject, [], nano=False)
    assert "a photo of a dog on a beach" not in [prompt.text for prompt in prompts.of_class]
    assert prompts.left_out == ["a photo of a dog on a beach"]


def test_without_a_name_the_previews_are_drawn_or_a_file_is_needed() -> None:
    nobody = read_subject(["grass", "sea"])
    prompts = choose_prompts(EvalRequest("run"), nobody, ["a cat", "a cat", "a bird"], nano=False)
    assert [prompt.text for prompt in prompts.scored] == ["a cat", "a bird"]
    assert prompts.of_class == []
    with pytest.raises(ConfigError, match="give --prompts FILE"):
        choose_prompts(EvalRequest("run"), nobody, [], nano=False)
    with pytest.raises(ConfigError, match="--protocol dreambooth: its prompts need the subject's name"):
        choose_prompts(EvalRequest("run", protocol="dreambooth"), nobody, ["a cat"], nano=False)


def test_prompts_that_were_all_trained_are_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("A photo of sks dog")
    with pytest.raises(ConfigError, match=r"every prompt is one that the training used, such as 'A photo of sks dog'"):
        choose_prompts(EvalRequest("run", prompts=file), DOG, [], nano=False)
