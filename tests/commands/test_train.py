"""A whole run in one process: what it writes, what is in memory meanwhile, and what it leaves when it is refused."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from sd3tune.adapter.file import read_adapter
from sd3tune.cli.main import run as command_line
from sd3tune.commands.cache import run_cache
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.errors import DataError, RunError, UserError
from sd3tune.run.places import store_folder
from sd3tune.training.loop import View


@pytest.fixture(scope="module")
def finished(quick_config, tmp_path_factory) -> Path:
    """A run with everything on, to look at."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    run_training(
        quick_config(
            run, "train.steps=4", "checkpoint={every: 2, keep: 1}", "ema={decay: 0.5}", "method.alpha=3.0", "seed=5",
            "preview={every: 2, prompts: [a dog], steps: 1, guidance: 1.0}", "train.gradient_accumulation=2",
        )
    )  # fmt: skip
    return run


def test_a_run_writes_its_folder(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert files == {
        ".lock", "README.md", "config.yaml", "metrics.jsonl", "run.json",
        "adapter/pytorch_lora_weights.safetensors",
        "adapter_raw/pytorch_lora_weights.safetensors",
        "checkpoints/step-000004/state.json",
        "checkpoints/step-000004/state.safetensors",
        "checkpoints/step-000004/adapter/pytorch_lora_weights.safetensors",
        "samples/over_time.png",
        "samples/base-0.png",
        *(f"samples/step-00000{step}-0.png" for step in (0, 2, 4)),
    }  # fmt: skip


def test_the_saved_configuration_is_the_run_again(finished: Path, quick_config) -> None:
    saved = load_config(finished / "config.yaml").config
    assert saved.seed == 5
    assert saved.output_dir == str(finished)
    assert saved.train.gradient_accumulation == 2


def test_run_json_says_what_ran(finished: Path) -> None:
    described = json.loads((finished / "run.json").read_text())
    assert described["world_size"] == 1
    assert described["seed"] == 5
    assert described["dtype"] == "fp32"
    assert described["resumes"] == []
    assert described["threads"] == torch.get_num_threads()
    assert set(described["versions"]) >= {"sd3tune", "python", "torch", "diffusers", "peft"}
    assert set(described["timings"]) == {"encode_s", "load_s", "train_s", "validation_s", "preview_s", "tracking_s"}
    assert described["report"]["changes_output"] is True
    assert described["skipped_steps"] == []
    assert len(described["base"]["fingerprint"]) == 64


def test_the_contract_is_what_infer_needs_and_names_no_time_host_or_path(finished: Path) -> None:
    contract = read_adapter(finished).contract
    assert contract["base"] == "tiny"
    assert contract["max_sequence_length"] == 16
    assert contract["encoders"] == ["clip_l", "clip_g", "t5"]
    assert contract["shift"] == 1.0
    assert (contract["rank"], contract["alpha"]) == (2, 3.0)
    assert contract["weights"] == "ema"
    assert read_adapter(finished / "adapter_raw").contract == {**contract, "weights": "raw"}
    assert str(finished) not in json.dumps(contract)
    assert "/" not in json.dumps(contract)


def test_the_average_and_the_raw_weights_differ(finished: Path, adapter_of) -> None:
    average, raw = adapter_of(finished), adapter_of(finished, "adapter_raw")
    assert average.keys() == raw.keys()
    assert all(not torch.equal(average[key], raw[key]) for key in average)


def test_the_last_checkpoint_holds_the_exported_adapter(finished: Path, adapter_of) -> None:
    exported, saved = adapter_of(finished), adapter_of(finished / "checkpoints" / "step-000004")
    assert all(torch.equal(exported[key], saved[key]) for key in exported)


def test_every_step_has_a_line(finished: Path, lines_of) -> None:
    lines = lines_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["grad_norm"] > 0 and line["loss"] > 0 and line["lr"] == 1e-2 for line in lines)


def test_without_an_average_there_is_one_adapter(quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path, "train.steps=1"))
    assert read_adapter(tmp_path).contract["weights"] == "raw"
    assert not (tmp_path / "adapter_raw").exists()


def test_the_last_step_is_saved_whatever_the_interval(quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path, "checkpoint.every=2", "train.steps=3"))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


HEAVY = (AutoencoderKL, CLIPTextModelWithProjection, T5EncoderModel)


def alive(kinds: tuple[type, ...]) -> set[int]:
    return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), kinds)}


def test_only_the_transformer_is_in_memory_while_training(quick_config, tmp_path: Path, capsys) -> None:
    gc.collect()
    before, transformers = alive(HEAVY), alive((SD3Transformer2DModel,))
    found: list[set[int]] = []

    def look(view: View) -> None:
        assert len(alive((SD3Transformer2DModel,)) - transformers) == 1
        found.append(alive(HEAVY) - before)

    config = quick_config(
        tmp_path / "run", f"data.cache_dir={tmp_path / 'store'}", "train.steps=2",
        "preview={every: 1, prompts: [a dog], steps: 1, guidance: 1.0}",
    )  # fmt: skip
    run_training(config, callbacks=[look])
    assert "images: 5, all new" in capsys.readouterr().out  # the encoders and the VAE were there
    assert found == [set(), set(), set()]


def test_the_run_leaves_nothing_in_memory(quick_config, tmp_path: Path) -> None:
    seen: list[weakref.ref[SD3Transformer2DModel]] = []
    run_training(
        quick_config(tmp_path, "train.steps=1"), callbacks=[lambda view: seen.append(weakref.ref(view.transformer))]
    )
    gc.collect()
    assert len(seen) == 2
    assert all(reference() is None for reference in seen)


def test_previews_do_not_disturb_a_run(quick_config, tmp_path: Path, assert_equal_runs) -> None:
    settings = ("train.steps=4", "train.gradient_accumulation=2", "ema={decay: 0.5}", "method.alpha=3.0")
    run_training(quick_config(tmp_path / "off", *settings, "preview.steps=2", "preview.guidance=3.0"))
    previews = "preview={every: 1, prompts: [a dog, a cat], steps: 2, guidance: 3.0}"
    run_training(quick_config(tmp_path / "on", *settings, previews))
    assert len(list((tmp_path / "on" / "samples").glob("step-*.png"))) == 10
    assert_equal_runs(tmp_path / "off", tmp_path / "on")


def test_block_checkpointing_gives_the_same_adapter(quick_config, tmp_path: Path, adapter_of, monkeypatch) -> None:
    switched_on = []
    genuine = SD3Transformer2DModel.enable_gradient_checkpointing
    monkeypatch.setattr(
        SD3Transformer2DModel,
        "enable_gradient_checkpointing",
        lambda self, compute: (switched_on.append(True), genuine(self, compute)),
    )
    run_training(quick_config(tmp_path / "none"))
    assert not switched_on
    run_training(quick_config(tmp_path / "block", "train.gradient_checkpointing=block"))
    assert switched_on
    plain, checkpointed = adapter_of(tmp_path / "none"), adapter_of(tmp_path / "block")
    for key, tensor in plain.items():
        torch.testing.assert_close(checkpointed[key], tensor, rtol=0, atol=1e-6)


def test_the_fast_path_is_taken_unless_switched_off_and_trains_the_same(
    quick_config, tmp_path: Path, adapter_of
) -> None:
    run_training(quick_config(tmp_path / "fast"))
    run_training(quick_config(tmp_path / "plain", "train.fast_path=false"))
    fast, plain = adapter_of(tmp_path / "fast"), adapter_of(tmp_path / "plain")
    assert any(not torch.equal(fast[key], plain[key]) for key in plain)
    for key, tensor in plain.items():
        torch.testing.assert_close(fast[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_low_precision_runs_from_end_to_end(quick_config, tmp_path: Path, adapter_of, name: str, dtype) -> None:
    found: set[torch.dtype] = set()
    run_training(
        quick_config(tmp_path, f"model.dtype={name}", "train.steps=2"),
        callbacks=[lambda view: found.update(parameter.dtype for parameter in view.transformer.parameters())],
    )
    assert found == {dtype}
    assert {tensor.dtype for tensor in adapter_of(tmp_path).values()} == {torch.float32}
    assert json.loads((tmp_path / "run.json").read_text())["dtype"] == name


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-sd35-large"])
def test_the_other_architectures_train(quick_config, tmp_path: Path, base: str) -> None:
    run_training(quick_config(tmp_path, f"model.base={base}", "train.steps=1"))
    assert read_adapter(tmp_path).contract["base"] == base


def test_t5_can_be_left_out(quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path, "model.t5=false", "train.steps=1"))
    assert read_adapter(tmp_path).contract["encoders"] == ["clip_l", "clip_g"]


def test_the_same_seed_is_the_same_run_and_another_is_not(
    quick_config, tmp_path, assert_equal_runs, adapter_of
) -> None:
    starts: list[torch.Tensor] = []

    def note(view: View) -> None:
        if view.step == 0:
            starts.append(next(iter(view.weights.values())).clone())

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)  # the global generator has no part in it
        run_training(quick_config(tmp_path / name, f"seed={seed}", "train.steps=2"), callbacks=[note])
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    one, other = adapter_of(tmp_path / "a"), adapter_of(tmp_path / "c")
    assert all(not torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_step_whose_gradient_is_not_finite_is_passed_over_and_reported(
    quick_config, tmp_path: Path, lines_of, capsys, monkeypatch
) -> None:
    calls = 0

    def poisoned(flow, shift):
        def weight(sigma: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return torch.full_like(sigma, float("nan") if calls == 2 else 1.0)

        return weight

    monkeypatch.setattr("sd3tune.training.objective.make_weight", poisoned)
    weights: list[torch.Tensor] = []
    run_training(
        quick_config(tmp_path, "train.steps=4"),
        callbacks=[lambda view: weights.append(torch.cat([w.flatten() for w in view.weights.values()]))],
    )
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert [line["grad_norm"] is None for line in lines_of(tmp_path)] == [False, True, False, False]
    assert json.loads((tmp_path / "run.json").read_text())["skipped_steps"] == [2]
    assert "1 step was skipped, the gradient was not finite: step 2\n" in capsys.readouterr().out


def test_a_dry_run_decodes_every_picture_and_names_broken_ones(
    quick_config, write_images, tmp_path: Path, capsys
) -> None:
    pictures, held = write_images(tmp_path / "pictures", 3), write_images(tmp_path / "held", 2)
    for broken in (pictures / "1.png", held / "0.png"):
        broken.write_bytes(broken.read_bytes()[:-60])  # its header is sound
    data = f"data.sources=[{{path: {pictures}}}]", f"data.cache_dir={tmp_path / 'store'}"
    with pytest.raises(DataError) as caught:
        run_training(quick_config(tmp_path / "run", *data, f"validation.holdout={held}"), dry_run=True)
    assert [line.split(": ")[0] for line in caught.value.problems] == [f"{pictures}/1.png", f"{held}/0.png"]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "store").exists()


def test_what_is_passed_over_is_said_at_the_start_and_in_the_run(
    quick_config, write_images, tmp_path: Path, capsys
) -> None:
    pictures = write_images(tmp_path / "pictures", 3)
    (pictures / "IMG_1.JXL").write_bytes(b"\xff\x0a")
    Image.new("RGBA", (96, 80), (9, 9, 9, 100)).save(pictures / "2.png")
    config = quick_config(tmp_path / "run", f"data.sources=[{{path: {pictures}}}]")
    run_training(config, dry_run=True)
    passed_over = f"{pictures}: 1 picture is passed over: IMG_1.JXL; convert to JPEG or PNG"
    clear = "1 image has transparent parts, which are laid on white: 2.png; masks: alpha uses them as masks"
    printed = capsys.readouterr().out.splitlines()
    assert {f"warning: {passed_over}", f"warning: {clear}"} <= set(printed)
    run_training(config)
    started = capsys.readouterr().out.splitlines()
    assert started.index(f"warning: {passed_over}") < started.index(f"warning: {clear}")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["warnings"][:2] == [passed_over, clear]


def test_a_dry_run_writes_nothing(quick_config, tmp_path: Path, capsys) -> None:
    config = quick_config(tmp_path / "run", f"data.cache_dir={tmp_path / 'store'}")
    run_training(config, dry_run=True)
    printed = capsys.readouterr().out
    assert "rank 2: 9,728 parameters" in printed
    assert "attn2.to_q" in printed
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_learned_nothing_is_an_error(quick_config, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the adapter changes nothing: raise optimizer\.lr"):
        run_training(quick_config(tmp_path, "optimizer.lr=1e-12", "train.steps=1"))


def corrupt(folder: Path) -> None:
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:100])


def remove_caption(folder: Path) -> None:
    (folder / "3.txt").unlink()


def remove_images(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("spoil", "override", "message"),
    [
        (corrupt, "seed=0", "2.png"),
        (remove_caption, "seed=0", "3.png"),
        (remove_images, "seed=0", "pictures"),
        (shutil.rmtree, "seed=0", "pictures"),
        (None, "method.targets=[attn.to_z]", "method.targets: 'attn.to_z' matches no linear module"),
        (None, "data.resolution=2048", "data.resolution: 2048 is too large for this base; at most 1536"),
        (None, "model.base=tony", "tony: no such base"),
    ],
)
def test_what_cannot_be_trained_leaves_no_run_folder(
    quick_config, write_images, tmp_path: Path, spoil, override: str, message: str
) -> None:
    folder = write_images(tmp_path / "pictures", 5)
    if spoil is not None:
        spoil(folder)
    config = quick_config(tmp_path / "run", f"data.sources=[{{path: {folder}}}]", override)
    with pytest.raises(UserError) as caught:
        run_training(config)
    assert message in caught.value.problems[0]
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "run").exists()


def test_all_problems_are_told_at_once(quick_config, write_images, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "pictures", 5)
    remove_caption(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "holiday.jpg").touch()
    config = quick_config(tmp_path / "run", f"data.sources=[{{path: {folder}}}]", "method.targets=[attn.to_z]")
    with pytest.raises(UserError) as caught:
        run_training(config)
    captions, folder_in_use, targets = caught.value.problems
    assert "3.png" in captions
    assert "not empty and not a run folder" in folder_in_use
    assert "attn.to_z" in targets


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_trains(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "train.steps=2")
    refusals: list[str] = []

    def intrude(view: View) -> None:
        with pytest.raises(RunError) as caught:
            run_training(config, resume=True)
        refusals.extend(caught.value.problems)

    run_training(config, callbacks=[intrude])
    assert len(refusals) == 3
    assert all("another process is training here" in line for line in refusals)


def test_pictures_of_an_attempt_that_saved_nothing_do_not_stay(quick_config, tmp_path: Path) -> None:
    def stop(view: View) -> None:
        raise RuntimeError("stop")

    preview = "preview={every: 1, prompts: [a dog], steps: 1, guidance: 1.0}"
    with pytest.raises(RuntimeError, match="stop"):
        run_training(quick_config(tmp_path, preview, "train.steps=1", "seed=1"), callbacks=[stop])
    before = (tmp_path / "samples" / "step-000000-0.png").read_bytes()
    run_training(quick_config(tmp_path, preview.replace("a dog", "a cat"), "train.steps=1", "seed=1"))
    assert (tmp_path / "samples" / "step-000000-0.png").read_bytes() != before


def test_encoding_alone_leaves_no_run_folder_and_is_reused(quick_config, tmp_path: Path, capsys) -> None:
    config = quick_config(tmp_path / "run", f"data.cache_dir={tmp_path / 'store'}", "data.flip=true", "train.steps=1")
    run_cache(config)
    assert not (tmp_path / "run").exists()
    assert "images: 5 x 2 variants, all new" in capsys.readouterr().out
    run_training(config)
    printed = capsys.readouterr().out
    assert "images: 5 x 2 variants, all reused" in printed
    assert "captions: 5 texts x 3 encoders, all reused" in printed


def test_the_store_is_where_the_configuration_or_the_environment_says(quick_config, tmp_path, monkeypatch) -> None:
    config = quick_config(tmp_path / "runs" / "run")
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    assert store_folder(config) == tmp_path / "cache" / "store"
    assert store_folder(quick_config(tmp_path, f"data.cache_dir={tmp_path / 'own'}")) == tmp_path / "own"
    monkeypatch.delenv("SD3TUNE_CACHE")
    assert store_folder(config) == tmp_path / ".cache" / "sd3tune"


@pytest.mark.parametrize(
    ("override", "message"),
    [("trian.steps=4", "did you mean"), ("data.sources=[{path: ./nowhere, caption: a dog}]", "nowhere")],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    quick_config, finished: Path, tmp_path: Path, monkeypatch, capsys, override: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sd3tune", "train", str(finished / "config.yaml"), "output_dir=run", override])
    with pytest.raises(SystemExit) as caught:
        command_line()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()
