"""The recipe of nano's VAE, and of the pictures that nano is trained on, in seconds."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from examples.nano import render, resume, train_vae
from examples.nano.muon import MuonAndAdamW
from examples.nano.pictures import training_pictures
from sd3tune.config.sections.data import DatasetSource
from sd3tune.data.sources.dataset import list_rows
from sd3tune.nano.world import Scene, is_held_out, parse


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return train_vae.stack(training_pictures(96, seed=0))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a training of two steps leaves."""
    folder = tmp_path_factory.mktemp("recipe") / "vae"
    train_vae.main(["--out", str(folder), "--steps", "2", "--batch-size", "4", "--pictures", "64", "--fp32"])
    return folder


def test_pictures_are_a_function_of_the_seed(pictures: Tensor) -> None:
    assert torch.equal(train_vae.stack(training_pictures(8, seed=0)), pictures[:8])
    assert not torch.equal(train_vae.stack(training_pictures(8, seed=1)), pictures[:8])


@pytest.mark.long
def test_a_few_steps_lower_the_loss(pictures: Tensor) -> None:
    losses = train_vae.train(train_vae.build_vae(0), pictures, steps=16, batch_size=8, seed=0, bf16=False)
    assert losses[-4:].mean() < 0.85 * losses[:4].mean()


def test_a_stopped_training_continues_to_the_same_weights(
    pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(checkpoint: Path) -> AutoencoderKL:
        vae = train_vae.build_vae(0)
        train_vae.train(vae, pictures, steps=4, batch_size=2, seed=0, bf16=False, checkpoint=checkpoint)
        return vae

    monkeypatch.setattr(resume, "EVERY", 2)
    whole = train(tmp_path / "whole")
    calls, right = [], train_vae.reconstruction_loss

    def stopped(decoded: Tensor, pixels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return right(decoded, pixels)

    monkeypatch.setattr(train_vae, "reconstruction_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped")
    continued = train(tmp_path / "stopped")
    assert len(calls) == 4 + 2  # steps 3 and 4 again
    for name, tensor in continued.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


@pytest.mark.long
@pytest.mark.long
def test_it_is_written_as_a_vae_of_the_shape_of_sd3s(written: Path) -> None:
    vae = AutoencoderKL.from_pretrained(written)
    assert vae.quant_conv is None
    assert vae.post_quant_conv is None
    assert vae.num_parameters() * 2 < 4e6  # bytes, in fp16
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        assert latents.shape == (1, 16, 8, 8)
        assert vae.decode(latents).sample.shape == (1, 3, 64, 64)


@pytest.mark.long
def test_scaled_latents_have_mean_0_and_standard_deviation_1(written: Path) -> None:
    vae = AutoencoderKL.from_pretrained(written)
    pixels = train_vae.as_pixels(train_vae.stack(training_pictures(64, seed=0)))
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=0.01)
    assert scaled.std().item() == pytest.approx(1, abs=0.01)


def test_psnr_is_that_of_an_error_of_one_level(pictures: Tensor) -> None:
    grey = torch.full_like(pictures, 100)
    assert train_vae.psnr(grey, grey + 1) == pytest.approx(48.13, abs=0.01)  # 20 log10 255


def test_muon_moves_kernels_by_orthogonal_matrices_and_adamw_the_rest() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(4, 8, 3)
    before = copy.deepcopy(convolution)
    optimizer = MuonAndAdamW(convolution, learning_rate=0.01)
    convolution(torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    moved = (convolution.weight - before.weight).detach().flatten(1)
    singular = torch.linalg.svdvals(moved)
    assert singular.max() / singular.min() < 2.5  # Newton and Schulz's iteration ends between 0.7 and 1.2
    assert moved.square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=0.3)
    assert (convolution.bias - before.bias).abs().detach().numpy() == pytest.approx(0.01, rel=1e-3)
    assert all(parameter.grad is None for parameter in convolution.parameters())


def test_the_learning_rate_ends_at_nothing() -> None:
    shares = [train_vae.learning_rate_share(step, 1000) for step in range(1000)]
    assert max(shares) == pytest.approx(1, abs=0.02)
    assert shares[0] < 0.05
    assert shares[-1] < 0.001


def test_what_is_rendered_is_read_as_a_dataset(tmp_path: Path) -> None:
    render.main(["--out", str(tmp_path), "--pictures", "60", "--held-out", "30"])
    rows = list_rows(DatasetSource(path=str(tmp_path / "pictures.parquet")))
    assert len(rows) == 60
    assert len(list_rows(DatasetSource(path=str(tmp_path / "held_out.parquet")))) == 30
    assert len({row.read_bytes() for row, _ in rows}) == 60
    row, caption = rows[0]
    assert caption
    with Image.open(io.BytesIO(row.read_bytes())) as picture:
        assert (picture.mode, picture.size) == ("RGB", (64, 64))


def test_one_caption_in_ten_has_a_lead_and_the_rest_of_it_is_of_the_world() -> None:
    captions = [caption for _, _, caption in render.training_rows(300, seed=0)]
    led = [caption for caption in captions if caption.startswith(render.LEADS)]
    assert 0.05 < len(led) / len(captions) < 0.15
    assert all(_scene(caption).caption == caption.partition(" of ")[2] for caption in led)


def test_training_never_sees_what_is_held_out() -> None:
    assert not any(is_held_out(_scene(caption)) for _, _, caption in render.training_rows(200, seed=3))
    assert all(is_held_out(_scene(caption)) for _, _, caption in render.held_out_rows(40, seed=3))


def _scene(caption: str) -> Scene:
    leads = [lead for lead in render.LEADS if caption.startswith(lead)]
    return parse(caption.removeprefix(leads[0]) if leads else caption)
