"""The names of shapes, patterns, colours and backgrounds, and the families of unnamed ones."""

from __future__ import annotations

SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "cross",
    "ring",
    "crescent",
    "hexagon",
    "arrow",
    "diamond",
    "flower",
)
PATTERNS = ("solid", "striped", "dotted", "checkered", "gradient", "zigzag")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
BACKGROUNDS = ("gray", "pink", "cyan", "beige")
UNNAMED_SHAPES = ("fourier", "superformula", "polygon", "union", "limbs", "strokes", "blocks", "lathe")
UNNAMED_APPEARANCES = (
    "fbm",
    "marble",
    "wood",
    "brick",
    "gravel",
    "speckle",
    "plaid",
    "ramp",
    "patches",
    "brushed",
    "plain",
    "tiles",
)
# Families nearer to real materials; only in a `varied` world.
VARIED_APPEARANCES = (
    "spectral",
    "relief",
    "studs",
    "chips",
    "fibres",
    "cracks",
    "ribs",
    "strata",
    "planks",
)
# Share of a varied world's unnamed outlines that get holes, gaps and inner lines.
PIERCED_SHARE = 0.45
# Only in the "heldout" split, for evaluation.
HELDOUT_SHAPES = ("gear", "spiral", "comb")
HELDOUT_APPEARANCES = ("hexcells", "weave", "target")
# Words for an appearance; each of them occurs in the captions.
APPEARANCE_WORDS = ("appearance", "texture", "material", "pattern", "colour")
COLOUR_RGB = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.10, 0.62, 0.18),
    "blue": (0.10, 0.22, 0.86),
    "yellow": (0.96, 0.86, 0.08),
    "purple": (0.50, 0.10, 0.66),
    "orange": (0.98, 0.50, 0.06),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
}
BACKGROUND_RGB = {
    "gray": (0.52, 0.52, 0.52),
    "pink": (0.98, 0.70, 0.80),
    "cyan": (0.40, 0.86, 0.92),
    "beige": (0.92, 0.86, 0.70),
}
SIZE = 64
NONE = -1  # the label of a factor that has no name
