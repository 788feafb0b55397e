"""The UNet of `mini`, its noise schedule, and growth to more latent channels."""

from __future__ import annotations

import torch.distributed
from diffusers import DDIMScheduler, UNet2DConditionModel

from .autoencoder import LATENT_CHANNELS
from .towers import WIDTH


def make_unet(channels: int = LATENT_CHANNELS) -> UNet2DConditionModel:
    """SD 1.5's class scaled down: three resolutions (16, 8, 4), cross-attention in every block."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(64, 128, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


@torch.no_grad()
def grow_unet(unet: UNet2DConditionModel, channels: int) -> UNet2DConditionModel:
    """The UNet with more latent channels: the same prediction of the old ones, zero for the added ones.

    Raises ValueError where it already has as many.
    """
    old = unet.config.in_channels
    if not old < channels:
        raise ValueError(f"a UNet of {old} latent channels cannot grow to {channels}")
    wide = make_unet(channels)
    own, start = wide.state_dict(), unet.state_dict()
    own["conv_in.weight"].zero_()[:, :old] = start.pop("conv_in.weight")
    for name in ("conv_out.weight", "conv_out.bias"):
        own[name].zero_()[:old] = start.pop(name)
    wide.load_state_dict(own | start)
    return wide


def make_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule with zero terminal SNR (Lin et al. 2024), for velocity prediction.

    On 16 x 16 latents, SD's last timestep still contains the image's mean colour. A UNet trained with it
    takes the background from the starting noise, not from the prompt (docs/notes/2026-11-25-noise-levels.md).
    At zero SNR only the velocity (Salimans and Ho 2022) is left to predict.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )
