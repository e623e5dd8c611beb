"""The two sides of a cell: each takes steps on prepared inputs, and only draws the noise itself."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import convert_outputs_to_fp32
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from peft import LoraConfig
from torch import Tensor

from benchmarks.cells import CLIP_TOKENS, Model
from benchmarks.gpu.cells import RANK, T5_TOKENS, Cell, Shapes
from benchmarks.gpu.models import config_of, model_of
from benchmarks.peer.cells import LEARNING_RATE, TARGETS
from benchmarks.trainer import SD3_SCALING, SHIFT, make_trainer


class Side(Protocol):
    def step(self) -> object:
        """Take one optimizer step."""

    def close(self) -> None: ...


class Ours:
    """The trainer's step, on a store of random entries on disk, which a thread reads ahead."""

    def __init__(self, cell: Cell, shapes: Shapes, device: torch.device, folder: Path) -> None:
        model = model_of(cell, shapes, device)
        self.trainer = make_trainer(config_of(cell, shapes), model, folder, device)

    def step(self) -> object:
        return self.trainer.step()

    def close(self) -> None:
        self.trainer.batches.close()


class Example:
    """A reimplementation of the step of diffusers' example with `--mixed_precision bf16 --cache_latents`.

    PEFT's layers in the base's precision, the forward pass under autocast with its output in fp32 (as accelerate
    prepares a model), sigmas looked up one by one, foreach AdamW. In its favour, reading images, VAE and text encoders
    are left out, and their outputs are on the device already. With nf4 the base is quantised as on the other side,
    which the example itself does not support.
    """

    def __init__(self, cell: Cell, shapes: Shapes, device: torch.device, folder: Path) -> None:
        model = model_of(cell, shapes, device)
        self.transformer, self.device = model.build(torch.bfloat16), device
        if cell.checkpointing != "none":
            self.transformer.enable_gradient_checkpointing()
        lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(TARGETS))
        self.transformer.add_adapter(lora)
        self.transformer.train()
        self.parameters = [of for of in self.transformer.parameters() if of.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, weight_decay=1e-4)
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
        self.forward = convert_outputs_to_fp32(_autocast(device)(self.transformer.forward))
        self.mean, self.std, self.prompt_embeds, self.pooled = _inputs(cell, model, self.transformer, device)

    def step(self) -> object:
        draw = self.mean + self.std * torch.randn_like(self.mean)
        latents = ((draw - SD3_SCALING.shift_factor) * SD3_SCALING.scaling_factor).to(torch.bfloat16)
        noise = torch.randn_like(latents)
        timesteps, sigmas = self._timesteps(len(latents), latents.dtype)
        noisy = (1 - sigmas) * latents + sigmas * noise
        velocity = self.forward(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=self.prompt_embeds,
            pooled_projections=self.pooled,
            return_dict=False,
        )[0]
        weight = compute_loss_weighting_for_sd3("logit_normal", sigmas).float()
        loss = (weight * (velocity.float() - (noise - latents).float()) ** 2).flatten(1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def close(self) -> None:
        pass

    def _timesteps(self, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return timesteps [B] and their sigmas [B, 1, 1, 1], whose lookup makes the host wait."""
        u = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=0.0, logit_std=1.0)
        timesteps = self.scheduler.timesteps[(u * len(self.scheduler.timesteps)).long()].to(self.device)
        schedule, sigmas = self.scheduler.timesteps.to(self.device), self.scheduler.sigmas.to(self.device, dtype)
        places = [(schedule == time).nonzero().item() for time in timesteps]
        return timesteps, sigmas[places].flatten()[:, None, None, None]


SIDE_CLASSES: dict[str, type[Ours] | type[Example]] = {"example": Example, "sd3tune": Ours}


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def _inputs(
    cell: Cell, model: Model, transformer: SD3Transformer2DModel, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return posterior moments in fp32, and the conditioning in bf16."""
    shape = (cell.batch, transformer.config.in_channels, model.latent_side, model.latent_side)
    text = (cell.batch, CLIP_TOKENS + T5_TOKENS, transformer.config.joint_attention_dim)
    mean, std = torch.randn(shape, device=device), 0.1 * torch.randn(shape, device=device).abs()
    prompt_embeds = torch.randn(text, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(cell.batch, sum(model.clip_widths.values()), device=device, dtype=torch.bfloat16)
    return mean, std, prompt_embeds, pooled
