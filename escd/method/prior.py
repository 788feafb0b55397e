"""Prior preservation (DreamBooth, Ruiz et al. 2023): class images of the untouched backbone."""

from __future__ import annotations

from dataclasses import replace

import torch
from tqdm.auto import tqdm

from ..backbone.model import Backbone
from .batches import Batches, EncodedViews
from .config import TuningConfig
from .pipeline import ESCDPipeline


def prior_batches(backbone: Backbone, config: TuningConfig, progress: bool) -> Batches | None:
    """Batches of `config.prior_images` images of the prior prompt; None where there are none.

    The images come from the seeds that follow the run's own, and stay latents.
    """
    if not config.prior_images:
        return None
    pipe = ESCDPipeline(backbone)
    pipe.set_progress_bar_config(disable=True)
    latents = []
    batches = torch.arange(config.prior_images).split(1 if backbone.large else 16)
    for indices in tqdm(batches, desc="class images", unit="batch", disable=not progress):
        generators = [torch.Generator().manual_seed(_seed(config, 1 + k)) for k in indices.tolist()]
        prompts = [config.prior_prompt] * len(generators)
        latents.append(pipe(prompts, generator=generators, output_type="latent").images.float())
    latents = torch.cat(latents)
    views = EncodedViews(
        latents=latents,
        masks=torch.ones_like(latents[:, :1]),
        prompts=[[config.prior_prompt]] * len(latents),
    )
    # Another seed than the run's and the images': their noise would be drawn again.
    return Batches(views, backbone, replace(config, seed=_seed(config, 1 + config.prior_images)), 0.0)


def _seed(config: TuningConfig, offset: int) -> int:
    return (config.seed + offset) % 2**63
