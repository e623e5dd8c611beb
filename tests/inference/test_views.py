"""Every parameter of an image is declared once; options, prompt files, grids, recipes and calls are views of it."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import typer

from sd3tune.cli.main import app
from sd3tune.errors import ConfigError
from sd3tune.inference import image_request
from sd3tune.inference.from_recipe import Recipe
from sd3tune.inference.generate import generate
from sd3tune.inference.grid import AXES
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import ALL_PARAMETERS, InferenceJob, Memory
from sd3tune.inference.parameters import parameters_of
from sd3tune.inference.prompts_file import COLUMNS

NOT_PARAMETERS = {ImageRequest: {"loras"}, InferenceJob: {"given", "memory"}, Memory: set()}
"""Fields that are made from parameters: the weights in `loras` of a job, and what was given of the other two."""
OF_THE_MODEL = {"base", "base_revision", "base_fingerprint", "max_sequence_length", "encoders", "dtype", "loras"}


def test_every_field_is_a_parameter_and_declared_once() -> None:
    owned = {owner: set(parameters_of(owner)) for owner in NOT_PARAMETERS}
    for owner, others in NOT_PARAMETERS.items():
        assert {field.name for field in dataclasses.fields(owner)} - others == owned[owner]
    assert sum(map(len, owned.values())) == len(ALL_PARAMETERS)


def test_every_parameter_with_a_help_text_is_an_option_and_there_is_no_other() -> None:
    command = typer.main.get_command(app).commands["infer"]
    options = {one.name: set(one.opts + one.secondary_opts) for one in command.params if one.name != "help"}
    assert options == {name: set(one.flags.split("/")) for name, one in ALL_PARAMETERS.items() if one.help is not None}
    assert {name for name, one in ALL_PARAMETERS.items() if one.help is None} == {"name", "revision"}


def test_columns_and_axes_are_the_fields_that_say_so() -> None:
    parameters = image_request.PARAMETERS
    assert set(COLUMNS) == set(parameters) - {"slg_layers", "slg_start", "slg_stop"}
    assert list(AXES) == ["weight", "lora", *(name for name, one in parameters.items() if one.axis)]


def test_every_field_of_an_image_but_its_name_is_in_the_recipe() -> None:
    assert {name for name, one in image_request.PARAMETERS.items() if one.recipe is None} == {"name"}
    keys = {one.recipe.partition(".")[0] for one in ALL_PARAMETERS.values() if one.recipe is not None}
    assert (keys - {"batch"}) | OF_THE_MODEL | {"clip_l_pooled", "lora_encoders"} == set(Recipe.model_fields)


def test_a_call_takes_every_field_but_those_about_files() -> None:
    named = set(inspect.signature(generate).parameters) - {"fields", "lora"}
    assert named <= set(ALL_PARAMETERS)
    for name in ("out", "before", "stepz"):
        with pytest.raises(TypeError, match=f"'{name}' is "):
            generate("a dog", base="tiny", **{name: None})


@pytest.mark.parametrize(("text", "size"), [("512", (512, 512)), ("1152x896", (1152, 896)), ("64X32", (64, 32))])
def test_a_size_is_a_side_or_width_by_height(text: str, size: tuple[int, int]) -> None:
    assert InferenceJob.from_fields(size=text).given == {"size": size}
    assert InferenceJob.from_fields(size=size).given == {"size": size}
    assert InferenceJob.from_fields(size=None).given == {}


@pytest.mark.parametrize("text", ["", "x", "512x", "1x2x3", "-512", "5.5", "²", "512 x 512"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write a side such as 1024, or WIDTHxHEIGHT"):
        InferenceJob.from_fields(size=text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 2.5}, "--steps 2.5: write a whole number"),
        ({"num": "two"}, "--num two: write a whole number"),
        ({"guidance": "much"}, "--guidance much: write a number"),
        ({"slg_layers": "7;8"}, "--slg-layers 7;8: write numbers of blocks, such as 7,8,9"),
        ({"size": (64, None)}, r"--size \(64, None\): write a whole number"),
        ({"t5": "no"}, "--t5 no: write true or false"),
        ({"offload": 1}, "--offload 1: write true or false"),
        ({"grid": 3}, "--grid 3: write a list"),
        ({"prompt": 3}, "--prompt 3: write a text"),
        ({"dtype": "fp8"}, "--dtype fp8: one of auto, fp32, bf16, fp16"),
    ],
)
def test_a_value_of_another_type_is_one_line(given: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}$"):
        InferenceJob.from_fields(**given)
