"""DoRA, LoHa and LoKr files: ours in diffusers and ComfyUI, and other tools' here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoHaConfig, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.kinds import change_of
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.commands.lora_merge import merge_into_base, merge_loras
from sd3tune.commands.lora_resize import resize_lora
from sd3tune.commands.lora_verify import verify_lora
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError, UserError
from sd3tune.inference.job import InferenceJob, Memory
from sd3tune.inference.prepare import prepare
from sd3tune.methods import METHODS
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer, load_vae
from sd3tune.model.load.quantized import is_quantized, load_transformer_in, weights_of

KINDS = ("dora", "loha", "lokr")
QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
Velocity = Callable[[SD3Transformer2DModel], Tensor]


def fresh() -> SD3Transformer2DModel:
    return load_transformer(resolve_base("tiny"), torch.float32)


def with_adapter(file: Path) -> SD3Transformer2DModel:
    transformer = fresh()
    attach(transformer, read_adapter(file), "default")
    return transformer


def with_changes(changes: Mapping[str, Tensor]) -> SD3Transformer2DModel:
    """The base with these changes added to its weights."""
    transformer = fresh()
    for module, change in changes.items():
        weight = transformer.get_submodule(module).weight
        weight.data = (weight.double() + change).float()
    return transformer


@pytest.fixture(scope="module")
def exported(quick_config, tmp_path_factory) -> Callable[..., Path]:
    """`exported(kind, "key=value", ...)`: the file of a random adapter of that kind, with a scale of 1.5."""
    made: dict[tuple[str, ...], Path] = {}

    def make(kind: str, *settings: str) -> Path:
        if (kind, *settings) not in made:
            folder = tmp_path_factory.mktemp(kind)
            config = quick_config(folder / "run", f"method={{kind: {kind}, rank: 2, alpha: 3.0}}", *settings)
            method = METHODS[kind](config, resolve_base("tiny"))
            parameters = method.inject(fresh(), lambda name: generator(0, "init", name))
            weights = {
                name: value.detach() + 0.2 * torch.randn(value.shape, generator=generator(1, name))
                for name, value in parameters.items()
            }
            contract = {"base": "tiny", "base_kind": "tiny", "max_sequence_length": 16, **method.contract()}
            made[(kind, *settings)] = method.export(folder / "adapter", weights, contract)
        return made[(kind, *settings)]

    return make


def pipeline() -> StableDiffusion3Pipeline:
    parts = dict.fromkeys([f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")])
    return StableDiffusion3Pipeline(
        transformer=fresh(), scheduler=None, vae=load_vae(resolve_base("tiny"), torch.float32), **parts
    )


def test_diffusers_loads_dora_with_equal_output(velocity: Velocity, exported) -> None:
    file = exported("dora")
    pipe = pipeline()
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    assert torch.equal(velocity(pipe.transformer), velocity(with_adapter(file)))
    assert not torch.allclose(velocity(pipe.transformer), velocity(fresh()), atol=1e-2)


@pytest.mark.parametrize("settings", [(), ("method.decompose_both=true",), ("method.factor=4",), ("method.rank=64",)])
def test_diffusers_loads_lokr_into_the_transformer_only(
    velocity: Velocity, exported, settings: tuple[str, ...]
) -> None:
    file = exported("lokr", *settings)
    pipe = pipeline()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    pipe.transformer.load_lora_adapter(file.parent, weight_name=file.name)
    assert torch.equal(velocity(pipe.transformer), velocity(with_adapter(file)))
    assert not torch.allclose(velocity(pipe.transformer), velocity(fresh()), atol=1e-2)


def test_peft_loads_loha_with_equal_output_and_diffusers_does_not(velocity: Velocity, exported) -> None:
    file = exported("loha")
    pipe = pipeline()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights(file.parent, weight_name=file.name)
    transformer = fresh()
    with safe_open(file, "pt") as opened:
        tensors = {key.removeprefix("transformer."): opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    modules = sorted({key.rpartition(".")[0] for key in tensors})
    transformer.add_adapter(LoHaConfig(r=2, alpha=2, target_modules=modules))
    assert not set_peft_model_state_dict(transformer, tensors).unexpected_keys
    assert torch.equal(velocity(transformer), velocity(with_adapter(file)))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_the_formulas_say(velocity: Velocity, exported, kind: str) -> None:
    """DoRA: m (W + BA) / |W + BA|; LoHa: (w1_a w1_b) * (w2_a w2_b); LoKr: w1 (x) (w2_a w2_b), or w2 whole."""
    tensors, base = load_file(exported(kind)), fresh()
    changes = {}
    for module in dict.fromkeys(key.removeprefix("transformer.").partition(".lora_")[0].partition(".hada")[0]
                                .partition(".lokr")[0] for key in tensors):  # fmt: skip
        of = {key.removeprefix(f"transformer.{module}."): value.double() for key, value in tensors.items()
              if key.startswith(f"transformer.{module}.")}  # fmt: skip
        weight = base.get_submodule(module).weight.detach().double()
        if kind == "dora":
            whole = weight + of["lora_B.weight"] @ of["lora_A.weight"]
            rows = whole.square().sum(dim=1).sqrt()
            changes[module] = (of["lora_magnitude_vector"] / rows)[:, None] * whole - weight
        elif kind == "loha":
            changes[module] = (of["hada_w1_a"] @ of["hada_w1_b"]) * (of["hada_w2_a"] @ of["hada_w2_b"])
        else:
            second = of["lokr_w2"] if "lokr_w2" in of else of["lokr_w2_a"] @ of["lokr_w2_b"]
            (a, c), (b, d) = of["lokr_w1"].shape, second.shape
            product = of["lokr_w1"][:, None, :, None] * second[None, :, None, :]
            changes[module] = product.reshape(a * b, c * d)
    expected = velocity(with_changes(changes))
    torch.testing.assert_close(velocity(with_adapter(exported(kind))), expected, rtol=0, atol=1e-5)


def comfyui(weight: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A weight as ComfyUI changes it (v0.3.77, comfy/weight_adapter): for one `dora_scale` per output it divides by
    the norm of the weight before the change."""
    update = tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double()
    update *= tensors[f"{name}.alpha"].item() / len(tensors[f"{name}.lora_down.weight"])
    scale = tensors[f"{name}.dora_scale"].double()
    assert scale.shape == (len(weight), 1)
    return (weight + update) * (scale / weight.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "settings", [(), ("method.targets=['re:.*(to_q|to_out.0|norm_out.linear|norm1_context.linear)']",)]
)
def test_comfyui_computes_the_same_weights_from_a_converted_dora(
    exported, original_layout, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    file = exported("dora", *settings)
    adapter, base = read_adapter(file), fresh()
    changes = {name: change_of(adapter, name, base.get_submodule(name).weight.detach()) for name in adapter.sizes}
    vae = load_vae(resolve_base("tiny"), torch.float32).state_dict()
    before = original_layout(base.state_dict(), vae)
    after = original_layout(with_changes(changes).state_dict(), vae)
    convert_lora(file, "kohya", tmp_path / "k.safetensors")
    tensors = load_file(tmp_path / "k.safetensors")
    names = {key.partition(".")[0] for key in tensors}
    seen = 0
    for key, weight in before.items():
        name = "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        if name in names:
            torch.testing.assert_close(comfyui(weight.double(), tensors, name), after[key].double(), rtol=0, atol=1e-5)
            seen += 1
    assert seen == len(names) > 5


@pytest.mark.parametrize("form", ["kohya", "comfyui", "lycoris", "diffusers"])
def test_converted_dora_is_read_back(velocity: Velocity, exported, tmp_path: Path, form: str) -> None:
    convert_lora(exported("dora"), form, tmp_path / "a.safetensors")
    expected = velocity(with_adapter(exported("dora")))
    torch.testing.assert_close(velocity(with_adapter(tmp_path / "a.safetensors")), expected, rtol=0, atol=1e-5)
    before, after, base = read_adapter(exported("dora")), read_adapter(tmp_path / "a.safetensors"), fresh()
    for name in before.sizes:
        weight = base.get_submodule(name).weight.detach()
        torch.testing.assert_close(change_of(after, name, weight), change_of(before, name, weight), rtol=0, atol=1e-6)
    convert_lora(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    first, again = load_file(exported("dora")), load_file(tmp_path / "b.safetensors")
    assert first.keys() == again.keys()
    for key, value in first.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_names_are_written_and_read(velocity: Velocity, exported, tmp_path: Path, kind: str) -> None:
    convert_lora(exported(kind), "lycoris", tmp_path / "a.safetensors")
    names = set(load_file(tmp_path / "a.safetensors"))
    assert {
        f"lycoris_transformer_blocks_0_attn_to_q.{part}"
        for part in ("alpha", {"loha": "hada_w1_a"}.get(kind, "lokr_w1"))
    } <= names
    assert torch.equal(velocity(with_adapter(tmp_path / "a.safetensors")), velocity(with_adapter(exported(kind))))
    with pytest.raises(AdapterError, match="q, k and v are one module there"):
        convert_lora(exported(kind), "kohya", tmp_path / "b.safetensors")


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=generator(seed, *shape))


FUSED = "lora_unet_joint_blocks_0_x_block_attn_qkv"
WIDTH = 64


def foreign_files() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Files as LyCORIS writes them for sd-scripts -> tensors, and the change of the fused q, k and v."""
    loha = {"hada_w1_a": random(3 * WIDTH, 2), "hada_w1_b": random(2, WIDTH, seed=1),
            "hada_w2_a": random(3 * WIDTH, 2, seed=2), "hada_w2_b": random(2, WIDTH, seed=3)}  # fmt: skip
    first, second = loha["hada_w1_a"] @ loha["hada_w1_b"], loha["hada_w2_a"] @ loha["hada_w2_b"]
    cut = {"lokr_w1": random(12, 8), "lokr_w2_a": random(16, 4), "lokr_w2_b": random(4, 8)}
    whole = {"lokr_w1": random(8, 8), "lokr_w2": random(24, 8)}
    return {
        "loha": ({**loha, "alpha": torch.tensor(1.0)}, first * second / 2),
        "lokr": (
            {**cut, "alpha": torch.tensor(8.0)},
            2 * torch.kron(cut["lokr_w1"], cut["lokr_w2_a"] @ cut["lokr_w2_b"]),
        ),
        "whole lokr": ({**whole, "alpha": torch.tensor(7.0)}, torch.kron(whole["lokr_w1"], whole["lokr_w2"])),
    }


@pytest.mark.parametrize("case", ["loha", "lokr", "whole lokr"])
def test_fused_lycoris_files_of_other_tools_are_applied(velocity: Velocity, tmp_path: Path, case: str) -> None:
    """`whole lokr` has 8 rows in w1, which three parts cannot share; its alpha counts for nothing."""
    parts, change = foreign_files()[case]
    save_file({f"{FUSED}.{part}": value for part, value in parts.items()}, tmp_path / "a.safetensors")
    names = [f"transformer_blocks.0.attn.to_{letter}" for letter in "qkv"]
    expected = velocity(with_changes(dict(zip(names, change.double().chunk(3), strict=True))))
    torch.testing.assert_close(velocity(with_adapter(tmp_path / "a.safetensors")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_doras_of_other_tools_are_applied(velocity: Velocity, tmp_path: Path, axis: str, kind: str) -> None:
    """As LyCORIS trains them (`wd_on_out` or not): m (W + U) / |W + U|, per output or, as OneTrainer, per input."""
    name, weight = "lycoris_transformer_blocks_0_attn_to_q", fresh().get_submodule(QUERY).weight.detach().double()
    parts = {"lokr_w1": random(8, 8), "lokr_w2": random(8, 8, seed=1)}
    update = torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    if kind == "lora":
        parts = {"lora_down.weight": random(2, WIDTH), "lora_up.weight": random(WIDTH, 2), "alpha": torch.tensor(1.0)}
        update = parts["lora_up.weight"] @ parts["lora_down.weight"] / 2
    dim = 1 if axis == "output" else 0
    magnitude = 1 + random(*((WIDTH, 1) if axis == "output" else (1, WIDTH)), seed=4).abs()
    tensors = {f"{name}.{part}": value for part, value in parts.items()} | {f"{name}.dora_scale": magnitude}
    save_file(tensors, tmp_path / "a.safetensors")
    whole = weight + update.double()
    change = whole * (magnitude.double() / whole.norm(dim=dim, keepdim=True)) - weight
    expected = velocity(with_changes({QUERY: change}))
    torch.testing.assert_close(velocity(with_adapter(tmp_path / "a.safetensors")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_lora_is_within_the_error_that_is_reported(exported, tmp_path: Path, kind: str) -> None:
    adapter, base = read_adapter(exported(kind)), fresh()
    changes = {name: change_of(adapter, name, base.get_submodule(name).weight.detach()) for name in adapter.sizes}
    lines = convert_lora(exported(kind), "diffusers", tmp_path / "a.safetensors", rank=4)
    near = read_adapter(tmp_path / "a.safetensors")
    assert (near.kind, near.contract["rank"]) == ("LoRA", 4)
    folded = near.folded()
    lost = sum((changes[name] - up.double() @ down.double()).square().sum() for name, (down, up) in folded.items())
    total = sum(change.square().sum() for change in changes.values())
    assert f"lost: {(lost / total).sqrt().item():.3%} of the weight update's norm" in lines[2]
    assert lines[3].startswith("by block: block 0 ")
    whole = convert_lora(exported(kind), "kohya", tmp_path / "b.safetensors", rank=64)
    assert "lost: 0.000%" in whole[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_base_draws_what_the_adapter_draws(velocity: Velocity, exported, tmp_path: Path, kind: str) -> None:
    merge_into_base([str(exported(kind))], tmp_path / "model", None)
    merged = load_transformer(resolve_base(str(tmp_path / "model")), torch.float32)
    torch.testing.assert_close(velocity(merged), velocity(with_adapter(exported(kind))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_described_and_verified_or_refused_by_name(exported, tmp_path: Path, kind: str) -> None:
    file, name = exported(kind), {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}[kind]
    lines = inspect_lora(file)
    assert lines[0].endswith(f"a {name} in diffusers' layout")
    assert not [line for line in lines if line.startswith("warning")]
    if kind == "loha":
        with pytest.raises(AdapterError, match="diffusers does not load this LoHa; merge it into its base"):
            verify_lora(file, None, "fp32", preview=False)
    else:
        assert "tensors of 38 modules loaded by diffusers" in verify_lora(file, None, "fp32", preview=False)[0]
    for refused in (
        lambda: resize_lora(file, tmp_path / "a.safetensors", 1, None),
        lambda: merge_loras([str(file)], tmp_path / "b.safetensors", "diffusers", "concat", None),
    ):
        with pytest.raises(AdapterError, match=f"is a {name}, and lora (resize|merge .*) takes LoRA only"):
            refused()


def test_several_kinds_are_applied_together(velocity: Velocity, exported) -> None:
    files = [exported(kind) for kind in ("lora", "lokr", "loha")]
    transformer, base = fresh(), fresh()
    changes: dict[str, Tensor] = {}
    for number, file in enumerate(files):
        adapter = read_adapter(file)
        attach(transformer, adapter, f"adapter_{number}")
        for name in adapter.sizes:
            change = change_of(adapter, name, base.get_submodule(name).weight.detach())
            changes[name] = changes.get(name, 0) + (number + 1) / 2 * change
    transformer.set_adapters([f"adapter_{number}" for number in range(3)], [0.5, 1.0, 1.5])
    torch.testing.assert_close(velocity(transformer), velocity(with_changes(changes)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"transformer.{QUERY}.hada_w1_a": (64, 2)}, "hada_w1 is not complete"),
        ({f"transformer.{QUERY}.lokr_w1": (8, 8)}, "lokr_w2 is not complete"),
        ({f"transformer.{QUERY}.lokr_w1": (8, 8), f"transformer.{QUERY}.lokr_w2_a": (8, 2),
          f"transformer.{QUERY}.lokr_w2_b": (3, 8)}, "lokr_w2_a and lokr_w2_b are not of one rank"),
        ({f"transformer.{QUERY}.lokr_w1": (8, 8), f"transformer.{QUERY}.lokr_w2": (8, 8, 1, 1)}, "a convolution"),
        ({f"transformer.{QUERY}.lora_A.weight": (2, 64), f"transformer.{QUERY}.lora_B.weight": (64, 2),
          f"transformer.{QUERY}.dora_scale": (5,)}, "its DoRA magnitude has shape [5]"),
        ({f"transformer.{QUERY}.dora_scale": (64,)}, "not a pair of matrices"),
        ({f"{FUSED}.lora_down.weight": (2, 64), f"{FUSED}.lora_up.weight": (192, 2), f"{FUSED}.dora_scale": (1, 64)},
         "one per input of q, k and v together"),
        ({f"transformer.{QUERY}.lokr_w1": (8, 8), f"transformer.{QUERY}.lokr_w2": (8, 8),
          f"transformer.{KEY}.lora_A.weight": (2, 64), f"transformer.{KEY}.lora_B.weight": (64, 2)}, "several kinds"),
    ],
)  # fmt: skip
def test_incomplete_files_are_refused_by_name(tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str) -> None:
    save_file({key: torch.ones(shape) for key, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path / "a.safetensors")
    (line,) = caught.value.problems
    assert says in line


@pytest.mark.parametrize(("kind", "form"), [("dora", "int8"), ("loha", "int8"), ("lokr", "int8"), ("dora", "nf4")])
def test_a_quantised_base_counts_with_the_weights_that_it_multiplies(velocity, exported, kind: str, form: str) -> None:
    """DoRA's norms are of the dequantised weights, not of the stored codes."""
    if form == "nf4":
        pytest.importorskip("bitsandbytes")
    adapter = read_adapter(exported(kind))
    quantised = load_transformer_in(form, resolve_base("tiny"), torch.float32, torch.device("cpu"))
    stored = {name: weights_of(module, torch.float32) for name, module in quantised.named_modules()
              if is_quantized(module)}  # fmt: skip
    expected = fresh()
    for name, weight in stored.items():
        change = change_of(adapter, name, weight).float() if name in adapter.sizes else 0
        expected.get_submodule(name).weight.data = weight + change
    attach(quantised, adapter, "default")
    torch.testing.assert_close(velocity(quantised), velocity(expected), rtol=0, atol=1e-5)


def test_lycoris_adapters_and_a_base_in_nf4_are_refused_before_anything_is_loaded(exported, tmp_path: Path) -> None:
    job = InferenceJob(loras=[str(exported("lokr"))], given={"prompt": "a dog"}, memory=Memory(quantize="nf4"))
    with pytest.raises(UserError, match="is a LoKr, whose change needs a base with whole rows; take --quantize int8"):
        prepare(job)
