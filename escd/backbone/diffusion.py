"""The diffusion loss (paper, Eqs. 1 and 2): noised latents, target, squared error, weight, noise levels."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

SNR_CEILING = 5.0
# Deviation of the logarithm of noise over signal at which a UNet learns (`draw_noise_levels`).
NOISE_SPREAD = 1.2


def noised(scheduler: DDIMScheduler, x_0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noised latents x_t and the UNet's target, both (B, C, h, w), at time steps t (B,) of latents x_0."""
    # Eq. 1: x_t, and the epsilon that epsilon_theta(x_t, t) is to predict
    return scheduler.add_noise(x_0, noise, t), target_of(scheduler, x_0, noise, t)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared error (B, C, h, w) of a UNet's prediction, in float32; its mean is the loss (Eq. 2)."""
    # Eq. 2: || epsilon - epsilon_theta(x_t, t, tau(c)) ||^2
    return (prediction.float() - target).square()


def target_of(scheduler: DDIMScheduler, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Target of a UNet's prediction at time steps t (B,): the noise (B, C, h, w), or the velocity."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(x_0, noise, t)
    raise ValueError(f"a UNet that predicts {kind!r} cannot be trained here; known: epsilon, v_prediction")


def loss_weight(scheduler: DDIMScheduler, t: Tensor) -> Tensor:
    """The weight (B,) of the squared error at time steps t (B,): 1 where the noise is predicted.

    A velocity's error at little noise says nothing of the picture and would drown the rest: it is weighted
    down from the signal-to-noise ratio SNR_CEILING on, a soft form of min-SNR (Hang et al. 2023).
    """
    if scheduler.config.prediction_type == "epsilon":
        return torch.ones(t.shape, device=t.device)
    return SNR_CEILING / (compute_snr(scheduler, t) + SNR_CEILING)


def draw_noise_levels(
    scheduler: DDIMScheduler, count: int, mean: float, generator: torch.Generator | None = None
) -> Tensor:
    """Time steps (count,) whose log of noise over signal is normal around `mean`, spread over one batch.

    SD's schedule, drawn uniformly, spends half of its steps below a signal-to-noise ratio of 0.3, where there
    is little left to learn at 16 x 16 latents, and outlines stay blurred; a normal distribution of the level
    (Karras et al. 2022) with the plain error serves them better. One step in ten stays uniform, so that pure
    noise is met too.
    """
    alpha = scheduler.alphas_cumprod.cpu().double()  # an Apple GPU has no float64
    level = ((1 - alpha) / alpha.clamp(min=1e-9)).log() / 2
    share = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    normal = mean + NOISE_SPREAD * torch.special.ndtri(share.double().clamp(1e-4, 1 - 1e-4))
    drawn = torch.searchsorted(level, normal).clamp(max=len(level) - 1)
    uniform = torch.randint(0, len(level), (count,), generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.1, uniform, drawn)
    return t[torch.randperm(count, generator=generator)]
