"""Outlines of the world: named shapes, unnamed families, held-out families; and their rasterisation.

An outline is a set of closed contours (N, C, V, 2), y up, in units of the object's half extent. Contours wind
counter-clockwise; a clockwise contour is a hole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .names import SIZE
from .random import CounterRNG


def present(contours: Tensor) -> Tensor:
    """Which contours (N, C, V, 2) are used, (N, C, 1, 1) bool: all points of an unused one are the origin."""
    return (contours != 0).any(-1).any(-1)[..., None, None]


def _angles(n: int, count: int, device: torch.device) -> Tensor:
    return (torch.arange(count, device=device) * (2 * math.pi / count)).expand(n, count)


def _polar(radius: Tensor, theta: Tensor) -> Tensor:
    return torch.stack([radius * theta.cos(), radius * theta.sin()], -1)


def _ellipse(cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor, angle: Tensor, vertices: int = 24) -> Tensor:
    theta = torch.arange(vertices, device=cx.device) * (2 * math.pi / vertices)
    return _place(theta.cos() * rx[..., None], theta.sin() * ry[..., None], cx, cy, angle)


def _rectangle(cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor, angle: Tensor, vertices: int = 24) -> Tensor:
    corner = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], device=cx.device)
    corner = corner.repeat_interleave(vertices // 4, 0)  # repeated vertices make edges of no length
    return _place(corner[:, 0] * rx[..., None], corner[:, 1] * ry[..., None], cx, cy, angle)


def _triangle(cx: Tensor, cy: Tensor, rx: Tensor, ry: Tensor, angle: Tensor, vertices: int = 24) -> Tensor:
    corner = torch.tensor([[0.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], device=cx.device).repeat_interleave(
        vertices // 3, 0
    )
    return _place(corner[:, 0] * rx[..., None], corner[:, 1] * ry[..., None], cx, cy, angle)


def _place(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, angle: Tensor) -> Tensor:
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    return torch.stack([cx[..., None] + cos * x - sin * y, cy[..., None] + sin * x + cos * y], -1)


def _capsule(a: Tensor, b: Tensor, half_width: Tensor, vertices: int = 16) -> Tensor:
    """A stroke with round ends from a to b (..., 2): contour (..., V, 2)."""
    along = b - a
    angle = torch.atan2(along[..., 1], along[..., 0])[..., None]
    half = vertices // 2
    cap = torch.linspace(-math.pi / 2, math.pi / 2, half, device=a.device)
    first = b[..., None, :] + _polar(half_width[..., None].expand(*half_width.shape, half), angle + cap)
    second = a[..., None, :] + _polar(
        half_width[..., None].expand(*half_width.shape, half), angle + cap + math.pi
    )
    return torch.cat([first, second], -2)


def _regular(n: int, corners: int, phase: float, device: torch.device) -> Tensor:
    theta = _angles(n, corners, device) + phase
    return _polar(torch.ones_like(theta), theta)[:, None]


def _fixed(points: list[tuple[float, float]], n: int, device: torch.device) -> Tensor:
    return torch.tensor(points, device=device).expand(n, 1, len(points), 2)


def _circle(d: CounterRNG) -> Tensor:
    return _regular(len(d), 48, 0.0, d.index.device)


def _square(d: CounterRNG) -> Tensor:
    return _regular(len(d), 4, math.pi / 4, d.index.device)


def _named_triangle(d: CounterRNG) -> Tensor:
    return _regular(len(d), 3, math.pi / 2, d.index.device)


def _hexagon(d: CounterRNG) -> Tensor:
    return _regular(len(d), 6, 0.0, d.index.device)


def _star(d: CounterRNG) -> Tensor:
    theta = _angles(len(d), 10, d.index.device) + math.pi / 2
    inner = d.uniform("inner", 1, low=0.36, high=0.48)
    return _polar(torch.where(torch.arange(10, device=d.index.device) % 2 == 0, 1.0, inner), theta)[:, None]


def _heart(d: CounterRNG) -> Tensor:
    t = _angles(len(d), 48, d.index.device)
    x = 16 * t.sin() ** 3
    y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    return torch.stack([-x, y], -1)[:, None] / 16  # -x: the classical parametrisation runs clockwise


def _cross(d: CounterRNG) -> Tensor:
    w, one = d.uniform("arm", low=0.27, high=0.40), torch.ones(len(d), device=d.index.device)
    x = [w, w, -w, -w, -one, -one, -w, -w, w, w, one, one]
    y = [w, one, one, w, w, -w, -w, -one, -one, -w, -w, w]
    return torch.stack([torch.stack(x, -1), torch.stack(y, -1)], -1)[:, None]


def _ring(d: CounterRNG) -> Tensor:
    theta = _angles(len(d), 40, d.index.device)
    inner = d.uniform("hole", 1, low=0.48, high=0.66).expand_as(theta)
    return torch.stack([_polar(torch.ones_like(theta), theta), _polar(inner, -theta)], 1)


def _crescent(d: CounterRNG) -> Tensor:
    # The unit circle minus a circle of radius r at (s, 0): outer arc forwards, inner arc back.
    r, s = d.uniform("bite", low=0.78, high=0.88), d.uniform("offset", low=0.42, high=0.52)
    cut_x = (1 - r * r + s * s) / (2 * s)
    outer = torch.acos(cut_x.clamp(-1, 1))
    inner = torch.acos(((cut_x - s) / r).clamp(-1, 1))
    step = torch.linspace(0, 1, 24, device=d.index.device)
    forwards = outer[:, None] + (2 * math.pi - 2 * outer)[:, None] * step
    back = (2 * math.pi - inner)[:, None] - (2 * math.pi - 2 * inner)[:, None] * step
    bite = _polar(r[:, None].expand_as(back), back) + torch.stack([s, torch.zeros_like(s)], -1)[:, None]
    return torch.cat([_polar(torch.ones_like(forwards), forwards), bite], 1)[:, None]


def _arrow(d: CounterRNG) -> Tensor:
    head, half = d.uniform("head", low=0.0, high=0.25), d.uniform("shaft", low=0.20, high=0.32)
    wing, one = d.uniform("wing", low=0.62, high=0.80), torch.ones(len(d), device=d.index.device)
    x = [one, head, head, -one, -one, head, head]
    y = [0 * one, wing, half, half, -half, -half, -wing]
    return torch.stack([torch.stack(x, -1), torch.stack(y, -1)], -1)[:, None]


def _diamond(d: CounterRNG) -> Tensor:
    w, one = d.uniform("width", low=0.56, high=0.70), torch.ones(len(d), device=d.index.device)
    x, y = [w, 0 * one, -w, 0 * one], [0 * one, one, 0 * one, -one]
    return torch.stack([torch.stack(x, -1), torch.stack(y, -1)], -1)[:, None]


def _flower(d: CounterRNG) -> Tensor:
    theta = _angles(len(d), 72, d.index.device)
    depth = d.uniform("depth", 1, low=0.22, high=0.34)
    return _polar(1 + depth * (6 * theta).cos(), theta)[:, None]


def _fourier(d: CounterRNG) -> Tensor:
    theta = _angles(len(d), 96, d.index.device)
    order = torch.arange(1, 9, device=d.index.device)
    amplitude = d.uniform("amplitude", 8, low=0.1) * d.uniform("rough", 1, low=0.35, high=1.0) / order**0.7
    phase = d.uniform("phase", 8, high=2 * math.pi)
    wave = (amplitude[:, :, None] * (order[:, None] * theta[:, None] + phase[:, :, None]).cos()).sum(1)
    return _polar((1 + wave).clamp(min=0.12), theta)[:, None]


def _superformula(d: CounterRNG) -> Tensor:
    theta = _angles(len(d), 96, d.index.device)
    m = d.integer("m", 1, 11)[:, None]
    n1, n2 = d.uniform("n1", 1, low=0.35, high=2.5), d.uniform("n2", 2, low=0.6, high=6.0)
    part = (m * theta / 4).cos().abs() ** n2[:, :1] + (m * theta / 4).sin().abs() ** n2[:, 1:]
    # An odd m closes only after two turns: the seam is blended over the last eighth of the outline.
    radius = part.clamp(min=1e-4) ** (-1 / n1)
    blend = ((theta - 1.75 * math.pi) / (0.25 * math.pi)).clamp(0, 1)
    radius = radius * (1 - blend) + radius[:, :1] * blend
    return _polar((radius / radius.amax(1, keepdim=True)).clamp(min=0.08), theta)[:, None]


def _polygon(d: CounterRNG) -> Tensor:
    corners = 11
    used = d.integer("corners", 4, corners + 1)[:, None]
    slot = torch.arange(corners, device=d.index.device)
    theta = 2 * math.pi * (slot.clamp(max=used - 1) + 0.8 * d.uniform("jitter", corners)) / used
    radius = d.uniform("radius", corners, low=0.3)
    last = (used - 1).expand(-1, corners)
    keep = slot < used  # surplus corners repeat the last one
    theta, radius = (torch.where(keep, v, v.gather(1, last)) for v in (theta, radius))
    return _polar(radius, theta)[:, None]


def _parts(d: CounterRNG, name: str, count: int, spread: float, low: float, high: float) -> Tensor:
    """`count` ellipses, rectangles or triangles scattered around the origin: (N, count, 24, 2)."""
    cx, cy = (
        d.uniform(name + "x", count, low=-spread, high=spread),
        d.uniform(name + "y", count, low=-spread, high=spread),
    )
    rx, ry = (
        d.uniform(name + "rx", count, low=low, high=high),
        d.uniform(name + "ry", count, low=low, high=high),
    )
    angle = d.uniform(name + "angle", count, high=math.pi) * (d.uniform(name + "upright", count) < 0.6)
    kind = d.uniform(name + "kind", count)[..., None, None]
    box, tri = _rectangle(cx, cy, rx, ry, angle), _triangle(cx, cy, rx, ry, angle)
    return torch.where(kind < 0.4, _ellipse(cx, cy, rx, ry, angle), torch.where(kind < 0.75, box, tri))


def _hole(d: CounterRNG, limit: float) -> Tensor:
    """A hole (a clockwise ellipse) in half of the images, a point in the others: (N, 1, 24, 2)."""
    size = d.uniform("hole", 2, low=0.12, high=limit) * (d.uniform("holed", 1) < 0.5)
    at = d.uniform("hole at", 2, low=-0.2, high=0.2)
    return _ellipse(at[:, :1], at[:, 1:], size[:, :1], size[:, 1:], torch.zeros_like(at[:, :1])).flip(-2)


def _union(d: CounterRNG) -> Tensor:
    body = _parts(d, "body", 1, 0.0, 0.4, 0.8)
    others = _parts(d, "other", 4, 0.75, 0.12, 0.5)
    present = (d.uniform("present", 4) < 0.75)[..., None, None]
    return torch.cat([body, others * present, _hole(d, 0.35)], 1)


def _limbs(d: CounterRNG) -> Tensor:
    """A body with a head, legs or arms: animals, chairs, tools."""
    zero = torch.zeros(len(d), 1, device=d.index.device)
    rx, ry = d.uniform("rx", 1, low=0.25, high=0.75), d.uniform("ry", 1, low=0.18, high=0.5)
    body = torch.where(
        (d.uniform("boxy", 1) < 0.3)[..., None, None],
        _rectangle(zero, zero, rx, ry, zero),
        _ellipse(zero, zero, rx, ry, zero),
    )
    root = torch.stack(
        [d.uniform("root x", 6, low=-0.85, high=0.85) * rx, d.uniform("root y", 6, low=-0.7, high=0.7) * ry],
        -1,
    )
    down = d.uniform("down", 6) < d.uniform("legged", 1)
    angle = torch.where(
        down, -math.pi / 2 + d.uniform("splay", 6, low=-0.3, high=0.3), d.uniform("any", 6, high=2 * math.pi)
    )
    length = torch.where(
        down, d.uniform("leg", 1, low=0.5, high=1.0), d.uniform("limb", 6, low=0.4, high=1.1)
    )
    present = (d.uniform("present", 6) < 0.7)[..., None, None]
    width = d.uniform("thick", 1, low=0.05, high=0.16) * d.uniform("vary", 6, low=0.7, high=1.3)
    limbs = _capsule(root, root + _polar(length, angle), width, 24) * present
    side = rx * torch.where(d.uniform("side", 1) < 0.5, -1.0, 1.0)
    head = _parts(d, "head", 1, 0.1, 0.15, 0.32) + torch.stack([side, ry + 0.1], -1)[:, :, None]
    return torch.cat([body, limbs, head * (d.uniform("headed", 1) < 0.75)[..., None, None]], 1)


def _strokes(d: CounterRNG) -> Tensor:
    """A thick random path, half of the time with a closed loop: letters, rackets, keys, spectacles."""
    knots = d.uniform("knots", 6, 2, low=-0.9, high=0.9)
    straight = (d.uniform("straight", 1, 1) < 0.4) * (torch.arange(6, device=d.index.device) % 2 == 0)[
        :, None
    ]
    shifted = torch.cat([knots[:, :1], knots[:, :-1]], 1)
    knots = torch.where(straight.bool(), torch.stack([shifted[..., 0], knots[..., 1]], -1), knots)
    width = d.uniform("width", 1, low=0.08, high=0.24).expand(-1, 5)
    present = d.uniform("present", 5) < 0.8
    present[:, 0] |= ~present.any(1)  # otherwise one image in about 70,000 would be empty
    path = _capsule(knots[:, :-1], knots[:, 1:], width, 24) * present[..., None, None]
    at, outer = knots[:, 1], d.uniform("loop", 1, low=0.3, high=0.6)
    looped = (d.uniform("looped", 1) < 0.5)[..., None, None]
    zero = torch.zeros_like(outer)
    loop = _ellipse(at[:, :1], at[:, 1:], outer, outer, zero) * looped
    inner = (outer - width[:, :1] * 1.6).clamp(min=0.08)
    hole = _ellipse(at[:, :1], at[:, 1:], inner, inner, zero).flip(-2) * looped
    return torch.cat([path, loop, hole], 1)


def _blocks(d: CounterRNG) -> Tensor:
    """Upright rectangles that share edges: furniture, buildings, vehicles, letters."""
    edges = d.uniform("edges", 6, 4, low=-1.0, high=1.0)
    x, y = edges[..., :2].sort(-1).values, edges[..., 2:].sort(-1).values
    x = (x * 3).round() / 3 + torch.tensor([0.0, 0.24], device=x.device)
    y = (y * 3).round() / 3 + torch.tensor([0.0, 0.24], device=y.device)
    boxes = _rectangle(
        x.mean(-1),
        y.mean(-1),
        (x[..., 1] - x[..., 0]) / 2,
        (y[..., 1] - y[..., 0]) / 2,
        torch.zeros_like(x[..., 0]),
    )
    present = (d.uniform("present", 6) < 0.6) | (torch.arange(6, device=x.device) < 2)
    wheel = _ellipse(
        *d.uniform("wheel", 2, 2, low=-0.8, high=0.8).unbind(-1),
        *[d.uniform("r", 2, low=0.15, high=0.35)] * 2,
        torch.zeros_like(x[:, :2, 0]),
    )
    wheeled = (d.uniform("wheeled", 1) < 0.35)[..., None, None]
    return torch.cat([boxes * present[..., None, None], wheel * wheeled], 1)


def _lathe(d: CounterRNG) -> Tensor:
    """Mirror-symmetric profiles: bottles, vases, chess pieces, leaves, insects."""
    rows, knots = 40, 9
    profile = d.uniform("profile", knots, low=0.06, high=0.8) ** d.uniform("slim", 1, low=0.7, high=2.0)
    smooth = F.interpolate(profile[:, None], size=rows, mode="linear", align_corners=True)[:, 0]
    stepped = F.interpolate(profile[:, None], size=rows, mode="nearest")[:, 0]
    half = torch.where(d.uniform("stepped", 1) < 0.35, stepped, smooth)
    y = torch.linspace(-1, 1, rows, device=d.index.device).expand_as(half)
    right, left = torch.stack([half, y], -1), torch.stack([-half, y], -1).flip(1)
    lathe = torch.cat([right, left], 1)[:, None]
    turned = d.uniform("lying", 1, 1, 1) < 0.25
    return torch.where(turned, torch.stack([-lathe[..., 1], lathe[..., 0]], -1), lathe)


def _gear(d: CounterRNG) -> Tensor:
    theta = _angles(len(d), 144, d.index.device)
    teeth = d.integer("teeth", 7, 13)[:, None]
    tooth = torch.tanh(6 * (teeth * theta).cos())
    return _polar(0.85 + d.uniform("depth", 1, low=0.08, high=0.15) * tooth, theta)[:, None]


def _spiral(d: CounterRNG) -> Tensor:
    t = torch.linspace(0, 1, 60, device=d.index.device).expand(len(d), 60)
    theta = t * d.uniform("turns", 1, low=1.3, high=1.9) * 2 * math.pi
    radius, half = 0.15 + 0.75 * t, d.uniform("half", 1, low=0.08, high=0.13)
    return torch.cat([_polar(radius + half, theta), _polar(radius - half, theta).flip(1)], 1)[:, None]


def _comb(d: CounterRNG) -> Tensor:
    count = 6
    x = torch.linspace(-0.85, 0.85, count, device=d.index.device).expand(len(d), count)
    long = d.uniform("long", count, low=0.3, high=0.8)
    half = d.uniform("half", 1, low=0.07, high=0.11).expand_as(x)
    teeth = _rectangle(x, 0.3 - long, half, long, torch.zeros_like(x))
    zero = torch.zeros(len(d), 1, device=d.index.device)
    return torch.cat([teeth, _rectangle(zero, zero + 0.35, zero + 1, zero + 0.25, zero)], 1)


def draw_cuts(d: CounterRNG) -> Tensor:
    """Lines, round and square holes to cut out of an outline: (N, 8, 24, 2) in units of its box.

    In half of the images all lines are parallel, as in grilles, ribs and teeth. Lines are 1 to 4 px wide.
    """
    lines, holes = 5, 3
    width = d.uniform("cut width", 1, low=0.025, high=0.085).expand(-1, lines)
    middle = d.uniform("cut at", lines, 2, low=-0.75, high=0.75)
    together = d.uniform("cut together", 1) < 0.5
    angle = torch.where(
        together,
        (d.uniform("cut angle", 1) * 4).round() * (math.pi / 4),
        d.uniform("cut angles", lines, high=math.pi),
    )
    half = d.uniform("cut length", lines, low=0.15, high=0.9) ** d.uniform("cut short", 1, low=0.6, high=2.0)
    along = _polar(half, angle)
    line = _capsule(middle - along, middle + along, width, 24)
    line = line * (d.uniform("cut line", lines) < 0.55)[..., None, None]
    hole = _parts(d, "cut hole", holes, 0.6, 0.07, 0.32)
    hole = hole * (d.uniform("cut hole there", holes) < 0.4)[..., None, None]
    return torch.cat([line, hole], 1)


OUTLINES: dict[str, Callable[[CounterRNG], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _named_triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "hexagon": _hexagon,
    "arrow": _arrow,
    "diamond": _diamond,
    "flower": _flower,
    "fourier": _fourier,
    "superformula": _superformula,
    "polygon": _polygon,
    "union": _union,
    "limbs": _limbs,
    "strokes": _strokes,
    "blocks": _blocks,
    "lathe": _lathe,
    "gear": _gear,
    "spiral": _spiral,
    "comb": _comb,
}


def rasterise(contours: Tensor, size: int = SIZE, rows_per_pixel: int = 4) -> Tensor:
    """Coverage (N, S, S) in [0, 1] of closed contours (N, C, V, 2) given in pixels, y down; non-zero winding.

    The area of each scan line is exact in x (accumulated as in font rasterisers) and sampled
    ``rows_per_pixel`` times in y. Contours wind positively around the filled area, holes negatively.
    """
    n = len(contours)
    start = contours.reshape(n, -1, 2)
    end = contours.roll(-1, dims=2).reshape(n, -1, 2)
    x0, y0, x1, y1 = (v[:, :, None] for v in (start[..., 0], start[..., 1], end[..., 0], end[..., 1]))
    rows = size * rows_per_pixel
    y = (torch.arange(rows, device=contours.device) + 0.5) / rows_per_pixel  # (rows,)
    crosses = (torch.minimum(y0, y1) <= y) & (y < torch.maximum(y0, y1))  # (N, E, rows)
    slope = (x1 - x0) / torch.where(y1 == y0, 1.0, y1 - y0)
    x = (x0 + (y - y0) * slope).clamp(0, size)
    direction = torch.sign(y0 - y1) * crosses  # y points down
    left = x.floor().clamp(max=size - 1)
    share = x - left
    cell = torch.arange(rows, device=contours.device) * (size + 1) + left.to(torch.int64)  # (N, E, rows)
    winding = torch.zeros(n, rows * (size + 1), device=contours.device)
    winding.scatter_add_(1, cell.view(n, -1), (direction * (1 - share)).view(n, -1))
    winding.scatter_add_(1, (cell + 1).view(n, -1), (direction * share).view(n, -1))
    coverage = (-winding).view(n, rows, size + 1)[..., :size].cumsum(-1).clamp(0, 1)
    return coverage.view(n, size, rows_per_pixel, size).mean(2)
