"""Measures without learnt parameters: IoU of silhouettes, distances of appearances, retrieval, intervals.

Images are float tensors (N, 3, H, W) in [-1, 1]; masks are (N, H, W), true (or 1) on the object. The learnt
judges of named attributes are in `escd.evaluation.judges`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..data.foreground import inner, to_lab

CANVAS = 72  # px: side of the square on which silhouettes are compared
AREA = 1 / 7  # share of it that they are scaled to cover (a bar seven times longer than wide still fits)
MOST_ROTATION = 40  # degrees
STEP = 4  # degrees between the rotations tried first
REFINED = (2, 1)  # degrees either side of the best that are tried next


def aligned_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of silhouettes (N, H, W) and (N, H, W), aligned: (N,) in [0, 1].

    Both are centred on their centroids, scaled to equal area, and rotated against each other by at most 40
    degrees for the best IoU. Symmetric: each takes half of the rotation. An empty mask scores 0.
    """
    return _best_iou(a, b, paired=True)


def iou_matrix(a: Tensor, b: Tensor, *, refined: Sequence[int] = REFINED) -> Tensor:
    """`aligned_iou` of every silhouette of a (N, H, W) with every one of b (M, H, W): (N, M).

    Without `refined` steps the rotation is exact to `STEP` / 2 degrees, and the time is much shorter.
    """
    return _best_iou(a, b, paired=False, refined=refined)


def _best_iou(a: Tensor, b: Tensor, paired: bool, refined: Sequence[int] = REFINED) -> Tensor:
    a, b = a.float(), b.float()
    if a.ndim != 3 or b.ndim != 3:
        raise ValueError(f"silhouettes are (N, H, W), not {tuple(a.shape)} and {tuple(b.shape)}")
    if paired and len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} silhouettes cannot be paired")
    angles = torch.arange(-MOST_ROTATION, MOST_ROTATION + 1, STEP, device=a.device, dtype=torch.float32)
    to_a = torch.stack([_canonical(a, angle / 2) for angle in angles.tolist()], 1)  # (N, R, P)
    to_b = torch.stack([_canonical(b, -angle / 2) for angle in angles.tolist()], 1)  # (M, R, P)
    equation = "nrp,nrp->nr" if paired else "nrp,mrp->nmr"
    coarse = _iou(torch.einsum(equation, to_a, to_b), to_a.sum(-1), to_b.sum(-1), paired)
    best, which = coarse.max(-1)
    rows = torch.arange(len(a), device=a.device)
    columns = rows if paired else torch.arange(len(b), device=a.device)
    n, m = (
        (rows, columns)
        if paired
        else (grid.reshape(-1) for grid in torch.meshgrid(rows, columns, indexing="ij"))
    )
    fine, turn = best.reshape(-1), angles[which].reshape(-1)
    for step in refined:
        centre = turn
        for angle in ((centre + step).clamp(max=MOST_ROTATION), (centre - step).clamp(min=-MOST_ROTATION)):
            one, other = _canonical(a, angle / 2, n), _canonical(b, -angle / 2, m)
            both = (one * other).sum(-1)
            score = both / (one.sum(-1) + other.sum(-1) - both).clamp(min=1)
            fine, turn = torch.maximum(fine, score), torch.where(score > fine, angle, turn)
    return fine.reshape(best.shape)


def canonical(masks: Tensor) -> Tensor:
    """Silhouettes (N, H, W) in the form that is compared: (N, CANVAS, CANVAS), centred, of one area."""
    return _canonical(masks.float(), 0.0).view(-1, CANVAS, CANVAS)


def _iou(both: Tensor, area_a: Tensor, area_b: Tensor, paired: bool) -> Tensor:
    total = area_a + area_b if paired else area_a[:, None] + area_b[None]
    return both / (total - both).clamp(min=1)


def _canonical(masks: Tensor, angle: Tensor | float, which: Tensor | None = None) -> Tensor:
    """Masks[which] centred, scaled to `AREA`, turned by `angle` degrees: (K, CANVAS**2) of 0 and 1."""
    count, height, width = masks.shape
    y = torch.arange(height, device=masks.device) + 0.5
    x = torch.arange(width, device=masks.device) + 0.5
    area = masks.sum((1, 2)).clamp(min=1)
    centre_y = (masks * y[:, None]).sum((1, 2)) / area
    centre_x = (masks * x[None]).sum((1, 2)) / area
    scale = (area / (AREA * CANVAS**2)).sqrt()  # source pixels a canvas pixel
    if which is not None:
        masks, centre_y, centre_x, scale = masks[which], centre_y[which], centre_x[which], scale[which]
        count = len(which)
    turn = torch.deg2rad(torch.as_tensor(angle, dtype=torch.float32, device=masks.device)).expand(count)
    grid = torch.arange(CANVAS, device=masks.device) + 0.5 - CANVAS / 2
    v, u = torch.meshgrid(grid, grid, indexing="ij")
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    at_x = centre_x[:, None, None] + scale[:, None, None] * (cos * u - sin * v)
    at_y = centre_y[:, None, None] + scale[:, None, None] * (sin * u + cos * v)
    points = torch.stack([2 * at_x / width - 1, 2 * at_y / height - 1], -1)
    sampled = F.grid_sample(
        masks[:, None], points, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return (sampled > 0.5).float().flatten(1)


LEVELS = 33  # quantiles a distribution is described by
QUANTILES = np.linspace(0.02, 0.98, LEVELS)
SCALES = (0.7, 1.4, 2.8)  # px at 64 px: standard deviations of the texture filters
# CIELAB units per unit of texture distance: the weight of the best retrieval on the development list, blurred
# and not. Two random materials differ by about 20 in colour and 0.09 in texture.
TEXTURE_WEIGHT = 30.0


@dataclasses.dataclass(frozen=True)
class Appearance:
    """Colour and texture over a mask, independent of the mask's outline."""

    colour: np.ndarray  # (directions, LEVELS): quantiles of CIELAB projected on fixed directions
    texture: np.ndarray  # (responses, LEVELS): quantiles of filter responses to normalised lightness


def appearance_of(image: Tensor, mask: Tensor) -> Appearance:
    """Appearance of an image (3, H, W) over a mask (H, W); ValueError for an empty mask.

    Colour is the distribution of CIELAB, projected on 16 directions. Texture is the distribution of the
    responses of isotropic filters at three scales (difference of Gaussians, gradient magnitude, and coherence
    of the gradients' direction) to lightness, normalised by its mean and deviation, so colour has no
    influence. Pixels outside the mask take the value of the nearest inner pixel, so the outline has no
    influence either.
    """
    lab = to_lab(image[None])[0]
    within = inner(mask.detach().cpu().numpy() > 0.5)
    nearest = ndimage.distance_transform_edt(~within, return_distances=False, return_indices=True)

    lightness = lab[..., 0][tuple(nearest)]
    spread = lightness[within].std()
    flat = (lightness - lightness[within].mean()) / (spread + 2.0)  # 2: a nearly flat surface stays flat
    responses = [np.full(within.sum(), np.log(spread + 2.0) / 4)]  # how rough it is at all
    for scale in SCALES:
        sigma = scale * min(lightness.shape) / 64
        dy = sigma * ndimage.gaussian_filter(flat, sigma, order=(1, 0))
        dx = sigma * ndimage.gaussian_filter(flat, sigma, order=(0, 1))
        blob = ndimage.gaussian_filter(flat, sigma) - ndimage.gaussian_filter(flat, 1.6 * sigma)
        xx, yy, xy = (ndimage.gaussian_filter(p, 2 * sigma) for p in (dx * dx, dy * dy, dx * dy))
        agree = np.hypot(xx - yy, 2 * xy) / (xx + yy + 0.02)
        responses += [2.0 * blob[within], np.hypot(dx, dy)[within], 0.5 * agree[within]]
    texture = np.quantile(np.stack(responses), QUANTILES, axis=1).T
    return Appearance(colours_of(lab, within), texture.astype(np.float32))


def colours_of(lab: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Quantiles of CIELAB (H, W, 3) over a mask, projected on fixed directions: (directions, LEVELS)."""
    return np.quantile(lab[mask] @ _directions().T, QUANTILES, axis=0).T.astype(np.float32)


def _directions() -> np.ndarray:
    """16 unit vectors spread over a half sphere (a Fibonacci lattice), (16, 3)."""
    i = np.arange(16)
    z = (i + 0.5) / 16
    angle = i * math.pi * (3 - math.sqrt(5))
    return np.stack([z, np.sqrt(1 - z * z) * np.cos(angle), np.sqrt(1 - z * z) * np.sin(angle)], -1)


def colour_distance(a: Appearance, b: Appearance) -> float:
    """Sliced Wasserstein-1 distance of two colour distributions, in CIELAB units."""
    return float(np.abs(a.colour - b.colour).mean())


def texture_distance(a: Appearance, b: Appearance) -> float:
    """Wasserstein-1 distance of two textures' filter responses, averaged; colour-blind, unitless."""
    return float(np.abs(a.texture - b.texture).mean())


def appearance_distance(image_a: Tensor, mask_a: Tensor, image_b: Tensor, mask_b: Tensor) -> dict[str, float]:
    """Colour, texture and combined distance between two images (3, H, W), each over its mask (H, W).

    `combined` = colour + TEXTURE_WEIGHT * texture: candidates are ranked by it.
    """
    a, b = appearance_of(image_a, mask_a), appearance_of(image_b, mask_b)
    return {
        "colour": colour_distance(a, b),
        "texture": texture_distance(a, b),
        "combined": combined_distance(a, b),
    }


def combined_distance(a: Appearance, b: Appearance) -> float:
    """Colour plus weighted texture distance, in CIELAB units; candidates are ranked by it."""
    return colour_distance(a, b) + TEXTURE_WEIGHT * texture_distance(a, b)


T = TypeVar("T")


def retrieval(score: Callable[[T, T], float], query: T, candidates: Sequence[T]) -> int:
    """Index of the candidate with the highest score against the query (the first of equals).

    Raises ValueError without candidates.
    """
    if not candidates:
        raise ValueError("there is nothing to retrieve from")
    return int(np.argmax([score(query, candidate) for candidate in candidates]))


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    n: int = 2000,
    seed: int = 0,
    groups: Sequence[object] | None = None,
) -> Interval:
    """Mean of a - b with its 95 % percentile interval over `n` resamples of the pairs.

    With `groups` (one label per pair: its reference) whole groups are resampled, because prompts of one
    reference are not independent. Raises ValueError for lists of different or no length.
    """
    difference = np.asarray(a, float) - np.asarray(b, float)
    labels = np.arange(len(difference)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    if len(a) != len(b) or len(labels) != len(difference) or not len(difference):
        raise ValueError(f"{len(a)} and {len(b)} values in {len(labels)} groups cannot be paired")
    count = np.bincount(labels)
    total = np.bincount(labels, weights=difference)
    picks = np.random.default_rng(seed).integers(len(count), size=(n, len(count)))
    means = total[picks].sum(1) / count[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(difference.mean()), float(low), float(high))
