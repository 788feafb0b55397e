"""References with an exact shape label and an exact appearance label: a silhouette filled with a material.

The bundled lists take silhouettes from glyph outlines of matplotlib's DejaVu Sans and from scikit-image's
horse, materials from crops of photographs that ship inside scikit-image: nothing is downloaded.
`escd/data/references` holds one list for evaluation and one, of other glyphs and other photographs, to
settle hyper-parameters on. Each has 20 silhouettes and 20 materials of distinct categories, which are the
candidates of every retrieval score; the first of each are paired into references. A folder of other
silhouettes and materials can take their place.

The lists "real" and "real-development" hold photographed materials that are stationary, and silhouettes of
things, a third of them pierced; `escd.evaluation.lists` says how they were chosen, a NOTICE beside them whose
they are. On these, texture and colour are scored apart (`escd.evaluation.texture`).
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache, cached_property
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import torch
import torch.nn.functional as F
from fontTools.pens.basePen import BasePen
from fontTools.ttLib import TTFont
from PIL import Image
from scipy import ndimage
from torch import Tensor

from .. import records
from ..data import foreground, names, shapes
from ..data.random import CounterRNG
from ..paths import PACKAGE
from . import measure, texture

CANDIDATES = 20  # silhouettes and materials a retrieval score chooses from
LISTS = ("evaluation", "development")
REAL_LISTS = ("real", "real-development")  # of real things: texture and colour are scored apart
BUNDLED = PACKAGE / "data" / "references"
FINE = 128  # px: silhouettes are kept at this size, tiles at world.SIZE
EXTENT = (
    44 / 64
)  # longer side of a silhouette's box, as a share of the picture: the middle of the world's range
TOO_ALIKE = 0.85  # aligned IoU above which two silhouettes do not count as distinct
# Backgrounds a reference can stand on: the world's four, and two for materials none of those contrasts with.
GROUNDS = {**names.BACKGROUND_RGB, "white": (0.96, 0.96, 0.96), "black": (0.05, 0.05, 0.05)}


@dataclasses.dataclass(frozen=True, eq=False)
class Silhouette:
    """A filled outline: coverage (FINE, FINE) in [0, 1], centred, its longer side EXTENT of the picture."""

    name: str
    mask: Tensor
    sha256: str  # of the image file, or of a glyph's outline in font units
    pierced: bool = False  # with holes, gaps and inner lines: reported as a row of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """A tile (3, 64, 64) in [0, 1] that fills the frame."""

    name: str
    tile: Tensor
    sha256: str  # of the image file, or of the file and the crop
    # What the tile was cut from, its top left quarter: (3, 128, 128). Only of the real lists.
    whole: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """One silhouette filled with one material: `image` (3, S, S) in [-1, 1] and `mask` (S, S) bool."""

    silhouette: Silhouette
    material: Material

    @property
    def id(self) -> str:
        """`silhouette/material`: what a config calls it."""
        return f"{self.silhouette.name}/{self.material.name}"

    @cached_property
    def _composed(self) -> tuple[Tensor, Tensor, str]:
        return compose_reference(self.silhouette.mask, self.material.tile)

    @property
    def image(self) -> Tensor:
        return self._composed[0]

    @property
    def mask(self) -> Tensor:
        return self._composed[1] > 0.5

    @property
    def background(self) -> str:
        """The name of the plain background it stands on, a key of GROUNDS."""
        return self._composed[2]

    @property
    def inputs(self) -> dict[str, str]:
        """sha256 of what it was made from, for a record."""
        return {f"silhouette {self.silhouette.name}": self.silhouette.sha256,
                f"material {self.material.name}": self.material.sha256}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class References:
    """A list of references with the candidates its retrieval scores choose from."""

    name: str
    silhouettes: tuple[Silhouette, ...]
    materials: tuple[Material, ...]
    references: tuple[Reference, ...]

    def __len__(self) -> int:
        return len(self.references)

    def __iter__(self):
        return iter(self.references)

    def __getitem__(self, key: int | str) -> Reference:
        """The reference with this number or id; KeyError lists the ids."""
        if isinstance(key, int):
            return self.references[key]
        by_id = {reference.id: reference for reference in self.references}
        if key not in by_id:
            raise KeyError(f"no reference {key!r} in the {self.name} list: it has {', '.join(by_id)}")
        return by_id[key]

    @cached_property
    def sha256(self) -> str:
        """One sha256 over the inputs of all candidates and of the references, for a record."""
        every = [item.sha256 for item in (*self.silhouettes, *self.materials)]
        return records.sha256(json.dumps([every, [r.id for r in self.references]]).encode())

    @cached_property
    def silhouette_masks(self) -> Tensor:
        """Candidate silhouettes as they stand in a picture: (CANDIDATES, 64, 64) bool."""
        return torch.stack([resized(s.mask[None], names.SIZE)[0] > 0.5 for s in self.silhouettes])

    @cached_property
    def appearances(self) -> tuple[measure.Appearance, ...]:
        """Appearance of every candidate material, over its whole tile."""
        whole = torch.ones(names.SIZE, names.SIZE)
        return tuple(measure.appearance_of(m.tile * 2 - 1, whole) for m in self.materials)

    @cached_property
    def looks(self) -> texture.Candidates | None:
        """The candidate materials by texture and colour apart; None where a material is but a tile."""
        wholes = [material.whole for material in self.materials]
        if any(whole is None for whole in wholes):
            return None
        return texture.Candidates(wholes, [material.tile for material in self.materials])


def load_references(
    folder: str | Path | None = None, *, which: str = "evaluation", count: int | None = None, twenty: int = 1
) -> References:
    """The bundled list `which` (of LISTS or REAL_LISTS), or one made from a folder.

    A folder holds `silhouettes/*.png` (white on black) and `materials/*.webp`. A file's category is its name
    without digits and trailing punctuation; files are taken in the order of a hash of their names, one a
    category, passing over silhouettes that look like one taken before or like a named shape of the world.
    `twenty`: a larger folder gives a second list of other silhouettes, and of other files of the materials'
    categories, named "folder 2", and so on. `count` bounds the references. Raises FileNotFoundError or
    ValueError where a list is not there, too short, or its inputs are not the ones it was made from.
    """
    if folder is None:
        known = (*LISTS, *REAL_LISTS)
        if which not in known:
            raise ValueError(f"which must be one of {', '.join(known)}, not {which!r}")
        return _bundled(which, count)
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    if twenty < 1:
        raise ValueError(f"the lists of a folder are counted from 1, not {twenty}")
    before = (twenty - 1) * CANDIDATES
    silhouettes = _distinct_silhouettes(in_order(folder / "silhouettes", "*.png"), before + CANDIDATES)
    materials = tuple(
        Material(path.stem, _tile(Image.open(path)), records.sha256(path))
        for path in _one_a_category(in_order(folder / "materials", "*.webp"), twenty)[:CANDIDATES]
    )
    name = "folder" if twenty == 1 else f"folder {twenty}"
    return _paired(name, silhouettes[before:], materials, CANDIDATES if count is None else count)


def compose_reference(
    mask: Tensor, tile: Tensor, background: str | None = None, size: int = names.SIZE
) -> tuple[Tensor, Tensor, str]:
    """Fill a silhouette (H, W) with a tile (3, h, w) in [0, 1]: image (3, S, S) in [-1, 1], mask, background.

    The background is the one of GROUNDS that contrasts most with the material where it contrasts least (the
    tenth percentile of the CIELAB distance over the tile), so that no part of the outline is lost.
    Antialiased.
    """
    if mask.ndim != 2 or tile.ndim != 3 or len(tile) != 3:
        raise ValueError(
            f"a silhouette is (H, W) and a tile (3, h, w), not {tuple(mask.shape)}, {tuple(tile.shape)}"
        )
    coverage = resized(mask[None].float(), size)[0].clamp(0, 1)
    material = resized(tile.float(), size).clamp(0, 1)
    if background is None:
        background = max(GROUNDS, key=lambda name: _contrast(material, GROUNDS[name]))
    elif background not in GROUNDS:
        raise ValueError(f"unknown background {background!r}; known: {', '.join(GROUNDS)}")
    ground = torch.tensor(GROUNDS[background])[:, None, None]
    return (material * coverage + ground * (1 - coverage)) * 2 - 1, coverage, background


def _contrast(tile: Tensor, rgb: tuple[float, float, float]) -> float:
    plain = torch.tensor(rgb)[:, None, None].expand_as(tile)
    lab = foreground.to_lab(torch.stack([tile, plain]) * 2 - 1)
    return float(np.percentile(np.linalg.norm(lab[0] - lab[1], axis=-1), 10))


def resized(images: Tensor, size: int) -> Tensor:
    """(C, H, W) -> (C, size, size), antialiased."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(
        images[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )[0]


# ------------------------------------------------------------------------------------------------------------
# the bundled lists


@cache
def _bundled(which: str, count: int | None) -> References:
    listed = json.loads((BUNDLED / f"{which}.json").read_text())
    silhouettes = tuple(_checked(_silhouette(entry), entry) for entry in listed["silhouettes"])
    materials = tuple(_checked(_material(entry), entry) for entry in listed["materials"])
    return _paired(which, silhouettes, materials, listed["references"] if count is None else count)


def _paired(
    name: str, silhouettes: tuple[Silhouette, ...], materials: tuple[Material, ...], count: int
) -> References:
    for kind, items in (("silhouettes", silhouettes), ("materials", materials)):
        if len(items) != CANDIDATES:
            raise ValueError(
                f"{CANDIDATES} {kind} of distinct categories are needed, the {name} list has {len(items)}"
            )
    if not 1 <= count <= CANDIDATES:
        raise ValueError(f"between 1 and {CANDIDATES} references can be made, not {count}")
    pairs = zip(silhouettes[:count], materials[:count], strict=True)
    return References(name, silhouettes, materials, tuple(Reference(s, m) for s, m in pairs))


def _checked(item, entry: dict):
    if item.sha256 != entry["sha256"]:
        raise ValueError(
            f"{item.name!r} is not what the list was made from: {item.sha256} is not {entry['sha256']}"
        )
    return item


def _silhouette(entry: dict) -> Silhouette:
    if "file" in entry:
        path = BUNDLED / entry["file"]
        pierced = path.parent.name == "pierced"
        return Silhouette(entry["name"], fit_silhouette(path), records.sha256(path), pierced)
    if "glyph" in entry:
        contours = _glyph_contours(int(entry["glyph"].removeprefix("U+"), 16))
        digest = records.sha256(json.dumps([contour.tolist() for contour in contours]).encode())
        mask = _fill(_rasterise(contours), holes=entry.get("holes", False))
    else:
        data, picture = _bundled_image(entry["image"])
        digest = records.sha256(data)
        mask = _fit(np.asarray(picture.convert("L")) < 128)  # the horse is black on white
    return Silhouette(entry["name"], mask, digest)


def _material(entry: dict) -> Material:
    if "file" in entry:
        whole = open_tile(BUNDLED / entry["file"])
        digest = records.sha256(BUNDLED / entry["file"])
        return Material(entry["name"], whole[:, : names.SIZE, : names.SIZE], digest, whole)
    data, picture = _bundled_image(entry["image"])
    left, top, side = entry["crop"]
    tile = _tile(picture.convert("RGB").crop((left, top, left + side, top + side)))
    # A file's bytes, not its decoded pixels: two builds of libjpeg may differ by a level.
    return Material(entry["name"], tile, records.sha256(data + json.dumps(entry["crop"]).encode()))


def open_tile(path: Path) -> Tensor:
    """A file of a material as it is: (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255


def _bundled_image(name: str) -> tuple[bytes, Image.Image]:
    path = Path(skimage.__file__).parent / "data" / name
    return path.read_bytes(), Image.open(path)


def _tile(picture: Image.Image) -> Tensor:
    if min(picture.size) < 32:
        raise ValueError(f"a material of {picture.size} px is too small")
    side = min(picture.size)
    picture = (
        picture.convert("RGB").crop((0, 0, side, side)).resize((names.SIZE, names.SIZE), Image.Resampling.BOX)
    )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


@cache
def _font() -> TTFont:
    return TTFont(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


class _Chords(BasePen):
    """Draws a glyph as closed contours (V, 2) in font units, y up; a curve becomes `SEGMENTS` chords."""

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


def _glyph_contours(codepoint: int) -> list[np.ndarray]:
    """Contours of a glyph, each (V, 2) in font units, y up."""
    glyphs = _font().getGlyphSet()
    pen = _Chords(glyphs)
    glyphs[_font().getBestCmap()[codepoint]].draw(pen)
    return [np.array(contour, float) for contour in pen.contours]


def _rasterise(contours: list[np.ndarray]) -> Tensor:
    """Coverage (FINE, FINE) of a glyph whose box has the side EXTENT, centred."""
    every = np.concatenate(contours)
    low, high = every.min(0), every.max(0)
    scale = EXTENT * FINE / (high - low).max()
    longest = max(len(contour) for contour in contours)
    padded = []
    for contour in contours:
        points = (contour - (low + high) / 2) * scale * [1, -1] + FINE / 2  # y down
        points = points[::-1]  # TrueType winds clockwise around the inside, the world the other way
        padded.append(np.concatenate([points, np.repeat(points[-1:], longest - len(points), 0)]))
    return shapes.rasterise(torch.tensor(np.stack(padded), dtype=torch.float32)[None], FINE)[0]


def _fill(mask: Tensor, holes: bool) -> Tensor:
    """The largest connected piece of a glyph; its inner holes are filled unless `holes`."""
    solid = mask.numpy() > 0.5
    if not holes:
        # What no path from the frame reaches is inside, and so are the soft inner edges between.
        filled = ndimage.binary_fill_holes(solid)
        rim = ndimage.binary_dilation(~filled)  # keeps the soft outer edge as it is
        mask = torch.from_numpy(np.where(filled & ~rim, 1.0, mask.numpy())).float()
        solid = mask.numpy() > 0.5
    labels, _ = ndimage.label(solid, structure=np.ones((3, 3)))
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    return _fit_coverage(mask * torch.from_numpy(ndimage.binary_dilation(largest)))


def fit_silhouette(path: Path) -> Tensor:
    """A file of a silhouette, white on black, as `Silhouette.mask` holds it."""
    return _fit(np.asarray(Image.open(path).convert("L")) >= 128)


def _fit(solid: np.ndarray) -> Tensor:
    """A binary picture's foreground, centred in (FINE, FINE) with the longer side of its box EXTENT of it."""
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


# ------------------------------------------------------------------------------------------------------------
# a folder


def in_order(folder: Path, pattern: str) -> list[Path]:
    """Files in an order that follows from their names alone and favours no category."""
    paths = sorted(folder.glob(pattern), key=lambda path: records.sha256(path.name.encode()))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {folder}")
    return paths


def category(path: str | Path) -> str:
    """A file's category: its stem without digits and trailing punctuation ("rock-047.webp" -> "rock")."""
    return "".join(c for c in Path(path).stem if not c.isdigit()).rstrip("-_ .")


def _one_a_category(paths: list[Path], number: int = 1) -> list[Path]:
    """The file of this number, from 1, of each category that has so many."""
    by_category: dict[str, list[Path]] = {}
    for path in paths:
        by_category.setdefault(category(path), []).append(path)
    return [files[number - 1] for files in by_category.values() if len(files) >= number]


def _distinct_silhouettes(paths: list[Path], count: int) -> tuple[Silhouette, ...]:
    taken: list[Silhouette] = []
    known = named_outlines()
    for path in _one_a_category(paths):
        if len(taken) == count:
            break
        data = path.read_bytes()
        mask = fit_silhouette(path)
        small = resized(mask[None], names.SIZE) > 0.5
        if float(measure.iou_matrix(small, known).max()) <= TOO_ALIKE:
            taken.append(Silhouette(path.stem, mask, records.sha256(data)))
            known = torch.cat([known, small])
    return tuple(taken)


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
