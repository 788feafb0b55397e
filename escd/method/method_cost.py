"""What sampling with a customization takes, and class images, in floating-point operations.

The operations are counted while they are done, because a method may read the latents at each step (E4T).
"""

from __future__ import annotations

import inspect

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..backbone.model import Backbone
from .config import TuningConfig
from .customization import Customization
from .pipeline import ESCDPipeline

# Denoising steps of a class image (`prior`): the pipeline's default.
PRIOR_STEPS = inspect.signature(ESCDPipeline.__call__).parameters["num_inference_steps"].default


def sampling_operations(backbone: Backbone, customization: Customization | None = None) -> int:
    """Operations of one denoising step of one image, with guidance; None: of the untouched backbone."""
    pipe = ESCDPipeline(backbone, attributes=[] if customization is None else [customization])
    pipe.set_progress_bar_config(disable=True)
    prompt = "a shape" if customization is None else f"a {customization.attribute.token}"
    counts = []
    for steps in (1, 2):  # the prompt is encoded once for all steps
        with FlopCounterMode(display=False) as counter:
            pipe(
                prompt, num_inference_steps=steps, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0]


def sampling_passes(backbone: Backbone, customization: Customization) -> float:
    """Forward passes of the UNet that a denoising step takes, 1 being the untouched backbone's step."""
    return sampling_operations(backbone, customization) / sampling_operations(backbone)


def prior_operations(backbone: Backbone, config: TuningConfig) -> int:
    """Operations of drawing a configuration's class images; 0 where it has none."""
    if not config.prior_images:
        return 0
    return config.prior_images * PRIOR_STEPS * sampling_operations(backbone)
