"""Check, before anything is timed, that both sides have the same loss and gradients on the same inputs.

`python -m benchmarks.peer.gate BASE OUT ...` (then the script and its arguments) runs the script itself up to its first
gradient, and records its latents, noise and timesteps. sd3tune's step then runs on them with the same adapter weights,
but with its own text embeddings. OUT receives the errors as JSON.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
from torch import Tensor

from benchmarks.peer.accommodations import with_casting_vae
from benchmarks.peer.cells import BATCH_SIZE, LEARNING_RATE, RANK, T5_TOKENS, TARGETS
from benchmarks.peer.materials import CAPTION
from sd3tune.config import Config
from sd3tune.data.sampler import generator
from sd3tune.methods import LoraMethod
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.load.components import load_scheduler, load_text_encoder, load_transformer
from sd3tune.run.state import make_state
from sd3tune.runtime.processes import ALONE
from sd3tune.training.batches import Batch, Batches
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.objective import make_objective
from sd3tune.training.step import train_step

LOSS_TOLERANCE = 1e-5
LEAST_COSINE = 0.999


class _FirstGradient(Exception):
    """Raised to stop the script at its first gradient."""


@dataclass
class Seen:
    """The inputs and results of the script's first step."""

    latents: Tensor | None = None
    noise: Tensor | None = None
    timesteps: Tensor | None = None
    loss: Tensor | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def observe_script(arguments: Sequence[str]) -> Seen:
    """Run the script up to its first gradient. B is filled with small numbers, so that A has a gradient."""
    seen = Seen()
    randn_like, forward = torch.randn_like, SD3Transformer2DModel.forward
    backward = Accelerator.backward
    model: list[SD3Transformer2DModel] = []

    def drawing(like: Tensor, *given: Any, **options: Any) -> Tensor:
        noise = randn_like(like, *given, **options)
        if seen.timesteps is None:  # the last draw before the forward pass
            seen.latents, seen.noise = like.clone(), noise.clone()
        return noise

    def predicting(transformer: SD3Transformer2DModel, *given: Any, **options: Any) -> Any:
        model.append(transformer)
        seen.timesteps = options["timestep"].clone()
        seen.weights = _fill(transformer)
        return forward(transformer, *given, **options)

    def differentiating(accelerator: Accelerator, loss: Tensor, **options: Any) -> None:
        seen.loss = loss.detach().clone()
        backward(accelerator, loss, **options)
        seen.gradients = {name: of.grad.clone() for name, of in _factors(model[0]).items() if of.grad is not None}
        raise _FirstGradient

    with (
        mock.patch.object(torch, "randn_like", drawing),
        mock.patch.object(SD3Transformer2DModel, "forward", predicting),
        mock.patch.object(Accelerator, "backward", differentiating),
        mock.patch.object(sys, "argv", list(arguments)),
    ):
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except _FirstGradient:
            return seen
    raise RuntimeError("the script ended before its first gradient")


def our_step(base_folder: Path, seen: Seen) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the adapter's gradients of `train_step` on the same inputs."""
    config = _config(base_folder)
    base = resolve_base(str(base_folder))
    transformer = load_transformer(base, torch.float32)
    method = LoraMethod(config)
    parameters = method.inject(transformer, lambda name: generator(0, "init", name))
    if config.train.fast_path:
        use_fast_path(transformer)
    for name, parameter in parameters.items():
        parameter.data.copy_(seen.weights[name])
    state = make_state(config, FlatMaster(parameters, torch.float32), torch.float32)
    assert seen.latents is not None
    assert seen.noise is not None
    batch = Batch(
        latents=seen.latents,
        noise=seen.noise,
        sigma=_sigmas(base_folder, seen),
        embeddings=_embeddings(base_folder),
        weights=torch.ones(BATCH_SIZE),
        names=[""] * BATCH_SIZE,
        instances=BATCH_SIZE,
        kept=slice(BATCH_SIZE, BATCH_SIZE),
    )
    batches = cast(Batches, SimpleNamespace(fetch=lambda step, micro: batch, seed_for=lambda *_: 0, with_prior=False))
    objective = make_objective(config.flow, float(load_scheduler(base).config.shift))
    result = train_step(state, transformer, method, batches, objective, config, ALONE.reduce_mean)
    moment = state.optimizer.state[state.master.master]["exp_avg"]  # after one step (1 - beta1) times the gradient
    gradients = state.master.views(moment / (1 - state.optimizer.param_groups[0]["betas"][0]))
    return result.weighted.mean().item(), gradients


def compare(seen: Seen, loss: float, gradients: dict[str, Tensor]) -> dict[str, Any]:
    """Return the errors, and whether they pass. Each nonzero gradient of the script must equal sd3tune's."""
    assert seen.loss is not None
    expected = seen.loss.item()
    flat, flat_expected = (
        torch.cat([side[name].flatten() for name in gradients]) for side in (gradients, seen.gradients)
    )
    absent = [name for name, gradient in seen.gradients.items() if name not in gradients and gradient.any()]
    figures = {
        "loss": loss,
        "peer_loss": expected,
        "loss_relative_error": abs(loss - expected) / abs(expected),
        "gradient_cosine": _cosine(flat, flat_expected),
        "least_module_cosine": min(_cosine(gradient, seen.gradients[name]) for name, gradient in gradients.items()),
        "gradient_norm_relative_error": ((flat.norm() - flat_expected.norm()).abs() / flat_expected.norm()).item(),
        "gradients_compared": len(gradients),
        "gradients_of_the_peer_alone": absent,
    }
    passed = (
        figures["loss_relative_error"] <= LOSS_TOLERANCE and figures["gradient_cosine"] > LEAST_COSINE and not absent
    )
    return {**figures, "passed": passed}


def _config(base_folder: Path) -> Config:
    return Config.model_validate(
        {
            "name": "gate",
            "model": {"base": str(base_folder), "dtype": "fp32", "max_sequence_length": T5_TOKENS},
            "method": {"kind": "lora", "rank": RANK, "alpha": float(RANK), "targets": list(TARGETS)},
            "data": {"sources": [{"kind": "folder", "path": "none"}]},
            "optimizer": {"kind": "adamw", "lr": LEARNING_RATE},
            "train": {"batch_size": BATCH_SIZE, "max_grad_norm": None},
        }
    )


def _sigmas(base_folder: Path, seen: Seen) -> Tensor:
    """Return the scheduler's sigma for each timestep."""
    scheduler = load_scheduler(resolve_base(str(base_folder)))
    assert seen.timesteps is not None
    return torch.stack([scheduler.sigmas[scheduler.timesteps == time].squeeze() for time in seen.timesteps])


def _embeddings(base_folder: Path) -> dict[str, dict[str, Tensor]]:
    base = resolve_base(str(base_folder))
    entries = {}
    for encoder in ("clip_l", "clip_g", "t5"):
        text_encoder = load_text_encoder(base, encoder, torch.float32, max_sequence_length=T5_TOKENS)
        (entry,) = text_encoder.encode([CAPTION])
        entries[encoder] = {name: torch.stack([tensor] * BATCH_SIZE) for name, tensor in entry.items()}
    return entries


@torch.no_grad()
def _fill(transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
    factors = _factors(transformer)
    for name, factor in factors.items():
        if name.endswith(".lora_B"):
            factor.normal_(std=0.02, generator=generator(0, name))
    return {name: factor.detach().clone() for name, factor in factors.items()}


def _factors(transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
    ending = ".default.weight"
    return {name.removesuffix(ending): of for name, of in transformer.named_parameters() if name.endswith(ending)}


def _cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()


def main(arguments: Sequence[str]) -> None:
    base_folder, out, *script = arguments
    with_casting_vae()
    seen = observe_script(script)
    Path(out).write_text(json.dumps(compare(seen, *our_step(Path(base_folder), seen)), indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
