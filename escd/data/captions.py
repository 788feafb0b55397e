"""Captions of the world."""

from __future__ import annotations

from collections.abc import Sequence


def with_article(phrase: str) -> str:
    """ "star" -> "a star", "arrow" -> "an arrow"."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def captions_of(
    shape: str, pattern: str | None, colours: Sequence[str], background: str, decoy: str
) -> list[str]:
    """All forms of caption for one image, the fullest first.

    shape: a name of SHAPES, or "shape" for an unnamed one. pattern: a name of PATTERNS, or None for an
    unnamed appearance, which is called "appearance". So a prompt whose pseudo-word has strength 0 is a
    caption of the training data. Pseudo-words stand in the same places: shape "*m", or pattern "*a" without
    colours. decoy: the noun that "in the shape of" overrides.
    """
    ground = f" on {with_article(background)} background"
    look = " ".join([pattern, *" and ".join(colours).split()]) if pattern else "appearance"
    described = f"{look} {shape}" if pattern else shape
    captions = [
        f"{with_article(shape)} shape with {look} appearance{ground}",
        f"{with_article(described)}{ground}",
        f"{with_article(shape)} with the appearance of {look}{ground}",
        f"{with_article(f'{look} {decoy}' if pattern else decoy)} in the shape of {shape}{ground}",
        f"{with_article(shape)}{ground}",
        f"{with_article(described)}",
        f"{with_article(shape)} shape with {look} appearance",
        f"{with_article(shape)} with {look} {'texture' if pattern else 'material'}{ground}",
        f"{with_article(shape)} shape",
    ]
    if pattern and len(colours) == 1:
        captions.insert(2, f"{with_article(f'{colours[0]} {pattern} {shape}')}{ground}")
        captions.append(f"{with_article(shape)} in {colours[0]} colour{ground}")
    if pattern and pattern != "solid":
        captions.append(f"{with_article(shape)} with {with_article(pattern)} pattern{ground}")
    return captions


# How many of the forms name every attribute and have a place for either pseudo-word: the first ones.
FULL_FORMS = 4


def draw_caption(captions: Sequence[str], u: float) -> str:
    """The caption that a uniform number u in [0, 1) selects: one of the full forms for u below 0.8."""
    if u < 0.8:
        return captions[min(int(u / 0.8 * FULL_FORMS), FULL_FORMS - 1)]
    rest = captions[FULL_FORMS:]
    return rest[min(int((u - 0.8) / 0.2 * len(rest)), len(rest) - 1)]
