"""A picture to start from, skip-layer guidance and a text per encoder: each as diffusers' pipelines have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image, ImageChops, ImageDraw

from sd3tune.commands.infer import run_infer
from sd3tune.errors import ConfigError, DataError, RunError, UserError
from sd3tune.inference import session
from sd3tune.inference.generate import generate
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.start_images import latent_mask
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline
from sd3tune.nano.oracle import judge
from sd3tune.nano.world import parse
from sd3tune.sampling.sampler import to_image
from tests.pictures import distance, opened

PROMPT, T5_LENGTH, SEED = "a red circle on a blue background", 16, 3
Draw = Callable[..., Path]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    pipeline = load_pipeline(resolve_base("nano"), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    def draw(**options: object) -> Path:
        given = {"prompt": PROMPT, "base": "nano", "seed": SEED, "steps": 4, "guidance": 4.0, "size": (64, 48)}
        out = {"out": tmp_path / "images", "t5_tokens": T5_LENGTH}
        return run_infer(InferenceJob.from_fields(loras=[], **{**given, **out, **options}))[0]

    return draw


def theirs(pipeline: StableDiffusion3Pipeline, prompt: str = PROMPT, **options: object) -> Image.Image:
    given = {"height": 48, "width": 64, "num_inference_steps": 4, "guidance_scale": 4.0}
    given |= {"max_sequence_length": T5_LENGTH, "generator": torch.Generator().manual_seed(SEED)}
    return pipeline(prompt, **{**given, **options}).images[0]


def recipe_of(path: Path) -> dict:
    return json.loads(opened(path).text["sd3tune"])


# A picture to start from.


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Lying on its side by its EXIF data, and of another shape than what is drawn."""
    image = Image.new("RGB", (96, 120), "teal")
    ImageDraw.Draw(image).polygon([(10, 10), (90, 30), (40, 100)], fill="orange")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    return tmp_path / "photo.jpg"


def cut(photo: Path) -> Image.Image:
    """The photo upright, just covering 64 x 48, its middle."""
    upright = opened(photo).transpose(Image.Transpose.ROTATE_270)
    assert upright.size == (120, 96)
    return upright.resize((64, 51), Image.Resampling.LANCZOS).crop((0, 1, 64, 49))


@pytest.mark.parametrize(("sampler", "strength"), [("euler", 0.6), ("euler", 1.0), ("heun", 0.45)])
def test_from_a_picture_is_the_image_to_image_pipeline(
    sampler: str, strength: float, pipeline, photo: Path, draw: Draw
) -> None:
    other = StableDiffusion3Img2ImgPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    if sampler == "heun":
        other.scheduler = FlowMatchHeunDiscreteScheduler(shift=pipeline.scheduler.config.shift)
    path = draw(image=photo, strength=strength, sampler=sampler)
    assert distance(opened(path), theirs(other, image=cut(photo), strength=strength)) == 0
    assert recipe_of(path)["image"]["name"] == "photo.jpg"
    assert recipe_of(path)["strength"] == strength


def test_the_less_strength_the_nearer_to_the_picture(photo: Path, draw: Draw) -> None:
    def mean_difference(strength: float) -> float:
        path = draw(image=photo, strength=strength, steps=20, sampler="dpmpp")
        return sum(ImageChops.difference(opened(path), cut(photo)).convert("L").getdata()) / (64 * 48)

    assert mean_difference(0.05) < 20 < 40 < mean_difference(0.5)


def test_a_picture_from_a_picture_is_repeated_where_that_is_found(photo: Path, draw: Draw) -> None:
    path = draw(image=photo, strength=0.5)
    fresh = {"prompt": None, "base": None, "seed": None, "steps": None, "guidance": None, "size": None}
    again = draw(**fresh, t5_tokens=None, from_picture=path)
    assert distance(opened(again), opened(path)) == 0
    assert recipe_of(again) == recipe_of(path)
    Image.new("RGB", (64, 64)).save(photo)
    with pytest.raises(ConfigError, match=r"drawn from the picture 'photo.jpg' .* give it with --image$"):
        draw(**fresh, t5_tokens=None, from_picture=path)


def test_each_line_of_a_file_may_start_from_its_own_picture(photo: Path, draw: Draw, tmp_path: Path) -> None:
    prompts = tmp_path / "p.csv"
    prompts.write_text(f"prompt,image,strength\n{PROMPT},photo.jpg,0.5\n")
    path = draw(prompt=None, prompts=prompts)
    assert distance(opened(path), opened(draw(image=photo, strength=0.5, out=tmp_path / "alone"))) == 0


# A picture of which a part is redrawn.


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """White in whole latent positions of what is drawn, on a copy of the photo's shape."""
    mask = Image.new("L", (64, 48))
    mask.paste(255, (16, 8, 48, 32))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture
def plain(photo: Path, tmp_path: Path) -> Path:
    """The photo as it is drawn over, so that nothing is scaled."""
    cut(photo).save(tmp_path / "plain.png")
    return tmp_path / "plain.png"


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_is_the_pipelines_apart_from_its_decoding(
    strength: float, pipeline, plain: Path, mask: Path, draw: Draw
) -> None:
    """diffusers 0.42.1 decodes `latents / scaling_factor` there, and leaves `+ shift_factor` out."""
    other = StableDiffusion3InpaintPipeline(**pipeline.components)
    other.set_progress_bar_config(disable=True)
    options = {"image": opened(plain), "mask_image": opened(mask), "strength": strength}
    latents = theirs(other, **options, output_type="latent")[None]
    drawn = to_image(pipeline.vae, latents)
    expected = Image.composite(drawn, opened(plain), opened(mask))
    path = draw(image=plain, mask=mask, strength=strength)
    assert distance(opened(path), expected) == 0
    assert pipeline.vae.config.shift_factor != 0
    assert distance(drawn, theirs(other, **options)) > 0.3
    assert ImageChops.difference(drawn, opened(plain)).getbbox() == (0, 0, 64, 48)  # the VAE changes every part


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp"])
def test_what_is_masked_is_redrawn_and_the_rest_kept_to_the_pixel(
    sampler: str, plain: Path, mask: Path, draw: Draw
) -> None:
    found = ImageChops.difference(opened(draw(image=plain, mask=mask, strength=1.0, sampler=sampler)), opened(plain))
    assert found.getbbox() is not None
    kept = ImageChops.multiply(found, ImageChops.invert(opened(mask)).convert("RGB"))
    assert kept.getbbox() is None
    redrawn = draw(image=plain, mask=mask, strength=1.0, sampler=sampler, prompt="a yellow star on a green background")
    assert distance(opened(redrawn), opened(plain)) > 2


def test_a_mask_is_scaled_and_cut_like_its_picture(photo: Path, draw: Draw, tmp_path: Path) -> None:
    """At half the photo's size: still the same part of it."""
    mask = Image.new("L", (60, 48))
    mask.paste(255, (0, 0, 30, 48))
    mask.save(tmp_path / "half.png")
    drawn = opened(draw(image=photo, mask=tmp_path / "half.png", strength=1.0))
    difference = ImageChops.difference(drawn, cut(photo))
    assert difference.crop((33, 0, 64, 48)).getbbox() is None
    assert difference.crop((0, 0, 32, 48)).getbbox() is not None


def test_a_masked_picture_is_drawn_again_from_its_recipe(plain: Path, mask: Path, draw: Draw) -> None:
    path = draw(image=plain, mask=mask, strength=0.75)
    recipe = recipe_of(path)
    assert (recipe["image"]["name"], recipe["mask"]["name"]) == ("plain.png", "mask.png")
    fresh = dict.fromkeys(("prompt", "base", "seed", "steps", "guidance", "size", "t5_tokens"))
    again = draw(**fresh, from_picture=path)
    assert distance(opened(again), opened(path)) == 0
    assert recipe_of(again) == recipe
    Image.new("L", (64, 48)).save(mask)
    with pytest.raises(ConfigError, match=r"drawn from the picture 'mask.png' .* give it with --mask$"):
        draw(**fresh, from_picture=path)


def test_a_mask_of_another_shape_is_one_line(photo: Path, draw: Draw, tmp_path: Path) -> None:
    Image.new("L", (96, 120)).save(tmp_path / "mask.png")  # the photo lies on its side
    with pytest.raises(ConfigError) as caught:
        draw(image=photo, mask=tmp_path / "mask.png")
    (line,) = caught.value.problems
    sizes = f"is 96 x 120 px and {photo} is 120 x 96"
    assert line == f"--mask {tmp_path / 'mask.png'}: {sizes}; draw the mask on a copy of the picture"


def test_a_line_of_a_file_may_have_a_mask(plain: Path, mask: Path, draw: Draw, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    line = {"prompt": PROMPT, "image": "plain.png", "strength": 0.5}
    prompts.write_text(json.dumps({**line, "name": "part", "mask": "mask.png"}) + "\n" + json.dumps(line))
    images = draw(prompt=None, prompts=prompts, batch=2).parent
    alone = draw(image=plain, mask=mask, strength=0.5, out=tmp_path / "alone")
    assert distance(opened(images / "part.png"), opened(alone)) == 0
    assert "mask" not in recipe_of(next(path for path in images.glob("*.png") if path.name != "part.png"))


def test_generate_takes_a_mask(plain: Path, mask: Path, draw: Draw) -> None:
    settings = {"image": plain, "mask": mask, "strength": 1.0, "steps": 4, "guidance": 4.0, "size": (64, 48)}
    (image,) = generate(PROMPT, base="nano", seed=SEED, t5_tokens=T5_LENGTH, **settings)
    assert distance(image, opened(draw(image=plain, mask=mask, strength=1.0))) == 0


def test_grey_blends_and_counts_as_redrawn() -> None:
    mask = Image.new("L", (16, 16))
    mask.putpixel((9, 3), 1)
    assert latent_mask(mask).tolist() == [[[[0.0, 1.0], [0.0, 0.0]]]]


# Skip-layer guidance.


def test_skip_layer_guidance_is_the_pipelines(pipeline, draw: Draw) -> None:
    path = draw(slg=2.8, slg_layers=(2, 3), slg_start=0.01, slg_stop=0.5)
    skip = {"skip_guidance_layers": [2, 3], "skip_layer_guidance_scale": 2.8}
    other = theirs(pipeline, **skip, skip_layer_guidance_start=0.01, skip_layer_guidance_stop=0.5)
    assert distance(opened(path), other) == 0
    assert distance(opened(path), theirs(pipeline)) > 4
    assert recipe_of(path)["slg"] == {"scale": 2.8, "layers": [2, 3], "start": 0.01, "stop": 0.5}


# What the encoders read.


def test_each_encoder_may_read_its_own_text(pipeline, draw: Draw) -> None:
    path = draw(prompt_clip_g="a green star", prompt_t5="a yellow square", negative="a cross")
    both = {"prompt_2": "a green star", "prompt_3": "a yellow square"}
    assert distance(opened(path), theirs(pipeline, **both, negative_prompt="a cross")) == 0
    first = draw(prompt="a green star", prompt_clip_l=PROMPT, prompt_t5="a yellow square", negative="a cross")
    assert distance(opened(first), opened(path)) == 0
    assert recipe_of(path)["prompt"] == PROMPT
    assert recipe_of(path)["prompt_t5"] == "a yellow square"
    assert "prompt_clip_l" not in recipe_of(path)


def test_the_length_of_t5_can_be_chosen_and_t5_left_out(pipeline, draw: Draw) -> None:
    assert distance(opened(draw(t5_tokens=40)), theirs(pipeline, max_sequence_length=40)) == 0
    without = StableDiffusion3Pipeline(**{**pipeline.components, "text_encoder_3": None, "tokenizer_3": None})
    without.set_progress_bar_config(disable=True)
    assert distance(opened(draw(t5=False)), theirs(without)) == 0


# Memory.


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(class, where to) of every model that a session sends to its device, or to where it waits."""
    seen: list[tuple[str, str]] = []
    genuine = session.Component._move

    def recording(part: session.Component, device: torch.device) -> None:
        seen.append((type(part._model).__name__, "rest" if device is part._session.idle_device else "work"))
        genuine(part, device)

    monkeypatch.setattr(session.Component, "_move", recording)
    monkeypatch.setattr(session.InferenceSession, "idle_device", torch.device("cpu"))
    return seen


def test_what_is_not_at_work_leaves_and_nothing_of_the_picture_changes(draw: Draw, moves: list, tmp_path: Path) -> None:
    prompts = tmp_path / "p.csv"
    prompts.write_text("prompt,seed\na star,1\na star,2\n")
    plain = draw(prompt=None, prompts=prompts, steps=2)
    assert moves == []
    offloaded = draw(prompt=None, prompts=prompts, steps=2, offload=True, out=tmp_path / "offloaded")
    assert distance(opened(offloaded), opened(plain)) == 0
    transformer, vae = "SD3Transformer2DModel", "AutoencoderKL"
    expected = [(transformer, "work"), (transformer, "rest"), (vae, "work"), (vae, "rest")]
    assert moves == expected * 2


def test_tiles_are_those_of_diffusers(pipeline, draw: Draw) -> None:
    path = draw(steps=1, size=(128, 96), vae_tiling=True)
    whole = theirs(pipeline, num_inference_steps=1, height=96, width=128)
    pipeline.vae.enable_tiling()
    try:
        tiled = theirs(pipeline, num_inference_steps=1, height=96, width=128)
    finally:
        pipeline.vae.disable_tiling()
    assert distance(opened(path), tiled) == 0
    assert distance(tiled, whole) > 0
    assert recipe_of(path)["vae_tiling"] is True


def test_compiled_blocks_draw_the_same_picture(draw: Draw, monkeypatch) -> None:
    """The graphs are those of `torch.compile`; a real back end would take a minute to turn them into code."""
    graphs, compile_it = [], torch.nn.Module.compile

    def noted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_it(block, backend=noted))
    plain, compiled = draw(steps=2), draw(steps=2, compiled=True)
    assert len(graphs) >= 3  # nano has three sorts of blocks
    assert distance(opened(plain), opened(compiled)) <= 1


def test_in_fewer_bits_the_picture_still_shows_what_was_asked_for(draw: Draw) -> None:
    pytest.importorskip("bitsandbytes")
    path = draw(steps=8, size=(64, 64), quantize="nf4", t5_8bit=True)
    assert judge(opened(path), parse(PROMPT)).right
    assert (recipe_of(path)["quantize"], recipe_of(path)["t5_8bit"]) == ("nf4", True)
    fresh = {"prompt": None, "base": None, "seed": None, "steps": 1, "guidance": None, "size": None}
    again = draw(**fresh, t5_tokens=None, from_picture=path)
    assert recipe_of(again) == recipe_of(path) | {"steps": 1}


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("encode_prompts", "out of memory while encoding the prompts: hold T5 in 8 bits with --t5-8bit"),
        ("sample_latents", "out of memory while drawing: hold the transformer in 4 bits with --quantize nf4"),
        ("to_image", "out of memory while decoding: decode in tiles with --vae-tiling"),
    ],
)
def test_running_out_of_memory_is_one_line_with_what_to_try(where: str, said: str, draw: Draw, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(session, where, full)
    with pytest.raises(RunError) as caught:
        draw(steps=1)
    (line,) = caught.value.problems
    assert line.startswith(said)


# Mistakes.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "photo.jpg"}, "--mask photo.jpg: the part of --image that is redrawn; give both"),
        ({"strength": 0.5}, "--strength 0.5: the share of --image that is redrawn; give --image, too"),
        ({"image": "photo.jpg", "strength": 0.0}, "--strength 0: above 0, and at most 1"),
        ({"image": "photo.jpg", "strength": 0.1}, "--strength 0.1: no step of 4 is left; at least 0.25"),
        ({"slg": 2.8}, "--slg-layers 7,8,9: this base has the blocks 0 to 5"),
        ({"slg": 2.8, "guidance": 1.0}, "--slg 2.8: needs guidance above 1; it is 1"),
        ({"slg": 2.8, "slg_layers": (2,), "slg_start": 0.5}, "--slg-start 0.5, --slg-stop 0.2: shares of the steps"),
        ({"quantize": "fp4"}, "--quantize fp4: one of nf4, int8"),
        ({"t5_tokens": 0}, "--t5-tokens 0: from 1 to 512"),
        ({"t5_tokens": 513}, "--t5-tokens 513: from 1 to 512"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict, said: str, photo: Path, draw: Draw, tmp_path: Path) -> None:
    if "image" in options:
        options = {**options, "image": photo}
    with pytest.raises(UserError) as caught:
        draw(**options)
    (line,) = caught.value.problems
    assert line.startswith(said)
    assert not (tmp_path / "images").exists()


def test_what_is_no_picture_is_one_line(draw: Draw, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png: is not an image"):
        draw(image=tmp_path / "text.png")
    with pytest.raises(DataError, match=r"none\.png"):
        draw(image=tmp_path / "none.png")
    assert not (tmp_path / "images").exists()
