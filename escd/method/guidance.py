"""Guidance by default, in one place: pipeline, sliders, command line and study all ask here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ..backbone.model import Backbone
from ..backbone.prompts import starred_words
from .attributes import Attribute, resolve_attribute

# Which UNet predicts the branch without the prompt. CUSTOMIZED: Eq. 7 in both branches. BACKBONE: the
# pipeline's own UNet as it is, without customizations (Phunyaphibarn et al. 2025), so that guidance amplifies
# what was learnt, too.
Start = Literal["customized", "backbone"]
CUSTOMIZED: Start = "customized"
BACKBONE: Start = "backbone"
UNCONDITIONAL = (CUSTOMIZED, BACKBONE)

# Scale of guidance of a prompt without pseudo-words, and of one with a pseudo-word of each recipe, on `mini`.
# `python -m escd.evaluation.recipe` compares them: from the backbone, an outline and a texture come nearer to
# the reference's, and named patterns are obeyed somewhat less.
PLAIN_SCALE = 4.0
SCALES: dict[str, dict[str, float]] = {
    CUSTOMIZED: {"shape": 4.0, "appearance": 2.0},
    BACKBONE: {"shape": 3.0, "appearance": 3.0},
}
# On a backbone of Stable Diffusion's size, whatever stands in the prompt: diffusers' default.
LARGE_SCALE = 7.5


@dataclass(frozen=True)
class Guidance:
    """The scale of classifier-free guidance, and the UNet that predicts its branch without the prompt."""

    guidance_scale: float
    guidance_from: Start = CUSTOMIZED


def default_guidance(
    attributes: Iterable[Attribute | str] = (),
    backbone: Backbone | None = None,
    guidance_from: Start | None = None,
) -> Guidance:
    """The guidance of a prompt with these attributes' pseudo-words: the smallest of their scales.

    guidance_from: where it starts; None is from the backbone where there is a pseudo-word, and on a large
    backbone from the customized UNet.
    """
    if backbone is not None and backbone.large:
        return Guidance(LARGE_SCALE, guidance_from or CUSTOMIZED)
    recipes = [resolve_attribute(attribute).recipe for attribute in attributes]
    known = [recipe for recipe in recipes if recipe is not None]
    if not known:
        return Guidance(PLAIN_SCALE, guidance_from or CUSTOMIZED)
    start = guidance_from or BACKBONE
    return Guidance(min(SCALES[start][recipe] for recipe in known), start)


def guidance_of(
    prompts: Sequence[str] | Sequence[Tensor],
    active: Mapping[str, Attribute],
    guidance_scale: float | None,
    guidance_from: Start | None,
    backbone: Backbone,
) -> list[Guidance]:
    """The guidance of each prompt: as it is given, and else the default of the pseudo-words in it.

    active: the attributes that are in force, by their tokens; all of them count for a prompt that is given
    as an embedding.
    """
    standing = [starred_words(each) if isinstance(each, str) else active for each in prompts]
    each = [
        default_guidance([a for t, a in active.items() if t in tokens], backbone, guidance_from)
        for tokens in standing
    ]
    if guidance_scale is not None:
        each = [replace(one, guidance_scale=float(guidance_scale)) for one in each]
    return each
