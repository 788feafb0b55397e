"""The prompts of the protocol: each names other attributes than the reference has."""

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
from .references import Reference
from .silhouettes import named_outlines

PROMPTS = 4  # per reference, one image each
NEAR_COLOUR = 30.0  # CIELAB: a named colour nearer than this to a tenth of a material counts as its own
NEAR_SHAPE = 0.7  # aligned IoU: a named shape above this counts as the silhouette's own


@dataclass(frozen=True)
class Prompt:
    """A prompt and the attributes it names; None for one that it does not name, such as a pseudo-word's."""

    text: str
    background: str
    shape: str | None = None
    pattern: str | None = None
    colours: tuple[str, ...] | None = None


def prompts_for(reference: Reference, attribute: str, count: int = PROMPTS) -> list[Prompt]:
    """Prompts that name other attributes than the reference has; its id is the seed.

    For shape: "a *m shape with PATTERN COLOURS appearance on a BACKGROUND background". For appearance: "a
    SHAPE shape with *a appearance on a BACKGROUND background". The prompts leave out colours near a tenth of
    the material (NEAR_COLOUR), shapes like the silhouette (NEAR_SHAPE) and the reference's background. A
    pattern, shape or background repeats only after all others. Raises ValueError for another attribute.
    """
    draw = _generator(f"{reference.id} {attribute}")
    grounds = _cycle(draw, [name for name in BACKGROUNDS if name != reference.background], count)
    if attribute == "shape":
        patterns, allowed = _cycle(draw, PATTERNS, count), other_colours(reference.material.tile)
        prompts = []
        for pattern, ground in zip(patterns, grounds, strict=True):
            colours = tuple(_cycle(draw, allowed, 1 if pattern == "solid" else 2))
            look = f"{pattern} {' and '.join(colours)}"
            text = f"a *m shape with {look} appearance on a {ground} background"
            prompts.append(Prompt(text, ground, pattern=pattern, colours=colours))
        return prompts
    if attribute == "appearance":
        shapes = _cycle(draw, other_shapes(reference.mask), count)
        return [
            Prompt(
                f"{with_article(shape)} shape with *a appearance on a {ground} background",
                ground,
                shape=shape,
            )
            for shape, ground in zip(shapes, grounds, strict=True)
        ]
    raise ValueError(f"there are prompts for shape and for appearance, not for {attribute!r}")


def prompts_for_pair(shape: Reference, appearance: Reference, count: int = PROMPTS) -> list[Prompt]:
    """Prompts "a *m shape with *a appearance on a BACKGROUND background", with a background of neither."""
    draw = _generator(f"{shape.id} {appearance.id}")
    taken = (shape.background, appearance.background)
    grounds = _cycle(draw, [name for name in BACKGROUNDS if name not in taken], count)
    return [Prompt(f"a *m shape with *a appearance on a {ground} background", ground) for ground in grounds]


def named_prompts(count: int, seed: int) -> list[Prompt]:
    """Prompts that name every attribute, each drawn uniformly; two colours, or one for "solid"."""
    draw = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        shape, pattern, ground = (
            names[draw.integers(len(names))] for names in (SHAPES, PATTERNS, BACKGROUNDS)
        )
        colours = tuple(COLOURS[i] for i in draw.permutation(len(COLOURS))[: 1 if pattern == "solid" else 2])
        look = f"{pattern} {' and '.join(colours)}"
        text = f"{with_article(shape)} shape with {look} appearance on a {ground} background"
        prompts.append(Prompt(text, ground, shape, pattern, colours))
    return prompts


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
    """`count` names in random order; a name repeats only after all others."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += [names[i] for i in draw.permutation(len(names))]
    return chosen[:count]
