"""Guidance by default, in one place: pipeline, sliders, command line and study all ask here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..backbone.model import Backbone
from ..backbone.prompts import starred_words
from .attributes import Attribute, resolve_attribute

# Which UNet predicts the branch without the prompt.
CUSTOMIZED, BACKBONE = UNCONDITIONAL = ("customized", "backbone")


@dataclass(frozen=True)
class Guidance:
    """The scale of classifier-free guidance, and the UNet that predicts its branch without the prompt."""

    guidance_scale: float
    # "customized": Eq. 7 in both branches. "backbone": the branch without the prompt is the untouched UNet's
    # (Phunyaphibarn et al. 2025), so that guidance enlarges what was learnt, too.
    guidance_from: str = CUSTOMIZED


# Of a prompt without pseudo-words, and of one with a pseudo-word of each recipe, on `mini`.
# `python -m escd.evaluation.recipe` compares them: from the backbone, an outline and a texture come nearer to
# the reference's, and named patterns are obeyed somewhat less.
PLAIN_SCALE = 4.0
PLAIN = Guidance(PLAIN_SCALE)
GUIDANCE = {"shape": Guidance(3.0, BACKBONE), "appearance": Guidance(3.0, BACKBONE)}
# On a backbone of Stable Diffusion's size, whatever stands in the prompt: diffusers' defaults.
LARGE = Guidance(7.5)


def default_guidance(
    attributes: Iterable[Attribute | str] = (), backbone: Backbone | None = None
) -> Guidance:
    """The guidance of a prompt with these attributes' pseudo-words: theirs that has the smallest scale."""
    if backbone is not None and backbone.large:
        return LARGE
    recipes = [resolve_attribute(attribute).recipe for attribute in attributes]
    known = [GUIDANCE[recipe] for recipe in recipes if recipe is not None]
    return min(known, key=lambda guidance: guidance.guidance_scale, default=PLAIN)


def guidance_of(
    prompts: Sequence[str] | Sequence[Tensor],
    active: Mapping[str, Attribute],
    guidance_scale: float | None,
    guidance_from: str | None,
    backbone: Backbone,
) -> list[Guidance]:
    """The guidance of each prompt: as it is given, and else the default of the pseudo-words in it.

    active: the attributes that are in force, by their tokens; all of them count for a prompt that is given
    as an embedding.
    """
    given: dict[str, Any] = {}
    if guidance_scale is not None:
        given["guidance_scale"] = float(guidance_scale)
    if guidance_from is not None:
        given["guidance_from"] = guidance_from
    standing = [starred_words(each) if isinstance(each, str) else active for each in prompts]
    return [
        replace(default_guidance([a for t, a in active.items() if t in tokens], backbone), **given)
        for tokens in standing
    ]
