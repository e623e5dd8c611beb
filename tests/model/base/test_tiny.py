"""The tiny bases: complete folders that a plain pipeline loads, repeatable, and sensitive to text."""

from __future__ import annotations

import filecmp
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from sd3tune.model.base import tiny as tiny_module
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.tiny import build_tiny
from sd3tune.model.base.tokenizers import make

SHAPES = ("sd3", "sd35-medium", "sd35-large")
TOKENIZERS = Path(tiny_module.__file__).parent / "tokenizers"


@pytest.fixture(scope="module", params=SHAPES)
def pipeline(request: pytest.FixtureRequest) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(resolve_base(f"tiny-{request.param}").path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.shape = request.param
    return pipeline


def generate(pipeline: StableDiffusion3Pipeline, prompt: str, side: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images: torch.Tensor = pipeline(
        prompt, height=side, width=side, num_inference_steps=4, generator=generator, output_type="pt"
    ).images
    return images[0]


def test_a_plain_pipeline_loads_it_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in (diffusers_logging, transformers_logging):
        logger = library.get_logger(library.__name__.split(".")[0])
        monkeypatch.setattr(logger, "propagate", True)
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            for shape in SHAPES:
                StableDiffusion3Pipeline.from_pretrained(resolve_base(f"tiny-{shape}").path)
        finally:
            logger.setLevel(level)
    assert caplog.text == ""


def test_the_shapes_mirror_the_three_models(pipeline: StableDiffusion3Pipeline) -> None:
    dual = [hasattr(block, "attn2") and block.attn2 is not None for block in pipeline.transformer.transformer_blocks]
    norms = [block.attn.norm_q is not None for block in pipeline.transformer.transformer_blocks]
    expected = {
        "sd3": ([False] * 4, [False] * 4),
        "sd35-medium": ([True, True, False, False], [True] * 4),
        "sd35-large": ([False] * 6, [True] * 6),
    }
    assert (dual, norms) == expected[pipeline.shape]
    assert pipeline.transformer.transformer_blocks[-1].context_pre_only
    assert pipeline.vae.config.scaling_factor == 1.5305
    assert pipeline.vae.config.shift_factor == 0.0609
    assert pipeline.vae_scale_factor == 8
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.text_encoder.config.hidden_act == "quick_gelu"
    assert pipeline.text_encoder_2.config.hidden_act == "gelu"


def test_it_makes_an_image_at_once_that_is_not_flat(pipeline: StableDiffusion3Pipeline) -> None:
    generate(pipeline, "warm up")
    start = time.perf_counter()
    image = generate(pipeline, "a photo of a dog")
    assert time.perf_counter() - start < 5
    assert image.shape == (3, 64, 64)
    assert image.std() > 0.1


def test_another_prompt_gives_another_velocity(pipeline: StableDiffusion3Pipeline) -> None:
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    velocity = []
    with torch.no_grad():
        for prompt in ("a photo of a dog", "a photo of a cat"):
            embeds, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
            velocity.append(pipeline.transformer(latents, embeds, pooled, torch.tensor([500.0])).sample)
    assert 0.5 < velocity[0].std() < 2
    assert (velocity[0] - velocity[1]).std() > 0.1 * velocity[0].std()


def test_the_context_alone_moves_the_velocity_too(pipeline: StableDiffusion3Pipeline) -> None:
    """Not only the pooled vector: adapters on the context stream would learn nothing otherwise."""
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pooled = torch.zeros(1, 48)
    with torch.no_grad():
        dog, cat = (
            pipeline.transformer(
                latents,
                pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)[0],
                pooled,
                torch.tensor([500.0]),
            ).sample
            for prompt in ("a dog on the beach", "a red teapot")
        )
    assert (dog - cat).std() > 0.05 * dog.std()


def test_the_largest_size_runs(pipeline: StableDiffusion3Pipeline) -> None:
    with torch.no_grad():
        velocity = pipeline.transformer(
            torch.randn(1, 16, 92 * 2, 44 * 2),
            torch.randn(1, 80, 64),
            torch.randn(1, 48),
            torch.tensor([500.0]),
        ).sample
    assert velocity.shape == (1, 16, 184, 88)


def test_latents_of_images_have_about_unit_spread_and_a_narrow_posterior(
    pipeline: StableDiffusion3Pipeline,
) -> None:
    pixels = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8) * 2 - 1, size=64, mode="bilinear")
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    latents = (posterior.mean - 0.0609) * 1.5305
    assert 0.3 < latents.std() < 3
    assert posterior.std.mean() < 0.2


def test_pooled_is_taken_from_the_end_token(pipeline: StableDiffusion3Pipeline) -> None:
    """Both with the padding of CLIP-L (the end token again) and of CLIP-G ("!", id 0)."""
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        short = tokenizer("a dog", padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(short)
        end = short[0].tolist().index(tokenizer.eos_token_id)
        assert end == 3
        expected = encoder.text_projection(output.last_hidden_state[0, end])
        torch.testing.assert_close(output.text_embeds[0], expected)


def test_padding_is_that_of_the_real_tokenizers(pipeline: StableDiffusion3Pipeline) -> None:
    clip_l, clip_g, t5 = pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3
    assert (clip_l.pad_token, clip_g.pad_token, clip_g.pad_token_id) == ("<|endoftext|>", "!", 0)
    assert (clip_l.model_max_length, clip_g.model_max_length) == (77, 77)
    ids = clip_g("a dog", padding="max_length", max_length=8).input_ids
    assert ids[0] == clip_g.bos_token_id
    assert ids[3:] == [clip_g.eos_token_id, 0, 0, 0, 0]
    assert t5("a dog", padding="max_length", max_length=6).input_ids[-4:] == [1, 0, 0, 0]
    assert t5("").input_ids == [1]
    assert clip_l.decode(clip_l("Café, sks dog! 犬").input_ids, skip_special_tokens=True) == "café , sks dog ! 犬"


def test_it_is_the_same_whatever_the_random_state_and_leaves_that_alone(tmp_path: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    build_tiny("sd35-medium", tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    cached = resolve_base("tiny").path
    for file in cached.rglob("*.safetensors"):
        expected, again = load_file(file), load_file(tmp_path / "again" / file.relative_to(cached))
        assert expected.keys() == again.keys()
        assert all(torch.equal(expected[key], again[key]) for key in expected)


def test_a_build_that_was_cut_short_is_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    build_tiny("sd3", folder)
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "vae")
    build_tiny("sd3", folder)
    assert (folder / "vae" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.lock"]


def test_two_that_build_at_once_build_it_once(tmp_path: Path) -> None:
    """Two threads contend for the lock as two processes do: it belongs to the open file."""
    folder = tmp_path / "tiny"

    def build(_: int) -> int:
        build_tiny("sd3", folder)
        return (folder / "model_index.json").stat().st_ino

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, range(2))
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "tiny.lock"]


@pytest.mark.long
@pytest.mark.long
def test_building_and_loading_print_nothing(tmp_path: Path) -> None:
    script = (
        "import torch; from sd3tune.model.base.resolve import resolve_base; base = resolve_base('tiny');"
        "from sd3tune.model.load.components import load_pipeline; load_pipeline(base, torch.float16)"
    )
    environment = {**os.environ, "SD3TUNE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_committed_tokenizers_are_what_make_writes(tmp_path: Path) -> None:
    make.make(tmp_path)
    for encoder in ENCODERS:
        names = sorted(path.name for path in (TOKENIZERS / encoder).iterdir())
        _, different, missing = filecmp.cmpfiles(TOKENIZERS / encoder, tmp_path / encoder, names, shallow=False)
        assert (different, missing) == ([], [])


def test_the_model_index_names_what_is_there() -> None:
    folder = resolve_base("tiny").path
    index = json.loads((folder / "model_index.json").read_text())
    parts = {key for key in index if not key.startswith("_")}
    assert parts == {path.name for path in folder.iterdir() if path.is_dir()}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 8e6
