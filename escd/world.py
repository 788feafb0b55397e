"""The labelled shape x appearance world that `mini` is trained, probed and judged on.

Every picture is one object on a background. Its factors (shape, appearance, background, pose) are drawn by a
counter-based generator from ``(seed, factor, index)`` alone, so any picture can be rendered on its own, in
any batch, on any worker, and two pictures can share exactly one factor: ``world.batch(shape=i,
appearance=j)``. That is what the attribute filters' cross-image supervision needs (paper, section
"Multi-modal fusion").

Units: pixels are RGB in [-1, 1] in a ``Batch`` and in [0, 1] while being painted; lengths in an outline are
in units of the object's half extent; angles are radians.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
# More of what real materials are made of; only a `varied` world draws them.
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
# Share of a varied world's unnamed outlines that holes, gaps and inner lines are cut out of.
PIERCED = 0.45
# Never drawn by the "train" split: what a backbone is evaluated on must be new to it.
HELDOUT_SHAPES = ("gear", "spiral", "comb")
HELDOUT_APPEARANCES = ("hexcells", "weave", "target")
# Words a sub-attribute can be called by; the captions teach each of them.
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


@dataclass(frozen=True)
class Sample:
    """One picture of the world: image (3, S, S) in [-1, 1], mask (1, S, S) in [0, 1], labels, captions."""

    image: Tensor
    mask: Tensor
    labels: dict[str, int | str | tuple[str, ...]]
    captions: list[str]


@dataclass(frozen=True)
class Batch:
    """N pictures: image (N, 3, S, S) in [-1, 1], mask (N, 1, S, S) in [0, 1], and their labels, each (N,)."""

    image: Tensor
    mask: Tensor
    shape: Tensor  # (N,) index into SHAPES, or NONE
    pattern: Tensor  # (N,) index into PATTERNS, or NONE
    colours: Tensor  # (N, 8) bool, which of COLOURS the object shows; all False for an unnamed appearance
    background: Tensor  # (N,) index into BACKGROUNDS, or NONE
    shape_family: list[str]
    appearance_family: list[str]
    background_family: list[str]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.image)


# ------------------------------------------------------------------------
# Counter-based random numbers


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 has only an arithmetic shift; the mask makes it logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    # The finaliser of splitmix64 (Steele et al. 2014), in wrapping int64.
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


@lru_cache(maxsize=4096)
def _key(text: str) -> int:
    value = 0xCBF29CE484222325  # FNV-1a: stable over processes, unlike hash()
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & ((1 << 64) - 1)
    return _signed(value)


class Draws:
    """Uniform numbers that are a function of (seed, index, name): the same in any batch and on any worker."""

    def __init__(self, seed: int, index: Tensor) -> None:
        self.seed = seed
        self.index = index.to(torch.int64)
        self._base = _mix(
            self.index * _signed(0x9E3779B97F4A7C15) + _signed(_key("world") + seed * 0x2545F4914F6CDD1D)
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor) -> Draws:
        return Draws(self.seed, self.index[rows])

    def uniform(self, name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(N, *shape) float32 in [low, high)."""
        count = math.prod(shape)
        counter = torch.arange(count, device=self.index.device, dtype=torch.int64) * _signed(
            0xD1342543DE82EF95
        )
        bits = _mix((self._base ^ _key(name))[:, None] + counter[None])
        unit = _shift(bits, 40).to(torch.float32) * 2.0**-24
        return (low + (high - low) * unit).view(len(self), *shape)

    def integer(self, name: str, low: int, high: int) -> Tensor:
        """(N,) int64 in [low, high)."""
        return (low + self.uniform(name) * (high - low)).floor().to(torch.int64).clamp(max=high - 1)

    def choose(self, name: str, weights: Sequence[float]) -> Tensor:
        """(N,) int64: an index drawn with these weights."""
        edges = torch.tensor(weights, dtype=torch.float64).cumsum(0).to(self.index.device)
        return torch.searchsorted((edges / edges[-1])[:-1].to(torch.float32), self.uniform(name), right=True)


# ------------------------------------------------------------------------
# Outlines: each family maps Draws to closed contours (N, C, V, 2), counter-clockwise with y up; a clockwise
# contour is a hole.


def present(contours: Tensor) -> Tensor:
    """Which contours (N, C, V, 2) there are, (N, C, 1, 1): one that is switched off lies in the origin."""
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


def _circle(d: Draws) -> Tensor:
    return _regular(len(d), 48, 0.0, d.index.device)


def _square(d: Draws) -> Tensor:
    return _regular(len(d), 4, math.pi / 4, d.index.device)


def _named_triangle(d: Draws) -> Tensor:
    return _regular(len(d), 3, math.pi / 2, d.index.device)


def _hexagon(d: Draws) -> Tensor:
    return _regular(len(d), 6, 0.0, d.index.device)


def _star(d: Draws) -> Tensor:
    theta = _angles(len(d), 10, d.index.device) + math.pi / 2
    inner = d.uniform("inner", 1, low=0.36, high=0.48)
    return _polar(torch.where(torch.arange(10, device=d.index.device) % 2 == 0, 1.0, inner), theta)[:, None]


def _heart(d: Draws) -> Tensor:
    t = _angles(len(d), 48, d.index.device)
    x = 16 * t.sin() ** 3
    y = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
    return torch.stack([-x, y], -1)[:, None] / 16  # -x: the classical parametrisation runs clockwise


def _cross(d: Draws) -> Tensor:
    w, one = d.uniform("arm", low=0.27, high=0.40), torch.ones(len(d), device=d.index.device)
    x = [w, w, -w, -w, -one, -one, -w, -w, w, w, one, one]
    y = [w, one, one, w, w, -w, -w, -one, -one, -w, -w, w]
    return torch.stack([torch.stack(x, -1), torch.stack(y, -1)], -1)[:, None]


def _ring(d: Draws) -> Tensor:
    theta = _angles(len(d), 40, d.index.device)
    inner = d.uniform("hole", 1, low=0.48, high=0.66).expand_as(theta)
    return torch.stack([_polar(torch.ones_like(theta), theta), _polar(inner, -theta)], 1)


def _crescent(d: Draws) -> Tensor:
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


def _arrow(d: Draws) -> Tensor:
    head, half = d.uniform("head", low=0.0, high=0.25), d.uniform("shaft", low=0.20, high=0.32)
    wing, one = d.uniform("wing", low=0.62, high=0.80), torch.ones(len(d), device=d.index.device)
    x = [one, head, head, -one, -one, head, head]
    y = [0 * one, wing, half, half, -half, -half, -wing]
    return torch.stack([torch.stack(x, -1), torch.stack(y, -1)], -1)[:, None]


def _diamond(d: Draws) -> Tensor:
    w, one = d.uniform("width", low=0.56, high=0.70), torch.ones(len(d), device=d.index.device)
    x, y = [w, 0 * one, -w, 0 * one], [0 * one, one, 0 * one, -one]
    return torch.stack([torch.stack(x, -1), torch.stack(y, -1)], -1)[:, None]


def _flower(d: Draws) -> Tensor:
    theta = _angles(len(d), 72, d.index.device)
    depth = d.uniform("depth", 1, low=0.22, high=0.34)
    return _polar(1 + depth * (6 * theta).cos(), theta)[:, None]


def _fourier(d: Draws) -> Tensor:
    theta = _angles(len(d), 96, d.index.device)
    order = torch.arange(1, 9, device=d.index.device)
    amplitude = d.uniform("amplitude", 8, low=0.1) * d.uniform("rough", 1, low=0.35, high=1.0) / order**0.7
    phase = d.uniform("phase", 8, high=2 * math.pi)
    wave = (amplitude[:, :, None] * (order[:, None] * theta[:, None] + phase[:, :, None]).cos()).sum(1)
    return _polar((1 + wave).clamp(min=0.12), theta)[:, None]


def _superformula(d: Draws) -> Tensor:
    theta = _angles(len(d), 96, d.index.device)
    m = d.integer("m", 1, 11)[:, None]
    n1, n2 = d.uniform("n1", 1, low=0.35, high=2.5), d.uniform("n2", 2, low=0.6, high=6.0)
    part = (m * theta / 4).cos().abs() ** n2[:, :1] + (m * theta / 4).sin().abs() ** n2[:, 1:]
    # An odd m closes only after two turns: the seam is blended over the last eighth of the outline.
    radius = part.clamp(min=1e-4) ** (-1 / n1)
    blend = ((theta - 1.75 * math.pi) / (0.25 * math.pi)).clamp(0, 1)
    radius = radius * (1 - blend) + radius[:, :1] * blend
    return _polar((radius / radius.amax(1, keepdim=True)).clamp(min=0.08), theta)[:, None]


def _polygon(d: Draws) -> Tensor:
    corners = 11
    used = d.integer("corners", 4, corners + 1)[:, None]
    slot = torch.arange(corners, device=d.index.device)
    theta = 2 * math.pi * (slot.clamp(max=used - 1) + 0.8 * d.uniform("jitter", corners)) / used
    radius = d.uniform("radius", corners, low=0.3)
    last = (used - 1).expand(-1, corners)
    keep = slot < used  # surplus corners repeat the last one
    theta, radius = (torch.where(keep, v, v.gather(1, last)) for v in (theta, radius))
    return _polar(radius, theta)[:, None]


def _parts(d: Draws, name: str, count: int, spread: float, low: float, high: float) -> Tensor:
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


def _hole(d: Draws, limit: float) -> Tensor:
    """A clockwise ellipse in half of the pictures, nothing (a point) in the others: (N, 1, 24, 2)."""
    size = d.uniform("hole", 2, low=0.12, high=limit) * (d.uniform("holed", 1) < 0.5)
    at = d.uniform("hole at", 2, low=-0.2, high=0.2)
    return _ellipse(at[:, :1], at[:, 1:], size[:, :1], size[:, 1:], torch.zeros_like(at[:, :1])).flip(-2)


def _union(d: Draws) -> Tensor:
    body = _parts(d, "body", 1, 0.0, 0.4, 0.8)
    others = _parts(d, "other", 4, 0.75, 0.12, 0.5)
    present = (d.uniform("present", 4) < 0.75)[..., None, None]
    return torch.cat([body, others * present, _hole(d, 0.35)], 1)


def _limbs(d: Draws) -> Tensor:
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


def _strokes(d: Draws) -> Tensor:
    """A thick random path with branches, now and then a closed loop: letters, rackets, keys, spectacles."""
    knots = d.uniform("knots", 6, 2, low=-0.9, high=0.9)
    straight = (d.uniform("straight", 1, 1) < 0.4) * (torch.arange(6, device=d.index.device) % 2 == 0)[
        :, None
    ]
    shifted = torch.cat([knots[:, :1], knots[:, :-1]], 1)
    knots = torch.where(straight.bool(), torch.stack([shifted[..., 0], knots[..., 1]], -1), knots)
    width = d.uniform("width", 1, low=0.08, high=0.24).expand(-1, 5)
    present = d.uniform("present", 5) < 0.8
    present[:, 0] |= ~present.any(1)  # else one picture in some seventy thousand would be empty
    path = _capsule(knots[:, :-1], knots[:, 1:], width, 24) * present[..., None, None]
    at, outer = knots[:, 1], d.uniform("loop", 1, low=0.3, high=0.6)
    looped = (d.uniform("looped", 1) < 0.5)[..., None, None]
    zero = torch.zeros_like(outer)
    loop = _ellipse(at[:, :1], at[:, 1:], outer, outer, zero) * looped
    inside = (outer - width[:, :1] * 1.6).clamp(min=0.08)
    hole = _ellipse(at[:, :1], at[:, 1:], inside, inside, zero).flip(-2) * looped
    return torch.cat([path, loop, hole], 1)


def _blocks(d: Draws) -> Tensor:
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


def _lathe(d: Draws) -> Tensor:
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


def _gear(d: Draws) -> Tensor:
    theta = _angles(len(d), 144, d.index.device)
    teeth = d.integer("teeth", 7, 13)[:, None]
    tooth = torch.tanh(6 * (teeth * theta).cos())
    return _polar(0.85 + d.uniform("depth", 1, low=0.08, high=0.15) * tooth, theta)[:, None]


def _spiral(d: Draws) -> Tensor:
    t = torch.linspace(0, 1, 60, device=d.index.device).expand(len(d), 60)
    theta = t * d.uniform("turns", 1, low=1.3, high=1.9) * 2 * math.pi
    radius, half = 0.15 + 0.75 * t, d.uniform("half", 1, low=0.08, high=0.13)
    return torch.cat([_polar(radius + half, theta), _polar(radius - half, theta).flip(1)], 1)[:, None]


def _comb(d: Draws) -> Tensor:
    count = 6
    x = torch.linspace(-0.85, 0.85, count, device=d.index.device).expand(len(d), count)
    long = d.uniform("long", count, low=0.3, high=0.8)
    half = d.uniform("half", 1, low=0.07, high=0.11).expand_as(x)
    teeth = _rectangle(x, 0.3 - long, half, long, torch.zeros_like(x))
    zero = torch.zeros(len(d), 1, device=d.index.device)
    return torch.cat([teeth, _rectangle(zero, zero + 0.35, zero + 1, zero + 0.25, zero)], 1)


def _cuts(d: Draws) -> Tensor:
    """Lines, round and square holes to be cut out of an outline: (N, 8, 24, 2) in units of its box.

    Half of the lines run in one direction, as grilles, ribs and teeth do. Lines are 1 to 4 px wide.
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


OUTLINES: dict[str, Callable[[Draws], Tensor]] = {
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

    The area of each scan line is exact in x (the accumulation trick of font rasterisers) and sampled
    ``rows_per_pixel`` times in y. Contours must wind positively around the inside; holes the other way.
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


# ------------------------------------------------------------------------
# Appearances: each family maps Draws to RGB (N, 3, S, S) in [0, 1] that covers the whole frame.


def _grid(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    axis = torch.arange(size, device=device, dtype=torch.float32) * (
        SIZE / size
    )  # in pixels of the 64 px frame
    return axis.expand(size, size), axis[:, None].expand(size, size)


def _turned(d: Draws, size: int, limit: float = math.pi) -> tuple[Tensor, Tensor]:
    """Pixel coordinates (N, S, S) turned by a random angle within +-limit and shifted."""
    x, y = _grid(size, d.index.device)
    angle = d.uniform("turn", 1, 1, low=-limit, high=limit)
    shift = d.uniform("shift", 2, 1, 1, high=64.0)
    return angle.cos() * x + angle.sin() * y + shift[:, 0], -angle.sin() * x + angle.cos() * y + shift[:, 1]


def _noise(
    d: Draws, name: str, size: int, cells: tuple[int, ...], stretch: tuple[int, int] = (1, 1)
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


def _palette(d: Draws, count: int) -> Tensor:
    """(N, count, 3): a base colour and its relatives; most palettes are muted, as real materials are."""
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


def _ramp_colours(level: Tensor, palette: Tensor) -> Tensor:
    """Colours (N, 3, S, S) of a level (N, S, S) in [0, 1] on a piecewise linear palette (N, K, 3)."""
    steps = palette.shape[1] - 1
    at = level.clamp(0, 1) * steps
    out = torch.zeros(len(level), 3, *level.shape[1:], device=level.device)
    for k in range(steps + 1):
        out += (1 - (at - k).abs()).clamp(min=0)[:, None] * palette[:, k, :, None, None]
    return out


def _blend(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """a where share is 0, b where it is 1; colours (N, 3), share (N, S, S)."""
    return a[:, :, None, None] + (b - a)[:, :, None, None] * share[:, None]


def _edge(distance: Tensor) -> Tensor:
    return (distance + 0.5).clamp(0, 1)  # an edge one pixel wide; `distance` in pixels


def as_painted(pattern: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The colours (N,) a named pattern is painted in, its ground first, of the two a caption names, (N,).

    A caption's order says nothing: of two colours the dots are the darker. A text tower that has learnt what
    a caption names hardly tells its first colour from its second, and a UNet that does not know which is the
    ground gives each a half of the surface, which is no dots but a labyrinth. All other patterns have as much
    of one as of the other.
    """
    light = torch.tensor([COLOUR_RGB[name] for name in COLOURS]) @ torch.tensor([0.299, 0.587, 0.114])
    light = light.to(first.device)
    swapped = (pattern == PATTERNS.index("dotted")) & (light[first] < light[second])
    return torch.where(swapped, second, first), torch.where(swapped, first, second)


def _pattern_share(d: Draws, pattern: str, size: int) -> Tensor:
    """How much of the second colour a named pattern shows at each pixel: (N, S, S) in [0, 1]."""
    # Three to five pixels of the latents: a finer one they can hold, and a UNet cannot draw. Stripes, which
    # change in one direction only, may be the finest.
    period = d.uniform("period", 1, 1, low=12.0 if pattern == "striped" else 14.5, high=18.0)
    if pattern == "solid":
        return torch.zeros(len(d), size, size, device=d.index.device)
    if pattern == "striped":
        # At any angle, a small UNet settles on none: it drew a labyrinth for 99 of 100 prompts.
        x, _ = _turned(d, size, 0.5)
        return _edge(((x % period) - period / 2).abs() - period / 4)
    if pattern == "dotted":
        x, y = _turned(d, size, 0.5)
        far = torch.hypot((x % period) - period / 2, (y % period) - period / 2)
        return _edge(period * d.uniform("dot", 1, 1, low=0.27, high=0.34) - far)
    if pattern == "checkered":
        x, y = _turned(d, size, 0.35)
        period = period + 2  # its cells are half as wide
        across = ((x % period) - period / 2).abs() - period / 4
        along = ((y % period) - period / 2).abs() - period / 4
        a, b = _edge(across), _edge(along)
        return a + b - 2 * a * b
    if pattern == "gradient":
        x, y = _grid(size, d.index.device)
        angle = d.uniform("turn", 1, 1, high=2 * math.pi)
        # Both ends lie within 12 px of the middle, where most objects show them.
        return (((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 24 + 0.5).clamp(0, 1)
    if pattern == "zigzag":
        x, y = _turned(d, size, 0.4)
        wave = d.uniform("wave", 1, 1, low=17.0, high=22.0)
        # Steeper bands are narrower ones, measured across.
        height = ((x % wave) - wave / 2).abs() * d.uniform("steep", 1, 1, low=0.9, high=1.15)
        return _edge((((y + height) % period) - period / 2).abs() - period / 4)
    raise ValueError(f"unknown pattern {pattern!r}; known: {', '.join(PATTERNS)}")


def _cells(d: Draws, size: int, period: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Worley cells: nearest and second nearest distance in cells, and a random number per cell, each (N, S,
    S)."""
    x, y = _grid(size, d.index.device)
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


def _fbm(d: Draws, size: int) -> Tensor:
    level = _noise(d, "n", size, (5, 9, 17, 33))
    return _ramp_colours(level, _palette(d, 3))


def _marble(d: Draws, size: int) -> Tensor:
    x, _ = _turned(d, size)
    turbulence = _noise(d, "n", size, (4, 8, 16, 32))
    level = torch.sin(x / d.uniform("wave", 1, 1, low=3.0, high=9.0) + 9 * turbulence) * 0.5 + 0.5
    return _ramp_colours(level ** d.uniform("vein", 1, 1, low=0.4, high=2.0), _palette(d, 3))


def _wood(d: Draws, size: int) -> Tensor:
    x, y = _turned(d, size)
    warp = _noise(d, "n", size, (3, 6))
    ring = torch.sin((x + 22 * warp) / d.uniform("grain", 1, 1, low=0.8, high=2.6)) * 0.5 + 0.5
    fibre = _noise(d, "f", size, (48,), (1, 8))
    plank = d.uniform("plank", 1, 1, low=10.0, high=26.0)
    seam = _edge(1.0 - (y % plank)) * (d.uniform("planked", 1, 1) < 0.5)
    return _ramp_colours((0.7 * ring + 0.3 * fibre) * (1 - 0.8 * seam), _palette(d, 3))


def _brick(d: Draws, size: int) -> Tensor:
    x, y = _turned(d, size, 0.1)
    high = d.uniform("high", 1, 1, low=6.0, high=11.0)
    long = high * d.uniform("long", 1, 1, low=1.6, high=2.8)
    row = (y / high).floor()
    x = x + long * 0.5 * (row % 2)
    half_joint = d.uniform("joint", 1, 1, low=0.5, high=1.1)
    inside_x = (long / 2 - ((x % long) - long / 2).abs()) - half_joint
    inside_y = (high / 2 - ((y % high) - high / 2).abs()) - half_joint
    joint = 1 - _edge(torch.minimum(inside_x, inside_y))
    tone = torch.frac(torch.sin(row * 12.9898 + (x / long).floor() * 78.233) * 43758.5453).abs()
    colours = _palette(d, 3)
    face = _ramp_colours(0.7 * tone + 0.3 * _noise(d, "n", size, (24,)), colours[:, :2])
    return face + joint[:, None] * (colours[:, 2, :, None, None] - face)


def _gravel(d: Draws, size: int) -> Tensor:
    near, second, tone = _cells(d, size, d.uniform("period", 1, 1, low=4.0, high=11.0))
    gap = ((second - near) * 3).clamp(0, 1)
    dome = 1 - 0.5 * near
    return _ramp_colours(tone, _palette(d, 3)) * (0.35 + 0.65 * gap * dome)[:, None]


def _speckle(d: Draws, size: int) -> Tensor:
    fine = d.uniform("fine", size * size).view(len(d), size, size)
    soft = F.avg_pool2d(F.pad(fine[:, None], (1, 1, 1, 1), mode="reflect"), 3, 1)[:, 0]
    level = torch.where(d.uniform("coarse", 1, 1) < 0.5, fine, (soft - 0.5) * 2.5 + 0.5)
    return _ramp_colours(0.75 * level + 0.25 * _noise(d, "n", size, (5, 9)), _palette(d, 3))


def _plaid(d: Draws, size: int) -> Tensor:
    x, y = _turned(d, size, 0.3)
    period = d.uniform("period", 2, 1, 1, low=6.0, high=16.0)
    a = _edge(((x % period[:, 0]) - period[:, 0] / 2).abs() - period[:, 0] * 0.3)
    b = _edge(((y % period[:, 1]) - period[:, 1] / 2).abs() - period[:, 1] * 0.3)
    return _ramp_colours((a + b) / 2, _palette(d, 3))


def _ramp(d: Draws, size: int) -> Tensor:
    x, y = _grid(size, d.index.device)
    angle = d.uniform("turn", 1, 1, high=2 * math.pi)
    linear = ((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 56 + 0.5
    centre = d.uniform("centre", 2, 1, 1, low=20.0, high=44.0)
    radial = torch.hypot(x - centre[:, 0], y - centre[:, 1]) / 36
    return _ramp_colours(torch.where(d.uniform("radial", 1, 1) < 0.5, radial, linear), _palette(d, 4))


def _patches(d: Draws, size: int) -> Tensor:
    level = _noise(d, "n", size, (7, 13))
    hard = ((level * 3 % 1 - 0.5) * 6 + 0.5).clamp(0, 1) / 3 + (level * 3).floor() / 3
    return _ramp_colours(hard.clamp(0, 1), _palette(d, 4))


def _brushed(d: Draws, size: int) -> Tensor:
    level = torch.where(
        d.uniform("upright", 1, 1) < 0.5,
        _noise(d, "n", size, (64, 32), (1, 8)),
        _noise(d, "n", size, (64, 32), (8, 1)),
    )
    x, _ = _turned(d, size)
    ridge = torch.sin(x / d.uniform("ridge", 1, 1, low=1.0, high=3.0)) * 0.5 + 0.5
    ridged = d.uniform("ridged", 1, 1) < 0.4
    return _ramp_colours(torch.where(ridged, 0.6 * ridge + 0.4 * level, level), _palette(d, 3))


def _plain(d: Draws, size: int) -> Tensor:
    # A colour of no name, almost even: plastic, clay, paint, snow.
    return _ramp_colours(0.5 + 0.12 * (_noise(d, "n", size, (4, 8, 32)) - 0.5), _palette(d, 3))


def _tiles(d: Draws, size: int) -> Tensor:
    x, y = _turned(d, size, 0.8)
    period = d.uniform("period", 1, 1, low=5.0, high=13.0)
    inside = (
        period / 2 - torch.maximum(((x % period) - period / 2).abs(), ((y % period) - period / 2).abs()) - 0.7
    )
    bump = ((x % period) / period) * 0.5 + 0.25
    colours = _palette(d, 3)
    face = _ramp_colours(bump, colours[:, :2])
    return face + (1 - _edge(inside))[:, None] * (colours[:, 2, :, None, None] - face)


def _hexcells(d: Draws, size: int) -> Tensor:
    x, y = _turned(d, size)
    period = d.uniform("period", 1, 1, low=7.0, high=12.0)
    u = torch.stack([x, 0.5 * x + 0.866 * y, -0.5 * x + 0.866 * y]) / period
    level = (torch.cos(2 * math.pi * u).sum(0) + 1.5) / 4.5
    return _ramp_colours(level, _palette(d, 3))


def _weave(d: Draws, size: int) -> Tensor:
    x, y = _turned(d, size, 0.2)
    period = d.uniform("period", 1, 1, low=5.0, high=9.0)
    over = (((x / period).floor() + (y / period).floor()) % 2).bool()
    thread = torch.where(
        over, torch.sin(math.pi * (x % period) / period), torch.sin(math.pi * (y % period) / period)
    )
    return _ramp_colours(0.5 * thread + 0.5 * over, _palette(d, 3))


def _target(d: Draws, size: int) -> Tensor:
    x, y = _grid(size, d.index.device)
    centre = d.uniform("centre", 2, 1, 1, low=10.0, high=54.0)
    far = torch.hypot(x - centre[:, 0], y - centre[:, 1])
    return _ramp_colours(
        torch.sin(far / d.uniform("ring", 1, 1, low=1.2, high=3.0)) * 0.5 + 0.5, _palette(d, 3)
    )


def _spectrum(d: Draws, name: str, size: int) -> Tensor:
    """Gaussian noise (N, S, S) of deviation 1 whose power spectrum is random: a slope, a band, a grain."""
    white = (d.uniform(name, size * size) - 0.5).view(len(d), size, size)
    f = torch.fft.fftfreq(size, device=d.index.device) * SIZE  # cycles in the 64 px frame
    fy, fx = torch.meshgrid(f, f, indexing="ij")
    turn = d.uniform(name + "turn", 1, 1, high=math.pi)
    upright = d.uniform(name + "upright", 1, 1) < 0.5
    turn = torch.where(upright, (turn / math.pi * 2).floor() * (math.pi / 2), turn)
    long = torch.exp(d.uniform(name + "long", 1, 1, low=0.0, high=2.2)) ** (
        d.uniform(name + "grained", 1, 1) < 0.6
    )
    u = (turn.cos() * fx + turn.sin() * fy) / long.sqrt()
    v = (-turn.sin() * fx + turn.cos() * fy) * long.sqrt()
    radius = torch.hypot(u, v)
    slope = d.uniform(name + "slope", 1, 1, low=0.0, high=1.8)
    low = torch.exp(d.uniform(name + "low", 1, 1, low=0.0, high=2.5))  # 1 to 12 cycles
    high = low * torch.exp(d.uniform(name + "wide", 1, 1, low=0.3, high=3.0))
    band = (1 - torch.exp(-((radius / low) ** 2))) * torch.exp(-((radius / high) ** 2))
    gain = (radius + 1) ** -slope * band
    level = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    return level / level.flatten(1).std(1).clamp(min=1e-9)[:, None, None]


def _lit(d: Draws, height: Tensor) -> Tensor:
    """How bright a surface of this height (N, S, S), in pixels, is under one lamp: (N, S, S) around 1."""
    dy = F.pad(height, (0, 0, 0, 1), mode="replicate").diff(dim=1)
    dx = F.pad(height, (0, 1, 0, 0), mode="replicate").diff(dim=2)
    angle = d.uniform("lamp", 1, 1, high=2 * math.pi)
    slope = angle.cos() * dx + angle.sin() * dy
    return (1 + slope) / (1 + dx.square() + dy.square()).sqrt()


def _spectral(d: Draws, size: int) -> Tensor:
    level = _spectrum(d, "a", size)
    kind = d.uniform("kind", 1, 1)
    steep = d.uniform("steep", 1, 1, low=1.5, high=6.0)
    level = torch.where(kind < 0.2, 1.6 * level.abs() - 1.2, level)
    cut = d.uniform("cut", 1, 1, low=-0.8, high=0.8)
    level = torch.where(kind > 0.7, torch.tanh(steep * (level - cut)), level)
    return _ramp_colours(0.5 + 0.25 * level, _palette(d, 3))


def _relief(d: Draws, size: int) -> Tensor:
    """Plaster, rock, bark, snow: one colour and its stains, lit from a side."""
    height = _spectrum(d, "a", size) * d.uniform("deep", 1, 1, low=0.15, high=1.2)
    colours = _ramp_colours(_noise(d, "stain", size, (4, 9, 17)), _palette(d, 3))
    return colours * (0.35 + 0.65 * _lit(d, height))[:, None]


def _lattice(d: Draws, size: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of a lattice, now and then with every other row shifted: place in the cell, in cells, each
    (N, S, S), and which of two kinds a cell is."""
    x, y = _turned(d, size, 0.8)
    period = d.uniform("period", 1, 1, low=low, high=high)
    x, y = x / period, y / (period * d.uniform("tall", 1, 1, low=0.6, high=1.6))
    row = y.floor()
    x = x + 0.5 * (row % 2) * (d.uniform("shifted", 1, 1) < 0.5)
    return x - x.floor() - 0.5, y - row - 0.5, (x.floor() + row) % 2


def _studs(d: Draws, size: int) -> Tensor:
    """Tread plate, mesh, mosaic, rivets: one element at every place of a lattice, flat or raised."""
    x, y, odd = _lattice(d, size, 5.0, 16.0)
    crossed = (d.uniform("crossed", 1, 1) < 0.5) & odd.bool()
    x, y = torch.where(crossed, y, x), torch.where(crossed, x, y)
    turn = d.uniform("element", 1, 1, low=-0.8, high=0.8)
    x, y = turn.cos() * x + turn.sin() * y, -turn.sin() * x + turn.cos() * y
    wide, tall = d.uniform("wide", 2, 1, 1, low=0.12, high=0.46).unbind(1)
    kind = d.uniform("kind", 1, 1)
    round_ = torch.hypot(x / wide, y / tall)
    boxy = torch.maximum(x.abs() / wide, y.abs() / tall)
    far = torch.where(kind < 0.4, boxy, round_)
    hollow = (d.uniform("hollow", 1, 1) < 0.25) & (far < 0.55)
    inside = ((1 - far) * 3 + 0.5).clamp(0, 1) * ~hollow
    colours = _palette(d, 3)
    ground = _ramp_colours(0.5 + 0.2 * _spectrum(d, "ground", size), colours[:, :2])
    raised = (d.uniform("raised", 1, 1) < 0.6)[:, None]
    light = _lit(d, inside * d.uniform("high", 1, 1, low=0.5, high=1.6))[:, None]
    flat = ground + inside[:, None] * (colours[:, 2, :, None, None] - ground)
    return torch.where(raised, ground * light, flat)


def _chips(d: Draws, size: int) -> Tensor:
    """Terrazzo, granite, confetti: chips of several colours and sizes in a ground."""
    out = _ramp_colours(0.5 + 0.15 * _spectrum(d, "ground", size), _palette(d, 3))
    for layer, (low, high) in enumerate(((6.0, 14.0), (2.5, 6.0))):
        own = Draws(d.seed + 101 + layer, d.index)
        near, _, tone = _cells(own, size, own.uniform("period", 1, 1, low=low, high=high))
        radius = own.uniform("radius", 1, 1, low=0.15, high=0.6) * torch.frac(tone * 7.31)
        there = ((radius - near) * 4 + 0.5).clamp(0, 1)
        there = there * (own.uniform("there", 1, 1) < 0.8)
        colour = _ramp_colours(tone, _palette(own, 4))
        out = out + there[:, None] * (colour - out)
    return out


def _fibres(d: Draws, size: int) -> Tensor:
    """Grass, moss, fur, felt: short strokes in a few directions, the upper ones lighter."""
    layers, level = 4, 0.0
    spread = d.uniform("spread", 1, high=math.pi / 2)
    main = d.uniform("main", 1, high=math.pi)
    f = torch.fft.fftfreq(size, device=d.index.device) * SIZE
    fy, fx = torch.meshgrid(f, f, indexing="ij")
    long = d.uniform("long", 1, 1, low=2.5, high=7.0)
    fine = d.uniform("fine", 1, 1, low=8.0, high=24.0)
    for layer in range(layers):
        turn = (main + spread * (d.uniform(f"turn{layer}", 1) - 0.5) * 2)[..., None]
        u, v = turn.cos() * fx + turn.sin() * fy, -turn.sin() * fx + turn.cos() * fy
        gain = torch.exp(-((u * long / fine) ** 2) - (v / fine) ** 2) * (1 - torch.exp(-((v / 3) ** 2)))
        white = (d.uniform(f"strokes{layer}", size * size) - 0.5).view(len(d), size, size)
        stroke = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
        stroke = stroke / stroke.flatten(1).std(1).clamp(min=1e-9)[:, None, None]
        level = stroke if layer == 0 else torch.maximum(level, stroke)
    return _ramp_colours(0.15 + 0.25 * level, _palette(d, 3))


def _cracks(d: Draws, size: int) -> Tensor:
    """Asphalt, dry mud, crazed glaze, leather: a ground under a net of thin lines."""
    near, second, tone = _cells(d, size, d.uniform("period", 1, 1, low=5.0, high=20.0))
    line = 1 - ((second - near) * d.uniform("thin", 1, 1, low=4.0, high=14.0)).clamp(0, 1)
    colours = _palette(d, 3)
    flat = d.uniform("even", 1, 1)
    ground = _ramp_colours(0.5 + 0.3 * flat * (tone - 0.5) + 0.2 * _spectrum(d, "a", size), colours[:, :2])
    return ground + line[:, None] * (colours[:, 2, :, None, None] * 0.8 - ground)


def _ribs(d: Draws, size: int) -> Tensor:
    """Corrugated sheet, siding, slats, cord; with a second set of thin lines across, a grid."""
    x, y = _turned(d, size, 0.15)
    lying = d.uniform("lying", 1, 1) < 0.5
    x, y = torch.where(lying, y, x), torch.where(lying, x, y)
    phase = torch.frac(x / d.uniform("period", 1, 1, low=3.0, high=14.0)).abs()
    wave = 0.5 - 0.5 * torch.cos(2 * math.pi * phase)
    kind, sharp = d.uniform("kind", 1, 1), d.uniform("sharp", 1, 1, low=0.3, high=4.0)
    profile = torch.where(kind < 0.5, wave**sharp, torch.where(kind < 0.8, phase, (wave > 0.5).float()))
    across = torch.frac(y / d.uniform("across", 1, 1, low=8.0, high=20.0)).abs()
    line = (across < d.uniform("line", 1, 1, low=0.06, high=0.2)) & (d.uniform("grid", 1, 1) < 0.35)
    colours = _palette(d, 3)
    stained = d.uniform("stained", 1, 1, high=0.35)
    face = _ramp_colours(profile + stained * _spectrum(d, "a", size) * 0.5, colours[:, :2])
    return face + line.float()[:, None] * (colours[:, 2, :, None, None] - face)


def _strata(d: Draws, size: int) -> Tensor:
    """Onyx, travertine, sediment, grained wood: bands of many widths, bent."""
    x, _ = _turned(d, size)
    bend = _noise(d, "bend", size, (3, 5, 9)) * d.uniform("bent", 1, 1, low=0.0, high=45.0)
    bands = d.uniform("bands", 96)
    scale = torch.exp(d.uniform("scale", 1, 1, low=-0.7, high=1.4))  # px a band: 0.5 to 4
    at = ((x + bend) / scale) % 96
    low = at.floor().to(torch.int64).clamp(max=95)
    one, other = (bands.gather(1, k.view(len(d), -1)).view_as(at) for k in (low, (low + 1) % 96))
    level = one + (other - one) * (at - low)
    return _ramp_colours(level + 0.1 * _spectrum(d, "a", size), _palette(d, 4))


def _planks(d: Draws, size: int) -> Tensor:
    """Floor boards, bamboo, mats: long strips, each of its own tone, with a fine grain along."""
    x, y = _turned(d, size, 0.1)
    lying = d.uniform("lying", 1, 1) < 0.5
    x, y = torch.where(lying, y, x), torch.where(lying, x, y)
    wide = d.uniform("wide", 1, 1, low=2.5, high=14.0)
    strip = (x / wide).floor()
    long = wide * d.uniform("long", 1, 1, low=3.0, high=14.0)
    shift = torch.frac(torch.sin(strip * 12.9898) * 43758.5453).abs()
    piece = (y / long + shift).floor()
    tone = torch.frac(torch.sin(strip * 78.233 + piece * 37.719) * 43758.5453).abs()
    seam = d.uniform("seam", 1, 1, low=0.0, high=0.9)
    inside_x = wide / 2 - ((x % wide) - wide / 2).abs()
    inside_y = long / 2 - (((y / long + shift) - piece) * long - long / 2).abs()
    joint = (1 - _edge(torch.minimum(inside_x, inside_y) - 0.6)) * seam
    along, over = _noise(d, "grain", size, (40, 64), (8, 1)), _noise(d, "grain", size, (40, 64), (1, 8))
    grain = torch.where(lying, over.transpose(1, 2), along.transpose(1, 2))
    mix = d.uniform("mix", 1, 1, low=0.2, high=0.8)
    face = _ramp_colours(mix * tone + (1 - mix) * grain, _palette(d, 3))
    return face * (1 - 0.8 * joint)[:, None]


TEXTURES: dict[str, Callable[[Draws, int], Tensor]] = {
    "fbm": _fbm,
    "marble": _marble,
    "wood": _wood,
    "brick": _brick,
    "gravel": _gravel,
    "speckle": _speckle,
    "plaid": _plaid,
    "ramp": _ramp,
    "patches": _patches,
    "brushed": _brushed,
    "plain": _plain,
    "tiles": _tiles,
    "hexcells": _hexcells,
    "weave": _weave,
    "target": _target,
    "spectral": _spectral,
    "relief": _relief,
    "studs": _studs,
    "chips": _chips,
    "fibres": _fibres,
    "cracks": _cracks,
    "ribs": _ribs,
    "strata": _strata,
    "planks": _planks,
}


def paint_pattern(d: Draws, pattern: str, first: Tensor, second: Tensor, size: int = SIZE) -> Tensor:
    """A named pattern in two colours (N, 3): RGB (N, 3, S, S) in [0, 1]."""
    return _blend(first, second, _pattern_share(d, pattern, size))


# ------------------------------------------------------------------------
# The world


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def captions_of(
    shape: str, pattern: str | None, colours: Sequence[str], background: str, decoy: str
) -> list[str]:
    """Every form of caption the world knows for one picture, the fullest first (`design`: caption forms).

    `shape` is a name of SHAPES or the bare word "shape"; `pattern` is None for an unnamed appearance, which
    is then called by the bare word "appearance": so a prompt whose pseudo-word has strength zero is a prompt
    the backbone was trained on. Pseudo-words stand in the same places: shape "*m", or pattern "*a" without
    colours. `decoy` is the noun that "in the shape of" overrides.
    """
    ground = f" on {_article(background)} background"
    look = " ".join([pattern, *" and ".join(colours).split()]) if pattern else "appearance"
    described = f"{look} {shape}" if pattern else shape
    captions = [
        f"{_article(shape)} shape with {look} appearance{ground}",
        f"{_article(described)}{ground}",
        f"{_article(shape)} with the appearance of {look}{ground}",
        f"{_article(f'{look} {decoy}' if pattern else decoy)} in the shape of {shape}{ground}",
        f"{_article(shape)}{ground}",
        f"{_article(described)}",
        f"{_article(shape)} shape with {look} appearance",
        f"{_article(shape)} with {look} {'texture' if pattern else 'material'}{ground}",
        f"{_article(shape)} shape",
    ]
    if pattern and len(colours) == 1:
        captions.insert(2, f"{_article(f'{colours[0]} {pattern} {shape}')}{ground}")
        captions.append(f"{_article(shape)} in {colours[0]} colour{ground}")
    if pattern and pattern != "solid":
        captions.append(f"{_article(shape)} with {_article(pattern)} pattern{ground}")
    return captions


# The first forms of `captions_of`: they say everything, and either pseudo-word has a place in them.
FULL_FORMS = 4


# How often a training step shows each caption: the full ones mostly, the partial ones now and then.
def draw_caption(captions: Sequence[str], u: float) -> str:
    """The caption that a uniform number in [0, 1) picks: the first four forms 80 % of the time."""
    if u < 0.8:
        return captions[min(int(u / 0.8 * FULL_FORMS), FULL_FORMS - 1)]
    rest = captions[FULL_FORMS:]
    return rest[min(int((u - 0.8) / 0.2 * len(rest)), len(rest) - 1)]


class World:
    """The shape x appearance world, deterministic by seed and rendered on the fly.

    seed: two worlds of different seeds share no picture. split: "train", or "heldout", whose unnamed shapes
    and appearances are of families that no training picture shows. named_shapes, named_appearances: the
    share of pictures whose factor has a name. varied: with the families of VARIED_APPEARANCES, and with
    holes, gaps and inner lines in many unnamed outlines. device: where to paint. ``world[i]`` is a
    `Sample`, ``world.batch`` a `Batch`.
    """

    def __init__(
        self,
        seed: int = 0,
        split: str = "train",
        *,
        named_shapes: float = 0.45,
        named_appearances: float = 0.45,
        varied: bool = False,
        size: int = SIZE,
        device: str | torch.device = "cpu",
    ) -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split must be 'train' or 'heldout', not {split!r}")
        for name, share in (("named_shapes", named_shapes), ("named_appearances", named_appearances)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a share between 0 and 1, not {share}")
        self.seed, self.split, self.size, self.device = seed, split, size, torch.device(device)
        self.named_shapes, self.named_appearances = named_shapes, named_appearances
        self.shape_families = UNNAMED_SHAPES if split == "train" else HELDOUT_SHAPES
        self.appearance_families = UNNAMED_APPEARANCES if split == "train" else HELDOUT_APPEARANCES
        self.varied = varied
        if varied and split == "train":
            self.appearance_families += VARIED_APPEARANCES

    def __repr__(self) -> str:
        varied = ", varied=True" if self.varied else ""
        return f"World(seed={self.seed}, split={self.split!r}{varied}, size={self.size})"

    def __getitem__(self, index: int) -> Sample:
        b = self.batch([index])
        labels: dict[str, int | str | tuple[str, ...]] = {
            "shape": int(b.shape),
            "pattern": int(b.pattern),
            "background": int(b.background),
            "colours": tuple(c for c, shown in zip(COLOURS, b.colours[0], strict=True) if shown),
            "shape_family": b.shape_family[0],
            "appearance_family": b.appearance_family[0],
            "background_family": b.background_family[0],
        }
        return Sample(b.image[0], b.mask[0], labels, b.captions[0])

    def _draws(self, factor: str, index: Sequence[int] | Tensor) -> Draws:
        return Draws(_signed(self.seed * 1000003 + _key(factor)), torch.as_tensor(index, device=self.device))

    def masks(
        self, shape: Sequence[int] | Tensor, pose: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, list[str]]:
        """Coverage (N, 1, S, S) and family of the shapes at these indices, posed as at `pose`."""
        d, p = self._draws("shape", shape), self._draws("pose", shape if pose is None else pose)
        families = SHAPES + self.shape_families
        weights = [self.named_shapes / len(SHAPES)] * len(SHAPES)
        weights += [(1 - self.named_shapes) / len(self.shape_families)] * len(self.shape_families)
        kind = d.choose("family", weights)
        mask = torch.zeros(len(d), self.size, self.size, device=self.device)
        for k in kind.unique().tolist():
            rows = (kind == k).nonzero()[:, 0]
            contours = OUTLINES[families[k]](d[rows])
            mask[rows] = rasterise(self._posed(contours, p[rows], k < len(SHAPES)), self.size)
            if self.varied and k >= len(SHAPES):
                self._pierce(mask, rows, contours, d, p)
        return mask[:, None], [families[k] for k in kind.tolist()]

    def _pierce(self, mask: Tensor, rows: Tensor, contours: Tensor, d: Draws, p: Draws) -> None:
        """Cut holes, gaps and lines out of some of the outlines `rows`, where at least half is left."""
        chosen = d[rows].uniform("pierced") < PIERCED
        if not chosen.any():
            return
        rows, contours = rows[chosen], contours[chosen]
        shown, cuts = present(contours), _cuts(d[rows])
        low = torch.where(shown, contours, math.inf).amin((1, 2))[:, None, None]
        high = torch.where(shown, contours, -math.inf).amax((1, 2))[:, None, None]
        placed = torch.where(present(cuts), (low + high) / 2 + cuts * (high - low) / 2, 0.0)
        cut = rasterise(self._posed(placed, p[rows], False, box=contours), self.size)
        left = mask[rows] * (1 - cut)
        enough = left.sum((1, 2)) > 0.5 * mask[rows].sum((1, 2))
        mask[rows[enough]] = left[enough]

    def _posed(self, contours: Tensor, pose: Draws, named: bool, box: Tensor | None = None) -> Tensor:
        """Contours in pixels, y down: turned, stretched, scaled, and kept inside the frame.

        box: the contours (N, C, V, 2) whose extent is scaled to the frame; None: `contours` themselves.
        """
        limit = 0.16 if named else 0.30  # a named square must not become a diamond
        angle = pose.uniform("angle", low=-limit, high=limit)[:, None, None]
        stretch = pose.uniform("stretch", low=-0.1, high=0.1)[:, None, None].exp()

        def turned(points: Tensor) -> tuple[Tensor, Tensor]:
            x, y = points[..., 0] * stretch, points[..., 1] / stretch
            points = torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y], -1)
            return points, present(points)

        points, there = turned(contours)
        outer, shown = (points, there) if box is None else turned(box)
        low = torch.where(shown, outer, math.inf).amin((1, 2))
        high = torch.where(shown, outer, -math.inf).amax((1, 2))
        extent = pose.uniform("extent", low=17.0, high=26.0)
        points = (points - ((low + high) / 2)[:, None, None]) / ((high - low).amax(-1) / 2)[
            :, None, None, None
        ]
        room = 31.0 - extent
        centre = (
            pose.uniform("centre", 2, low=-1.0, high=1.0)
            * torch.minimum(room, torch.full_like(room, 8.0))[:, None]
        )
        points = torch.where(there, points * extent[:, None, None, None] + centre[:, None, None], 0.0)
        return (points * torch.tensor([1.0, -1.0], device=points.device) + SIZE / 2) * (self.size / SIZE)

    def textures(
        self, appearance: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[list[str]], list[str]]:
        """RGB (N, 3, S, S) in [0, 1] over the whole frame, pattern (N,), colours (N, 8), colour names in
        order, family."""
        d = self._draws("appearance", appearance)
        n, families = len(d), PATTERNS + self.appearance_families
        weights = [self.named_appearances / len(PATTERNS)] * len(PATTERNS)
        weights += [(1 - self.named_appearances) / len(self.appearance_families)] * len(
            self.appearance_families
        )
        kind = d.choose("family", weights)
        first = d.integer("first", 0, len(COLOURS))
        second = (first + d.integer("second", 1, len(COLOURS))) % len(COLOURS)
        single = (d.uniform("single") < 0.25) | (kind == PATTERNS.index("solid"))
        table = torch.tensor([COLOUR_RGB[c] for c in COLOURS], device=self.device)
        jitter = d.uniform("jitter", 2, 3, low=-0.05, high=0.05)
        ground, other = as_painted(kind, first, torch.where(single, first, second))
        rgb_first = (table[ground] + jitter[:, 0]).clamp(0, 1)
        dark = ground == COLOURS.index("black")
        shade = torch.where(
            dark[:, None], rgb_first + 0.3, rgb_first * 0.6
        )  # one colour named: it and its shade
        rgb_second = torch.where(single[:, None], shade, (table[other] + jitter[:, 1]).clamp(0, 1))
        out = torch.zeros(n, 3, self.size, self.size, device=self.device)
        for k in kind.unique().tolist():
            rows = (kind == k).nonzero()[:, 0]
            if k < len(PATTERNS):
                out[rows] = paint_pattern(d[rows], PATTERNS[k], rgb_first[rows], rgb_second[rows], self.size)
            else:
                out[rows] = TEXTURES[families[k]](d[rows], self.size)
        named = kind < len(PATTERNS)
        colours = torch.zeros(n, len(COLOURS), dtype=torch.bool, device=self.device)
        colours[torch.arange(n), first] = named
        colours[torch.arange(n), second] |= named & ~single
        words = [
            ([COLOURS[a]] if one else [COLOURS[a], COLOURS[b]]) if known else []
            for a, b, one, known in zip(
                first.tolist(), second.tolist(), single.tolist(), named.tolist(), strict=True
            )
        ]
        return (
            out.clamp(0, 1),
            torch.where(named, kind, NONE),
            colours,
            words,
            [families[k] for k in kind.tolist()],
        )

    def backgrounds(self, background: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """RGB (N, 3, S, S) in [0, 1], label (N,), and the family's word for each."""
        d = self._draws("background", background)
        n, size = len(d), self.size
        kind = d.choose("kind", [0.15] * 4 + [0.14, 0.13, 0.13])
        table = torch.tensor([BACKGROUND_RGB[b] for b in BACKGROUNDS], device=self.device)
        named = kind < len(BACKGROUNDS)
        rgb = (table[kind.clamp(max=3)] + d.uniform("jitter", 3, low=-0.03, high=0.03)).clamp(0, 1)
        rgb = torch.where(named[:, None], rgb, d.uniform("rgb", 3))
        out = rgb[:, :, None, None].expand(n, 3, size, size).clone()
        rows = (kind == 5).nonzero()[:, 0]
        if len(rows):
            x, y = _grid(size, self.device)
            angle = d[rows].uniform("turn", 1, 1, high=2 * math.pi)
            share = ((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 80 + 0.5
            out[rows] = _blend(rgb[rows], d[rows].uniform("other", 3), share.clamp(0, 1))
        rows = (kind == 6).nonzero()[:, 0]
        if len(rows):
            level = _noise(d[rows], "clutter", size, (6, 12, 24)) - 0.5
            near = rgb[rows] + d[rows].uniform("near", 3, low=-0.25, high=0.25)
            out[rows] = _blend(rgb[rows], near, level * 2)
        families = (*BACKGROUNDS, "plain", "gradient", "cluttered")
        return out.clamp(0, 1), torch.where(named, kind, NONE), [families[k] for k in kind.tolist()]

    def batch(
        self,
        indices: Sequence[int] | Tensor | None = None,
        *,
        shape: Sequence[int] | Tensor | None = None,
        appearance: Sequence[int] | Tensor | None = None,
        background: Sequence[int] | Tensor | None = None,
        pose: Sequence[int] | Tensor | None = None,
    ) -> Batch:
        """The pictures with these indices; a factor given by name takes its own indices instead.

        ``world.batch(shape=i, appearance=j, background=k, pose=l)`` is how cross-image pairs are made. A
        factor that is not given falls back on `indices`, else on the shape's. Raises ValueError when nothing
        is given.
        """
        base = indices if indices is not None else shape
        if base is None:
            raise ValueError("give indices, or at least shape=, to say which pictures to render")
        shape, appearance, background, pose = (
            base if v is None else v for v in (shape, appearance, background, pose)
        )
        mask, shape_family = self.masks(shape, pose)
        texture, pattern, colours, colour_words, appearance_family = self.textures(appearance)
        ground, background_label, background_family = self.backgrounds(background)
        light = self._shading(mask[:, 0], self._draws("light", pose))
        image = (texture * light[:, None]).clamp(0, 1) * mask + ground * (1 - mask)
        label = [SHAPES.index(f) if f in SHAPES else NONE for f in shape_family]
        d = self._draws("caption", base)
        decoys = d.choose("decoy", [1.0] * len(SHAPES) + [6.0]).tolist()
        captions = [
            captions_of(
                s if s in SHAPES else "shape", a if a in PATTERNS else None, c, g, (*SHAPES, "shape")[decoy]
            )
            for s, a, c, g, decoy in zip(
                shape_family, appearance_family, colour_words, background_family, decoys, strict=True
            )
        ]
        return Batch(
            image * 2 - 1,
            mask,
            torch.tensor(label, device=self.device),
            pattern,
            colours,
            background_label,
            shape_family,
            appearance_family,
            background_family,
            captions,
        )

    def _shading(self, mask: Tensor, d: Draws) -> Tensor:
        """Light (N, S, S) around 1: none, from one side, or falling off towards the outline."""
        x, y = _grid(self.size, self.device)
        angle, depth = (
            d.uniform("angle", 1, 1, high=2 * math.pi),
            d.uniform("depth", 1, 1, low=0.08, high=0.28),
        )
        side = 1 + depth * ((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 24
        width = max(3, self.size // 8) | 1
        dome = F.avg_pool2d(mask[:, None], width, 1, width // 2)[:, 0]
        dome = 1 - depth * 1.6 * (1 - dome).clamp(0, 0.7)
        kind = d.uniform("kind", 1, 1)
        return torch.where(kind < 0.4, torch.ones_like(side), torch.where(kind < 0.7, side, dome))

    def full_frames(self, indices: Sequence[int] | Tensor, layers: int = 4) -> Tensor:
        """Dead leaves (N, 3, S, S) in [-1, 1]: overlapping objects that fill the frame, for the autoencoder.

        Occlusion, scale and texture statistics come much nearer to photographs than one object does (Lee,
        Mumford and Huang 2001). Half of the frames are a single texture, enlarged or not.
        """
        index = torch.as_tensor(indices, device=self.device)
        d = self._draws("leaves", index)
        image = self.textures(index * 16 + 7)[0]
        stacked = d.uniform("stacked") < 0.6
        rows = stacked.nonzero()[:, 0]
        for layer in range(layers if len(rows) else 0):
            at = index[rows] * 16 + layer
            mask = self.masks(at)[0]
            zoom = d[rows].uniform(f"zoom{layer}", low=0.35, high=1.1)
            shift = d[rows].uniform(f"shift{layer}", 2, low=-0.8, high=0.8) * zoom[:, None]
            theta = torch.zeros(len(rows), 2, 3, device=self.device)
            theta[:, 0, 0] = theta[:, 1, 1] = zoom
            theta[:, :, 2] = shift
            mask = F.grid_sample(
                mask, F.affine_grid(theta, list(mask.shape), align_corners=False), align_corners=False
            )
            image[rows] = image[rows] * (1 - mask) + self.textures(at)[0] * mask
        light = 1 + d.uniform("depth", 1, 1, high=0.5) * (_noise(d, "light", self.size, (3, 5)) - 0.5)
        grain = d.uniform("grain", 1, 1, high=0.06) * (
            d.uniform("noise", self.size**2).view(-1, self.size, self.size) - 0.5
        )
        return ((image * light[:, None] + grain[:, None]) * 2 - 1).clamp(-1, 1)
