"""Parts of the UNet by name: `escd.parts.parameters_of(unet, "encoder")` (`escd.backbone.parts`)."""

from __future__ import annotations

from .backbone.parts import KINDS, NO_PART, half_named, names_of, parameters_of

__all__ = ["KINDS", "NO_PART", "half_named", "names_of", "parameters_of"]
