"""The masked loss in float64, the base's prediction outside, and masks that stay with their pictures and captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd3tune.data.store import Store
from sd3tune.flow.objective import position_weights
from sd3tune.model.load.components import load_transformer
from sd3tune.training.batches import Batches, LatentScaling
from sd3tune.training.examples import Example, MaskedVariants, OwnPrediction
from sd3tune.training.step import predict_velocity, velocity_targets

SQUARES = ("data.buckets=false", "train.batch_size=3", "optimizer.lr=1e-2")


@pytest.fixture
def photos(tmp_path: Path, write_images) -> Path:
    """Photos of the size of the crop, the first three with masks: half, quarter and grey."""
    folder = write_images(tmp_path / "photos", 4)
    for number in range(4):
        with Image.open(folder / f"{number}.png") as image:
            image.resize((64, 64)).save(folder / f"{number}.png")
    for number, grey in enumerate(greys()[:3]):
        Image.fromarray(grey).save(folder / f"{number}_mask.png")
    return folder


def greys() -> list[np.ndarray]:
    half, quarter = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    half[:, :36], quarter[32:, 32:] = 255, 255
    return [half, quarter, np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), np.full_like(half, 255)]


@pytest.fixture
def start(assembled, quick_config, tmp_path: Path, photos: Path) -> Callable:
    """`start({"masks": "off"}, "key=value", ...)`: a training on the photos, with settings of their source."""

    def make(source: dict[str, object], *overrides: str):
        sources = json.dumps([{"path": str(photos), **source}])
        return assembled(quick_config(tmp_path / "run", f"data.sources={sources}", *SQUARES, *overrides))

    return make


def weights_in_float64(name: str, outside: float) -> np.ndarray:
    """Weights of latent positions: 1 inside, `outside` outside, divided by their mean."""
    grey = greys()[int(name.removesuffix(".png"))].astype(np.float64) / 255
    inside = np.array([[grey[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].mean() for x in range(8)] for y in range(8)])
    weights = inside + outside * (1 - inside)
    return weights / weights.mean()


DISTANCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mse": np.square,
    "absolute": np.abs,
    "{kind: huber, delta: 0.7}": lambda d: np.where(np.abs(d) < 0.7, d**2 / 2, 0.7 * (np.abs(d) - 0.35)),
    "{kind: pseudo_huber, delta: 0.7}": lambda d: 0.49 * (np.sqrt(1 + (d / 0.7) ** 2) - 1),
}


@pytest.mark.parametrize(("loss", "outside"), [*((loss, 0.1) for loss in DISTANCES), ("mse", 0.0), ("mse", 1.0)])
def test_the_masked_loss_is_that_of_float64(start, loss: str, outside: float) -> None:
    """For every distance, with a weighting of sigma and a weight of the source, in each micro-step."""
    training = start(
        {"outside_weight": outside, "weight": 0.5}, "train.gradient_accumulation=2", "flow.weighting.kind=sigma_sqrt",
        f"flow.loss={loss}" if "kind" in loss else f"flow.loss.kind={loss}",
    )  # fmt: skip
    expected = []
    for micro in range(2):
        batch = training.batches.fetch(0, micro)
        with torch.no_grad():
            velocity = predict_velocity(training.transformer, training.method, batch).double().numpy()
        errors = DISTANCES[loss](velocity - (batch.noise.double() - batch.latents.double()).numpy())
        weights = np.stack([weights_in_float64(name, outside) for name in batch.names])
        expected += (errors * weights[:, None]).mean((1, 2, 3)).tolist()
    result = training.step()
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-5)
    factors = 0.5 * training.objective.weight(result.sigmas)
    assert result.weighted.tolist() == pytest.approx((factors * result.losses).tolist(), rel=1e-6)


def test_the_gradient_is_that_of_the_masked_loss(start) -> None:
    training = start({"outside_weight": 0.25})
    batch = training.batches.fetch(0, 0)
    weights = torch.tensor(np.stack([weights_in_float64(name, 0.25) for name in batch.names])).float()
    velocity = predict_velocity(training.transformer, training.method, batch)
    (weights[:, None] * (velocity - (batch.noise - batch.latents)).square()).mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in training.parameters.values()])
    for parameter in training.parameters.values():
        parameter.grad = None
    gradients: list[torch.Tensor] = []
    training.reduce_mean = lambda gradient: (gradients.append(gradient.clone()), gradient)[1]
    training.step()
    torch.testing.assert_close(gradients[0], expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_without_masks_nothing_changes_and_a_white_mask_changes_rounding_only(start, photos: Path) -> None:
    off = start({"masks": "off"})
    for number in range(3):
        (photos / f"{number}_mask.png").unlink()
    none = start({})
    for number in range(4):
        Image.new("L", (64, 64), 255).save(photos / f"{number}_mask.png")
    white = start({})
    for _ in range(3):
        results = [training.step() for training in (off, none, white)]
        assert torch.equal(results[0].losses, results[1].losses)
        torch.testing.assert_close(results[2].losses, results[1].losses, rtol=1e-5, atol=0)
    assert none.batches.fetch(0, 0).position_weights is None
    assert torch.equal(off.state.master.master, none.state.master.master)


def test_outside_the_mask_the_base_s_own_prediction_is_the_target(start) -> None:
    """Also next to a prior of it, whose samples have no mask."""
    prior = {"kind": "prediction", "prompt": "a dog"}
    training = start({"outside_target": "base", "outside_weight": 0.5, "prior": prior})
    for _ in range(3):  # so that the adapter differs from nothing
        training.step()
    batch = training.batches.fetch(3, 0)
    base = load_transformer(training.plan.base, torch.float32)
    with torch.no_grad():
        found = velocity_targets(training.transformer, training.method, batch)
        predicted = predict_velocity(base, training.method, batch)
        adapted = predict_velocity(training.transformer, training.method, batch)
    assert (predicted - adapted).abs().max() > 1e-2
    true = batch.noise - batch.latents
    for row, name in enumerate(batch.names):
        inside = torch.zeros(8, 8)
        if row < batch.instances:
            scaled = weights_in_float64(name, 0.0)
            inside = torch.tensor(scaled / scaled.max() * greys_max(name)).float()
        expected = inside * true[row] + (1 - inside) * predicted[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(batch.position_weights[batch.instances :], torch.ones(3, 8, 8))


def greys_max(name: str) -> float:
    grey = greys()[int(name.removesuffix(".png"))].astype(np.float64) / 255
    return float(grey.reshape(8, 8, 8, 8).mean((1, 3)).max())


def test_before_the_first_step_nothing_is_to_be_learned_outside(start) -> None:
    """B = 0: the adapter predicts what the base does."""
    training = start({"outside_target": "base", "outside_weight": 1.0})
    batch = training.batches.fetch(0, 0)
    targets = velocity_targets(training.transformer, training.method, batch)
    errors = (targets - predict_velocity(training.transformer, training.method, batch)).abs().amax(1)
    outside = batch.from_base == 1
    assert outside.any()
    assert errors[outside].max() < 1e-5
    assert errors[batch.from_base == 0].min() > 1e-3


def test_weights_have_mean_one_and_an_empty_crop_of_weight_zero_teaches_nothing() -> None:
    mask = torch.rand(5, 4, 6)
    torch.testing.assert_close(position_weights(mask, 0.1).mean((1, 2)), torch.ones(5))
    torch.testing.assert_close(position_weights(torch.zeros(4, 6), 0.1), torch.ones(4, 6))
    assert torch.equal(position_weights(torch.zeros(4, 6), 0.0), torch.zeros(4, 6))


# Pairing: image n, variant v has latents and mask of 0.1 n + 0.01 v + 0.02 everywhere; its embeddings are all n.

SIZES = ((16, 16), (8, 24), (16, 16), (24, 8), (8, 24))
VARIANTS = 4
ENCODERS = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    with store.writer() as writer:
        for image, (height, width) in enumerate(SIZES):
            for variant in range(VARIANTS):
                mask = torch.full((height // 8, width // 8), 0.1 * image + 0.01 * variant + 0.02)
                mean = mask.expand(4, -1, -1).clone()
                writer.put(f"image-{image}-{variant}", {"mean": mean, "std": torch.zeros_like(mean)})
                writer.put(f"mask-{image}-{variant}", {"mask": mask})
            for encoder in ENCODERS:
                pooled = {} if encoder == "t5" else {"pooled": torch.full((5,), float(image))}
                writer.put(f"{encoder}-{image}", {"hidden": torch.full((3, 2), float(image)), **pooled})
    return store


def example(image: int, masked: bool = True, prior: OwnPrediction | None = None) -> Example:
    mask = MaskedVariants(tuple(f"mask-{image}-{variant}" for variant in range(VARIANTS)), 1.0, keeps_base=True)
    keys = tuple(f"image-{image}-{variant}" for variant in range(VARIANTS))
    captions = {encoder: f"{encoder}-{image}" for encoder in ENCODERS}
    return Example(f"{image}.png", keys, captions, SIZES[image], prior=prior, mask=mask if masked else None)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (3, 1), (2, 2)])
def test_picture_mask_and_caption_stay_together(store: Store, world: int, batch_size: int, accumulation: int) -> None:
    """Through shuffling, buckets, crops and flips, two ranks and micro-steps; image 3 has no mask."""
    seen = set[tuple[int, int]]()
    prior = OwnPrediction([{encoder: f"{encoder}-0" for encoder in ENCODERS}], 1.0)
    examples = [example(image, image != 3, prior if image == 4 else None) for image in range(len(SIZES))]
    for rank in range(world):
        batches = Batches(
            store, examples, seed=5, batch_size=batch_size, accumulation=accumulation, rank=rank, world=world,
            device=torch.device("cpu"), scaling=LatentScaling(1.0, 0.0), sigma_of=lambda u, pixels: u,
        )  # fmt: skip
        for step in range(24):
            for micro in range(accumulation):
                batch = batches.fetch(step, micro)
                for row, name in enumerate(batch.names):
                    image, is_kept = int(name[0]), row >= batch.instances
                    if image == 3 or is_kept:
                        assert batch.from_base is None or not batch.from_base[row].any()
                        assert batch.position_weights is None or (batch.position_weights[row] == 1).all()
                    else:
                        assert torch.equal(batch.from_base[row], 1 - batch.latents[row, 0])
                        seen.add(divmod(round(100 * float(batch.latents[row].flatten()[0])) - 2, 10))
                    for entry in batch.embeddings.values():
                        assert all((tensor[row] == (0 if is_kept else image)).all() for tensor in entry.values())
        batches.close()
    assert {image for image, _ in seen} == {0, 1, 2, 4}
    assert {variant for _, variant in seen} == set(range(VARIANTS))
