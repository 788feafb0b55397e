"""What a pipeline offers to save memory, beside what diffusers gives it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

if TYPE_CHECKING:
    from ..backbone.model import Backbone

logger = logging.getLogger(__name__)


Network = TypeVar("Network", bound=nn.Module)


def fetched(network: Network) -> Network:
    """A network, where it is offloaded moved to the device that it computes on.

    accelerate's hook looks at the first parameter alone, which networks that share weights may share, too.
    """
    if (hook := getattr(network, "_hf_hook", None)) is not None:
        hook.pre_forward(network)
        network.to(hook.execution_device)
    return network


class MemorySaving(DiffusionPipeline):
    """Base of `ESCDPipeline`: offloading of networks, and decoding in slices or tiles."""

    backbone: Backbone
    vae: AutoencoderKL

    def enable_model_cpu_offload(self, *args: object, **kwargs: object) -> None:
        """Keep each network on the CPU until it is needed. The backbone itself stays where it was loaded."""
        if self.backbone.device.type != "cpu":
            logger.warning(
                "the backbone keeps its memory on %s: load it on the CPU to offload all of it (device='cpu')",
                self.backbone.device,
            )
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *_: object, **__: object) -> None:
        """Refused: it keeps the weights where a customization cannot reach them."""
        raise NotImplementedError(
            "a customization needs the UNet's weights whole; use enable_model_cpu_offload"
        )

    enable_group_offload = enable_sequential_cpu_offload

    # Not every release of diffusers has these four on its pipelines.

    def enable_vae_slicing(self) -> None:
        """Decode the images of a batch one by one, for less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images tile by tile, for less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()
