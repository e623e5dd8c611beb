"""CLIP-L from a single file: Stable Diffusion 3 takes its pooled vector without `text_projection`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_text_encoder

TEXTS = ["a photo of sks dog", "", "two cats, on a  mat! (detailed)"]
Tensors = dict[str, torch.Tensor]
PROJECTION = "text_projection.weight"
LAST = torch.tensor([15])
PROJECTIONS: dict[str, Callable[[Tensors], object]] = {
    "none": lambda tensors: tensors.pop(PROJECTION),
    "identity": lambda tensors: tensors.update({PROJECTION: torch.eye(16)}),
    "identity in fp16": lambda tensors: tensors.update({PROJECTION: torch.eye(16).half()}),
    "identity in bf16": lambda tensors: tensors.update({PROJECTION: torch.eye(16).bfloat16()}),
    "identity in fp8": lambda tensors: tensors.update({PROJECTION: torch.eye(16).to(torch.float8_e4m3fn)}),
    "learned": lambda tensors: None,
    "learned, in fp16": lambda tensors: tensors.update({PROJECTION: tensors[PROJECTION].half()}),
    "identity but for one entry": lambda tensors: tensors.update({PROJECTION: torch.eye(16).index_fill(0, LAST, 0)}),
    "a scaled identity": lambda tensors: tensors.update(
        {PROJECTION: torch.eye(16).to(torch.float8_e4m3fn), "text_projection.scale_weight": torch.tensor(0.5)}
    ),
    "not square": lambda tensors: tensors.update({PROJECTION: torch.ones(24, 16)}),
    "quantised": lambda tensors: tensors.update({PROJECTION: torch.ones(16, 16).char()}),
}
UNUSED = [name for name in PROJECTIONS if name != "none" and not name.startswith("identity in") and name != "identity"]


def rewritten(file: Path, target: Path, edit: Callable[[Tensors], object]) -> Path:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, target)
    return target


@pytest.fixture(scope="module")
def unprojected_pooled() -> torch.Tensor:
    """What `CLIPTextModel`, which has no projection, makes of TEXTS with the weights of `tiny`'s CLIP-L."""
    folder = resolve_base("tiny").path
    tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        pooled: torch.Tensor = CLIPTextModel.from_pretrained(folder / "text_encoder")(tokens.input_ids).pooler_output
    return pooled


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_clip_l_from_a_file_gives_its_unprojected_vector(
    single_file, tmp_path: Path, unprojected_pooled: torch.Tensor, projection: str
) -> None:
    source = single_file("tiny").with_name("clip_l.safetensors")
    own = rewritten(source, tmp_path / "clip_l.safetensors", PROJECTIONS[projection])

    def include(tensors: Tensors) -> None:
        tensors |= {f"text_encoders.clip_l.transformer.{name}": value for name, value in load_file(own).items()}

    whole = rewritten(single_file("tiny"), tmp_path / "model.safetensors", include)
    folder = resolve_base("tiny", encoder_files={"clip_l": str(own)})
    files = {encoder: str(source.with_name(f"{encoder}.safetensors")) for encoder in ("clip_g", "t5")}
    for base in (folder, resolve_base(str(whole), None, files, "tiny")):
        base.check_encoders(ENCODERS)
        assert base.ignores_projection is (projection in UNUSED)
        found = load_text_encoder(base, "clip_l", torch.float32).encode(TEXTS)
        torch.testing.assert_close(torch.stack([entry["pooled"] for entry in found]), unprojected_pooled)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_only_a_projection_that_was_applied_changes_the_fingerprint(
    single_file, tmp_path: Path, projection: str
) -> None:
    source = single_file("tiny").with_name("clip_l.safetensors")
    own = rewritten(source, tmp_path / "clip_l.safetensors", PROJECTIONS[projection])
    base = resolve_base("tiny", encoder_files={"clip_l": str(own)})
    of_before = base.fingerprint("text_encoder", uses_all=True)
    assert (base.fingerprint("text_encoder") != of_before) is (projection in UNUSED)
    assert base.fingerprint("text_encoder_2") == resolve_base("tiny").fingerprint("text_encoder_2")


def test_the_single_file_loader_of_diffusers_ignores_the_projection_as_well(
    single_file, unprojected_pooled: torch.Tensor
) -> None:
    clip_l = load_file(single_file("tiny").with_name("clip_l.safetensors"))
    assert not torch.equal(clip_l[PROJECTION], torch.eye(16))
    model = create_diffusers_clip_model_from_ldm(
        CLIPTextModelWithProjection,
        {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in clip_l.items()},
        subfolder="text_encoder",
        config=str(resolve_base("tiny").path),
        local_files_only=True,
    )
    tokenizer = CLIPTokenizer.from_pretrained(resolve_base("tiny").path / "tokenizer")
    tokens = tokenizer(TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens.input_ids).text_embeds, unprojected_pooled)


def test_a_folder_keeps_its_projection(unprojected, unprojected_pooled: torch.Tensor) -> None:
    own, identity = (
        torch.stack([entry["pooled"] for entry in load_text_encoder(base, "clip_l", torch.float32).encode(TEXTS)])
        for base in (resolve_base("tiny"), resolve_base(unprojected("tiny")))
    )
    projection = load_file(resolve_base("tiny").path / "text_encoder" / "model.safetensors")[PROJECTION]
    torch.testing.assert_close(own, unprojected_pooled @ projection.T)
    torch.testing.assert_close(identity, unprojected_pooled)
    assert not resolve_base("tiny").ignores_projection
