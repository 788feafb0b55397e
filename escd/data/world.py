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
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .captions import captions_of
from .names import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    HELDOUT_APPEARANCES,
    HELDOUT_SHAPES,
    NONE,
    PATTERNS,
    PIERCED_SHARE,
    SHAPES,
    SIZE,
    UNNAMED_APPEARANCES,
    UNNAMED_SHAPES,
    VARIED_APPEARANCES,
)
from .patterns import as_painted, blended, paint_pattern, pixel_grid, smooth_noise
from .random import CounterRNG, key_of, signed
from .shapes import OUTLINES, draw_cuts, present, rasterise
from .textures import TEXTURES


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


class World:
    """The shape x appearance world, deterministic by seed and rendered on the fly.

    seed: worlds of different seeds share no image. split: "train", or "heldout", whose unnamed shapes and
    appearances are of families that are not in "train". named_shapes, named_appearances: share of images
    whose factor has a name. varied: add the families of VARIED_APPEARANCES, and holes, gaps and inner lines
    in many unnamed outlines. device: where images are rendered. ``world[i]`` is a `Sample`, ``world.batch``
    returns a `Batch`.
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

    def _draws(self, factor: str, index: Sequence[int] | Tensor) -> CounterRNG:
        return CounterRNG(
            signed(self.seed * 1000003 + key_of(factor)), torch.as_tensor(index, device=self.device)
        )

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

    def _pierce(self, mask: Tensor, rows: Tensor, contours: Tensor, d: CounterRNG, p: CounterRNG) -> None:
        """Cut holes, gaps and lines out of some of the outlines `rows`, if half of the area is left."""
        chosen = d[rows].uniform("pierced") < PIERCED_SHARE
        if not chosen.any():
            return
        rows, contours = rows[chosen], contours[chosen]
        shown, cuts = present(contours), draw_cuts(d[rows])
        low = torch.where(shown, contours, math.inf).amin((1, 2))[:, None, None]
        high = torch.where(shown, contours, -math.inf).amax((1, 2))[:, None, None]
        placed = torch.where(present(cuts), (low + high) / 2 + cuts * (high - low) / 2, 0.0)
        cut = rasterise(self._posed(placed, p[rows], False, box=contours), self.size)
        left = mask[rows] * (1 - cut)
        enough = left.sum((1, 2)) > 0.5 * mask[rows].sum((1, 2))
        mask[rows[enough]] = left[enough]

    def _posed(self, contours: Tensor, pose: CounterRNG, named: bool, box: Tensor | None = None) -> Tensor:
        """Contours in pixels, y down: rotated, stretched, scaled, and moved within the frame.

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
        """The appearances at these indices, over the whole frame.

        Returns RGB (N, 3, S, S) in [0, 1], pattern (N,), colours (N, 8) bool, and for each image its colour
        names in order and its family.
        """
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
        """The backgrounds at these indices: RGB (N, 3, S, S) in [0, 1], label (N,), and families."""
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
            x, y = pixel_grid(size, self.device)
            angle = d[rows].uniform("turn", 1, 1, high=2 * math.pi)
            share = ((x - 31.5) * angle.cos() + (y - 31.5) * angle.sin()) / 80 + 0.5
            out[rows] = blended(rgb[rows], d[rows].uniform("other", 3), share.clamp(0, 1))
        rows = (kind == 6).nonzero()[:, 0]
        if len(rows):
            level = smooth_noise(d[rows], "clutter", size, (6, 12, 24)) - 0.5
            near = rgb[rows] + d[rows].uniform("near", 3, low=-0.25, high=0.25)
            out[rows] = blended(rgb[rows], near, level * 2)
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
        """The images with these indices; a factor that is given by name has its own indices.

        ``world.batch(shape=i, appearance=j, background=k, pose=l)`` gives cross-image pairs. A factor that is
        not given takes `indices`, or else those of the shape. Raises ValueError when nothing is given.
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

    def _shading(self, mask: Tensor, d: CounterRNG) -> Tensor:
        """Light (N, S, S) around 1: none, from one side, or falling off towards the outline."""
        x, y = pixel_grid(self.size, self.device)
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

        Their occlusion, scale and texture statistics are nearer to those of photographs than one object's
        (Lee, Mumford and Huang 2001). Half of the frames are a single texture, enlarged or not.
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
        light = 1 + d.uniform("depth", 1, 1, high=0.5) * (smooth_noise(d, "light", self.size, (3, 5)) - 0.5)
        grain = d.uniform("grain", 1, 1, high=0.06) * (
            d.uniform("noise", self.size**2).view(-1, self.size, self.size) - 0.5
        )
        return ((image * light[:, None] + grain[:, None]) * 2 - 1).clamp(-1, 1)
