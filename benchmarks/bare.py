"""The baseline: PEFT's LoRA in a minimal loop, on inputs prepared in memory.

It does not use sd3tune's training code, so it is also an independent implementation of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor
from torch.nn import functional as F

from sd3tune.config import Config


@dataclass(frozen=True)
class Ready:
    """The inputs of one step, noised, assembled and cast in advance."""

    noisy_latents: Tensor
    timestep: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    target: Tensor
    """The velocity, fp32."""


def ready(latents: Tensor, noise: Tensor, sigma: Tensor, prompt_embeds: Tensor, pooled: Tensor) -> Ready:
    """Return the inputs for given random draws; the embeddings have the model's dtype."""
    share = sigma[:, None, None, None]
    noisy = (1 - share) * latents + share * noise
    return Ready(noisy.to(prompt_embeds.dtype), 1000 * sigma, prompt_embeds, pooled, noise - latents)


class BareLoop:
    """Forward, velocity loss, backward, clip, fused AdamW on PEFT's own parameters, in the base's dtype."""

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        config: Config,
        modules: Sequence[str],
        weights: Mapping[str, Tensor],
        inputs: Iterable[Ready],
    ) -> None:
        """Initialize the factors from `weights`, `<module>.lora_A` and `.lora_B`. The loop cycles through `inputs`."""
        self.transformer, self.max_grad_norm = transformer, config.train.max_grad_norm
        method = config.method
        assert method.kind == "lora"
        transformer.add_adapter(LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules=list(modules)))
        named = dict(transformer.named_parameters())
        self.parameters = [named[f"{name}.default.weight"] for name in weights]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, weights.values(), strict=True):
                parameter.copy_(value)
        adamw = config.optimizer
        assert adamw.kind == "adamw"
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=adamw.lr,
            betas=(adamw.betas[0], adamw.betas[1]),
            eps=adamw.eps,
            weight_decay=adamw.weight_decay,
            fused=True,
        )
        self._inputs = itertools.cycle(list(inputs))

    def step(self) -> tuple[Tensor, Tensor]:
        """Run one step on the next inputs. Return the loss, and the gradient's norm before clipping."""
        given = next(self._inputs)
        velocity = self.transformer(
            hidden_states=given.noisy_latents,
            timestep=given.timestep,
            encoder_hidden_states=given.prompt_embeds,
            pooled_projections=given.pooled_prompt_embeds,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity.float(), given.target)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def first_moment(self) -> Tensor:
        """Return AdamW's exp_avg, flattened: after one step, (1 - beta1) times the clipped gradient."""
        return torch.cat([self.optimizer.state[p]["exp_avg"].float().reshape(-1) for p in self.parameters])
