"""The named patterns of the world, and the parts of all textures: grids, noise, palettes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .names import COLOUR_RGB, COLOURS, PATTERNS, SIZE
from .random import CounterRNG


def pixel_grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates x and y (S, S) of the pixels, in pixels of the 64 px frame."""
    axis = torch.arange(size, device=device, dtype=torch.float32) * (SIZE / size)
    return axis.expand(size, size), axis[:, None].expand(size, size)


def turned_grid(d: CounterRNG, size: int, limit: float = math.pi) -> tuple[Tensor, Tensor]:
    """Pixel coordinates (N, S, S), rotated by a random angle within +-limit and shifted at random."""
    x, y = pixel_grid(size, d.index.device)
    angle = d.uniform("turn", 1, 1, low=-limit, high=limit)
    shift = d.uniform("shift", 2, 1, 1, high=64.0)
    return angle.cos() * x + angle.sin() * y + shift[:, 0], -angle.sin() * x + angle.cos() * y + shift[:, 1]


def smooth_noise(
    d: CounterRNG, name: str, size: int, cells: tuple[int, ...], stretch: tuple[int, int] = (1, 1)
) -> Tensor:
    """Value noise (N, S, S) in about [0, 1]: one octave for each entry of `cells`, each half as strong."""
    total, weight = 0.0, 0.0
    for octave, count in enumerate(cells):
        lattice = d.uniform(f"{name}{octave}", 1, max(2, count // stretch[0]), max(2, count // stretch[1]))
        share = 0.5**octave
        total = (
            total
            + share * F.interpolate(lattice, size=(size, size), mode="bicubic", align_corners=True)[:, 0]
        )
        weight += share
    return ((total / weight - 0.5) * 1.6 + 0.5).clamp(0, 1)


def palette(d: CounterRNG, count: int) -> Tensor:
    """Colours (N, count, 3) around a random base colour; most palettes are muted, as real materials are."""
    hue = d.uniform("hue", 1)
    muted = d.uniform("muted", 1) < 0.6
    apart = torch.where(d.uniform("bold", 1) < 0.3, 0.5, 0.08)
    hue = hue + apart * (d.uniform("hue apart", count) - 0.5)
    saturation = torch.where(muted, 0.35, 0.95) * d.uniform("saturation", 1) + 0.15 * (
        d.uniform("s apart", count) - 0.5
    )
    contrast = d.uniform("contrast", 1, low=0.08, high=0.9)
    value = d.uniform("value", 1, low=0.15, high=0.95) + contrast * (d.uniform("v apart", count) - 0.5)
    # HSV to RGB in closed form
    k = (torch.tensor([5.0, 3.0, 1.0], device=hue.device) + (hue * 6)[..., None]) % 6
    s, v = saturation.clamp(0, 1)[..., None], value.clamp(0.02, 1)[..., None]
    return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)


def ramp_colours(level: Tensor, palette: Tensor) -> Tensor:
    """Colours (N, 3, S, S) of a level (N, S, S) in [0, 1] on a piecewise linear palette (N, K, 3)."""
    steps = palette.shape[1] - 1
    at = level.clamp(0, 1) * steps
    out = torch.zeros(len(level), 3, *level.shape[1:], device=level.device)
    for k in range(steps + 1):
        out += (1 - (at - k).abs()).clamp(min=0)[:, None] * palette[:, k, :, None, None]
    return out


def blended(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Colours (N, 3, S, S) from a (N, 3), where share (N, S, S) is 0, to b (N, 3), where it is 1."""
    return a[:, :, None, None] + (b - a)[:, :, None, None] * share[:, None]


def edge(distance: Tensor) -> Tensor:
    """Coverage of an edge one pixel wide; distance in pixels, positive on the object's side."""
    return (distance + 0.5).clamp(0, 1)


def as_painted(pattern: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The ground and the second colour (N,) of a pattern, from the two that its caption names, (N,).

    The order of the colours in a caption has no meaning: dots have the darker one, so that the caption
    determines which colour is the ground. In all other patterns both colours cover equal areas.
    """
    light = torch.tensor([COLOUR_RGB[name] for name in COLOURS]) @ torch.tensor([0.299, 0.587, 0.114])
    light = light.to(first.device)
    swapped = (pattern == PATTERNS.index("dotted")) & (light[first] < light[second])
    return torch.where(swapped, second, first), torch.where(swapped, first, second)


def _pattern_share(d: CounterRNG, pattern: str, size: int) -> Tensor:
    """Share of the second colour at each pixel of a named pattern: (N, S, S) in [0, 1]."""
    # Three to five latent pixels: a UNet does not learn finer patterns. Stripes vary in one direction only,
    # so they may be finer.
    period = d.uniform("period", 1, 1, low=12.0 if pattern == "striped" else 14.5, high=18.0)
    if pattern == "solid":
        return torch.zeros(len(d), size, size, device=d.index.device)
    if pattern == "striped":
        # Near upright: a small UNet does not learn stripes of any angle.
        x, _ = turned_grid(d, size, 0.5)
        return edge(((x % period) - period / 2).abs() - period / 4)
    if pattern == "dotted":
        x, y = turned_grid(d, size, 0.5)
        far = torch.hypot((x % period) - period / 2, (y % period) - period / 2)
        return edge(period * d.uniform("dot", 1, 1, low=0.27, high=0.34) - far)
    if pattern == "checkered":
        x, y = turned_grid(d, size, 0.35)
        period = period + 2  # its cells are half as wide
        across = ((x % period) - period / 2).abs() - period / 4
        along = ((y % period) - period / 2).abs() - period / 4
        a, b = edge(across), edge(along)
        return a + b - 2 * a * b
    if pattern == "gradient":
        x, y = pixel_grid(size, d.index.device)
        angle = d.uniform("turn", 1, 1, high=2 * math.pi)
        # Both ends lie within 12 px of the middle, so that most objects show both colours.
        return (((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 24 + 0.5).clamp(0, 1)
    if pattern == "zigzag":
        x, y = turned_grid(d, size, 0.4)
        wave = d.uniform("wave", 1, 1, low=17.0, high=22.0)
        # Steeper bands are narrower across.
        height = ((x % wave) - wave / 2).abs() * d.uniform("steep", 1, 1, low=0.9, high=1.15)
        return edge((((y + height) % period) - period / 2).abs() - period / 4)
    raise ValueError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")


def cell_grid(d: CounterRNG, size: int, period: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Worley cells: distance to the nearest and second nearest point, and a random number per cell.

    Each (N, S, S); distances in units of `period`.
    """
    x, y = pixel_grid(size, d.index.device)
    gx, gy = x / period, y / period
    bx, by = gx.floor(), gy.floor()
    lattice = 20
    jitter, tone = d.uniform("cells", 2, lattice * lattice), d.uniform("tone", lattice * lattice)
    first = torch.full_like(gx, 9.0)
    second, label = first.clone(), first.clone()
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            cell = (((by + dy) % lattice) * lattice + (bx + dx) % lattice).to(torch.int64).view(len(d), -1)
            jx, jy = (jitter[:, i].gather(1, cell).view_as(gx) for i in (0, 1))
            far = torch.hypot(bx + dx + jx - gx, by + dy + jy - gy)
            nearer = far < first
            second = torch.where(nearer, first, torch.minimum(second, far))
            label = torch.where(nearer, tone.gather(1, cell).view_as(gx), label)
            first = torch.minimum(first, far)
    return first, second, label


def paint_pattern(d: CounterRNG, pattern: str, first: Tensor, second: Tensor, size: int = SIZE) -> Tensor:
    """A named pattern in two colours (N, 3): RGB (N, 3, S, S) in [0, 1]."""
    return blended(first, second, _pattern_share(d, pattern, size))
