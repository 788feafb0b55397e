"""Silhouettes as coverage: from a glyph, from a picture, and of the named shapes of the world."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from fontTools.pens.basePen import BasePen
from fontTools.ttLib import TTFont
from PIL import Image
from scipy import ndimage
from torch import Tensor

from ..data import names, shapes
from ..data.random import CounterRNG

FINE = 128  # px: silhouettes are kept at this size
EXTENT = 44 / 64  # longer side of a silhouette's box, as a share of the image


@cache
def named_outlines() -> Tensor:
    """The world's named shapes, three variants of each: (36, 64, 64) bool, in the order of world.SHAPES."""
    draws = CounterRNG(0, torch.arange(3))
    masks = []
    for shape in names.SHAPES:
        contours = shapes.OUTLINES[shape](draws)
        low, high = contours.amin((1, 2), keepdim=True), contours.amax((1, 2), keepdim=True)
        points = (contours - (low + high) / 2) / (high - low).amax(-1, keepdim=True) * (EXTENT * names.SIZE)
        masks.append(shapes.rasterise(points * torch.tensor([1.0, -1.0]) + names.SIZE / 2) > 0.5)
    return torch.cat(masks)


def fit_silhouette(path: Path) -> Tensor:
    """The `Silhouette.mask` of a file, white on black."""
    return fit(np.asarray(Image.open(path).convert("L")) >= 128)


def fit(solid: np.ndarray) -> Tensor:
    """A binary image (H, W), centred in (FINE, FINE), the longer side of its box EXTENT of it."""
    if not solid.any():
        raise ValueError("a silhouette is white on black; this one is all black")
    return _fit_coverage(torch.from_numpy(solid).float())


def _fit_coverage(mask: Tensor) -> Tensor:
    rows, columns = (mask > 0.5).any(1).nonzero(), (mask > 0.5).any(0).nonzero()
    top, left = int(rows[0]), int(columns[0])
    box = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    scale = round(EXTENT * FINE) / max(box.shape)
    height, width = (max(1, round(scale * side)) for side in box.shape)
    box = F.interpolate(
        box[None, None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
    )[0, 0]
    top, left = (FINE - height) // 2, (FINE - width) // 2
    return F.pad(box, (left, FINE - width - left, top, FINE - height - top)).clamp(0, 1)


def resized(images: Tensor, size: int) -> Tensor:
    """(C, H, W) -> (C, size, size), antialiased."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(
        images[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]


def glyph_contours(codepoint: int) -> list[np.ndarray]:
    """Contours of a glyph, each (V, 2) in font units, y up."""
    glyphs = _font().getGlyphSet()
    pen = _Chords(glyphs)
    glyphs[_font().getBestCmap()[codepoint]].draw(pen)
    return [np.array(contour, float) for contour in pen.contours]


def glyph_silhouette(contours: list[np.ndarray], *, holes: bool = False) -> Tensor:
    """Coverage (FINE, FINE) of the largest piece of a glyph; its holes are filled unless `holes`."""
    return _fill(_rasterise(contours), holes)


@cache
def _font() -> TTFont:
    return TTFont(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


class _Chords(BasePen):
    """Collects a glyph's closed contours (V, 2) in font units, y up; a curve becomes `SEGMENTS` chords."""

    SEGMENTS = 8

    def __init__(self, glyphs) -> None:
        super().__init__(glyphs)
        self.contours: list[list[tuple[float, float]]] = []

    def _moveTo(self, point) -> None:
        self.contours.append([point])

    def _lineTo(self, point) -> None:
        self.contours[-1].append(point)

    def _qCurveToOne(self, control, end) -> None:
        start = self.contours[-1][-1]
        for t in (k / self.SEGMENTS for k in range(1, self.SEGMENTS + 1)):
            weights = ((1 - t) ** 2, 2 * t * (1 - t), t * t)
            self.contours[-1].append(tuple(np.dot(weights, (start, control, end)).tolist()))


def _rasterise(contours: list[np.ndarray]) -> Tensor:
    """Coverage (FINE, FINE) of a glyph whose box has the side EXTENT, centred."""
    every = np.concatenate(contours)
    low, high = every.min(0), every.max(0)
    scale = EXTENT * FINE / (high - low).max()
    longest = max(len(contour) for contour in contours)
    padded = []
    for contour in contours:
        points = (contour - (low + high) / 2) * scale * [1, -1] + FINE / 2  # y down
        points = points[::-1]  # TrueType contours wind clockwise, the world's the other way
        padded.append(np.concatenate([points, np.repeat(points[-1:], longest - len(points), 0)]))
    return shapes.rasterise(torch.tensor(np.stack(padded), dtype=torch.float32)[None], FINE)[0]


def _fill(mask: Tensor, holes: bool) -> Tensor:
    """The largest connected piece of a glyph; its inner holes are filled unless `holes`."""
    solid = mask.numpy() > 0.5
    if not holes:
        # Filled are the pixels that no path from the frame reaches, with the soft inner edges between them.
        filled = ndimage.binary_fill_holes(solid)
        rim = ndimage.binary_dilation(~filled)  # keeps the soft outer edge as it is
        mask = torch.from_numpy(np.where(filled & ~rim, 1.0, mask.numpy())).float()
        solid = mask.numpy() > 0.5
    labels, _ = ndimage.label(solid, structure=np.ones((3, 3)))
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return _fit_coverage(mask * torch.from_numpy(ndimage.binary_dilation(largest)))
