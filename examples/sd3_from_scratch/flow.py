"""5. Rectified flow: learn the straight way from noise to picture, then walk it in small steps.

Between a latent z and noise e lies the line  z_s = (1 - s) z + s e,  s from 0 to 1. Its direction, e - z, is what the
network predicts from z_s, s and the prompt. To draw, start at s = 1 and go back along the prediction.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1: the larger a picture, the more noise hides it (Esser et al. 2024, 5.3)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_sigmas(count: int, shift: float) -> Tensor:
    """Return noise levels, [count]: the logistic function of normal numbers, so medium ones are most common."""
    return shifted(torch.sigmoid(torch.randn(count)), shift)


def line(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return the mixtures of latents and noise, [B, c, h, w], at noise levels `sigma` [B]."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * latents + sigma * noise


def velocity_loss(predicted: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the direction, a scalar in fp32."""
    return (predicted.float() - (noise - latents)).square().mean()


def drawing_sigmas(steps: int, shift: float) -> Tensor:
    """Return the noise levels of a drawing, [steps + 1], from 1 to 0.

    Quirk: the least level before 0 is a thousandth that is shifted twice, as in diffusers.
    """
    least = shifted(torch.tensor(0.001), shift)
    return torch.cat([shifted(torch.linspace(1, least.item(), steps), shift), torch.zeros(1)])


Predict = Callable[[Tensor, Tensor], Tensor]  # latents [B, c, h, w] and noise levels [B] -> velocity


@torch.no_grad()
def draw(predict: Predict, noise: Tensor, sigmas: Tensor, show: Callable[[int], object] = lambda step: None) -> Tensor:
    """Return latents: walk from noise along the predicted velocity, in Euler's steps."""
    x = noise
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        x = x + (following - sigma) * predict(x, sigma.expand(len(x)).to(x))
        show(step + 1)
    return x


def guided(
    predict: Callable[..., Tensor], positive: tuple[Tensor, ...], negative: tuple[Tensor, ...], scale: float
) -> Predict:
    """Return a prediction that goes past the prompt's, away from that of a negative or empty prompt.

    Both are computed in one batch (classifier-free guidance, Ho and Salimans 2022).
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        both = [torch.cat([no, yes]) for no, yes in zip(negative, positive, strict=True)]
        without, toward = predict(torch.cat([x, x]), torch.cat([sigma, sigma]), *both).chunk(2)
        return without + scale * (toward - without)

    return velocity
