"""Loading one part at a time, and what is said of files that are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import (
    empty_transformer,
    load_pipeline,
    load_scheduler,
    load_text_encoder,
    load_transformer,
    load_vae,
    text_encoder_shape,
    transformer_config,
)

LOADERS: dict[str, Callable[[Base], object]] = {
    "transformer": lambda base: load_transformer(base, torch.float32),
    "vae": lambda base: load_vae(base, torch.float32),
    "text_encoder": lambda base: load_text_encoder(base, "clip_l", torch.float32),
    "text_encoder_3": lambda base: load_text_encoder(base, "t5", torch.float32),
}


@pytest.fixture(scope="module")
def tiny() -> Base:
    return resolve_base("tiny")


@pytest.fixture
def broken(tiny: Base, tmp_path: Path) -> Base:
    return resolve_base(str(shutil.copytree(tiny.path, tmp_path / "model")))


def weights(base: Base, part: str) -> Path:
    (file,) = (base.path / part).glob("*.safetensors")
    return file


def change(file: Path, edit: Callable[[dict[str, torch.Tensor], str], None]) -> str:
    """Edits one large tensor of the file and returns its name."""
    tensors = load_file(file)
    name = max((key for key in tensors if tensors[key].ndim == 2), key=lambda key: tensors[key].numel())
    edit(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def test_models_are_frozen_in_eval_mode_and_in_the_dtype_asked_for(tiny: Base) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        models = [load_transformer(tiny, dtype), load_vae(tiny, dtype)]
        models += [load_text_encoder(tiny, name, dtype).model for name in ("clip_l", "clip_g", "t5")]
        for model in models:
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_t5_in_fp16_keeps_what_transformers_keeps_in_fp32(tiny: Base) -> None:
    expected = StableDiffusion3Pipeline.from_pretrained(tiny.path, torch_dtype=torch.float16).text_encoder_3
    ours = load_text_encoder(tiny, "t5", torch.float16).model
    assert {name: p.dtype for name, p in ours.named_parameters()} == {
        name: p.dtype for name, p in expected.named_parameters()
    }


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"])
def test_the_pipeline_has_the_weights_that_diffusers_loads(name: str) -> None:
    base = resolve_base(name)
    ours, theirs = load_pipeline(base, torch.float32), StableDiffusion3Pipeline.from_pretrained(base.path)
    assert ours.components.keys() == theirs.components.keys()
    for part, model in theirs.components.items():
        if isinstance(model, torch.nn.Module):
            state = getattr(ours, part).state_dict()
            assert state.keys() == model.state_dict().keys()
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    prompt = {"prompt": "a dog", "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    images = [pipeline(**prompt, generator=torch.Generator().manual_seed(0)).images for pipeline in (ours, theirs)]
    assert torch.equal(*images)


def test_a_pipeline_without_t5_has_none(tiny: Base) -> None:
    pipeline = load_pipeline(tiny, torch.float32, t5=False)
    assert (pipeline.text_encoder_3, pipeline.tokenizer_3) == (None, None)


def test_the_scheduler_has_the_base_s_own_shift(broken: Base) -> None:
    assert load_scheduler(broken).config.shift == 3.0
    path = broken.path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 1.5}))
    assert load_scheduler(broken).shift == 1.5


def test_the_empty_transformer_has_the_shapes_and_no_weights(broken: Base) -> None:
    real = load_transformer(broken, torch.float32)
    weights(broken, "transformer").unlink()
    assert transformer_config(broken)["dual_attention_layers"] == [0, 1]
    empty = empty_transformer(broken)
    assert {key: value.shape for key, value in empty.state_dict().items()} == {
        key: value.shape for key, value in real.state_dict().items()
    }
    assert all(value.is_meta for value in empty.state_dict().values())


@pytest.mark.parametrize("part", LOADERS)
def test_a_truncated_file_is_named(part: str, broken: Base) -> None:
    file = weights(broken, part)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{file}: truncated") as caught:
        LOADERS[part](broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", LOADERS)
def test_nan_and_infinity_are_named(part: str, broken: Base) -> None:
    for bad in (float("nan"), float("inf")):
        file = weights(broken, part)
        name = change(file, lambda tensors, name, bad=bad: tensors[name][1].fill_(bad))  # type: ignore[misc]
        with pytest.raises(ModelError, match=rf"{file.name}.*NaN or infinity in {name}"):
            LOADERS[part](broken)


@pytest.mark.parametrize("part", LOADERS)
def test_a_missing_tensor_is_named(part: str, broken: Base) -> None:
    name = change(weights(broken, part), lambda tensors, name: tensors.__delitem__(name))
    with pytest.raises(ModelError, match=rf"{part}.*missing.*{name}"):
        LOADERS[part](broken)


@pytest.mark.parametrize("part", LOADERS)
def test_a_tensor_of_another_shape_is_named(part: str, broken: Base) -> None:
    def cut(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = tensors[name][:-1].clone()

    name = change(weights(broken, part), cut)
    with pytest.raises(ModelError, match=name) as caught:
        LOADERS[part](broken)
    assert str(broken.path / part) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_transformer_weights_that_the_config_does_not_know_are_an_error(broken: Base) -> None:
    """Else a config without dual attention would drop `attn2` and train another model than the file's."""
    path = broken.path / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "qk_norm": None}))
    with pytest.raises(ModelError, match=r"unexpected: .*norm_.* and \d+ more"):
        load_transformer(broken, torch.float32)


def test_a_broken_config_or_tokenizer_is_one_line(broken: Base) -> None:
    (broken.path / "vae" / "config.json").write_text("{")
    (broken.path / "tokenizer" / "vocab.json").write_text("{")
    for says, load in (
        (r"vae/config\.json: not valid JSON", LOADERS["vae"]),
        ("tokenizer: cannot be loaded", LOADERS["text_encoder"]),
    ):
        with pytest.raises(ModelError, match=says) as caught:
            load(broken)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_3", "tokenizer", "scheduler"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_in_the_folder_of_a_part_is_refused(part: str, name: str, broken: Base) -> None:
    (broken.path / part / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"{part}/{name}: an adapter inside a base") as caught:
        broken.folder(part)
    assert "\n" not in str(caught.value)


def test_a_text_encoder_is_not_loaded_with_an_adapter_that_lies_in_its_folder(broken: Base) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "task_type": None}
    (broken.path / "text_encoder" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="an adapter inside a base"):
        LOADERS["text_encoder"](broken)


def test_a_scheduler_is_checked_before_it_is_made(broken: Base) -> None:
    file = broken.path / "scheduler" / "scheduler_config.json"
    for shift in (0, "3", None, -1.0):
        file.write_text(json.dumps({"shift": shift}))
        with pytest.raises(ModelError, match=r"scheduler_config\.json: shift: "):
            load_scheduler(broken)


META: dict[str, Callable[[Base], object]] = {
    "vae": lambda base: load_vae(base, torch.float32, "meta"),
    "text_encoder": lambda base: text_encoder_shape(base, "clip_l", torch.float32),
    "text_encoder_3": lambda base: text_encoder_shape(base, "t5", torch.float32),
}


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("vae", "latent_channels", [16]), ("text_encoder", "hidden_act", "no such"), ("text_encoder_3", "d_ff", None)],
)
def test_an_odd_configuration_is_one_line_on_the_meta_device(part: str, key: str, value: object, broken: Base) -> None:
    file = broken.path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ModelError) as caught:
        META[part](broken)
    assert str(broken.path) in str(caught.value)
    assert "\n" not in str(caught.value)
