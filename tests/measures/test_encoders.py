"""Encoders: which are chosen, how they are loaded, and their features against transformers' own classes."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTImageProcessorPil,
    ViTModel,
)

from sd3tune.errors import MeasureUnavailable, UserError
from sd3tune.measures import encoders
from sd3tune.measures.encoders import (
    DEFAULT_ENCODERS,
    DREAMBOOTH,
    PROTOCOL_ENCODERS,
    EncoderSpec,
    TextImageEncoder,
    encoders_for,
    loaded,
    register,
    unregister,
)
from tests.local_hub import COMMIT, hub
from tests.measures.small_models import save_clip, save_dino, save_dinov2, save_siglip

PROMPTS = ("a red dog", "a cat", "beach")
Save = Callable[[Path], Path]
SUBJECT: tuple[encoders.Measure, ...] = ("subject",)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {"dinov2": save_dinov2(root / "v2"), "dino": save_dino(root / "v1"), "clip": save_clip(root / "clip")}


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (5, 9, 12, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((60, 45), Image.Resampling.BICUBIC) for one in values]


def spec(name: str, folder: Path) -> EncoderSpec:
    return EncoderSpec(name, str(folder), None, ("subject", "prompt") if name == "clip" else SUBJECT)


def unit(features: Tensor) -> np.ndarray:
    rows = features.detach().double().numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Which encoders are used.


def test_the_protocol_has_the_papers_encoders_and_others_have_dinov2() -> None:
    assert [one.name for one in encoders_for(DREAMBOOTH, "stabilityai/x", {})] == ["dino", "clip"]
    assert encoders_for(DREAMBOOTH, "x", {}) == list(PROTOCOL_ENCODERS)
    assert encoders_for("own", "x", {}) == list(DEFAULT_ENCODERS)
    assert encoders_for("own", "nano-1", {}) == encoders_for("own", "nano", {}) != list(DEFAULT_ENCODERS)
    assert [one.source for one in PROTOCOL_ENCODERS] == ["facebook/dino-vits16", "openai/clip-vit-base-patch32"]


def test_every_hub_encoder_is_pinned_to_a_commit() -> None:
    for one in (*PROTOCOL_ENCODERS, *DEFAULT_ENCODERS):
        assert one.revision is not None
        assert len(one.revision) == 40
        assert one.label == f"{one.source}@{one.revision}"


def test_nano_is_measured_by_its_own_encoder_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(encoders, "NANO_CLIP", tmp_path / "missing")
    assert encoders_for("own", "nano", {}) == list(DEFAULT_ENCODERS)
    monkeypatch.setattr(encoders, "NANO_CLIP", folders["clip"])
    monkeypatch.setattr("sd3tune.measures.pretrained.NANO_CLIP", folders["clip"])
    chosen = encoders_for(DREAMBOOTH, "nano", {})
    assert [one.name for one in chosen] == ["nano"]
    with loaded(chosen[0], "cpu") as encoder:
        assert (encoder.name, encoder.source) == ("nano", "nano")
        assert isinstance(encoder, TextImageEncoder)


def test_a_source_can_be_a_folder_a_hub_id_or_none(tmp_path: Path) -> None:
    first, second = encoders_for("own", "x", {"dinov2": str(tmp_path), "clip": "google/siglip-base-patch16-224@abc"})
    assert (first.source, first.revision) == (str(tmp_path), None)
    assert (second.source, second.revision, second.name) == ("google/siglip-base-patch16-224", "abc", "clip")
    assert [one.name for one in encoders_for("own", "x", {"dinov2": "none"})] == ["clip"]
    assert [one.name for one in encoders_for("own", "x", {"dino": "a/b"})] == ["dinov2", "clip", "dino"]
    with pytest.raises(UserError, match="'dinov3': no such encoder; choose from dinov2, clip, dino, nano"):
        encoders_for("own", "x", {"dinov3": "a/b"})


class Brightness:
    """An encoder of a test's own."""

    name, source = "brightness", "here"

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        means = torch.tensor([np.asarray(one).mean() / 255 for one in pictures])
        return torch.stack([means, (1 - means**2).sqrt()], dim=1).float()


@pytest.fixture
def own() -> Iterator[EncoderSpec]:
    mine = EncoderSpec("brightness", "here", None, SUBJECT)
    register(mine, lambda spec, device: Brightness())
    yield mine
    unregister("brightness")


def test_a_program_brings_its_own_encoder(own: EncoderSpec, pictures: list[Image.Image]) -> None:
    assert encoders_for("own", "x", {})[-1] == own
    with loaded(own, "cpu") as encoder:
        assert encoder.images(pictures).shape == (5, 2)
        assert not isinstance(encoder, TextImageEncoder)
    with pytest.raises(ValueError, match="'brightness' exists"):
        register(own, lambda spec, device: Brightness())
    with pytest.raises(ValueError, match="'clip' exists"):
        register(DEFAULT_ENCODERS[1], lambda spec, device: Brightness())


# Features.


def expected_dinov2(folder: Path, pictures: list[Image.Image]) -> Tensor:
    pixels = BitImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt")
    return Dinov2Model.from_pretrained(folder).eval()(**pixels).pooler_output


def expected_dino(folder: Path, pictures: list[Image.Image]) -> Tensor:
    pixels = ViTImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt")
    return ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()(**pixels).last_hidden_state[:, 0]


def expected_clip(folder: Path, pictures: list[Image.Image]) -> Tensor:
    return clip(folder, pictures, ["a"]).image_embeds


def clip(folder: Path, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
    """Return the output of the whole model for a batch."""
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(list(prompts), padding=True, return_tensors="pt")
    return CLIPModel.from_pretrained(folder).eval()(**pixels, **tokens)


@pytest.mark.parametrize(
    ("name", "expected"), [("dinov2", expected_dinov2), ("dino", expected_dino), ("clip", expected_clip)]
)
def test_picture_features_are_transformers_own(
    name: str, expected: Callable[..., Tensor], folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    with loaded(spec(name, folders[name]), "cpu") as encoder:
        found = encoder.images(pictures)
    assert (encoder.name, encoder.source) == (name, str(folders[name]))
    assert (found.dtype, found.device.type) == (torch.float32, "cpu")
    np.testing.assert_allclose(found, unit(expected(folders[name], pictures)), atol=2e-6)
    assert torch.pdist(found).min() > 0.01  # they tell pictures apart


def test_prompt_features_are_transformers_own(folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    expected = unit(clip(folders["clip"], pictures, PROMPTS).text_embeds)
    with loaded(spec("clip", folders["clip"]), "cpu") as encoder:
        assert isinstance(encoder, TextImageEncoder)
        found = encoder.texts(PROMPTS)
        assert encoder.texts(["a dog " * 40]).isfinite().all()  # longer than the model's 16 tokens
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert torch.pdist(found).min() > 0.01


def test_siglip_is_read_like_clip(tmp_path: Path, pictures: list[Image.Image]) -> None:
    folder = save_siglip(tmp_path)
    pixels = SiglipImageProcessorPil.from_pretrained(folder)(images=pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding="max_length", max_length=16, return_tensors="pt"
    )
    expected = SiglipModel.from_pretrained(folder).eval()(**pixels, **tokens)
    with loaded(spec("clip", folder), "cpu") as encoder:
        assert isinstance(encoder, TextImageEncoder)
        np.testing.assert_allclose(encoder.images(pictures), unit(expected.image_embeds), atol=2e-6)
        np.testing.assert_allclose(encoder.texts(PROMPTS), unit(expected.text_embeds), atol=2e-6)


OLD_FORMS = {
    "dino": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2},
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3},
}
"""As facebook/dino-vits16 and openai/clip-vit-base-patch32 state their preprocessing."""


@pytest.mark.parametrize("name", OLD_FORMS)
def test_preprocessing_in_its_old_form_is_the_same(
    name: str, folders: dict[str, Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(folders[name], folder)
    file = folder / "preprocessor_config.json"
    kept = {
        key: value
        for key, value in json.loads(file.read_text()).items()
        if key.startswith(("do_", "image_m", "image_s"))
    }
    file.write_text(json.dumps({**kept, **OLD_FORMS[name]}))
    with loaded(spec(name, folder), "cpu") as encoder:
        old = encoder.images(pictures)
    with loaded(spec(name, folders[name]), "cpu") as encoder:
        assert torch.equal(encoder.images(pictures), old)


@pytest.mark.parametrize("name", ["dinov2", "dino", "clip"])
def test_features_depend_neither_on_order_nor_on_number(
    name: str, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    with loaded(spec(name, folders[name]), "cpu") as encoder:
        together = encoder.images(pictures)
        assert torch.equal(encoder.images(pictures[::-1]), together.flip(0))
        assert torch.equal(torch.cat([encoder.images([one]) for one in pictures]), together)
        np.testing.assert_allclose(together.double().norm(dim=1), 1, atol=1e-6)
        if isinstance(encoder, TextImageEncoder):
            assert torch.equal(encoder.texts(PROMPTS[::-1]), encoder.texts(PROMPTS).flip(0))


def test_a_gpu_would_compute_in_fp32_and_keeps_its_settings(
    folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    allowed = []
    before = torch.backends.cudnn.allow_tf32
    with loaded(spec("dinov2", folders["dinov2"]), "cpu") as encoder:
        model: Any = encoder.model  # type: ignore[attr-defined]
        model.register_forward_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))
        encoder.images(pictures[:1])
    assert allowed == [False]
    assert torch.backends.cudnn.allow_tf32 == before


def test_modes_of_pictures_do_not_matter(folders: dict[str, Path], pictures: list[Image.Image]) -> None:
    grey = pictures[0].convert("L")
    with loaded(spec("dinov2", folders["dinov2"]), "cpu") as encoder:
        features = encoder.images([grey, grey.convert("RGB"), grey.convert("RGBA")])
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


def test_weights_are_freed_even_if_the_encoder_is_kept(folders: dict[str, Path]) -> None:
    with loaded(spec("dinov2", folders["dinov2"]), "cpu") as encoder:
        model = weakref.ref(encoder.model)  # type: ignore[attr-defined]
        assert model() is not None
    gc.collect()
    assert model() is None
    assert encoder.name == "dinov2"


def test_loading_does_not_print_or_change_random_numbers(folders: dict[str, Path], capfd: Any) -> None:
    state = torch.random.get_rng_state()
    for name, folder in folders.items():
        with loaded(spec(name, folder), "cpu"):
            pass
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


# What is missing or damaged.


def unavailable(wanted: EncoderSpec) -> str:
    with pytest.raises(MeasureUnavailable) as caught, loaded(wanted, "cpu"):
        pass
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_preprocessor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize("damage", [remove_weights, remove_a_tensor, truncate, break_config, remove_preprocessor])
def test_a_damaged_folder_is_named_in_one_line(
    damage: Callable[[Path], None], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(folders["dinov2"], folder)
    damage(folder)
    line = unavailable(spec("dinov2", folder))
    assert line.startswith(f"dinov2: {folder}: ")
    if damage is remove_a_tensor:
        assert "tensor layernorm.weight is missing" in line


def test_features_that_are_not_finite_are_refused(
    folders: dict[str, Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    shutil.copytree(folders["dinov2"], tmp_path / "encoder")
    weights = tmp_path / "encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["layernorm.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    with (
        loaded(spec("dinov2", tmp_path / "encoder"), "cpu") as encoder,
        pytest.raises(MeasureUnavailable, match=r"^dinov2: .*: features are not finite"),
    ):
        encoder.images(pictures)


def test_prompt_fidelity_needs_a_model_with_a_text_encoder(folders: dict[str, Path]) -> None:
    line = unavailable(EncoderSpec("clip", str(folders["dinov2"]), None, ("subject", "prompt")))
    assert (
        line == f"clip: {folders['dinov2']}: no text encoder, which prompt fidelity needs; name a CLIP or SigLIP model"
    )


# From the Hub.


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("empty_cache")
def test_offline_the_way_out_is_a_local_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = unavailable(DEFAULT_ENCODERS[0])
    assert line.startswith("dinov2: facebook/dinov2-small: not on this machine, and the Hub cannot be reached")
    assert line.endswith("or name a local folder: --encoder dinov2=FOLDER")
    assert unavailable(EncoderSpec("dinov2", "./missing", None, SUBJECT)).startswith(
        "dinov2: ./missing: no such folder"
    )


@pytest.mark.usefixtures("empty_cache")
def test_a_folder_of_the_same_name_does_not_replace_a_pinned_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(folders["dinov2"], tmp_path / "facebook" / "dinov2-small")
    monkeypatch.chdir(tmp_path)
    assert "not on this machine" in unavailable(DEFAULT_ENCODERS[0])
    (named,) = encoders_for("own", "x", {"dinov2": "facebook/dinov2-small", "clip": "none"})
    with loaded(named, "cpu") as encoder:
        assert encoder.source == "facebook/dinov2-small"


@pytest.mark.usefixtures("empty_cache")
def test_weights_in_pytorchs_format_are_downloaded_once_where_there_are_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folders: dict[str, Path], pictures: list[Image.Image]
) -> None:
    """As openai/clip-vit-base-patch32 and facebook/dino-vits16 have them, beside those of other libraries."""
    there = tmp_path / "there" / "openai" / "clip"
    shutil.copytree(folders["clip"], there)
    torch.save(load_file(there / "model.safetensors"), there / "pytorch_model.bin")
    (there / "model.safetensors").rename(there / "tf_model.h5")
    wanted = EncoderSpec("clip", "openai/clip", COMMIT, ("subject", "prompt"))
    with hub(tmp_path / "there") as (endpoint, requests):
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        with loaded(wanted, "cpu") as encoder:
            found = encoder.images(pictures)
        assert any("pytorch_model.bin" in request for request in requests)
        assert not any("tf_model" in request for request in requests)
        assert "gated" in unavailable(EncoderSpec("clip", "gated/clip", COMMIT, SUBJECT))
    with loaded(spec("clip", folders["clip"]), "cpu") as encoder:
        np.testing.assert_allclose(encoder.images(pictures), found, atol=1e-6)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with loaded(wanted, "cpu") as encoder:
        assert encoder.source == f"openai/clip@{COMMIT}"


class Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched-by-a-pickle"),)


def test_a_pickle_that_would_run_code_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["dinov2"], tmp_path / "encoder")
    (tmp_path / "encoder" / "model.safetensors").unlink()
    torch.save({"weights": Harmful()}, tmp_path / "encoder" / "pytorch_model.bin")
    assert "cannot be loaded" in unavailable(spec("dinov2", tmp_path / "encoder"))
    assert not Path("touched-by-a-pickle").exists()
