"""The unnamed materials of the world, family by family."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .names import SIZE
from .patterns import cell_grid, edge, palette, pixel_grid, ramp_colours, smooth_noise, turned_grid
from .random import CounterRNG


def _fbm(d: CounterRNG, size: int) -> Tensor:
    level = smooth_noise(d, "n", size, (5, 9, 17, 33))
    return ramp_colours(level, palette(d, 3))


def _marble(d: CounterRNG, size: int) -> Tensor:
    x, _ = turned_grid(d, size)
    turbulence = smooth_noise(d, "n", size, (4, 8, 16, 32))
    level = torch.sin(x / d.uniform("wave", 1, 1, low=3.0, high=9.0) + 9 * turbulence) * 0.5 + 0.5
    return ramp_colours(level ** d.uniform("vein", 1, 1, low=0.4, high=2.0), palette(d, 3))


def _wood(d: CounterRNG, size: int) -> Tensor:
    x, y = turned_grid(d, size)
    warp = smooth_noise(d, "n", size, (3, 6))
    ring = torch.sin((x + 22 * warp) / d.uniform("grain", 1, 1, low=0.8, high=2.6)) * 0.5 + 0.5
    fibre = smooth_noise(d, "f", size, (48,), (1, 8))
    plank = d.uniform("plank", 1, 1, low=10.0, high=26.0)
    seam = edge(1.0 - (y % plank)) * (d.uniform("planked", 1, 1) < 0.5)
    return ramp_colours((0.7 * ring + 0.3 * fibre) * (1 - 0.8 * seam), palette(d, 3))


def _brick(d: CounterRNG, size: int) -> Tensor:
    x, y = turned_grid(d, size, 0.1)
    high = d.uniform("high", 1, 1, low=6.0, high=11.0)
    long = high * d.uniform("long", 1, 1, low=1.6, high=2.8)
    row = (y / high).floor()
    x = x + long * 0.5 * (row % 2)
    half_joint = d.uniform("joint", 1, 1, low=0.5, high=1.1)
    inside_x = (long / 2 - ((x % long) - long / 2).abs()) - half_joint
    inside_y = (high / 2 - ((y % high) - high / 2).abs()) - half_joint
    joint = 1 - edge(torch.minimum(inside_x, inside_y))
    tone = torch.frac(torch.sin(row * 12.9898 + (x / long).floor() * 78.233) * 43758.5453).abs()
    colours = palette(d, 3)
    face = ramp_colours(0.7 * tone + 0.3 * smooth_noise(d, "n", size, (24,)), colours[:, :2])
    return face + joint[:, None] * (colours[:, 2, :, None, None] - face)


def _gravel(d: CounterRNG, size: int) -> Tensor:
    near, second, tone = cell_grid(d, size, d.uniform("period", 1, 1, low=4.0, high=11.0))
    gap = ((second - near) * 3).clamp(0, 1)
    dome = 1 - 0.5 * near
    return ramp_colours(tone, palette(d, 3)) * (0.35 + 0.65 * gap * dome)[:, None]


def _speckle(d: CounterRNG, size: int) -> Tensor:
    fine = d.uniform("fine", size * size).view(len(d), size, size)
    soft = F.avg_pool2d(F.pad(fine[:, None], (1, 1, 1, 1), mode="reflect"), 3, 1)[:, 0]
    level = torch.where(d.uniform("coarse", 1, 1) < 0.5, fine, (soft - 0.5) * 2.5 + 0.5)
    return ramp_colours(0.75 * level + 0.25 * smooth_noise(d, "n", size, (5, 9)), palette(d, 3))


def _plaid(d: CounterRNG, size: int) -> Tensor:
    x, y = turned_grid(d, size, 0.3)
    period = d.uniform("period", 2, 1, 1, low=6.0, high=16.0)
    a = edge(((x % period[:, 0]) - period[:, 0] / 2).abs() - period[:, 0] * 0.3)
    b = edge(((y % period[:, 1]) - period[:, 1] / 2).abs() - period[:, 1] * 0.3)
    return ramp_colours((a + b) / 2, palette(d, 3))


def _ramp(d: CounterRNG, size: int) -> Tensor:
    x, y = pixel_grid(size, d.index.device)
    angle = d.uniform("turn", 1, 1, high=2 * math.pi)
    linear = ((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 56 + 0.5
    centre = d.uniform("centre", 2, 1, 1, low=20.0, high=44.0)
    radial = torch.hypot(x - centre[:, 0], y - centre[:, 1]) / 36
    return ramp_colours(torch.where(d.uniform("radial", 1, 1) < 0.5, radial, linear), palette(d, 4))


def _patches(d: CounterRNG, size: int) -> Tensor:
    level = smooth_noise(d, "n", size, (7, 13))
    hard = ((level * 3 % 1 - 0.5) * 6 + 0.5).clamp(0, 1) / 3 + (level * 3).floor() / 3
    return ramp_colours(hard.clamp(0, 1), palette(d, 4))


def _brushed(d: CounterRNG, size: int) -> Tensor:
    level = torch.where(
        d.uniform("upright", 1, 1) < 0.5,
        smooth_noise(d, "n", size, (64, 32), (1, 8)),
        smooth_noise(d, "n", size, (64, 32), (8, 1)),
    )
    x, _ = turned_grid(d, size)
    ridge = torch.sin(x / d.uniform("ridge", 1, 1, low=1.0, high=3.0)) * 0.5 + 0.5
    ridged = d.uniform("ridged", 1, 1) < 0.4
    return ramp_colours(torch.where(ridged, 0.6 * ridge + 0.4 * level, level), palette(d, 3))


def _plain(d: CounterRNG, size: int) -> Tensor:
    # An almost even colour without a name: plastic, clay, paint, snow.
    return ramp_colours(0.5 + 0.12 * (smooth_noise(d, "n", size, (4, 8, 32)) - 0.5), palette(d, 3))


def _tiles(d: CounterRNG, size: int) -> Tensor:
    x, y = turned_grid(d, size, 0.8)
    period = d.uniform("period", 1, 1, low=5.0, high=13.0)
    inside = (
        period / 2 - torch.maximum(((x % period) - period / 2).abs(), ((y % period) - period / 2).abs()) - 0.7
    )
    bump = ((x % period) / period) * 0.5 + 0.25
    colours = palette(d, 3)
    face = ramp_colours(bump, colours[:, :2])
    return face + (1 - edge(inside))[:, None] * (colours[:, 2, :, None, None] - face)


def _hexcells(d: CounterRNG, size: int) -> Tensor:
    x, y = turned_grid(d, size)
    period = d.uniform("period", 1, 1, low=7.0, high=12.0)
    u = torch.stack([x, 0.5 * x + 0.866 * y, -0.5 * x + 0.866 * y]) / period
    level = (torch.cos(2 * math.pi * u).sum(0) + 1.5) / 4.5
    return ramp_colours(level, palette(d, 3))


def _weave(d: CounterRNG, size: int) -> Tensor:
    x, y = turned_grid(d, size, 0.2)
    period = d.uniform("period", 1, 1, low=5.0, high=9.0)
    over = (((x / period).floor() + (y / period).floor()) % 2).bool()
    thread = torch.where(
        over, torch.sin(math.pi * (x % period) / period), torch.sin(math.pi * (y % period) / period)
    )
    return ramp_colours(0.5 * thread + 0.5 * over, palette(d, 3))


def _target(d: CounterRNG, size: int) -> Tensor:
    x, y = pixel_grid(size, d.index.device)
    centre = d.uniform("centre", 2, 1, 1, low=10.0, high=54.0)
    far = torch.hypot(x - centre[:, 0], y - centre[:, 1])
    return ramp_colours(
        torch.sin(far / d.uniform("ring", 1, 1, low=1.2, high=3.0)) * 0.5 + 0.5, palette(d, 3)
    )


def _spectrum(d: CounterRNG, name: str, size: int) -> Tensor:
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


def _lit(d: CounterRNG, height: Tensor) -> Tensor:
    """Brightness (N, S, S), around 1, of a surface of this height (N, S, S), in pixels, under one lamp."""
    dy = F.pad(height, (0, 0, 0, 1), mode="replicate").diff(dim=1)
    dx = F.pad(height, (0, 1, 0, 0), mode="replicate").diff(dim=2)
    angle = d.uniform("lamp", 1, 1, high=2 * math.pi)
    slope = angle.cos() * dx + angle.sin() * dy
    return (1 + slope) / (1 + dx.square() + dy.square()).sqrt()


def _spectral(d: CounterRNG, size: int) -> Tensor:
    level = _spectrum(d, "a", size)
    kind = d.uniform("kind", 1, 1)
    steep = d.uniform("steep", 1, 1, low=1.5, high=6.0)
    level = torch.where(kind < 0.2, 1.6 * level.abs() - 1.2, level)
    cut = d.uniform("cut", 1, 1, low=-0.8, high=0.8)
    level = torch.where(kind > 0.7, torch.tanh(steep * (level - cut)), level)
    return ramp_colours(0.5 + 0.25 * level, palette(d, 3))


def _relief(d: CounterRNG, size: int) -> Tensor:
    """Plaster, rock, bark, snow: one colour and its stains, lit from a side."""
    height = _spectrum(d, "a", size) * d.uniform("deep", 1, 1, low=0.15, high=1.2)
    colours = ramp_colours(smooth_noise(d, "stain", size, (4, 9, 17)), palette(d, 3))
    return colours * (0.35 + 0.65 * _lit(d, height))[:, None]


def _lattice(d: CounterRNG, size: int, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """A lattice, in half of the images with every other row shifted: x and y within the cell, and its parity.

    Each (N, S, S); x and y in units of the cell, from -0.5 to 0.5.
    """
    x, y = turned_grid(d, size, 0.8)
    period = d.uniform("period", 1, 1, low=low, high=high)
    x, y = x / period, y / (period * d.uniform("tall", 1, 1, low=0.6, high=1.6))
    row = y.floor()
    x = x + 0.5 * (row % 2) * (d.uniform("shifted", 1, 1) < 0.5)
    return x - x.floor() - 0.5, y - row - 0.5, (x.floor() + row) % 2


def _studs(d: CounterRNG, size: int) -> Tensor:
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
    colours = palette(d, 3)
    ground = ramp_colours(0.5 + 0.2 * _spectrum(d, "ground", size), colours[:, :2])
    raised = (d.uniform("raised", 1, 1) < 0.6)[:, None]
    light = _lit(d, inside * d.uniform("high", 1, 1, low=0.5, high=1.6))[:, None]
    flat = ground + inside[:, None] * (colours[:, 2, :, None, None] - ground)
    return torch.where(raised, ground * light, flat)


def _chips(d: CounterRNG, size: int) -> Tensor:
    """Terrazzo, granite, confetti: chips of several colours and sizes in a ground."""
    out = ramp_colours(0.5 + 0.15 * _spectrum(d, "ground", size), palette(d, 3))
    for layer, (low, high) in enumerate(((6.0, 14.0), (2.5, 6.0))):
        own = CounterRNG(d.seed + 101 + layer, d.index)
        near, _, tone = cell_grid(own, size, own.uniform("period", 1, 1, low=low, high=high))
        radius = own.uniform("radius", 1, 1, low=0.15, high=0.6) * torch.frac(tone * 7.31)
        there = ((radius - near) * 4 + 0.5).clamp(0, 1)
        there = there * (own.uniform("there", 1, 1) < 0.8)
        colour = ramp_colours(tone, palette(own, 4))
        out = out + there[:, None] * (colour - out)
    return out


def _fibres(d: CounterRNG, size: int) -> Tensor:
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
    return ramp_colours(0.15 + 0.25 * level, palette(d, 3))


def _cracks(d: CounterRNG, size: int) -> Tensor:
    """Asphalt, dry mud, crazed glaze, leather: a ground under a net of thin lines."""
    near, second, tone = cell_grid(d, size, d.uniform("period", 1, 1, low=5.0, high=20.0))
    line = 1 - ((second - near) * d.uniform("thin", 1, 1, low=4.0, high=14.0)).clamp(0, 1)
    colours = palette(d, 3)
    flat = d.uniform("even", 1, 1)
    ground = ramp_colours(0.5 + 0.3 * flat * (tone - 0.5) + 0.2 * _spectrum(d, "a", size), colours[:, :2])
    return ground + line[:, None] * (colours[:, 2, :, None, None] * 0.8 - ground)


def _ribs(d: CounterRNG, size: int) -> Tensor:
    """Corrugated sheet, siding, slats, cord; with a second set of thin lines across, a grid."""
    x, y = turned_grid(d, size, 0.15)
    lying = d.uniform("lying", 1, 1) < 0.5
    x, y = torch.where(lying, y, x), torch.where(lying, x, y)
    phase = torch.frac(x / d.uniform("period", 1, 1, low=3.0, high=14.0)).abs()
    wave = 0.5 - 0.5 * torch.cos(2 * math.pi * phase)
    kind, sharp = d.uniform("kind", 1, 1), d.uniform("sharp", 1, 1, low=0.3, high=4.0)
    profile = torch.where(kind < 0.5, wave**sharp, torch.where(kind < 0.8, phase, (wave > 0.5).float()))
    across = torch.frac(y / d.uniform("across", 1, 1, low=8.0, high=20.0)).abs()
    line = (across < d.uniform("line", 1, 1, low=0.06, high=0.2)) & (d.uniform("grid", 1, 1) < 0.35)
    colours = palette(d, 3)
    stained = d.uniform("stained", 1, 1, high=0.35)
    face = ramp_colours(profile + stained * _spectrum(d, "a", size) * 0.5, colours[:, :2])
    return face + line.float()[:, None] * (colours[:, 2, :, None, None] - face)


def _strata(d: CounterRNG, size: int) -> Tensor:
    """Onyx, travertine, sediment, grained wood: bands of many widths, bent."""
    x, _ = turned_grid(d, size)
    bend = smooth_noise(d, "bend", size, (3, 5, 9)) * d.uniform("bent", 1, 1, low=0.0, high=45.0)
    bands = d.uniform("bands", 96)
    scale = torch.exp(d.uniform("scale", 1, 1, low=-0.7, high=1.4))  # px a band: 0.5 to 4
    at = ((x + bend) / scale) % 96
    low = at.floor().to(torch.int64).clamp(max=95)
    one, other = (bands.gather(1, k.view(len(d), -1)).view_as(at) for k in (low, (low + 1) % 96))
    level = one + (other - one) * (at - low)
    return ramp_colours(level + 0.1 * _spectrum(d, "a", size), palette(d, 4))


def _planks(d: CounterRNG, size: int) -> Tensor:
    """Floor boards, bamboo, mats: long strips, each of its own tone, with a fine grain along."""
    x, y = turned_grid(d, size, 0.1)
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
    joint = (1 - edge(torch.minimum(inside_x, inside_y) - 0.6)) * seam
    along = smooth_noise(d, "grain", size, (40, 64), (8, 1))
    over = smooth_noise(d, "grain", size, (40, 64), (1, 8))
    grain = torch.where(lying, over.transpose(1, 2), along.transpose(1, 2))
    mix = d.uniform("mix", 1, 1, low=0.2, high=0.8)
    face = ramp_colours(mix * tone + (1 - mix) * grain, palette(d, 3))
    return face * (1 - 0.8 * joint)[:, None]


TEXTURES: dict[str, Callable[[CounterRNG, int], Tensor]] = {
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
