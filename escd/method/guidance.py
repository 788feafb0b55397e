"""How far guidance goes by default, in one place: pipeline, sliders, command line and study all ask here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..backbone.model import Backbone
from ..backbone.prompts import starred_words
from .attributes import Attribute, resolve_attribute

# Scale of classifier-free guidance of a prompt without pseudo-words, and of one with a pseudo-word of each
# recipe, on `mini`. `python -m escd.evaluation.recipe` compares scales.
PLAIN_SCALE = 4.0
SCALES = {"shape": 4.0, "appearance": 4.0}
# On a backbone of Stable Diffusion's size, whatever stands in the prompt: diffusers' default.
LARGE_SCALE = 7.5


def default_scale(attributes: Iterable[Attribute | str] = (), backbone: Backbone | None = None) -> float:
    """The scale of guidance for a prompt with these attributes' pseudo-words: the smallest of theirs."""
    if backbone is not None and backbone.large:
        return LARGE_SCALE
    recipes = [resolve_attribute(attribute).recipe for attribute in attributes]
    return min((SCALES[recipe] for recipe in recipes if recipe is not None), default=PLAIN_SCALE)


def scales_of(
    prompts: Sequence[str] | Sequence[Tensor],
    active: Mapping[str, Attribute],
    given: float | None,
    backbone: Backbone,
) -> list[float]:
    """The scale of guidance of each prompt: the given one, or the default of the pseudo-words in it.

    active: the attributes that are in force, by their tokens; all of them count for a prompt that is given
    as an embedding.
    """
    if given is not None:
        return [float(given)] * len(prompts)
    standing = [starred_words(each) if isinstance(each, str) else active for each in prompts]
    return [default_scale([a for t, a in active.items() if t in tokens], backbone) for tokens in standing]
