"""Training the whole transformer, from scratch and from a base: a run from end to end, and what others make of it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, ImageChops
from safetensors.torch import load_file

from sd3tune.adapter.file import read_adapter
from sd3tune.cli.main import app
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.errors import RunError, UserError
from sd3tune.inference.job import InferenceJob
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer
from sd3tune.run.card import card_to_upload
from sd3tune.training.loop import View

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a photo of sks dog"
SETTINGS = (
    "train.steps=5", "checkpoint={every: 2, keep: 9}", "ema={decay: 0.5}", "flow.shift=1.5", "data.caption_dropout=0.2",
    "schedule={kind: cosine, warmup_steps: 1}", "train.gradient_accumulation=2", "train.batch_size=2",
)  # fmt: skip
LOOKING = (
    "preview={every: 2, prompts: [a photo of sks dog], steps: 2, guidance: 4.0, seed: 11}",
    "validation={holdout: 1, every: 2}",
)


@pytest.fixture(scope="module")
def run(scratch_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "scratch"
    run_training(scratch_config(run, *SETTINGS, *LOOKING))
    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def drawn(base: Path, out: Path, **more) -> Image.Image:
    (path,) = run_infer(
        InferenceJob.from_fields(
            loras=[], prompt=PROMPT, out=out, seed=11, steps=2, guidance=4.0, base=str(base), **more
        )
    )
    return Image.open(path)


def preview(run: Path, name: str) -> Image.Image:
    return Image.open(run / "samples" / f"{name}-0.png")


def test_a_run_writes_a_model_and_no_adapter(run: Path) -> None:
    assert not list(run.rglob("adapter*"))
    for folder in ("model", "model_raw", "best/model", *(f"checkpoints/step-00000{step}/model" for step in (2, 4, 5))):
        tensors = weights_of(run / folder)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert resolve_base(str(run / folder)).contract["max_sequence_length"] == 16
    assert not list(run.rglob(".tmp-*"))


def test_the_model_is_new_and_everything_else_is_the_bases(run: Path) -> None:
    base, model = resolve_base("tiny"), resolve_base(str(run / "model"))
    assert model.config("transformer")["num_layers"] == 2
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    assert all(model.fingerprint(part) == base.fingerprint(part) for part in parts)


def test_the_contract_says_how_it_was_trained_and_names_no_path(run: Path) -> None:
    contract = resolve_base(str(run / "model")).contract
    expected = {"method": "full", "init": "random", "export_dtype": "fp16", "base": "tiny", "shift": 1.5,
                "resolution": 64, "weights": "ema", "seed": 0}  # fmt: skip
    assert contract.items() >= expected.items()
    assert resolve_base(str(run / "model_raw")).contract == {**contract, "weights": "raw"}
    assert "/" not in (run / "model" / "sd3tune.json").read_text()


def test_the_average_is_exported_and_the_weights_as_trained_beside_it(run: Path) -> None:
    average, raw = weights_of(run / "model"), weights_of(run / "model_raw")
    saved = load_file(run / "checkpoints" / "step-000005" / "state.safetensors")
    for folder, name in ((average, "ema"), (raw, "master")):
        flat = torch.cat([folder[key].flatten() for key in layout(run)])
        assert torch.equal(flat, saved[name].half())
    assert torch.equal(average["pos_embed.pos_embed"], raw["pos_embed.pos_embed"])


def layout(run: Path) -> list[str]:
    return list(json.loads((run / "checkpoints" / "step-000005" / "state.json").read_text())["layout"])


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_preview_is_what_infer_draws_from_that_step(run: Path, step: int, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / f"step-{step:06d}" / "model"
    assert same(preview(run, f"step-{step:06d}"), drawn(checkpoint, tmp_path))


def test_diffusers_own_pipeline_draws_the_same_with_the_shift_in_training(run: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.shift == 1.5
    generator = torch.Generator().manual_seed(11)
    theirs = pipeline(
        PROMPT, num_inference_steps=2, guidance_scale=4.0, height=64, width=64, max_sequence_length=16,
        generator=generator,
    ).images[0]  # fmt: skip
    assert same(theirs, preview(run, "step-000005"))
    assert same(theirs, drawn(run / "model", tmp_path))
    assert not same(theirs, preview(run, "base"))


def test_the_snippet_of_the_card_draws_it_too(run: Path, tmp_path: Path, monkeypatch) -> None:
    card = (run / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    (words,) = (shlex.split(line) for line in card.splitlines() if line.startswith("sd3tune infer"))
    monkeypatch.chdir(run)
    exec(compile(code, "card", "exec"), {})
    app([*words[1:], "--out", str(tmp_path)], standalone_mode=False)
    (path,) = tmp_path.glob("*.png")
    assert same(Image.open("image.png"), Image.open(path))
    assert same(Image.open("image.png"), preview(run, "step-000005"))
    assert b'snapshot_download("user/shapes", allow_patterns="model/*")' in card_to_upload(run, "user/shapes")
    assert "from scratch, with the text encoders and the VAE of `tiny`" in card
    assert not any(f"{folder}/" in card for folder in (run, *run.parents) if folder != Path("/"))


def test_the_report_is_finite_and_the_base_is_the_random_start(run: Path) -> None:
    report = json.loads((run / "run.json").read_text())["report"]
    assert report["changes_output"] is True
    assert report["velocity_change"] == 1.0  # new weights predict nothing
    assert set(report["block_changes"]) == {"elsewhere", "block 0", "block 1"}
    assert all(0 < change < 10 for change in report["block_changes"].values())
    first = json.loads((run / "validation.jsonl").read_text().splitlines()[0])
    assert first["loss"] == first["base_loss"]  # at step 0
    assert report["held_out"]["last"]["loss"] < first["loss"]


def stop_at(step: int):
    def callback(view: View) -> None:
        if view.step == step:
            raise InterruptedError

    return callback


def test_stopped_and_resumed_it_equals_one_that_was_not(scratch_config, run, tmp_path, assert_equal_runs) -> None:
    config = scratch_config(tmp_path, *SETTINGS, *LOOKING)
    for step in (1, 3):
        with pytest.raises(InterruptedError):
            run_training(config, resume=step > 1, callbacks=[stop_at(step)])
    run_training(config, resume=True)
    assert_equal_runs(run, tmp_path)
    assert (run / "validation.jsonl").read_text() == (tmp_path / "validation.jsonl").read_text()
    for picture in (run / "samples").glob("*.png"):
        assert same(Image.open(picture), Image.open(tmp_path / "samples" / picture.name))
    run_training(config, resume=True)  # finished: nothing to do


def test_the_same_seed_is_the_same_run_another_is_not_and_looking_changes_nothing(
    scratch_config, run, tmp_path, assert_equal_runs
) -> None:
    torch.rand(7)  # the global generator has no part in it
    run_training(scratch_config(tmp_path / "same", *SETTINGS, "validation.holdout=1", "validation.every=2"))
    assert_equal_runs(run, tmp_path / "same")
    run_training(scratch_config(tmp_path / "other", *SETTINGS, "seed=1", "train.steps=2"))
    ours, others = weights_of(run / "model"), weights_of(tmp_path / "other" / "model")
    name = "context_embedder.weight"
    assert not torch.equal(ours[name], others[name])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("model.transformer.num_layers=3", "model.base"),
        ("method.export_dtype=bf16", "method.export_dtype"),
        ("model.init=pretrained", "model.base"),
    ],
)
def test_what_changes_the_maths_is_refused(scratch_config, tmp_path, override: str, key: str) -> None:
    with pytest.raises(InterruptedError):
        run_training(scratch_config(tmp_path, "checkpoint.every=1"), callbacks=[stop_at(1)])
    shape = ["model.transformer=null"] if "pretrained" in override else []
    with pytest.raises(RunError) as caught:
        run_training(scratch_config(tmp_path, override, *shape), resume=True)
    assert any(line.startswith(f"--resume: {key}: ") for line in caught.value.problems)


def test_without_an_average_there_is_one_model(scratch_config, tmp_path: Path) -> None:
    run_training(scratch_config(tmp_path, "train.steps=2", LOOKING[0]))
    assert resolve_base(str(tmp_path / "model")).contract["weights"] == "raw"
    assert not (tmp_path / "model_raw").exists()
    assert same(preview(tmp_path, "step-000002"), drawn(tmp_path / "model", tmp_path / "out"))


@pytest.mark.parametrize("exported", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("computed", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_low_precision_runs_show_what_is_exported(scratch_config, tmp_path, exported: str, computed: str) -> None:
    dtypes: set[torch.dtype] = set()
    settings = (f"model.dtype={computed}", f"method.export_dtype={exported}", "train.steps=2", "ema={decay: 0.5}")
    run_training(
        scratch_config(tmp_path, *settings, LOOKING[0]),
        callbacks=[lambda view: dtypes.update(tensor.dtype for tensor in view.transformer.state_dict().values())],
    )
    assert len(dtypes) == 1
    image = drawn(tmp_path / "model", tmp_path / "out", dtype=computed)
    assert same(preview(tmp_path, "step-000002"), image)


def test_a_base_needs_no_transformer_when_its_shape_is_given(scratch_config, tmp_path: Path) -> None:
    base = Path(shutil.copytree(resolve_base("tiny").path, tmp_path / "parts"))
    shutil.rmtree(base / "transformer")
    shape = "{num_layers: 1, num_attention_heads: 2, attention_head_dim: 8, sample_size: 8, pos_embed_max_size: 8}"
    run_training(scratch_config(tmp_path / "run", f"model.base={base}", f"model.transformer={shape}", "train.steps=2"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "run" / "model")
    assert (pipeline.transformer.config.num_layers, pipeline.default_sample_size) == (1, 8)
    (base / "transformer").mkdir()
    run_training(scratch_config(tmp_path / "run", f"model.base={base}", f"model.transformer={shape}", "train.steps=2"),
                 resume=True)  # fmt: skip


def test_what_was_trained_is_a_base_to_fine_tune_and_to_adapt(
    run, quick_config, tmp_path, velocity, capsys, assert_equal_runs
) -> None:
    model = run / "model"
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    settings = (f"model.base={model}", "train.steps=2", "optimizer.lr=1e-3")
    run_training(quick_config(tmp_path / "tuned", "method={kind: full}", *settings))
    contract = resolve_base(str(tmp_path / "tuned" / "model")).contract
    assert (contract["init"], contract["base"], contract["method"]) == ("pretrained", "model", "full")
    old, new = (load_transformer(resolve_base(str(of / "model")), torch.float32) for of in (run, tmp_path / "tuned"))
    assert 0 < float((velocity(new) - velocity(old)).norm() / velocity(old).norm()) < 1
    run_training(quick_config(tmp_path / "adapted", *settings, "model.max_sequence_length=17"))
    assert "was trained on 16 T5 tokens and model.max_sequence_length is 17" in capsys.readouterr().out
    run_infer(InferenceJob.from_fields(loras=[str(tmp_path / "adapted")], prompt=PROMPT, out=tmp_path / "out", steps=1))
    assert len(read_adapter(tmp_path / "adapted").factors) > 0
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_a_full_fine_tune_keeps_a_class_by_the_bases_own_prediction(quick_config, tmp_path: Path, lines_of) -> None:
    prior = "data.sources.0.prior={kind: prediction, prompt: a picture}"
    run_training(quick_config(tmp_path, "method={kind: full}", prior, "train.steps=2", "optimizer.lr=1e-3"))
    assert all(line["prior_loss"] >= 0 for line in lines_of(tmp_path))
    assert lines_of(tmp_path)[1]["prior_loss"] > 0


def test_t5_can_be_left_out(scratch_config, tmp_path: Path) -> None:
    run_training(scratch_config(tmp_path, "model.t5=false", "train.steps=1", LOOKING[0]))
    assert not (tmp_path / "model" / "text_encoder_3").exists()
    assert same(preview(tmp_path, "step-000001"), drawn(tmp_path / "model", tmp_path / "out"))
    assert "text_encoder_3=None" in (tmp_path / "README.md").read_text()


def test_the_fast_path_and_recomputed_blocks_train_the_same(scratch_config, tmp_path: Path) -> None:
    settings = ("method.export_dtype=fp32", "optimizer.lr=1e-3")
    run_training(scratch_config(tmp_path / "fast", *settings))
    fast = weights_of(tmp_path / "fast" / "model")
    for name, override in (("plain", "train.fast_path=false"), ("block", "train.gradient_checkpointing=block")):
        run_training(scratch_config(tmp_path / name, *settings, override))
        other = weights_of(tmp_path / name / "model")
        for key, tensor in fast.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=2e-5)
    assert any(not torch.equal(fast[key], tensor) for key, tensor in weights_of(tmp_path / "plain" / "model").items())


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(scratch_config, tmp_path: Path, capsys) -> None:
    run_training(scratch_config(tmp_path / "run", f"data.cache_dir={tmp_path / 'store'}"), dry_run=True)
    said = capsys.readouterr().out
    assert "weights   random, seed 0: 2 blocks, 32 wide\n" in said
    assert re.search(r"model     full, from scratch: \d+,\d{3} parameters, 0\.\d MB, in \d+ modules\n", said)
    assert re.search(r"          attn +2 of 2 blocks\n", said)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_a_model_is_not_written_over(scratch_config, quick_config, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "model")
    for config in (scratch_config(tmp_path), quick_config(tmp_path)):
        with pytest.raises(UserError, match="already holds a model and no checkpoint"):
            run_training(config)


def test_an_adapter_is_looked_for_in_vain_and_the_model_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a whole model and no adapter; draw with --base .*/scratch/model"):
        run_infer(InferenceJob.from_fields(loras=[str(run)], prompt=PROMPT, out=tmp_path))


def test_training_that_changes_nothing_says_so(quick_config, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the model changes nothing: raise optimizer\.lr or train\.steps"):
        run_training(quick_config(tmp_path, "method={kind: full, export_dtype: fp32}", "optimizer.lr=1e-30"))
