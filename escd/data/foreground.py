"""Segmentation of the foreground of an image on a plain background, without learnt parameters."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu
from torch import Tensor

BORDER = 2  # px: width of the frame to which the background is fitted first, for a 64 px image
FLOOR = 6.0  # CIELAB: a smaller distance from the background is background
CEILING = 12.0  # CIELAB: a larger distance (and larger than 6 noise deviations) is object
SMALLEST, LARGEST = 0.015, 0.85  # share of the image that an object may cover
MOST_BORDER = 0.35  # share of the frame that an object may touch
LEAST_PLAIN = 0.55  # share of the frame that must lie on the background's colour surface


def to_lab(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] as CIELAB (D65), (N, H, W, 3) float32."""
    rgb = (images.detach().float().clamp(-1, 1).cpu().numpy() + 1) / 2
    return rgb2lab(np.moveaxis(rgb, 1, -1)).astype(np.float32)


def foreground_mask(images: Tensor) -> tuple[Tensor, Tensor]:
    """Objects on plain or nearly plain backgrounds: masks (N, H, W) bool and `failed` (N,) bool.

    The background is a quadratic colour surface in CIELAB, fitted robustly to the frame of the image and
    again to all pixels outside the object. The object is where the distance from this surface exceeds an
    Otsu threshold, bounded by `FLOOR`, `CEILING` and the background's noise. Small holes are filled. A mask
    has failed when the object is too small or too large or touches too much of the frame, or when the frame
    is not plain.
    """
    labs = to_lab(images)
    pairs = [_one_mask(lab) for lab in labs]
    masks = torch.from_numpy(np.stack([mask for mask, _ in pairs])).to(images.device)
    return masks, torch.tensor([failed for _, failed in pairs], device=images.device)


def _one_mask(lab: np.ndarray) -> tuple[np.ndarray, bool]:
    height, width, _ = lab.shape
    width_of_frame = max(1, round(BORDER * min(height, width) / 64))
    frame = np.ones((height, width), bool)
    frame[width_of_frame:-width_of_frame, width_of_frame:-width_of_frame] = False

    basis = _quadratic_basis(height, width)  # (H, W, 6)
    surface, noise, plain = _robust_surface(lab, basis, frame)
    distance = np.linalg.norm(lab - surface, axis=-1)
    mask = _threshold(distance, noise)
    # The frame constrains the middle poorly: fit again to all pixels outside the object and its soft edge.
    outside = ~ndimage.binary_dilation(mask, iterations=2)
    if plain >= LEAST_PLAIN and (outside & frame).sum() > 0.3 * frame.sum():
        surface, noise, _ = _robust_surface(lab, basis, outside)
        distance = np.linalg.norm(lab - surface, axis=-1)
        mask = _threshold(distance, noise)
    mask = _sharpen(mask, distance)
    mask = _components(mask)

    share = mask.mean()
    touching = mask[frame].mean()
    failed = not (SMALLEST <= share <= LARGEST) or touching > MOST_BORDER or plain < LEAST_PLAIN
    return mask, bool(failed)


def _quadratic_basis(height: int, width: int) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).astype(np.float32)


def _robust_surface(lab: np.ndarray, basis: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Colour surface (H, W, 3) through most of the pixels `where`, its inliers' deviation and their share."""
    design, values = basis[where], lab[where]
    # Start from the median colour, which an object over less than half of the frame cannot move.
    residual = np.linalg.norm(values - np.median(values, axis=0), axis=-1)
    inliers = residual <= max(12.0, float(np.median(residual)))
    for bound in (8.0, 5.0, 5.0):
        ridge = 1e-3 * np.eye(design.shape[1], dtype=np.float32) * inliers.sum() / len(inliers)
        ridge[0, 0] = 0  # the penalty is on slope and bend, not on the level
        a = design[inliers]
        coefficients = np.linalg.solve(a.T @ a + ridge, a.T @ values[inliers])
        residual = np.linalg.norm(values - design @ coefficients, axis=-1)
        spread = float(np.median(residual[inliers]))
        inliers = residual <= max(bound, 3.0 * spread)
    return basis @ coefficients, spread, float(inliers.mean())


def _threshold(distance: np.ndarray, noise: float) -> np.ndarray:
    lowest = max(FLOOR, 4.0 * noise)
    highest = max(CEILING, 6.0 * noise)
    otsu = threshold_otsu(distance) if np.ptp(distance) > 1e-3 else highest
    return distance > min(max(otsu, lowest), highest)


def _sharpen(mask: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Remove boundary pixels that are less than half covered, which a low threshold admits.

    Two passes, each comparing with the pixels within two, because an autoencoder blurs an edge over more than
    one pixel.
    """
    for _ in range(2):
        inner = ndimage.binary_erosion(mask, border_value=1)
        nearby = ndimage.maximum_filter(np.where(inner, distance, 0), size=5)
        mask = mask & (inner | (distance >= 0.5 * nearby))
    return mask


def _components(mask: np.ndarray) -> np.ndarray:
    """The largest component and those of at least a tenth of it, without specks or pinholes."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return mask
    areas = np.bincount(labels.ravel())[1:]
    kept = np.isin(labels, 1 + np.flatnonzero(areas >= max(areas.max() / 10, 4)))
    holes, count = ndimage.label(~kept)
    if count:
        areas = np.bincount(holes.ravel())[1:]
        small = 1 + np.flatnonzero(areas < max(4, 0.015 * kept.sum()))
        kept |= np.isin(holes, small)
    return kept


def inner(mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) bool without its outermost pixels, whose colour is mixed with the background.

    The whole mask where fewer than a quarter of the pixels would remain. ValueError for an empty mask.
    """
    if not mask.any():
        raise ValueError("an empty mask has no appearance")
    eroded = ndimage.binary_erosion(mask)
    return mask if eroded.sum() < 0.25 * mask.sum() else eroded
