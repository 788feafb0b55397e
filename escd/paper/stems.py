"""The register of the figures: one function per stem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .canvas import Drawing, house_style

STEMS: dict[str, Stem] = {}


@dataclass(frozen=True)
class Stem:
    """A figure of the paper: the function that draws it, and the notebook that explains it."""

    draw: Callable[[], Drawing]
    notebook: str
    # Says what makes the figure's records where there are none yet; None where it can be drawn.
    missing: Callable[[], str | None] = lambda: None


def drawable() -> dict[str, Stem]:
    """The figures whose records exist."""
    return {name: stem for name, stem in STEMS.items() if stem.missing() is None}


def figure(
    notebook: str, missing: Callable[[], str | None] = lambda: None
) -> Callable[[Callable[[], Drawing]], Callable[[], Drawing]]:
    """Make a function a stem of the paper's figures; it is drawn in the house style.

    missing: for a figure whose records may not exist yet (`Stem.missing`); it is left out then.
    """

    def register(draw: Callable[[], Drawing]) -> Callable[[], Drawing]:
        STEMS[draw.__name__] = Stem(house_style()(draw), f"notebooks/{notebook}.ipynb", missing)
        return STEMS[draw.__name__].draw

    return register
