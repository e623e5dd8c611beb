"""The released models as they are on the Hub, at full size: what is downloaded, what is loaded, and its shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sd3tune.config.sections.model import ModelConfig
from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import CONFIG_FILES, ENCODER_PARTS, VARIANTS
from sd3tune.model.base.resolve import resolve_base, shape_of_base
from sd3tune.model.base.single_file_header import released_shape
from sd3tune.model.base.weights import tensor_headers, weight_files
from sd3tune.model.load.components import (
    empty_transformer,
    load_text_encoder,
    load_vae,
    stored_dtype,
    text_encoder_shape,
)
from tests.local_hub import ask, cache_large_files, hub
from tests.released_models import (
    SINGLE_FILES,
    SIZES,
    empty_model,
    published_config,
    write_hollow,
    write_repository,
)

Released = Callable[[str], Path]
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(
        f"{folder}/{name}"
        for folder in ("tokenizer", "tokenizer_2")
        for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    ),
    *(
        f"tokenizer_3/{name}"
        for name in ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
    ),
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
}
IN_ONE_FILE = {"transformer/diffusion_pytorch_model.safetensors"}
IN_SHARDS = {
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
}
TRANSFORMER = {"sd3-medium": IN_ONE_FILE, "sd35-medium": IN_ONE_FILE, "sd35-large": IN_SHARDS}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, original_layout) -> Released:
    """`released("sd35-large")`: the repository of that model. Read only."""
    root = tmp_path_factory.mktemp("hub")

    def write(variant: str) -> Path:
        folder: Path = root / VARIANTS[variant]
        if not folder.exists():
            parts = (empty_model(variant, part).state_dict() for part in ("transformer", "vae"))
            tensors = original_layout(*parts).items()
            write_repository(variant, folder, {name: tensor.bfloat16() for name, tensor in tensors})
        return folder

    return write


# Downloads

RESOLVE = """
import json, sys
from sd3tune.errors import ModelError
from sd3tune.model.base.parts import CONFIG_FILES, has_weights
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.base.weights import weight_files
for name in sys.argv[1:]:
    base, problems, loaded = resolve_base(name), [], []
    for part in CONFIG_FILES:
        try:
            folder = base.folder(part)
        except ModelError as error:
            problems += error.problems
            continue
        loaded += [f"{part}/{file.name}" for file in (weight_files(folder) if has_weights(part) else [])]
    there = [str(path.relative_to(base.path)) for path in base.path.rglob("*") if path.is_file()]
    print(json.dumps({"there": there, "loaded": loaded, "problems": problems}))
"""


def test_only_the_needed_files_of_a_released_model_are_downloaded(released: Released, tmp_path: Path) -> None:
    names = [*VARIANTS.values(), "somebody/without-a-shard"]
    repositories = [*map(released, VARIANTS)]
    root = repositories[0].parents[1]
    incomplete = Path(shutil.copytree(repositories[-1], root / names[-1], copy_function=_link))
    shards = sorted(incomplete.glob("transformer/*-of-*"))
    shards[1].unlink()
    for name in names:
        cache_large_files(root / name, name, tmp_path)
    with hub(root) as (endpoint, requests):
        done = ask(endpoint, tmp_path, RESOLVE, *names)
    assert done.returncode == 0, done.stderr
    *found, broken = map(json.loads, done.stdout.splitlines())
    for variant, one in zip(VARIANTS, found, strict=True):
        needed = NEEDED | TRANSFORMER[variant]
        assert set(one["there"]) == needed
        assert sorted(one["loaded"]) == sorted(name for name in needed if name.endswith(".safetensors"))
        assert one["problems"] == []
    (problem,) = broken["problems"]
    assert problem.endswith(
        "transformer/diffusion_pytorch_model.safetensors.index.json: names weights that are missing: "
        "diffusion_pytorch_model-00002-of-00002.safetensors"
    )
    fetched = [request for request in requests if request.startswith("GET") and "/resolve/" in request]
    assert not any(request.endswith(".safetensors") for request in fetched)  # else gigabytes were copied here


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


# Shapes


def headers(base: Base, part: str) -> dict[str, dict[str, Any]]:
    return {name: one for file in weight_files(base.folder(part)) for name, one in tensor_headers(file).items()}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_released_folder_is_known_by_its_config_and_its_tensors_fit_it(released: Released, variant: str) -> None:
    base = resolve_base(str(released(variant)))
    assert base.config("transformer") == published_config(variant, "transformer")
    assert released_shape(base.config("transformer")) == variant
    stored = headers(base, "transformer")
    wanted = shapes(empty_transformer(base).state_dict())
    assert {name: one["shape"] for name, one in stored.items()} == wanted
    assert wanted == shapes(empty_transformer(shape_of_base(ModelConfig(base=VARIANTS[variant]))).state_dict())
    assert stored_dtype(base) == (torch.float16 if variant == "sd3-medium" else torch.bfloat16)
    for encoder, (_, part) in ENCODER_PARTS.items():
        expected = shapes(text_encoder_shape(base, encoder, torch.float16).state_dict())
        expected.pop("encoder.embed_tokens.weight", None)  # T5's second name of its embedding
        assert {name: one["shape"] for name, one in headers(base, part).items()} == expected
    assert len({base.fingerprint(part) for part in CONFIG_FILES}) == len(CONFIG_FILES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_have_the_published_sizes(released: Released, variant: str) -> None:
    folder = released(variant)
    files = weight_files(folder / "transformer")
    assert sum(file.stat().st_size for file in files) / 1e9 == pytest.approx(SIZES[variant]["transformer"], abs=0.01)
    if variant in SINGLE_FILES:
        size = (folder / SINGLE_FILES[variant]).stat().st_size
        assert size / 1e9 == pytest.approx(SIZES[variant]["single"], abs=0.01)
    assert sum(file.stat().st_blocks for file in folder.rglob("*")) * 512 < 10e6  # on the disk


@pytest.mark.parametrize(
    ("variant", "t5"), [("sd35-medium", "t5xxl_fp16.safetensors"), ("sd35-large", "t5xxl_fp8_e4m3fn.safetensors")]
)
def test_the_single_files_of_a_repository_are_a_base(released: Released, variant: str, t5: str) -> None:
    folder = released(variant)
    encoders = {
        "clip_l": str(folder / "text_encoders" / "clip_l.safetensors"),
        "clip_g": str(folder / "text_encoders" / "clip_g.safetensors"),
        "t5": str(folder / "text_encoders" / t5),
    }
    base = resolve_base(str(folder / SINGLE_FILES[variant]), encoder_files=encoders, tokenizers=str(folder))
    base.check_encoders(encoders)
    assert base.variant == variant
    whole = resolve_base(str(folder))
    assert shapes(empty_transformer(base).state_dict()) == shapes(empty_transformer(whole).state_dict())
    assert stored_dtype(base) == torch.bfloat16


@pytest.mark.parametrize("part", ["transformer", "text_encoder_3"])
def test_a_shard_that_is_cut_short_is_one_line(released: Released, part: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(released("sd35-large"), folder, copy_function=_link)
    shard = weight_files(folder / part)[1]
    with shard.open("rb") as stream:
        beginning = stream.read(1 << 20)
    shard.unlink()
    shard.write_bytes(beginning)
    with pytest.raises(ModelError, match=rf"{shard.name}: truncated .*; get the file again") as caught:
        resolve_base(str(folder)).fingerprint(part)
    assert len(caught.value.problems) == 1


# Loading


def test_the_smaller_parts_load_at_full_size(released: Released) -> None:
    base = resolve_base(str(released("sd3-medium")), tokenizers=str(resolve_base("tiny").path))
    clip = load_text_encoder(base, "clip_l", torch.float16).model
    assert {tensor.dtype for tensor in clip.parameters()} == {torch.float16}
    assert shapes(clip.state_dict()) == shapes(empty_model("sd3-medium", "text_encoder").state_dict())
    assert shapes(load_vae(base, torch.float32).state_dict()) == shapes(empty_model("sd3-medium", "vae").state_dict())


def test_a_block_of_t5_is_whole_with_its_published_config(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "model"))
    part = folder / "text_encoder_3"
    config = {**published_config("sd35-large", part.name), "num_layers": 1}
    (part / "config.json").write_text(json.dumps(config))
    shape = text_encoder_shape(resolve_base(str(folder)), "t5", torch.float16)
    tensors = {
        name: tensor.half() for name, tensor in shape.state_dict().items() if name != "encoder.embed_tokens.weight"
    }
    write_hollow(part / "model.safetensors", tensors)
    model = load_text_encoder(resolve_base(str(folder)), "t5", torch.float16).model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in shape.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == described
