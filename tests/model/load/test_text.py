"""Embeddings equal the pipeline's own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_text_encoder
from sd3tune.model.load.text import assemble

LONG = " ".join(f"a {color} dog and a cat on the beach {n}," for n, color in enumerate(["red", "blue", "green"] * 6))
PROMPTS = ["a photo of sks dog", "", "Café! 犬 [unusual], a watercolor of two red foxes", LONG]
SHAPES = ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"]


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest) -> Base:
    return resolve_base(request.param)


@pytest.fixture(scope="module")
def pipeline(base: Base) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(base.path)


def encoded(base: Base, texts: list[str], length: int) -> dict[str, dict[str, Tensor]]:
    """Per encoder, the entries of the texts stacked to a batch."""
    result = {}
    for name in ENCODERS:
        entries = load_text_encoder(base, name, torch.float32, max_sequence_length=length).encode(texts)
        result[name] = {key: torch.stack([entry[key] for entry in entries]) for key in entries[0]}
    return result


def conditioning(base: Base, texts: list[str], length: int, t5: bool = True) -> tuple[Tensor, Tensor]:
    entries = encoded(base, texts, length)
    return assemble(entries["clip_l"], entries["clip_g"], entries["t5"]["hidden"] if t5 else None, length, 64)


def expected(pipeline: StableDiffusion3Pipeline, texts: str | list[str], length: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return embeds, pooled


@pytest.mark.parametrize("length", [77, 154, 256])
def test_assembled_embeddings_equal_the_pipeline_s_bit_for_bit(
    base: Base, pipeline: StableDiffusion3Pipeline, length: int
) -> None:
    embeds, pooled = conditioning(base, PROMPTS, length)
    assert embeds.shape == (len(PROMPTS), 77 + length, 64)
    assert pooled.shape == (len(PROMPTS), 48)
    for n, prompt in enumerate(PROMPTS):
        their_embeds, their_pooled = expected(pipeline, prompt, length)
        assert torch.equal(embeds[n], their_embeds[0])
        assert torch.equal(pooled[n], their_pooled[0])


def test_a_batch_of_prompts_agrees_with_the_pipeline(base: Base, pipeline: StableDiffusion3Pipeline) -> None:
    for ours, theirs in zip(conditioning(base, PROMPTS, 77), expected(pipeline, PROMPTS, 77), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_empty_string_is_the_pipeline_s_negative_prompt(base: Base, pipeline: StableDiffusion3Pipeline) -> None:
    with torch.no_grad():
        _, negative, _, pooled = pipeline.encode_prompt("a dog", None, None, max_sequence_length=77)
    ours = conditioning(base, [""], 77)
    assert torch.equal(ours[0], negative)
    assert torch.equal(ours[1], pooled)
    assert ours[0].abs().sum() > 0  # the encoding of nothing, not zeros


def test_without_t5_there_are_zeros_as_in_the_pipeline(base: Base) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(base.path, text_encoder_3=None, tokenizer_3=None)
    embeds, pooled = conditioning(base, ["a photo of sks dog"], 154, t5=False)
    their_embeds, their_pooled = expected(pipeline, "a photo of sks dog", 154)
    assert torch.equal(embeds, their_embeds)
    assert torch.equal(pooled, their_pooled)
    assert embeds[:, 77:].abs().sum() == 0


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_entries_are_in_the_encoder_s_dtype_and_equal_the_pipeline_s_in_bf16() -> None:
    base = resolve_base("tiny")
    pipeline = StableDiffusion3Pipeline.from_pretrained(base.path, torch_dtype=torch.bfloat16)
    parts = {
        name: load_text_encoder(base, name, torch.bfloat16, max_sequence_length=77).encode(["a dog"])[0]
        for name in ENCODERS
    }
    assert all(value.dtype == torch.bfloat16 for part in parts.values() for value in part.values())
    clip_l, clip_g, t5 = ({key: value[None] for key, value in parts[name].items()} for name in ENCODERS)
    ours = assemble(clip_l, clip_g, t5["hidden"], 77, 64)
    for mine, theirs in zip(ours, expected(pipeline, "a dog", 77), strict=True):
        assert torch.equal(mine, theirs)


def test_an_entry_does_not_depend_on_the_texts_beside_it_nor_on_grad_mode() -> None:
    encoder = load_text_encoder(resolve_base("tiny"), "clip_g", torch.float32)
    together = encoder.encode(PROMPTS)
    with torch.enable_grad():
        alone = encoder.encode([PROMPTS[2]])[0]
    assert alone.keys() == {"hidden", "pooled"}
    for key, value in alone.items():
        assert torch.equal(value, together[2][key])
        assert not value.requires_grad


def test_an_embedding_that_is_not_finite_is_refused() -> None:
    encoder = load_text_encoder(resolve_base("tiny"), "t5", torch.float16, max_sequence_length=16)
    encoder.encode(["a dog"])
    feed_forward = encoder.model.encoder.block[0].layer[-1].DenseReluDense
    feed_forward.wi_0.weight.data.fill_(6e4)  # sums overflow in fp16
    says = r"^t5: NaN or infinity in the embedding of 'a cat' \(computed in float16\); use model.dtype: bf16 or fp32"
    with pytest.raises(ModelError, match=says):
        encoder.encode(["a cat"])


def test_the_t5_length_is_part_of_the_conditioning() -> None:
    """Padding is attended, so a longer sequence changes the tokens of the text itself (if by little)."""
    base = resolve_base("tiny")
    short, long = (
        load_text_encoder(base, "t5", torch.float32, max_sequence_length=length).encode(["a dog"])[0]["hidden"]
        for length in (77, 154)
    )
    assert (short.shape, long.shape) == ((77, 64), (154, 64))
    assert (short[:3] - long[:3]).abs().max() > 1e-4


def test_the_tokens_that_are_cut_off_are_counted() -> None:
    base = resolve_base("tiny")
    clip = load_text_encoder(base, "clip_l", torch.float32)
    t5 = load_text_encoder(base, "t5", torch.float32, max_sequence_length=10)
    assert (clip.max_length, t5.max_length) == (77, 10)
    assert clip.truncated(" ".join(["dog"] * 75)) == 0  # 75 and the two special tokens
    assert clip.truncated(" ".join(["dog"] * 80)) == 5
    assert t5.truncated(" ".join(["dog"] * 9)) == 0
    assert t5.truncated(" ".join(["dog"] * 12)) == 3


def test_t5_embeddings_of_another_length_or_width_are_refused() -> None:
    clip = {"hidden": torch.zeros(2, 77, 4), "pooled": torch.zeros(2, 4)}
    for t5 in (torch.zeros(2, 77, 64), torch.zeros(2, 154, 32)):
        with pytest.raises(ValueError, match=r"expected \[B, 154, 64\]"):
            assemble(clip, clip, t5, 154, 64)


def test_clip_is_padded_in_width_and_comes_before_t5() -> None:
    def clip(value: float, width: int) -> dict[str, Tensor]:
        return {"hidden": torch.full((2, 77, width), value), "pooled": torch.full((2, width), value)}

    embeds, pooled = assemble(clip(1.0, 3), clip(2.0, 5), torch.full((2, 4, 12), 3.0), 4, 12)
    assert embeds[1, 0].tolist() == [1.0] * 3 + [2.0] * 5 + [0.0] * 4
    assert torch.equal(embeds[:, 77:], torch.full((2, 4, 12), 3.0))
    assert pooled[0].tolist() == [1.0] * 3 + [2.0] * 5
