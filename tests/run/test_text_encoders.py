"""A run that trains text encoders, from its configuration to pictures by `infer` and by diffusers' own pipeline."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.metadata import PEFT_KEY
from sd3tune.adapter.rearrange import arrange
from sd3tune.commands.infer import run_infer
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.commands.lora_merge import merge_into_base, merge_loras
from sd3tune.commands.lora_resize import resize_lora
from sd3tune.commands.lora_verify import verify_lora
from sd3tune.commands.train import run_training
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError, RunError, UserError
from sd3tune.files.png_recipe import RECIPE_KEY
from sd3tune.inference.image_request import Texts
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.prompts import Prompt, encode_prompts
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_text_encoder
from sd3tune.training.loop import View

ENCODERS = (
    "method.text_encoders={clip_l: {rank: 4, alpha: 8.0, lr: 0.01}, clip_g: {rank: 2, alpha: 2.0, lr: 0.01, "
    "targets: attention+mlp}}"
)
PROMPT = "a photo of sks dog"
PREVIEW = f"preview={{every: 2, prompts: [{PROMPT}], steps: 2, guidance: 4.0, seed: 11}}"
OPTIONS = (ENCODERS, PREVIEW, "train.steps=3", "checkpoint={every: 1, keep: 9}", "ema={decay: 0.5}")
FILE = "adapter/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "text"
    run_training(quick_config(run, *OPTIONS))
    return run


def drawn(lora: Path | str, out: Path, **more: object) -> Image.Image:
    asked = {"seed": 11, "steps": 2, "guidance": 4.0, "before": False, **more}
    return Image.open(run_infer(InferenceJob.from_fields(loras=[str(lora)], prompt=PROMPT, out=out, **asked))[0])


def preview_of(run: Path, step: int = 3) -> bytes:
    return Image.open(run / "samples" / f"step-{step:06d}-0.png").tobytes()


def test_infer_and_diffusers_draw_the_preview(run: Path, tmp_path: Path, capsys) -> None:
    assert drawn(run, tmp_path / "whole").tobytes() == preview_of(run)
    said = capsys.readouterr().out
    assert "24 tensors loaded into CLIP-L" in said
    assert "36 tensors loaded into CLIP-G" in said
    assert drawn(run, tmp_path / "part", transformer_only=True).tobytes() != preview_of(run)
    checked = verify_lora(run, None, "auto")
    assert "also loaded into text encoders: CLIP-L 12, CLIP-G 18 modules" in checked
    assert checked[-1].endswith("drawn again by diffusers: equal to the pixel")


@pytest.mark.long
def test_a_picture_is_drawn_again_with_the_encoders_or_without_as_it_was(run: Path, tmp_path: Path) -> None:
    for name, only in (("whole", False), ("part", True)):
        before = drawn(run, tmp_path / name, transformer_only=only)
        (picture,) = (tmp_path / name).glob("*.png")
        job = InferenceJob.from_fields(from_picture=picture, look_in=[run], out=tmp_path / f"{name} again")
        again = Image.open(run_infer(job)[0])
        assert again.tobytes() == before.tobytes()
        recipes = [json.loads(image.info[RECIPE_KEY]) for image in (before, again)]
        assert recipes[0] == recipes[1]
        assert recipes[0].get("lora_encoders") == (None if only else ["clip_l", "clip_g"])


def test_the_base_in_the_previews_is_the_untrained_one(run: Path, tmp_path: Path) -> None:
    job = InferenceJob.from_fields(base="tiny", prompt=PROMPT, out=tmp_path, seed=11, steps=2, guidance=4.0,
                                   size=(64, 64), t5_tokens=16)  # fmt: skip
    assert Image.open(run_infer(job)[0]).tobytes() == Image.open(run / "samples" / "base-0.png").tobytes()


def test_the_file_is_as_diffusers_writes_and_loads_it(run: Path, tmp_path: Path) -> None:
    base = resolve_base("tiny")
    pipeline = StableDiffusion3Pipeline.from_pretrained(base.path)
    pipeline.load_lora_weights(run / "adapter")
    ours, theirs = load_file(run / FILE), {}
    layers = {}
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        state = getattr(pipeline, part).state_dict()
        layers[part] = {key.replace(".default_0", ""): tensor for key, tensor in state.items() if ".default_0." in key}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, *layers.values())
    theirs = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with safe_open(run / FILE, framework="pt") as file:
        peft = json.loads(file.metadata()[PEFT_KEY])
    assert (peft["transformer.r"], peft["text_encoder.lora_alpha"], peft["text_encoder_2.r"]) == (2, 4, 2)
    (ours_embeds, ours_pooled) = _encoded(run)
    with torch.no_grad():
        encoded = pipeline.encode_prompt(PROMPT, None, None, max_sequence_length=16)
    assert torch.equal(ours_embeds, encoded[0])
    assert torch.equal(ours_pooled, encoded[2])


def _encoded(lora: Path, weight: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    adapters, names = [read_adapter(lora)], ("clip_l", "clip_g", "t5")
    asked = [Prompt(Texts(PROMPT), ((0, weight),)), Prompt(Texts(PROMPT))]
    found, plain = encode_prompts(
        resolve_base("tiny"), names, asked, 16, torch.float32, torch.device("cpu"), adapters=adapters
    )
    (alone,) = encode_prompts(resolve_base("tiny"), names, asked[1:], 16, torch.float32, torch.device("cpu"))
    assert torch.equal(plain.prompt_embeds, alone.prompt_embeds)  # off, it leaves no trace
    return found.prompt_embeds, found.pooled_prompt_embeds


def test_the_contract_states_the_encoders_and_the_cards_code_draws_the_preview(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    stated = read_adapter(run).contract["text_encoders"]
    assert stated["clip_l"] == {"rank": 4, "alpha": 8.0, "lr": 0.01, "targets": "attention"}
    card = (run / "README.md").read_text()
    row = "CLIP-L, rank 4, attention, learning rate 0.01; CLIP-G, rank 2, attention+mlp, learning rate 0.01"
    assert f"| trained text encoders | {row} |" in card
    assert "It adapts text encoders, too: connect CLIP to `Load LoRA`." in card
    code = card.partition("```python\n")[2].partition("```")[0]
    code = re.sub("(?m)^base = .*$", f"base = {str(resolve_base('tiny').path)!r}", code)
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert Image.open("image.png").tobytes() == preview_of(run)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw8bit", pytest.param("adamw", marks=pytest.mark.long), pytest.param("prodigy", marks=pytest.mark.long)],
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    quick_config, tmp_path: Path, assert_equal_runs, optimizer: str
) -> None:
    more = (f"optimizer={{kind: {optimizer}, lr: 0.5}}", "model.quantize=nf4", "data.caption_dropout=0.3",
            "preview={prompts: []}")  # fmt: skip
    configs = [quick_config(tmp_path / name, *OPTIONS, *more) for name in ("straight", "killed")]
    run_training(configs[0])

    def kill(view: View) -> None:
        if view.step == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(configs[1], callbacks=[kill])
    run_training(configs[1], resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "killed")


def test_another_rate_or_encoder_does_not_resume(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path / "run", *OPTIONS, "train.steps=1")
    run_training(config)
    for other, says in (
        (ENCODERS.replace("lr: 0.01}, clip_g", "lr: 0.02}, clip_g"), "method.text_encoders.clip_l.lr: 0.01 in the run"),
        ("method.text_encoders={clip_l: {rank: 4, alpha: 8.0, lr: 0.01}}", "method.text_encoders.clip_g: "),
        ("method.text_encoders=null", "method.text_encoders: "),
    ):
        with pytest.raises(RunError) as caught:
            run_training(quick_config(tmp_path / "run", *OPTIONS, other, "train.steps=2"), resume=True)
        assert caught.value.problems[0].startswith(f"--resume: {says}")


def test_other_tools_layouts_hold_the_encoders_and_give_them_back(run: Path, tmp_path: Path) -> None:
    ours = load_file(run / FILE)
    first = "text_model.encoder.layers.0.self_attn.q_proj"
    for form, key in (
        ("kohya", f"lora_te1_{first.replace('.', '_')}.lora_down.weight"),
        ("comfyui", f"text_encoders.clip_l.transformer.{first}.lora_A.weight"),
    ):
        there, back = tmp_path / f"{form}.safetensors", tmp_path / f"back-from-{form}.safetensors"
        assert "of which CLIP-L 12, CLIP-G 18" in convert_lora(run, form, there, with_picture=False)[0]
        assert torch.equal(load_file(there)[key], ours[f"text_encoder.{first}.lora_A.weight"])
        convert_lora(there, "diffusers", back, with_picture=False)
        found = load_file(back)
        assert found.keys() == ours.keys()
        assert all(torch.equal(found[name], ours[name]) for name in ours)
    assert drawn(tmp_path / "kohya.safetensors", tmp_path / "kohya").tobytes() == preview_of(run)


def test_inspect_merge_and_resize_handle_the_encoders(run: Path, tmp_path: Path) -> None:
    assert "text      CLIP-L 12, CLIP-G 18 modules, rank 2 (18 modules), 4 (12 modules)" in inspect_lora(run)
    resize_lora(run, tmp_path / "one.safetensors", 1, None)
    merge_loras([f"{run}@0.5", f"{run}@0.5"], tmp_path / "two.safetensors", "diffusers", "concat", None)
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(load_file(tmp_path / "one.safetensors")[key]) == 1
    assert len(load_file(tmp_path / "two.safetensors")[key]) == 8
    for one, other in zip(_encoded(tmp_path / "two.safetensors"), _encoded(run), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_merged_base_draws_in_diffusers_what_infer_draws(run: Path, tmp_path: Path) -> None:
    """In fp32, within one of 255 levels: the sums are rounded once, and `infer` adds two products instead."""
    out, base = tmp_path / "base", resolve_base("tiny")
    assert merge_into_base([f"{run}@0.5"], out, None)[0].endswith("38 of its weights, and 12 in CLIP-L, 18 in CLIP-G")
    for part in ("text_encoder", "text_encoder_2"):
        before, after = (load_file(folder / part / "model.safetensors") for folder in (base.path, out))
        of_part = read_adapter(run).of_part(part)
        assert before.keys() == after.keys()
        for name, weight in before.items():
            if name.removesuffix(".weight") in of_part.factors:
                down, up = of_part.factors[name.removesuffix(".weight")]
                expected = weight.double() + 0.5 * up.double() @ down.double()  # alpha is the rank
                torch.testing.assert_close(after[name].double(), expected, rtol=1e-7, atol=1e-8)
            else:
                assert torch.equal(after[name], weight)
    pipeline = StableDiffusion3Pipeline.from_pretrained(out)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None, max_sequence_length=16)
    for found, expected in zip((embeds, pooled), _encoded(run, 0.5), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    picture = pipeline(
        PROMPT, height=64, width=64, num_inference_steps=2, guidance_scale=4.0, max_sequence_length=16,
        generator=torch.Generator().manual_seed(11),
    ).images[0]  # fmt: skip
    drawn_with = drawn(f"{run}@0.5", tmp_path / "drawn")
    assert max(high for _, high in ImageChops.difference(picture, drawn_with).getextrema()) <= 1
    assert drawn_with.tobytes() != drawn(f"{run}@0.5", tmp_path / "part", transformer_only=True).tobytes()


@pytest.mark.long
def test_t5_in_shards_is_merged_in_its_dtype(run: Path, tmp_path: Path) -> None:
    """Only the shard that changes is written anew; variants, which would be the former weights, are left out."""
    base = shutil.copytree(resolve_base("tiny").path, tmp_path / "base")
    folder, module = base / "text_encoder_3", "encoder.block.1.layer.1.DenseReluDense.wi_0"
    T5EncoderModel.from_pretrained(folder).half().save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").replace(folder / "model.fp16.safetensors")
    pair = torch.randn(2, 64, generator=generator(1)), torch.randn(128, 2, generator=generator(2))
    file, out = tmp_path / "t5.safetensors", tmp_path / "out"
    tensors = {**read_adapter(run, transformer_only=True).whole(), f"text_encoder_3.{module}": pair}
    save_file(arrange(tensors, "kohya"), file)
    assert merge_into_base([str(file)], out, str(base))[0].endswith("38 of its weights, and 1 in T5")
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 1
    assert not (out / folder.name / "model.fp16.safetensors").exists()
    before, after = (T5EncoderModel.from_pretrained(of / folder.name).state_dict() for of in (base, out))
    name = f"{module}.weight"
    assert torch.equal(after[name], (before[name].double() + pair[1].double() @ pair[0].double()).float().half())
    assert all(torch.equal(after[key], before[key]) for key in before if key != name)
    for shard in set(shards.values()):
        kept = (out / folder.name / shard).read_bytes() == (folder / shard).read_bytes()
        assert kept == (shard != shards[name])
    (base / "sd3tune.json").write_text(json.dumps({"encoders": ["clip_l", "clip_g"]}))
    with pytest.raises(AdapterError, match=r"also adapts T5, which the model is written without; leave the text enc"):
        merge_into_base([str(file)], tmp_path / "none", str(base))
    assert not (tmp_path / "none").exists()


def test_t5_of_a_kohya_file_is_read_and_applied_with_its_weight(run: Path, tmp_path: Path) -> None:
    """Against T5 with B A added to its weights."""
    base, factors = resolve_base("tiny"), {}
    t5 = load_text_encoder(base, "t5", torch.float32, max_sequence_length=16)
    for module in ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wi_0"):
        weight, source = t5.model.get_submodule(module).weight, generator(0, module)
        down, up = torch.randn(2, weight.shape[1], generator=source), torch.randn(len(weight), 2, generator=source)
        factors[f"text_encoder_3.{module}"] = down, up
        weight.data += 0.5 * up @ down
    file = tmp_path / "te3.safetensors"
    save_file({**arrange(read_adapter(run).folded(), "kohya"), **arrange(factors, "kohya")}, file)
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight" in load_file(file)
    embeds, _ = _encoded(file, 0.5)
    (expected,) = t5.encode([PROMPT])
    torch.testing.assert_close(embeds[0, 77:], expected["hidden"], rtol=0, atol=1e-4)
    for refused in (
        lambda: convert_lora(file, "diffusers", tmp_path / "x.safetensors", with_picture=False),
        lambda: verify_lora(file, "tiny", "auto"),
    ):
        with pytest.raises(AdapterError, match="diffusers loads no LoRA of T5"):
            refused()


def test_sizes_of_another_encoder_are_refused_before_anything_is_drawn(run: Path, tmp_path: Path) -> None:
    module = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    tensors = {**arrange(read_adapter(run).folded(), "kohya"),
               **arrange({module: (torch.ones(2, 8), torch.ones(8, 2))}, "kohya")}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=r"made for another base: text_model\.encoder\.layers\.0\.mlp\.fc1 is 8x8"):
        drawn(tmp_path / "x.safetensors", tmp_path / "out", base="tiny")
    assert not (tmp_path / "out").exists()


def test_a_kohya_file_is_trained_on_with_its_encoders_and_given_back(quick_config, run: Path, tmp_path: Path) -> None:
    """With a learning rate that changes nothing it comes back as it was, and its first preview is its last one."""
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    convert_lora(run, "kohya", theirs, with_picture=False)
    still = ENCODERS.replace("lr: 0.01", "lr: 1.0e-30").replace("alpha: 8.0", "alpha: 3.0")
    more = (f"method.start_from={theirs}", still, PREVIEW, "optimizer.lr=1e-30", "train.steps=1")
    run_training(quick_config(tmp_path / "on", *more))
    assert preview_of(tmp_path / "on", 0) == preview_of(run)
    convert_lora(tmp_path / "on", "kohya", ours, with_picture=False)
    before, after = load_file(theirs), load_file(ours)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-6, atol=0)


def test_a_start_that_this_run_cannot_go_on_from_is_named(quick_config, run: Path, tmp_path: Path) -> None:
    file, module = tmp_path / "t5.safetensors", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
    save_file({**arrange(read_adapter(run).whole(), "kohya"),
               **arrange({module: (torch.ones(2, 64), torch.ones(64, 2))}, "kohya")}, file)  # fmt: skip
    rank = "method.text_encoders={clip_l: {rank: 8}, clip_g: {rank: 2, targets: attention+mlp}}"
    fewer = "method.text_encoders={clip_l: {rank: 4}, clip_g: {rank: 2}}"
    for start, encoders, says in (
        (file, ENCODERS, "also adapts T5, which sd3tune does not train; `sd3tune lora convert "),
        (run, "method.text_encoders=null", "also adapts CLIP-L, which this run does not train; set method.text_enc"),
        (run, rank, "has rank 4 where this run has 8: text_model.encoder.layers.0.self_attn.k_proj and 11 more; set "
                    "method.text_encoders.clip_l.rank to 4"),
        (run, fewer, "which method.text_encoders.clip_g.targets leaves out"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            run_training(quick_config(tmp_path / "run", f"method.start_from={start}", encoders))
        (line,) = caught.value.problems
        assert line.startswith("method.start_from: ")
        assert says in line
