"""The reference: the one image that an attribute is learnt from."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..data.foreground import foreground_mask
from ..data.images import Source, open_image_and_mask


@dataclass(frozen=True)
class Reference:
    """An image (3, H, W) in [-1, 1], and the mask (1, H, W) in [0, 1] that came with it, if any."""

    image: Tensor
    mask: Tensor | None = None

    @classmethod
    def open(cls, source: Source, size: int, mask: Source | None = None) -> Reference:
        """Read an image and its mask; raises what `open_image_and_mask` raises."""
        return cls(*open_image_and_mask(source, size, mask))

    @cached_property
    def silhouette(self) -> Tensor | None:
        """Where the object is, (1, H, W) of 0 and 1: from the mask, or found on a plain background.

        None where the background is not plain.
        """
        if self.mask is not None:
            return (self.mask > 0.5).float().to(self.image)
        masks, failed = foreground_mask(self.image[None])
        return None if failed[0] else masks.float().to(self.image)

    def warn_without_silhouette(self, recipe: str) -> None:
        """Warn where the whole frame is learnt, because no silhouette is known."""
        if self.silhouette is None:
            warnings.warn(
                "no silhouette was found in the picture: its background is not plain, or nothing stands off "
                f"it. The whole frame is learnt as the {recipe}. Where only a part of it is meant, pass mask="
                " (--mask), white on the subject, or a picture with the subject cut out on transparency",
                stacklevel=3,
            )

    def whole_frame(self) -> Tensor:
        """A mask (1, H, W) of ones."""
        return torch.ones_like(self.image[:1])
