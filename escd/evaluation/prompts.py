"""The prompts of the protocol: each asks for other named attributes than the reference has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import foreground
from ..data.captions import with_article
from ..data.names import BACKGROUNDS, COLOUR_RGB, COLOURS, PATTERNS, SHAPES
from . import measure
from .references import Reference, named_outlines

PROMPTS = 4  # prompts a reference, one picture each
NEAR_COLOUR = 30.0  # CIELAB: a named colour this near to a tenth of a material is not another colour
NEAR_SHAPE = 0.7  # aligned IoU: a named shape this like a silhouette is not another shape


@dataclass(frozen=True)
class Asked:
    """What one prompt asks for; None where it does not say, or where a pseudo-word stands."""

    text: str
    background: str
    shape: str | None = None
    pattern: str | None = None
    colours: tuple[str, ...] | None = None


def prompts_for(reference: Reference, attribute: str, count: int = PROMPTS) -> list[Asked]:
    """Prompts that ask for other named attributes than the reference has, drawn from its id alone.

    shape: "a *m shape with PATTERN COLOURS appearance on a BACKGROUND background"; appearance: "a SHAPE
    shape with *a appearance on a BACKGROUND background". Colours near a tenth of the material, shapes like
    the silhouette and the reference's own background are not asked for; patterns, shapes and backgrounds
    repeat only when all of them have been asked for.
    """
    draw = _generator(f"{reference.id} {attribute}")
    grounds = _cycle(draw, [name for name in BACKGROUNDS if name != reference.background], count)
    if attribute == "shape":
        patterns, allowed = _cycle(draw, PATTERNS, count), other_colours(reference.material.tile)
        asked = []
        for pattern, ground in zip(patterns, grounds, strict=True):
            colours = tuple(_cycle(draw, allowed, 1 if pattern == "solid" else 2))
            look = f"{pattern} {' and '.join(colours)}"
            text = f"a *m shape with {look} appearance on a {ground} background"
            asked.append(Asked(text, ground, pattern=pattern, colours=colours))
        return asked
    if attribute == "appearance":
        shapes = _cycle(draw, other_shapes(reference.mask), count)
        return [
            Asked(
                f"{with_article(shape)} shape with *a appearance on a {ground} background",
                ground,
                shape=shape,
            )
            for shape, ground in zip(shapes, grounds, strict=True)
        ]
    raise ValueError(f"there are prompts for shape and for appearance, not for {attribute!r}")


def prompts_for_pair(shape: Reference, appearance: Reference, count: int = PROMPTS) -> list[Asked]:
    """Prompts "a *m shape with *a appearance on a BACKGROUND background", a background neither has."""
    draw = _generator(f"{shape.id} {appearance.id}")
    taken = (shape.background, appearance.background)
    grounds = _cycle(draw, [name for name in BACKGROUNDS if name not in taken], count)
    return [Asked(f"a *m shape with *a appearance on a {ground} background", ground) for ground in grounds]


def named_prompts(count: int, seed: int) -> list[Asked]:
    """Prompts that name everything, each factor drawn evenly; two colours but for "solid"."""
    draw = np.random.default_rng(seed)
    asked = []
    for _ in range(count):
        shape, pattern, ground = (
            names[draw.integers(len(names))] for names in (SHAPES, PATTERNS, BACKGROUNDS)
        )
        colours = tuple(COLOURS[i] for i in draw.permutation(len(COLOURS))[: 1 if pattern == "solid" else 2])
        look = f"{pattern} {' and '.join(colours)}"
        text = f"{with_article(shape)} shape with {look} appearance on a {ground} background"
        asked.append(Asked(text, ground, shape, pattern, colours))
    return asked


def other_colours(tile: Tensor) -> list[str]:
    """Named colours farther than NEAR_COLOUR from at least nine tenths of a material (3, H, W)."""
    lab = foreground.to_lab(tile[None] * 2 - 1)[0].reshape(-1, 3)
    table = torch.tensor([COLOUR_RGB[name] for name in COLOURS])[:, :, None, None]
    named = foreground.to_lab(table * 2 - 1)[:, 0, 0]
    near = (np.linalg.norm(lab[:, None] - named, axis=-1) < NEAR_COLOUR).mean(0)
    return [name for name, share in zip(COLOURS, near, strict=True) if share < 0.1]


def other_shapes(mask: Tensor) -> list[str]:
    """Named shapes that a silhouette (H, W) is not like: aligned IoU below NEAR_SHAPE."""
    like = measure.iou_matrix(mask[None], named_outlines())[0].view(len(SHAPES), -1).amax(1)
    return [name for name, iou in zip(SHAPES, like.tolist(), strict=True) if iou < NEAR_SHAPE]


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def _cycle(draw: np.random.Generator, names: Sequence[str], count: int) -> list[str]:
    """`count` names in a random order, none a second time before all have come once."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += [names[i] for i in draw.permutation(len(names))]
    return chosen[:count]
