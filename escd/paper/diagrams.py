"""Diagrams of the method, drawn from the code."""

from __future__ import annotations

import math

import torch

from ..backbone import model
from ..backbone.halves import down_path
from ..evaluation.references import load_references
from ..method.attributes import ATTRIBUTES
from ..method.encoder import GRIDS, TIMESTEP, feature_widths
from ..method.fusion import AttributeFilter
from .canvas import APPEARANCE, COLUMN, FROZEN, MUTED, PAGE, SHAPE, TINTS, TOWER, Canvas, Drawing
from .results import study
from .stems import figure

HALVES = ("encoder", "decoder")


@figure("03_method")
def diagram_pipeline() -> Drawing:
    """The method: visual features, fusion with the sub-attribute's word, tuning; then generation."""
    reference = load_references().references[0]
    canvas = Canvas(PAGE, 3.3)
    upper, lower = 2.52, 1.62  # the lines of shape and of appearance
    middle = (upper + lower) / 2

    canvas.image(reference.image, (0.04, middle - 0.33), 0.66)
    canvas.text((0.37, middle - 0.42), "reference $x_0$", va="top", size=6.5)

    canvas.panel((0.86, 1.12), 1.62, 2.16, "1  visual features")
    canvas.text((1.41, upper + 0.36), "$(x_t,\\ t,\\ $“”$)$", size=6.5, va="bottom")
    canvas.half((1.10, upper), 0.62, (0.62, 0.26), "UNet\ndown")
    canvas.box((1.41, lower), 0.66, 0.40, "OpenCLIP\nViT", fill=FROZEN, size=6.5)
    canvas.arrow((0.70, middle), (0.94, middle), (0.94, upper), (1.10, upper))
    canvas.arrow((0.70, middle), (0.94, middle), (0.94, lower), (1.08, lower))
    canvas.arrow((1.72, upper), (2.02, upper), (2.02, middle + 0.075))
    canvas.arrow((1.74, lower), (2.02, lower), (2.02, middle - 0.075))
    canvas.text((1.93, upper + 0.06), "$F_{down}$", size=6.5, va="bottom")
    canvas.text((1.93, lower - 0.06), "CLS", size=6.5, va="top")
    canvas.sum((2.02, middle))
    canvas.arrow((2.095, middle), (2.66, middle), head=False)
    canvas.text((2.27, middle + 0.05), "embeds$_{ref}$", size=6, va="bottom")

    canvas.panel((2.56, 1.12), 1.42, 2.16, "2  fusion")
    canvas.panel((4.06, 1.12), 2.82, 2.16, "3  attribute-aware fine-tuning")
    for y, name, colour in ((upper, "shape", SHAPE), (lower, "appearance", APPEARANCE)):
        attribute = ATTRIBUTES[name]
        canvas.arrow((2.66, middle), (2.66, y), (2.75, y))
        canvas.box((3.06, y), 0.62, 0.36, f"{attribute.name}\nfilter", fill=TINTS[colour], size=6.5)
        canvas.arrow((3.37, y), (3.485, y))
        canvas.text((3.56, y - 0.36), f"$e($“{attribute.word}”$)$", size=6)
        canvas.arrow((3.56, y - 0.29), (3.56, y - 0.075))
        canvas.sum((3.56, y))
        canvas.arrow((3.635, y), (4.18, y))
        canvas.text((3.83, y + 0.09), attribute.token, size=7.5, weight="bold")
        canvas.box((4.46, y), 0.56, 0.36, "CLIP\ntext", fill=FROZEN, size=6.5)
        canvas.arrow((4.74, y), (5.02, y))
        canvas.unet(
            (5.02, y), 1.15, 0.56, **{half: FROZEN for half in HALVES} | {attribute.part: TINTS[colour]}
        )
        canvas.arrow((6.17, y), (6.42, y))
        canvas.text((6.64, y), "$\\Vert\\epsilon-\\epsilon_\\theta\\Vert^2$", size=6.5)

    line = 0.47
    canvas.panel((0.02, 0.02), 6.86, 0.98)
    canvas.text((0.12, 0.86), "generation", weight="bold", ha="left")
    canvas.box((1.42, line), 2.2, 0.30, "“a *m shape with *a appearance\non a gray background”", size=6.5)
    canvas.arrow((2.52, line), (2.83, line))
    canvas.box((3.11, line), 0.56, 0.36, "CLIP\ntext", fill=FROZEN, size=6.5)
    canvas.arrow((3.39, line), (3.66, line))
    canvas.unet((3.66, line), 1.3, 0.62, encoder=TINTS[SHAPE], decoder=TINTS[APPEARANCE])
    canvas.text((3.93, 0.10), "$W_0+s_m\\Delta W_{enc}$", size=6)
    canvas.text((4.70, 0.10), "$W_0+s_a\\Delta W_{dec}$", size=6)
    canvas.arrow((4.96, line), (5.25, line))
    canvas.box((5.50, line), 0.5, 0.34, "VAE\ndecoder", fill=FROZEN, size=6.5)
    canvas.arrow((5.75, line), (5.99, line))
    canvas.box((6.35, line), 0.72, 0.72, "new image")
    return canvas.figure


@figure("03_method")
def diagram_encoder() -> Drawing:
    """Stage 1: pooled maps of the way down through the UNet, beside the CLS token of the image tower."""
    backbone = study().backbone("mini")
    maps = _down_maps(backbone)
    cls_width, down_width = feature_widths(backbone)
    canvas = Canvas(COLUMN, 2.75)

    reference = load_references().references[0].image
    canvas.image(reference, (0.03, 1.12), 0.50)
    canvas.text((0.28, 1.08), f"$x_0$\n{backbone.image_size}$^2$ px", va="top", size=6)

    # the way down, one box a map, as tall as the map is wide
    top, left, right = 2.24, 0.98, 3.29
    canvas.arrow((0.28, 1.62), (0.28, top), (0.55, top))
    canvas.box((0.68, top), 0.26, 0.24, "$\\mathcal{E}$", fill=FROZEN)
    canvas.text((0.68, top + 0.30), f"$x_t$, $t={TIMESTEP}$", size=6)
    canvas.text((0.68, top - 0.24), "prompt “”", size=6)
    pitch = (right - left) / len(maps)
    middles = [left + (i + 0.5) * pitch for i in range(len(maps))]
    canvas.arrow((0.81, top), (middles[0] - 0.30 * pitch, top))
    for i, (x, (name, channels, size)) in enumerate(zip(middles, maps, strict=True)):
        canvas.box((x, top), 0.6 * pitch, 0.22 + 0.36 * size / maps[0][2], f"{channels}", fill=FROZEN, size=6)
        canvas.text((x, top + 0.38), name, size=5.8)
        canvas.text((x, top - 0.37), f"{size} × {size}", size=5.2, colour=MUTED)
        canvas.arrow((x, top - 0.44), (x, 1.66))
        if i:
            canvas.arrow((middles[i - 1] + 0.30 * pitch, top), (x - 0.30 * pitch, top))
    grids = " and ".join(f"{grid} × {grid}" for grid in GRIDS)
    canvas.box(((left + right) / 2, 1.56), right - left, 0.20, f"means over a grid of {grids}", size=6.2)

    # F_down, in pieces as long as each map's share of it
    start = left
    for i, (_, channels, _) in enumerate(maps):
        length = (right - left) * channels * sum(grid * grid for grid in GRIDS) / down_width
        canvas.strip((start, 1.20), length, fill=FROZEN if i % 2 else "white")
        canvas.arrow((middles[i], 1.46), (start + length / 2, 1.27))
        start += length
    canvas.text((right, 1.04), f"$F_{{down}}$   {down_width}", size=6.5, ha="right")

    patch = backbone.image_tower.config.patch_size
    canvas.arrow((0.28, 0.80), (0.28, 0.66), (left, 0.66))
    canvas.box((left + 0.62, 0.66), 1.24, 0.26, f"OpenCLIP ViT, patch {patch}", fill=TOWER, size=6.2)

    share = (right - left) * max(0.06, cls_width / (cls_width + down_width))
    canvas.arrow((left + share / 2, 0.53), (left + share / 2, 0.21))
    canvas.text((left + share / 2 + 0.06, 0.37), f"CLS   {cls_width}", size=6.5, ha="left")
    canvas.arrow((2.62, 1.13), (2.62, 0.21))
    canvas.strip((left, 0.14), share, fill=TOWER)
    canvas.strip((left + share, 0.14), right - left - share, fill=FROZEN)
    canvas.text((left - 0.06, 0.14), f"embeds$_{{ref}}$   {cls_width + down_width}", size=6.5, ha="right")
    return canvas.figure


def _down_maps(backbone: model.Backbone) -> list[tuple[str, int, int]]:
    """(name, channels, width) of every feature map stage 1 pools."""
    x_t = torch.zeros(1, *backbone.latent_shape)
    maps = down_path(backbone.unet, x_t, torch.tensor([TIMESTEP]), backbone.encode_prompt([""]))
    names = ["in"]
    for k, block in enumerate(backbone.unet.down_blocks):
        names += [f"down {k}"] * len(block.resnets) + ["↓"] * (block.downsamplers is not None)
    return [(name, h.shape[1], h.shape[3]) for name, h in zip([*names, "mid"], maps, strict=True)]


@figure("03_method")
def diagram_filter() -> Drawing:
    """Stage 2: features of the reference and the sub-attribute's word in, the pseudo-word's embedding out."""
    backbone = study().backbone("mini")
    sizes = (backbone.filters.get("shape") or AttributeFilter.for_backbone(backbone)).config
    canvas = Canvas(COLUMN, 1.72)
    inputs = (
        (1.42, "CLS", sizes.cls_width, "standardise, linear", TOWER),
        (0.86, "$F_{down}$", sizes.down_width, "standardise, linear\nby cell; linear", FROZEN),
        (0.30, "$e(w)$", sizes.word_width, "norm, linear", TINTS[SHAPE]),
    )
    for y, name, length, layers, fill in inputs:
        canvas.strip((0.04, y), 0.34, fill=fill)
        canvas.text((0.21, y + 0.15), name, size=6.5)
        canvas.text((0.21, y - 0.15), f"{length}", size=6)
        canvas.arrow((0.38, y), (0.54, y))
        canvas.box((0.97, y), 0.86, 0.32, layers, size=6)
        canvas.text((1.51, y + 0.08), f"{sizes.hidden}", size=6)
    middle = inputs[1][0]
    for y in (inputs[0][0], inputs[2][0]):
        canvas.arrow((1.40, y), (1.62, y), (1.62, middle + math.copysign(0.075, y - middle)))
    canvas.arrow((1.40, middle), (1.545, middle))
    canvas.sum((1.62, middle), ";")
    canvas.arrow((1.695, middle), (1.86, middle))
    hidden = 2 * sizes.hidden
    layers = "\n".join(f"linear {length}" for length in (hidden, hidden, sizes.word_width))
    layers += f"\nup to {sizes.reach:g}$|e|$"
    canvas.box((2.20, middle), 0.68, 0.62, layers, size=6)
    canvas.arrow((2.54, middle), (2.745, middle))
    canvas.sum((2.82, middle))
    # the word goes round the network: an untrained filter gives the word itself
    canvas.arrow((0.21, 0.09), (0.21, 0.04), (2.82, 0.04), (2.82, middle - 0.075))
    canvas.arrow((2.895, middle), (3.0, middle))
    canvas.strip((3.0, middle), 0.29, fill=TINTS[SHAPE])
    canvas.text((3.145, middle + 0.15), "$v_w$", size=7)
    canvas.text((3.145, middle - 0.15), f"{sizes.word_width}", size=6)
    return canvas.figure
