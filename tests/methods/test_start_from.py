"""Going on from an adapter: the start is what its file computes, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import Adapter, read_adapter, write_adapter
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError, UserError
from sd3tune.methods import METHODS, LoraMethod
from sd3tune.methods.pivotal import PivotalMethod
from sd3tune.methods.start_from import check_start
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_transformer
from sd3tune.model.lora.targets import select_modules


@pytest.fixture
def make(quick_config, tmp_path):
    return lambda *overrides: LoraMethod(quick_config(tmp_path / "run", *overrides))


def factors(targets: str | list[str] = "attention", rank: int = 2, base: str = "tiny") -> dict[str, Tensor]:
    transformer = empty_transformer(resolve_base(base))
    made = {}
    for name in select_modules(transformer, targets):
        module, source = transformer.get_submodule(name), generator(4, name)
        made[f"{name}.lora_A"] = torch.randn(rank, module.in_features, generator=source) / 8
        made[f"{name}.lora_B"] = torch.randn(module.out_features, rank, generator=source) / 8
    return made


def started(method: LoraMethod) -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    return transformer, method.inject(transformer, lambda name: generator(0, name))


def with_file(file: Path) -> SD3Transformer2DModel:
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    attach(transformer, read_adapter(file), "default")
    return transformer


@pytest.mark.parametrize(
    "settings", [("method.alpha=2.0",), ("method.alpha=5.0",), ("method.alpha=3.0", "method.rslora=true")]
)
def test_the_first_step_sees_what_the_file_computes(velocity, make, tmp_path: Path, settings: tuple[str, ...]) -> None:
    file = write_adapter(tmp_path / "a", factors(), {})
    method = make(f"method.start_from={tmp_path / 'a'}", *settings)
    transformer, _ = started(method)
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)


def test_exporting_at_once_gives_the_same_factors(make, tmp_path: Path) -> None:
    made = factors()
    write_adapter(tmp_path / "a", made, {})
    method = make(f"method.start_from={tmp_path / 'a'}", "method.alpha=4.0")  # a power of two times the rank: exact
    _, parameters = started(method)
    exported = method.exported(parameters)
    assert exported.keys() == made.keys()
    assert all(torch.equal(exported[name], made[name]) for name in made)


def test_another_tools_scale_is_kept(velocity, make, tmp_path: Path) -> None:
    """alpha 8 at rank 2, in PEFT's metadata."""
    tensors = {f"transformer.{name}.weight": value for name, value in factors().items()}
    file = tmp_path / "other.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'})
    transformer, _ = started(make(f"method.start_from={file}", "method.alpha=3.0"))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-4)


def test_modules_that_the_file_lacks_start_anew(velocity, make, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a", factors("attention-image"), {})
    transformer, parameters = started(make(f"method.start_from={file}", "method.alpha=3.0"))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)
    assert parameters["transformer_blocks.0.attn.add_k_proj.lora_A"].any()
    assert not parameters["transformer_blocks.0.attn.add_k_proj.lora_B"].any()


def test_a_module_that_cannot_learn_may_be_in_the_file(velocity, make, tmp_path: Path) -> None:
    """diffusers' own script trains the last block's add_q_proj, to no effect."""
    dead = "transformer_blocks.3.attn.add_q_proj"
    extra = {f"{dead}.lora_A": torch.ones(2, 64), f"{dead}.lora_B": torch.ones(64, 2)}
    file = write_adapter(tmp_path / "a", {**factors(), **extra}, {})
    transformer, _ = started(make(f"method.start_from={file}"))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)


def test_patterns_may_make_ranks_fit(velocity, make, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a", factors(["attn.to_q"]) | factors(["attn.to_k"], rank=5), {})
    overrides = ("method.targets=[attn.to_q, attn.to_k]", "method.rank_pattern={attn.to_k: 5}")
    transformer, _ = started(make(f"method.start_from={file}", *overrides))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)


def test_the_contract_records_the_files_content_and_not_its_place(make, tmp_path: Path) -> None:
    one = make(f"method.start_from={write_adapter(tmp_path / 'a', factors(), {})}").contract()
    assert len(one["start_from"]) == 64
    assert str(tmp_path) not in repr(one)


@pytest.mark.parametrize(
    ("made", "overrides", "said"),
    [
        (lambda: factors(rank=4), (),
         "has rank 4 where this run has 2: transformer_blocks.0.attn.add_k_proj and 37 more; set method.rank to 4, or"),
        (lambda: factors(["attn.to_q"]) | factors(["attn.to_k"], rank=3), (),
         "has rank 3 where this run has 2: transformer_blocks.0.attn.to_k and 3 more"),
        (lambda: factors("attention+mlp"), (),
         "also adapts transformer_blocks.0.ff.net.0.proj and 13 more, which method.targets and method.blocks leave"),
        (lambda: factors(["attn.to_q"]), ("method.blocks=[1]",), "also adapts transformer_blocks.0.attn.to_q and 2"),
        (lambda: factors(["transformer_blocks.3.attn.to_q"], base="tiny-sd35-large"), (),
         "was made for another base: transformer_blocks.3.attn.to_q is 96x96 there and 64x64 in this one"),
        (lambda: factors(["attn.to_q", "transformer_blocks.0.attn2.to_q"]), ("model.base=tiny-sd3",),
         "was made for another base: it adapts transformer_blocks.0.attn2.to_q, which this one lacks"),
        (lambda: {"transformer_blocks.3.attn.add_q_proj.lora_A": torch.ones(2, 64),
                  "transformer_blocks.3.attn.add_q_proj.lora_B": torch.ones(64, 2)}, (),
         "adapts none of the trained modules"),
    ],
    ids=["rank", "one rank", "more modules", "other blocks", "other base", "another architecture", "nothing"],
)  # fmt: skip
def test_what_does_not_fit_is_named_before_anything_is_loaded(make, tmp_path: Path, made, overrides, said: str) -> None:
    file = write_adapter(tmp_path / "a", made(), {})
    method = make(f"method.start_from={file}", *overrides)
    base = "tiny-sd3" if "model.base=tiny-sd3" in overrides else "tiny"
    with pytest.raises(AdapterError) as caught:
        method.select(empty_transformer(resolve_base(base)))
    (line,) = caught.value.problems
    assert line.startswith(f"method.start_from: {file} {said}")


LYCORIS = {"loha": {"kind": "loha", "rank": 2}, "lokr": {"kind": "lokr", "rank": 2, "factor": 4}}


def asked(kind: str, **more: object) -> str:
    return f"method={json.dumps({**LYCORIS.get(kind, {'kind': kind}), **more})}"


def lycoris_file(quick_config, folder: Path, kind: str) -> Path:
    method = METHODS[kind](quick_config(folder, asked(kind, alpha=3.0)), resolve_base("tiny"))
    _, parameters = started(method)
    weights = {name: torch.randn(one.shape, generator=generator(3, name)) / 4 for name, one in parameters.items()}
    return method.export(folder / "file", weights, {})


@pytest.mark.parametrize("kind", LYCORIS)
def test_loha_and_lokr_go_on_from_their_files(velocity, quick_config, tmp_path: Path, kind: str) -> None:
    """At another alpha, also from LyCORIS' own names; exporting at once gives the same change."""
    file = lycoris_file(quick_config, tmp_path, kind)
    convert_lora(file, "lycoris", tmp_path / "theirs.safetensors", with_picture=False)
    theirs = with_file(file)
    expected = velocity(theirs)
    theirs.disable_adapters()
    assert not torch.allclose(velocity(theirs), expected, atol=1e-3)
    for start in (file, tmp_path / "theirs.safetensors"):
        config = quick_config(tmp_path / "on", asked(kind, alpha=8.0, start_from=str(start)))
        method = METHODS[kind](config, resolve_base("tiny"))
        transformer, parameters = started(method)
        torch.testing.assert_close(velocity(transformer), expected, rtol=0, atol=1e-5)
        assert len(method.contract()["start_from"]) == len(method.identity()["start_from"]) == 64
    again = with_file(method.export(tmp_path / "again", parameters, {}))
    torch.testing.assert_close(velocity(again), expected, rtol=0, atol=1e-5)


def test_a_lycoris_file_that_does_not_fit_is_named(make, quick_config, tmp_path: Path) -> None:
    loha, lokr = (lycoris_file(quick_config, tmp_path / kind, kind) for kind in LYCORIS)
    lora = write_adapter(tmp_path / "lora", factors(), {})
    other = {"rank": 4}
    for kind, start, more, says in (
        ("loha", lora, {}, "is a LoRA, which this run cannot continue; merge it into its base (`sd3tune lora merge"),
        ("loha", lora, {}, "or set method.kind=lora"),
        ("lora", loha, {}, "or set method.kind=loha"),
        ("lokr", loha, {}, "or set method.kind=loha"),
        (
            "loha",
            loha,
            other,
            "hada_w2_a 64x2, hada_w2_b 2x64 there and hada_w1_a 64x4, hada_w1_b 4x64",
        ),
        ("loha", loha, other, "in this one; set method.rank as the file's training did"),
        ("lokr", lokr, {"factor": 8}, "set method.rank, method.factor and method.decompose_both as the file's"),
        ("loha", loha, {"targets": "attention-image"}, "which method.targets and method.blocks leave out"),
    ):
        config = quick_config(tmp_path / "run", asked(kind, **{**more, "start_from": str(start)}))
        with pytest.raises(AdapterError) as caught:
            METHODS[kind](config, resolve_base("tiny")).select(empty_transformer(resolve_base("tiny")))
        (line,) = caught.value.problems
        assert line.startswith("method.start_from: ")
        assert says in line


def test_keys_of_lora_alone_are_refused_by_name(quick_config, tmp_path: Path) -> None:
    for key, says in (
        ("init: eva", "method.init: 'eva' is not one of: true, lycoris; LoRA's others are for its factors A and B"),
        ("rslora: true", "method.rslora: unknown key"),
        ("loraplus_lr_ratio: 4", "method.loraplus_lr_ratio: unknown key"),
    ):
        with pytest.raises(UserError) as caught:
            quick_config(tmp_path, f"method={{kind: loha, {key}}}")
        assert says in str(caught.value)


def test_a_missing_file_is_named(make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"method\.start_from: .*nothing: no such file or folder"):
        make(f"method.start_from={tmp_path / 'nothing'}").select(empty_transformer(resolve_base("tiny")))


def test_a_dora_with_text_encoders_is_merged_with_them(make, tmp_path: Path) -> None:
    made = {name.removesuffix(".lora_A"): (value, factors()[f"{name.removesuffix('A')}B"])
            for name, value in factors().items() if name.endswith(".lora_A")}  # fmt: skip
    magnitudes = {name: torch.ones(len(up)) for name, (_, up) in made.items()}
    text = {"text_encoder.text_model.layer": next(iter(made.values()))}
    adapter = Adapter(tmp_path / "a b.safetensors", made, {}, {}, magnitudes=magnitudes, text_factors=text)
    with pytest.raises(
        AdapterError, match=r"merge it into its base \(`sd3tune lora merge '.*a b.safetensors' --into-base --o"
    ):
        check_start(adapter, empty_transformer(resolve_base("tiny")), {})


def test_pivotal_tuning_goes_on_from_no_text_encoders(quick_config, tmp_path: Path) -> None:
    method = PivotalMethod(quick_config(tmp_path / "run", "method={kind: pivotal}"), resolve_base("tiny"))
    pair = torch.ones(2, 16), torch.ones(16, 2)
    adapter = Adapter(tmp_path / "a.safetensors", {}, {}, {}, text_factors={"text_encoder.text_model.layer": pair})
    with pytest.raises(AdapterError, match=r"also adapts text encoders, .* --transformer-only --to diffusers"):
        method.token.select(adapter)
