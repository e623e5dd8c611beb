"""Runs on masked photos: resuming, held-out loss, the forms of a mask, and what is said about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from sd3tune.commands.cache_store import list_store
from sd3tune.commands.train import run_training
from sd3tune.config import Config
from sd3tune.data.sampler import generator
from sd3tune.data.store import Store
from sd3tune.errors import ConfigError, RunError
from sd3tune.flow.objective import position_weights
from sd3tune.model.load.components import load_transformer, load_vae
from sd3tune.model.load.text import assemble
from sd3tune.run.callbacks.validation import SIGMAS
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE


@pytest.fixture
def photos(tmp_path: Path, write_images) -> Path:
    """Photos with masks, and as `alpha` the same photos with these masks as their alpha channels."""
    folder = write_images(tmp_path / "photos", 4)
    (tmp_path / "alpha").mkdir()
    for photo in sorted(folder.glob("*.png")):
        with Image.open(photo) as image:
            mask = Image.new("L", image.size, 30)
            ImageDraw.Draw(mask).ellipse((8, 8, 40, 72), fill=255)
            image.putalpha(mask)
            image.save(photo)
        shutil.copy(photo, tmp_path / "alpha")
        shutil.copy(photo.with_suffix(".txt"), tmp_path / "alpha")
        mask.save(folder / f"{photo.stem}_mask.png")
    return folder


@pytest.fixture
def config(quick_config, tmp_path: Path):
    """`config(folder, {"masks": "alpha"}, "key=value", ...)` with a run and a store of its own."""

    def make(folder: Path, source: dict[str, object], *overrides: str, name: str = "run") -> Config:
        return quick_config(
            tmp_path / name, f"data.sources={json.dumps([{'path': str(folder), **source}])}", "data.flip=true",
            "data.crop_variants=2", "train.batch_size=2", f"data.cache_dir={tmp_path / name}-store", *overrides,
        )  # fmt: skip

    return make


def entries(folder: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    store = Store(folder)
    return [found for key in store._index if (found := store.get(key)).keys() == {*names}]


def test_the_alpha_channel_is_the_same_mask_as_a_file(photos, config, tmp_path, assert_equal_runs, capsys) -> None:
    """And only without it is the transparency named."""
    run_training(config(photos, {}, name="files"))
    said = capsys.readouterr().out
    laid = "warning: 4 images have transparent parts, which are laid on white: 0.png, 1.png, 2.png, ...; masks: alpha"
    assert said.count(laid) == 1
    assert f"masks     {photos}: masks of 4 of 4 images; outside them the loss weighs 0.1\n" in said
    run_training(config(tmp_path / "alpha", {"masks": "alpha"}, name="alpha-run"))
    said = capsys.readouterr().out
    assert "laid on white" not in said
    assert "alpha channels of 4 of 4 images" in said
    assert_equal_runs(tmp_path / "files", tmp_path / "alpha-run")
    files, alphas = (entries(tmp_path / f"{name}-store", "mask") for name in ("files", "alpha-run"))
    assert len(files) == len(alphas) > 4
    (listed,) = (line for line in list_store(tmp_path / "files-store") if line.startswith("masks"))
    assert listed.split()[1:3] == [str(len(files)), "entries"]
    assert all(any(torch.equal(one["mask"], other["mask"]) for other in alphas) for one in files)


def test_a_masked_run_resumes_exactly_and_not_with_other_masks(photos, config, tmp_path, assert_equal_runs) -> None:
    source, every = {"outside_target": "base"}, "checkpoint.every=2"
    run_training(config(photos, source, "train.steps=4", every, name="whole"))
    run_training(config(photos, source, "train.steps=2", every))
    run_training(config(photos, source, "train.steps=4", every), resume=True)
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")
    for other in ({**source, "outside_weight": 0.2}, {}, {**source, "masks": "off"}, source):
        if other is source:
            Image.new("L", (96, 80), 255).save(photos / "0_mask.png")
        with pytest.raises(RunError) as caught:
            run_training(config(photos, other, "train.steps=6", every), resume=True)
        (changed, _) = caught.value.problems
        assert changed.startswith("--resume: data.masks: not the same masks, or loss outside them, as in the run")


def test_the_held_out_loss_is_masked(photos, config, tmp_path) -> None:
    """Computed apart, of the base, from the moments and masks in the store."""
    settings = config(photos, {"outside_weight": 0.3}, "validation={holdout: 1, every: 9}", "train.steps=1")
    run_training(settings)
    line = json.loads((tmp_path / "run" / "validation.jsonl").read_text().splitlines()[0])
    plan = make_plan(settings, torch.device("cpu"), resume=None)
    encoded = encode(plan, ALONE, lambda line: None)
    (example,) = encoded.holdout
    assert example.mask is not None
    (mask,) = (encoded.store.get(key)["mask"] for key in example.mask.keys)
    transformer, vae = load_transformer(plan.base, torch.float32), load_vae(plan.base, torch.float32).config
    entry = encoded.store.get(example.images[0])
    text = {e: {k: v[None] for k, v in encoded.store.get(of).items()} for e, of in example.captions.items()}
    embeds, pooled = assemble(
        text["clip_l"], text["clip_g"], text["t5"]["hidden"], 16, transformer.config.joint_attention_dim
    )
    eps, noise = torch.randn((2, *entry["mean"].shape), generator=generator(0, "validation", 0))
    z0 = (entry["mean"] + entry["std"] * eps - vae.shift_factor) * vae.scaling_factor
    losses = []
    for sigma in SIGMAS:
        noisy, timestep = ((1 - sigma) * z0 + sigma * noise)[None], torch.tensor([1000 * sigma])
        with torch.no_grad():
            velocity = transformer(noisy, embeds, pooled, timestep).sample
        weights = position_weights(mask.double(), 0.3)
        losses.append((weights * (velocity[0] - (noise - z0)).double().square()).mean().item())
    assert line["base_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_base_without_knowledge_is_no_target(scratch_config, photos, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"sources\.0\.outside_target is base, but with model\.init=random"):
        scratch_config(tmp_path / "run", f"data.sources=[{{path: {photos}, outside_target: base}}]")


def test_a_full_fine_tune_takes_the_base_s_prediction(photos, config) -> None:
    run_training(config(photos, {"outside_target": "base"}, "method={kind: full}", "train.steps=2"))
