"""Batches of one tuning run: views of the reference, encoded once, then noised anew for every step."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.diffusion import draw_noise_levels, noised
from ..backbone.model import Backbone
from .attributes import Attribute
from .config import TuningConfig
from .reference import Reference
from .step import NoisedViews
from .views import plain_prompts, readable, views_of


@dataclass(frozen=True)
class EncodedViews:
    """Latents (V, C, h, w) of the views, the mask of their loss (V, 1, h, w), and each view's prompts."""

    latents: Tensor
    masks: Tensor
    prompts: list[list[str]]

    @classmethod
    def of(
        cls, reference: Reference, backbone: Backbone, attribute: Attribute, config: TuningConfig
    ) -> EncodedViews:
        """Make the views of a reference and encode them."""
        images, masks, prompts = views_of(reference, config)
        # An autoencoder of Stable Diffusion's size needs more memory for 16 images than a tuning step.
        count = 1 if backbone.large else 16
        latents = torch.cat([backbone.encode_images(x) for x in images.split(count)]).float()
        return cls(
            latents=latents,
            masks=F.interpolate(masks, size=latents.shape[-2:], mode="area").to(backbone.device),
            prompts=[readable(backbone, attribute.token, each, plain_prompts(config)) for each in prompts],
        )


class Batches:
    """Draws noised views. All random numbers come from one generator on the CPU: one seed, one run."""

    def __init__(
        self, views: EncodedViews, backbone: Backbone, config: TuningConfig, prompt_dropout: float
    ) -> None:
        self.views, self.config, self.prompt_dropout = views, config, prompt_dropout
        self.device, self.dtype = backbone.device, backbone.unet.dtype
        self.scheduler = copy.copy(backbone.scheduler)  # add_noise moves its tables to the device
        self.generator = torch.Generator().manual_seed(config.seed)

    def draw(self, count: int) -> NoisedViews:
        """`count` random views at random noise levels, each under one of its prompts."""
        views, generator = self.views, self.generator
        rows = torch.randint(0, len(views.latents), (count,), generator=generator)
        t = self._timesteps(count).to(self.device)
        x_0 = views.latents[rows.to(self.device)]
        noise = torch.randn(x_0.shape, generator=generator).to(self.device)
        x_t, target = noised(self.scheduler, x_0, noise, t)
        return NoisedViews(
            x_t=x_t.to(self.dtype),
            t=t,
            target=target,
            mask=views.masks[rows.to(self.device)],
            prompts=self._prompts(rows.tolist()),
        )

    def _timesteps(self, count: int) -> Tensor:
        if self.config.noise_level is None:
            timesteps = self.scheduler.config.num_train_timesteps
            return torch.randint(0, timesteps, (count,), generator=self.generator)
        return draw_noise_levels(self.scheduler, count, self.config.noise_level, self.generator)

    def _prompts(self, rows: list[int]) -> list[str]:
        """A random prompt of each view; with prompt dropout, some are empty."""
        shares = torch.rand(len(rows), generator=self.generator).tolist()
        choices = [self.views.prompts[k] for k in rows]
        prompts = [each[int(share * len(each))] for each, share in zip(choices, shares, strict=True)]
        if not self.prompt_dropout:
            return prompts
        dropped = (torch.rand(len(rows), generator=self.generator) < self.prompt_dropout).tolist()
        return ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
