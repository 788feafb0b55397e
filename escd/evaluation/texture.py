"""Distances of texture without colour, and of colour without texture.

Texture is measured on lightness alone, less its mean. A candidate material is cut out with the image's own
mask, at several places of its tile, and the nearest of these counts; so the outline affects both spectra
equally. The reference is cut from none of these places, so a copy of its pixels has no advantage over the
same texture. Only materials that are larger than a reference (`Material.whole`) can be scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import fft
from torch import Tensor

from ..data import foreground
from ..data.names import SIZE
from . import measure

WAVELENGTHS = (3.0, 5.0, 9.0, 16.0)  # px at 64 px: centres of the bands
ORIENTATIONS = 4
WIDTH = 0.5  # octaves: standard deviation of a band
# Share of the darkest and of the lightest pixels that are clipped: a few pixels of background in the mask
# would have more energy than a faint texture.
CLIPPED = 0.03
# Squared CIELAB lightness: a surface of much less energy counts as plain.
LEAST_ENERGY, LEAST_BAND, LEAST_VARIANCE = 0.1, 0.3, 1.0
# Weights of the parts of a texture: the logarithm of the energy of each band and orientation, the skewness
# and kurtosis of lightness, and those of each band. They are the weights of the best retrieval on the
# development list, lossless and after the autoencoder.
WEIGHTS = {"energy": 1.0, "skewness": 0.4, "kurtosis": 0.3, "band_skewness": 0.6, "band_kurtosis": 0.6}
# Rows and columns where a candidate is cut from its tile; the reference is cut at (0, 0).
PLACES = ((64, 0), (0, 64), (64, 64), (32, 96), (96, 32))
# CIELAB units per unit of texture distance, for both together: two random materials differ by about 9 in
# texture and 20 in colour.
TEXTURE_IN_COLOUR = 6.0


SCORES = (
    "texture_first", "texture_rank", "texture_distance", "texture_likeness",
    "colour_first", "colour_rank", "colour_distance", "colour_likeness", "both_first", "both_rank",
)  # fmt: skip


def _filters() -> tuple[np.ndarray, np.ndarray]:
    """Bands (B, P) and energies of bands and orientations (P, B * O), over the P bins of half a spectrum."""
    y, x = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE), indexing="ij")
    frequency, angle = np.hypot(y, x), np.arctan2(y, x)
    octave = np.log2(np.maximum(frequency, 1e-9))
    bands = np.stack([np.exp(-((octave + np.log2(w)) ** 2) / (2 * WIDTH**2)) for w in WAVELENGTHS])
    turned = [
        np.abs(np.cos(angle - k * np.pi / ORIENTATIONS)) ** (ORIENTATIONS - 1) for k in range(ORIENTATIONS)
    ]
    both = bands[:, None] * np.stack(turned)[None]
    counted = np.full(x.shape, 2.0)  # a bin counts for its mirror image too,
    counted[:, [0, -1]] = 1.0  # except the bins that are their own mirror image
    energy = (both**2 * counted).reshape(len(WAVELENGTHS) * ORIENTATIONS, -1).T
    return bands.astype(np.float32), energy.astype(np.float32)


BANDS, ENERGY = _filters()


def textures(lightness: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Textures of lightness (N, 64, 64) over one mask (64, 64) bool: (N, F), compared by `distances`."""
    values = lightness[:, mask].astype(np.float32)
    low, high = np.quantile(values, (CLIPPED, 1 - CLIPPED), axis=1, keepdims=True).astype(np.float32)
    values = values.clip(low, high)
    values -= values.mean(1, keepdims=True)
    plain = np.zeros(lightness.shape, np.float32)
    plain[:, mask] = values
    spectrum = fft.rfft2(plain)
    power = (spectrum.real**2 + spectrum.imag**2).reshape(len(plain), -1)
    energy = power @ ENERGY / (SIZE**2 * mask.sum())
    bands = fft.irfft2(spectrum[:, None] * BANDS, s=(SIZE, SIZE))[..., mask]  # (N, B, pixels)
    skewness, kurtosis = _moments(values, LEAST_VARIANCE)
    band_skewness, band_kurtosis = _moments(bands, LEAST_BAND)
    parts = {
        "energy": np.log(energy + LEAST_ENERGY),
        "skewness": skewness[:, None],
        "kurtosis": kurtosis[:, None],
        "band_skewness": band_skewness,
        "band_kurtosis": band_kurtosis,
    }
    return np.concatenate([WEIGHTS[name] / part.shape[1] * part for name, part in parts.items()], 1)


def _moments(values: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Skewness and kurtosis, compressed, over the last axis of values of mean zero."""
    squares = values**2
    variance = squares.mean(-1) + least
    skewness = (squares * values).mean(-1) / variance**1.5
    return np.arcsinh(skewness), np.log1p((squares**2).mean(-1) / variance**2)


def distances(texture: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Distances (...) of one texture (F,) to others (..., F)."""
    return np.abs(others - texture).sum(-1)


class Candidates:
    """The materials that an image's appearance is compared with, prepared once."""

    def __init__(self, wholes: Sequence[Tensor], tiles: Sequence[Tensor]) -> None:
        """wholes: materials (3, 128, 128) in [0, 1]. tiles: the parts of them that the references show."""
        labs = [foreground.to_lab(whole[None] * 2 - 1)[0, ..., 0] for whole in wholes]
        self.views = np.stack([
            np.roll(lightness, (-top, -left), (0, 1))[:SIZE, :SIZE]
            for lightness in labs for top, left in PLACES
        ])  # fmt: skip
        everywhere = np.ones((SIZE, SIZE), bool)
        colours = [foreground.to_lab(tile[None] * 2 - 1)[0] for tile in tiles]
        self.colours = np.stack([measure.colours_of(lab, everywhere) for lab in colours])

    def __len__(self) -> int:
        return len(self.colours)

    def score(self, image: Tensor, mask: Tensor, own: int) -> dict[str, float | int | bool]:
        """Scores of an image (3, 64, 64) over its mask (64, 64) against the candidate number `own`.

        For `texture`, `colour` and `both`: `_first`, whether no other candidate is as near; `_rank`, how many
        are as near or nearer (chance: half of the others). For texture and colour also `_distance` (texture
        unitless, colour in CIELAB units), and `_likeness`, which is 1 at distance 0 and 0 at the mean
        distance of the other candidates from `own`. ValueError for an empty mask.
        """
        inner = foreground.inner(mask.cpu().numpy() > 0.5)
        lab = foreground.to_lab(image[None])[0]
        described = textures(np.concatenate([lab[None, ..., 0], self.views]), inner)
        views = described[1:].reshape(len(self), len(PLACES), -1)
        texture = distances(described[0], views).min(1)
        between = distances(views[own][:, None, None], views[None])  # (own place, candidate, place)
        texture_unlike = between.min((0, 2))
        colour = np.abs(self.colours - measure.colours_of(lab, inner)).mean((1, 2))
        colour_unlike = np.abs(self.colours - self.colours[own]).mean((1, 2))
        scores: dict[str, float | int | bool] = {}
        for name, distance in (
            ("texture", texture), ("colour", colour), ("both", colour + TEXTURE_IN_COLOUR * texture)
        ):  # fmt: skip
            rank = int((np.delete(distance, own) <= distance[own]).sum())
            scores |= {f"{name}_first": rank == 0, f"{name}_rank": rank}
        for name, distance, unlike in (
            ("texture", texture, texture_unlike), ("colour", colour, colour_unlike)
        ):  # fmt: skip
            scores[f"{name}_distance"] = float(distance[own])
            likeness = 1 - distance[own] / np.delete(unlike, own).mean()
            scores[f"{name}_likeness"] = float(np.clip(likeness, 0, 1))
        return scores
