"""References: a silhouette filled with a material, so that the shape and the appearance are known exactly.

A list has 20 silhouettes and 20 materials of distinct categories, the candidates of every retrieval score;
the first of each are paired into references. `escd/data/references` holds four lists:

- "evaluation", and "development" for hyper-parameters: glyphs of matplotlib's DejaVu Sans, scikit-image's
  horse, and crops of photographs of scikit-image.
- "real" and "real-development": photographed, stationary materials, and silhouettes of things, a third of
  them pierced. `escd.evaluation.lists` chose them; a NOTICE beside them names their authors. On these,
  texture and colour are scored apart (`escd.evaluation.texture`).

A folder of other silhouettes and materials can be used instead.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image
from torch import Tensor

from .. import records
from ..data import foreground, names
from ..paths import PACKAGE
from . import measure, texture
from .silhouettes import fit, fit_silhouette, glyph_contours, glyph_silhouette, named_outlines, resized

CANDIDATES = 20  # silhouettes and materials a retrieval score chooses from
LISTS = ("evaluation", "development")
REAL_LISTS = ("real", "real-development")  # of real things: texture and colour are scored apart
DEFAULT_LIST = "real"  # what the results are of
BUNDLED = PACKAGE / "data" / "references"
TOO_ALIKE = 0.85  # aligned IoU above which two silhouettes do not count as distinct
# Backgrounds of references: the world's four, and two for materials that contrast with none of those.
GROUNDS = {**names.BACKGROUND_RGB, "white": (0.96, 0.96, 0.96), "black": (0.05, 0.05, 0.05)}


@dataclasses.dataclass(frozen=True, eq=False)
class Silhouette:
    """An outline as coverage (128, 128) in [0, 1], centred (`silhouettes.FINE`, `silhouettes.EXTENT`)."""

    name: str
    mask: Tensor
    sha256: str  # of the image file, or of a glyph's outline in font units
    pierced: bool = False  # with holes, gaps and inner lines; reported in a row of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """A tile (3, 64, 64) in [0, 1] that fills the frame."""

    name: str
    tile: Tensor
    sha256: str  # of the image file, or of the file and the crop
    # The image (3, 128, 128) whose top left quarter is the tile. Only on the real lists.
    whole: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """One silhouette filled with one material: `image` (3, S, S) in [-1, 1] and `mask` (S, S) bool."""

    silhouette: Silhouette
    material: Material

    @property
    def id(self) -> str:
        """`silhouette/material`: its name in a config."""
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
        """The name of its plain background, a key of GROUNDS."""
        return self._composed[2]

    @property
    def inputs(self) -> dict[str, str]:
        """sha256 of its silhouette and of its material, for a record."""
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
        """Candidate silhouettes at the size of an image: (CANDIDATES, 64, 64) bool."""
        return torch.stack([resized(s.mask[None], names.SIZE)[0] > 0.5 for s in self.silhouettes])

    @cached_property
    def appearances(self) -> tuple[measure.Appearance, ...]:
        """Appearance of every candidate material, over its whole tile."""
        whole = torch.ones(names.SIZE, names.SIZE)
        return tuple(measure.appearance_of(m.tile * 2 - 1, whole) for m in self.materials)

    @cached_property
    def looks(self) -> texture.Candidates | None:
        """The candidate materials, with texture and colour apart; None where a material has no `whole`."""
        wholes = [material.whole for material in self.materials]
        if any(whole is None for whole in wholes):
            return None
        return texture.Candidates(wholes, [material.tile for material in self.materials])


def load_references(
    folder: str | Path | None = None, *, which: str = DEFAULT_LIST, count: int | None = None, twenty: int = 1
) -> References:
    """The bundled list `which` (of LISTS or REAL_LISTS), or a list of the files of a folder.

    A folder holds `silhouettes/*.png` (white on black) and `materials/*.webp`. A file's category is its name
    without digits and trailing punctuation. Files are taken in the order of a hash of their names, one per
    category; silhouettes that are like an earlier one or like a named shape of the world are skipped.

    twenty: a larger folder has a second list, "folder 2", of other silhouettes and of other files of the
    materials' categories, and so on. count: the number of references. Raises FileNotFoundError or ValueError
    for a list that does not exist or is too short, or whose files have another sha256 than listed.
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

    The background is the one of GROUNDS whose contrast with the material is largest at the tenth percentile
    of the CIELAB distance over the tile, so no part of the outline is lost. The edge is antialiased.
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
        contours = glyph_contours(int(entry["glyph"].removeprefix("U+"), 16))
        digest = records.sha256(json.dumps([contour.tolist() for contour in contours]).encode())
        mask = glyph_silhouette(contours, holes=entry.get("holes", False))
    else:
        data, picture = _bundled_image(entry["image"])
        digest = records.sha256(data)
        mask = fit(np.asarray(picture.convert("L")) < 128)  # the horse is black on white
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
    """A material's file at its full size: (3, H, W) in [0, 1]."""
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


# ------------------------------------------------------------------------------------------------------------
# a folder


def in_order(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of a hash of their names, which favours no category."""
    paths = sorted(folder.glob(pattern), key=lambda path: records.sha256(path.name.encode()))
    if not paths:
        raise FileNotFoundError(f"no {pattern} in {folder}")
    return paths


def category(path: str | Path) -> str:
    """A file's category: its stem without digits and trailing punctuation ("rock-047.webp" -> "rock")."""
    return "".join(c for c in Path(path).stem if not c.isdigit()).rstrip("-_ .")


def _one_a_category(paths: list[Path], number: int = 1) -> list[Path]:
    """File number `number`, counted from 1, of each category that has so many files."""
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
