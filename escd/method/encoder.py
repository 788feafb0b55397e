"""Stage 1, visual feature extraction: one reference image to ``embeds_ref`` (paper, Eqs. 3 and 4)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.halves import down_path

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ..backbone.model import Backbone

# How noisy the reference is read: little noise keeps the outline and the texture, and still looks to the UNet
# like something to be denoised.
TIMESTEP = 200
# Each feature map is averaged over the cells of a 4 x 4 grid: E4T's global means forget where a part of the
# outline lies.
GRIDS = (4,)


def pooled(maps: list[Tensor], grids: tuple[int, ...] = GRIDS) -> Tensor:
    """Means of maps (B, C, h, w) over each grid x grid partition of the frame: (B, sum grid^2 * sum C).

    Cell by cell, in each the channels of all maps.
    """
    cells = [torch.cat([F.adaptive_avg_pool2d(h.float(), g) for h in maps], 1).flatten(2) for g in grids]
    return torch.cat(cells, 2).transpose(1, 2).flatten(1)


def feature_widths(backbone: Backbone, grids: tuple[int, ...] = GRIDS) -> tuple[int, int]:
    """(width of the CLS token, width of F_down) for this backbone: the two lengths that make up embeds_ref.

    With ``grids=(1,)``, E4T's global means, Stable Diffusion 1.5 has 10 880.
    """
    return backbone.image_tower.config.width, down_width(backbone.unet) * sum(g * g for g in grids)


def down_width(unet: UNet2DConditionModel) -> int:
    """Number of channels of all feature maps of the UNet's way down."""
    config = unet.config
    layers = config.layers_per_block
    layers = [layers] * len(config.block_out_channels) if isinstance(layers, int) else list(layers)
    channels = config.block_out_channels[0]  # conv_in
    for k, (width, count) in enumerate(zip(config.block_out_channels, layers, strict=True)):
        channels += width * (
            count + (k < len(layers) - 1)
        )  # its layers, and its downsampler but for the last
    return channels + config.block_out_channels[-1]  # mid


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    images: Tensor,
    *,
    seed: int = 0,
    timestep: int = TIMESTEP,
    grids: tuple[int, ...] = GRIDS,
    x_0: Tensor | None = None,
) -> Tensor:
    """embeds_ref (B, width) of reference images (B, 3, H, W) in [-1, 1] (paper, Eqs. 3 and 4).

    The UNet's way down reads the reference noised to `timestep` under the empty prompt; the OpenCLIP tower
    gives its CLS token. Both stand side by side in the result, the CLS token first; the attribute filter
    merges them. The noise is drawn from `seed`, one field for all images, so a reference's features do not
    depend on its batch. `x_0`: the images' latents (B, C, h, w), where they are known already.
    """
    x_0 = backbone.encode_images(images) if x_0 is None else x_0  # (B, C, h, w)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *x_0.shape[1:], generator=generator).to(x_0).expand_as(x_0)
    t = torch.full((len(x_0),), timestep, device=x_0.device)
    scheduler = copy.copy(backbone.scheduler)  # which moves its tables to where they are needed
    x_t = scheduler.add_noise(x_0, noise, t)
    empty = backbone.encode_prompt([""]).expand(len(x_0), -1, -1)  # tau(c')
    # Eq. 3: F_down = eps_down(x_t, t, tau(c'))
    f_down = pooled(down_path(backbone.unet, x_t, t, empty), grids)
    # Eq. 4: embeds_ref = clip_v(x_0, F_down)
    cls = backbone.image_tower(images)
    return torch.cat([cls.float(), f_down], 1)
