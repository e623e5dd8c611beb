"""A base in one file: the same numbers as from the folder, in every precision it may be stored in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline, load_text_encoder, load_transformer, load_vae
from sd3tune.model.load.latents import decode, encode_moments

SingleFile = Callable[[str], Path]
TEXTS = ["a photo of sks dog", "", "two cats, on a  mat! (detailed)"]


def beside(file: Path) -> dict[str, str]:
    return {encoder: str(file.with_name(f"{encoder}.safetensors")) for encoder in ENCODERS}


@pytest.fixture
def both(single_file: SingleFile, tiny_in_bf16: str) -> tuple[Base, Base]:
    """A base as a single file, and as a folder."""
    file = single_file(tiny_in_bf16)
    return resolve_base(str(file), None, beside(file), "tiny"), resolve_base(tiny_in_bf16)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tiny", "tiny-sd35-large"])
def test_the_parts_equal_the_folders(single_file: SingleFile, unprojected, name: str, dtype: torch.dtype) -> None:
    file = single_file(unprojected(name))
    base, folder = resolve_base(str(file), None, beside(file), name), resolve_base(unprojected(name))
    assert (base.kind, base.variant) == ("file", None)
    assert equal(load_transformer(base, dtype), load_transformer(folder, dtype))
    assert equal(load_vae(base, dtype), load_vae(folder, dtype))
    for encoder in ENCODERS:
        ours, theirs = (load_text_encoder(of, encoder, dtype) for of in (base, folder))
        assert equal(ours.model, theirs.model)
        for one, other in zip(ours.encode(TEXTS), theirs.encode(TEXTS), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="memory maps are read as Linux lists them")
def test_weights_in_their_stored_precision_are_the_mapped_file(both: tuple[Base, Base]) -> None:
    """All but the split projections. A copy in fp32, as an intermediate step, would be 33 GB for SD3.5-large."""
    base = both[0]
    loaded = [load_transformer(base, torch.bfloat16), load_vae(base, torch.bfloat16)]
    lines = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(base.path) in line]
    ranges = [tuple(int(end, 16) for end in line.split("-")) for line in lines]
    for model in loaded:
        weights = list(model.parameters())
        mapped = [one for one in weights if any(start <= one.data_ptr() < end for start, end in ranges)]
        assert sum(one.nbytes for one in mapped) > 0.75 * sum(one.nbytes for one in weights)


class Cosines(TorchDispatchMode):
    """Collects the devices on which cosines are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cos.default:
            self.devices.add(result.device.type)
        return result


def test_the_table_of_positions_is_read_and_not_computed_first(both: tuple[Base, Base]) -> None:
    for base in both:
        with Cosines() as cosines:
            table = load_transformer(base, torch.float32).pos_embed.pos_embed
        assert cosines.devices == {"meta"}
        assert table.abs().max() == 1


@pytest.mark.parametrize("t5", [True, False])
def test_the_pipeline_draws_the_folders_picture(both: tuple[Base, Base], t5: bool) -> None:
    images = []
    for base in both:
        pipeline = load_pipeline(base, torch.float32, t5=t5)
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
        images.append(pipeline("sks dog", generator=torch.Generator().manual_seed(0), **size).images)
    assert torch.equal(*images)


def test_latents_and_pixels_equal_the_folders(both: tuple[Base, Base]) -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours, theirs = (load_vae(base, torch.float32) for base in both)
    for one, other in zip(encode_moments(ours, pixels), encode_moments(theirs, pixels), strict=True):
        assert torch.equal(one, other)
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(decode(ours, latents), decode(theirs, latents))


def rewritten(file: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, target)
    return target


def test_encoders_inside_the_checkpoint_need_no_files(single_file: SingleFile, unprojected, tmp_path: Path) -> None:
    file = single_file(unprojected("tiny"))

    def include(tensors: dict[str, torch.Tensor]) -> None:
        for encoder, inside in (("clip_l", "clip_l"), ("clip_g", "clip_g"), ("t5", "t5xxl")):
            held = load_file(file.with_name(f"{encoder}.safetensors"))
            tensors |= {f"text_encoders.{inside}.transformer.{name}": value for name, value in held.items()}

    base = resolve_base(str(rewritten(file, tmp_path / "all.safetensors", include)), tokenizers="tiny")
    base.check_encoders(ENCODERS)
    for encoder in ENCODERS:
        ours, theirs = (
            load_text_encoder(of, encoder, torch.float32) for of in (base, resolve_base(unprojected("tiny")))
        )
        assert equal(ours.model, theirs.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_fp8_t5_is_cast_to_the_dtype_of_the_run(
    single_file: SingleFile, tmp_path: Path, dtype: torch.dtype, scaled: bool
) -> None:
    """Against the same numbers stored in fp32; scales are powers of two, so that both are exact."""
    plain = single_file("tiny").with_name("t5.safetensors")
    stored, expected = {}, {}
    for name, tensor in load_file(plain).items():
        scale = 0.25 if scaled and name.endswith("SelfAttention.q.weight") else 1.0
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        expected[name] = stored[name].float() * scale
        if scale != 1.0:
            stored[f"{name.removesuffix('weight')}scale_weight"] = torch.tensor(scale)
    if scaled:
        stored["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    models = []
    for name, tensors in (("fp8", stored), ("fp32", expected)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        base = resolve_base("tiny", encoder_files={"t5": str(tmp_path / f"{name}.safetensors")})
        base.check_encoders(ENCODERS)
        models.append(load_text_encoder(base, "t5", dtype).model)
    assert equal(*models)
    assert not equal(models[0], load_text_encoder(resolve_base("tiny"), "t5", dtype).model)


def test_a_t5_whose_embedding_has_two_names_or_the_other_one(single_file: SingleFile, tmp_path: Path) -> None:
    plain = single_file("tiny").with_name("t5.safetensors")
    expected = load_text_encoder(resolve_base("tiny"), "t5", torch.float32).model
    for name, edit in (
        ("both", lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone()})),
        ("other", lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")})),
    ):
        file = rewritten(plain, tmp_path / f"{name}.safetensors", edit)
        base = resolve_base("tiny", encoder_files={"t5": str(file)})
        assert equal(load_text_encoder(base, "t5", torch.float32).model, expected)


def test_a_checkpoint_in_fp8_with_scales_is_decoded(single_file: SingleFile, tmp_path: Path) -> None:
    weight = "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        tensors[weight] = (tensors[weight] * 2).to(torch.float8_e4m3fn)
        tensors[weight.replace(".weight", ".scale_weight")] = torch.tensor([0.5])
        tensors["model.diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)

    base = resolve_base(str(rewritten(single_file("tiny"), tmp_path / "fp8.safetensors", quantise)))
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    found, exact = (load_transformer(of, torch.float32).state_dict()[name] for of in (base, resolve_base("tiny")))
    assert (found - exact).abs().max() < 2**-4 * exact.abs().max()
    assert not torch.equal(found, exact)


# What is refused


@pytest.mark.parametrize("part", ["transformer", "vae", "t5"])
def test_nan_is_named_with_its_file(single_file: SingleFile, tmp_path: Path, part: str) -> None:
    file = single_file("tiny")
    source = file.with_name("t5.safetensors") if part == "t5" else file
    begins = {"transformer": "model.diffusion_model.joint_blocks", "vae": "first_stage_model.decoder", "t5": "encoder"}

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        next(value for name, value in tensors.items() if name.startswith(begins[part])).view(-1)[0] = float("nan")

    bad = rewritten(source, tmp_path / "bad.safetensors", poison)
    base = resolve_base("tiny", encoder_files={"t5": str(bad)}) if part == "t5" else resolve_base(str(bad))
    load = {
        "transformer": lambda: load_transformer(base, torch.float32),
        "vae": lambda: load_vae(base, torch.float32),
        "t5": lambda: load_text_encoder(base, "t5", torch.float32),
    }[part]
    with pytest.raises(ModelError, match=r"bad\.safetensors: NaN or infinity in ") as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.pop("first_stage_model.decoder.mid.attn_1.q.weight"),
            r"model\.safetensors: weights that its config makes missing: decoder\.mid_block\..*to_q\.weight",
        ),
        (
            lambda tensors: tensors.update({"first_stage_model.decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}),
            r"model\.safetensors: cannot be loaded: .*decoder\.conv_out\.weight.*expected shape",
        ),
        (
            lambda tensors: tensors.update({"first_stage_model.decoder.conv_out.bias": torch.zeros(3).byte()}),
            r"model\.safetensors: first_stage_model\.decoder\.conv_out\.bias is quantised \(uint8\).*get .* fp16",
        ),
        (
            lambda tensors: tensors.update({"first_stage_model.decoder.conv_out.weight_scale": torch.zeros(3)}),
            r"model\.safetensors: first_stage_model\.decoder\.conv_out\.weight is quantised \(float32\)",
        ),
    ],
)
def test_what_is_wrong_inside_is_one_line(single_file: SingleFile, tmp_path: Path, edit, message: str) -> None:
    base = resolve_base(str(rewritten(single_file("tiny"), tmp_path / "model.safetensors", edit)))
    with pytest.raises(ModelError, match=message) as caught:
        load_vae(base, torch.float32)
    assert "\n" not in str(caught.value)


def test_missing_encoders_and_tokenizers_are_told_at_once(single_file: SingleFile) -> None:
    file = single_file("tiny")
    with pytest.raises(ModelError) as caught:
        resolve_base(str(file), None, {"clip_g": beside(file)["clip_g"]}).check_encoders(ENCODERS)
    clip_l, t5, tokenizers = caught.value.problems
    assert "CLIP-L is not in this file: name the file that holds it in model.text_encoders.clip_l" in clip_l
    assert "T5 is not in this file" in t5
    assert "model.t5=false" in t5
    assert "a single file holds no tokenizers" in tokenizers
    with pytest.raises(ModelError) as caught:
        resolve_base(str(file), None, beside(file)).check_encoders(["clip_l", "clip_g"])
    assert len(caught.value.problems) == 1


def test_tokenizers_come_from_a_folder(single_file: SingleFile, tmp_path: Path) -> None:
    file, tiny = single_file("tiny"), resolve_base("tiny")
    shutil.copytree(tiny.path / "tokenizer", tmp_path / "tokenizer")
    base = resolve_base(str(file), None, beside(file), str(tmp_path))
    assert base.fingerprint("tokenizer") == tiny.fingerprint("tokenizer")
    with pytest.raises(ModelError, match=r"no tokenizer_2/tokenizer_config\.json; give model\.tokenizers: a folder"):
        base.check_encoders(ENCODERS)


def test_fingerprints_cover_the_file_that_is_used(single_file: SingleFile, tmp_path: Path) -> None:
    file = single_file("tiny")
    copied = rewritten(file, tmp_path / "copy.safetensors", lambda tensors: None)
    changed = rewritten(
        file,
        tmp_path / "changed.safetensors",
        lambda tensors: tensors["first_stage_model.decoder.conv_in.bias"].add_(1),
    )
    one, same, other = (resolve_base(str(path)) for path in (file, copied, changed))
    for part, differs in (("transformer", False), ("vae", True)):
        assert one.fingerprint(part) == same.fingerprint(part)
        assert (one.fingerprint(part) != other.fingerprint(part)) is differs
    own = resolve_base("tiny")
    mixed = resolve_base("tiny", encoder_files={"clip_l": beside(file)["clip_l"]})
    assert mixed.fingerprint("text_encoder") != own.fingerprint("text_encoder")  # its config is derived
    assert mixed.fingerprint("text_encoder_2") == own.fingerprint("text_encoder_2")


@pytest.mark.parametrize(
    ("name", "inside", "distilled"),
    [
        ("sd3.5_large_turbo.safetensors", None, True),
        ("sd3.5_large.safetensors", None, False),
        ("my-model", {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}, True),
        ("my-Turbo-model", {}, True),
        ("my-model", {"_name_or_path": "stabilityai/stable-diffusion-3.5-large"}, False),
    ],
)
def test_a_turbo_model_is_known_by_its_name(
    single_file: SingleFile, tmp_path: Path, name: str, inside: dict[str, str] | None, distilled: bool
) -> None:
    path = tmp_path / name
    if inside is None:
        shutil.copy(single_file("tiny"), path)
    else:
        shutil.copytree(resolve_base("tiny").path, path)
        config = path / "transformer" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **inside}))
    assert resolve_base(str(path)).distilled is distilled
