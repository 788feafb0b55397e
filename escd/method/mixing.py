"""P+'s way to combine two references: one gives the coarse layers, the other the rest (style mixing)."""

from __future__ import annotations

from dataclasses import replace

from ..backbone.layers import coarse_layers
from ..backbone.model import Backbone
from .customization import Customization, require_fit


def mix_layers(shape: Customization, appearance: Customization, backbone: Backbone) -> Customization:
    """One customization that reads `shape` on coarse layers and `appearance` on the others.

    Its pseudo-word is that of `shape`. Coarse are the two lowest widths (`coarse_layers`). Raises ValueError
    for customizations without embeddings of each layer, and for those of another backbone.
    """
    for each in (shape, appearance):
        require_fit(each, backbone)
        if each.pseudo_word.ndim != 2:
            raise ValueError(
                f"this {each.attribute.name} has one embedding for all layers; mixing needs one for each: "
                "learn it with method='p-plus'"
            )
    rows = appearance.pseudo_word.clone()
    coarse = coarse_layers(backbone.unet)
    rows[coarse] = shape.pseudo_word[coarse].to(rows)
    return replace(shape, pseudo_word=rows)
