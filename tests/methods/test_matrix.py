"""Every kind of adapter in a whole run: resumed, averaged, previewed, drawn again, described, on each kind of base.

The short form trains each kind once, with all options at once. `make check-long` adds two processes, and 8 and 4 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import Config, dump_config
from sd3tune.errors import RunError, UserError
from sd3tune.inference.job import InferenceJob
from sd3tune.training.loop import View

PROMPT = "a photo of sks dog"
KINDS = {
    "lora": ("method={kind: lora, rank: 2, alpha: 3.0, loraplus_lr_ratio: 4, export_dtype: fp16}",),
    "dora": ("method={kind: dora, rank: 2, alpha: 3.0, dropout: 0.1}",),
    "loha": ("method={kind: loha, rank: 2, alpha: 3.0, rank_pattern: {attn.to_k: 3}, dropout: 0.1, init: lycoris}",),
    "lokr": ("method={kind: lokr, rank: 2, alpha: 3.0, factor: 4, export_dtype: fp16}",),
    "pivotal": (
        "method={kind: pivotal, rank: 2, alpha: 3.0, export_dtype: fp16}",
        "method.embedding={token: sks, vectors: 2, init: a dog, t5_caption: dog, lr: 0.05}",
    ),
}
ON_PACKED = ("lora", "dora", "pivotal")
NAMES = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "pivotal": "LoRA"}
OPTIONS = (
    "train.steps=3", "checkpoint={every: 1, keep: 9}", "ema={decay: 0.5}", "optimizer={kind: adamw8bit, lr: 0.01}",
    "data.sources.0.caption=a photo of sks dog",
    f"preview={{every: 3, prompts: [{PROMPT}], steps: 2, guidance: 4.0, seed: 11}}",
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def configured(quick_config, kind: str) -> Callable[..., Config]:
    pytest.importorskip("bitsandbytes")
    return lambda run, *more: quick_config(run, *KINDS[kind], *OPTIONS, *more)


@pytest.fixture(scope="module")
def run(configured, tmp_path_factory, kind: str) -> Path:
    run = tmp_path_factory.mktemp("runs") / kind
    run_training(configured(run))
    return run


def stop(view: View) -> None:
    if view.step == 1:
        raise InterruptedError


def same(one: Path, other: Path) -> bool:
    return ImageChops.difference(Image.open(one), Image.open(other)).getbbox() is None


def draws_its_preview(run: Path, out: Path) -> bool:
    asked = {"seed": 11, "steps": 2, "guidance": 4.0, "before": False}
    (drawn,) = run_infer(InferenceJob.from_fields(loras=[str(run)], prompt=PROMPT, out=out, **asked))
    return same(Path(drawn), run / "samples" / "step-000003-0.png")


def test_it_resumes_to_equal_files(run: Path, configured, tmp_path: Path, assert_equal_runs) -> None:
    with pytest.raises(InterruptedError):
        run_training(configured(tmp_path / "run"), callbacks=[stop])
    run_training(configured(tmp_path / "run"), resume=True)
    assert_equal_runs(run, tmp_path / "run")


def test_infer_draws_its_preview(run: Path, tmp_path: Path) -> None:
    assert draws_its_preview(run, tmp_path)


def test_the_snippet_of_its_card_draws_its_preview(run: Path, kind: str, monkeypatch) -> None:
    card = (run / "README.md").read_text()
    name = NAMES[kind]
    token = ", with the embedding of the token `sks`" * (kind == "pivotal")
    assert f"A {name} adapter for `tiny`{token}, trained with sd3tune." in card
    assert ("sd3tune lora convert adapter/" in card) == (kind == "dora")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(run)
    exec(compile(code, "card", "exec"), {})
    assert same(run / "image.png", run / "samples" / "step-000003-0.png")


def test_it_learned_and_states_what_it_is(run: Path, kind: str) -> None:
    adapter, report = read_adapter(run), json.loads((run / "run.json").read_text())["report"]
    assert (adapter.contract["method"], adapter.contract["rank"], adapter.contract["alpha"]) == (kind, 2, 3.0)
    assert (adapter.contract["weights"], adapter.kind) == ("ema", NAMES[kind])
    assert report["changes_output"]
    assert ("rounding_error" in report) == (kind in ("lora", "lokr", "pivotal"))
    last = read_adapter(run / "checkpoints" / "step-000001")
    assert adapter.sizes == last.sizes


@pytest.mark.parametrize("change", ["method.rank=4", "method.targets=attention-image", "method={kind: lora, rank: 2}"])
def test_a_changed_method_does_not_resume(run: Path, configured, change: str) -> None:
    with pytest.raises(RunError, match="--resume: method"):
        run_training(configured(run, change, "train.steps=4"), resume=True)


def test_nf4_is_refused_where_layers_need_rows(quick_config, tmp_path: Path, kind: str) -> None:
    if kind in ON_PACKED:
        quick_config(tmp_path, *KINDS[kind], "model.quantize=nf4")
        return
    with pytest.raises(UserError, match=f"model.quantize is nf4 and method.kind is {kind}: .* set model.quantize=int8"):
        quick_config(tmp_path, *KINDS[kind], "model.quantize=nf4")


def test_dora_and_swapped_blocks_are_refused_together(quick_config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.swap_blocks is 3 and method\.kind is dora: it needs"):
        quick_config(tmp_path, *KINDS["dora"], "train.swap_blocks=3")


@pytest.mark.long
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_base_is_drawn_on_as_it_was_trained_on(
    configured, tmp_path: Path, kind: str, form: str, assert_equal_runs
) -> None:
    if form == "nf4" and kind not in ON_PACKED:
        pytest.skip("refused")
    run_training(configured(tmp_path / "straight", f"model.quantize={form}"))
    assert draws_its_preview(tmp_path / "straight", tmp_path / "drawn")
    with pytest.raises(InterruptedError):
        run_training(configured(tmp_path / "run", f"model.quantize={form}"), callbacks=[stop])
    run_training(configured(tmp_path / "run", f"model.quantize={form}"), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_trains_in_half_precision(configured, tmp_path: Path, dtype: str) -> None:
    run_training(configured(tmp_path / "run", f"model.dtype={dtype}"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["report"]["changes_output"]


@pytest.mark.long
def test_two_processes_train_what_one_trains(configured, tmp_path: Path, kind: str, start_cli, adapter_of) -> None:
    plain = {
        "dora": ("optimizer={kind: adamw, lr: 0.001}", "method.dropout=0"),
        "loha": ("optimizer={kind: adamw}", "method.dropout=0"),
    }.get(kind, ("optimizer={kind: adamw}",))
    run_training(configured(tmp_path / "one", *plain, "train.batch_size=2"))
    (tmp_path / "two.yaml").write_text(dump_config(configured(tmp_path / "two", *plain)))
    process = start_cli("train", tmp_path / "two.yaml", "--num-processes", "2")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / "two" / "run.json").read_text())["world_size"] == 2
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-4 if tensor.dtype is torch.float32 else 1e-2)
