"""The rule that chooses the lists of real silhouettes and real materials.

`python -m escd.evaluation.lists FOLDER` reads `FOLDER/silhouettes`, `FOLDER/pierced` (PNG, white on black,
128 px) and `FOLDER/materials` (WebP, 128 px tiles) and writes `real.json` and `real-development.json` into
`escd/data/references`, with the chosen files, byte for byte, beside them. `load_references` reads those.

Files are taken in the order of a hash of their names, one a category, where they pass:

- A material has a texture that is visible at 64 px: the deviation of its lightness is at least `CONTRAST`.
- A material is stationary: the spectrum of its lightness is nearly the same in the four 64 px quarters of the
  tile (`UNSTEADY`), and so is its mean lightness (`DRIFT`).
- Materials of one list are distinct: their spectra differ by at least `APART`.
- A silhouette covers at least `LEAST_AREA` of the picture, so that its material is visible. It is not like
  another of the two lists, and not like a named shape of the world (`references.TOO_ALIKE`). One that is not
  from `pierced` has no holes (`MOST_HOLES`).

The development list takes categories that the evaluation list does not have, then other files of the rest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .. import records
from ..data import foreground
from ..data.names import SIZE
from ..ending import run_command
from ..files import together
from . import measure
from .references import (
    BUNDLED,
    CANDIDATES,
    REAL_LISTS,
    TOO_ALIKE,
    category,
    in_order,
    open_tile,
)
from .silhouettes import fit_silhouette, named_outlines, resized

PIERCED_COUNT = 7  # of the CANDIDATES silhouettes of a list: a third
CONTRAST = 1.75  # CIELAB lightness: standard deviation of a quarter, averaged over the quarters
UNSTEADY = 0.45  # mean difference of a quarter's log band energies from the tile's mean
DRIFT = 0.3  # deviation of the quarters' mean lightness, as a share of the contrast
APART = 0.55  # mean difference of two materials' log band energies
LEAST_AREA = 0.12  # share of the picture
MOST_HOLES = 0.02  # share of the filled outline

# Bands of the spectrum: octaves (cycles per pixel) in four sectors of directions.
OCTAVES = (1 / 40, 1 / 16, 1 / 8, 1 / 4, 1 / 2**0.5)
SECTORS = 4
NOISE = 0.02  # squared CIELAB lightness: less energy than this in a band counts as none


def quarters(tile: Tensor) -> np.ndarray:
    """Lightness of the four SIZE x SIZE quarters of a tile (3, 2 SIZE, 2 SIZE): (4, SIZE, SIZE)."""
    lightness = foreground.to_lab(tile[None] * 2 - 1)[0, ..., 0]
    rows = np.split(lightness, 2, axis=0)
    return np.stack([quarter for row in rows for quarter in np.split(row, 2, axis=1)])


def spectra(pictures: np.ndarray) -> np.ndarray:
    """Logarithms of the energy of lightness (N, H, W) in each band: (N, bands)."""
    side = pictures.shape[-1]
    window = np.outer(np.hanning(side), np.hanning(side))
    window /= np.sqrt((window**2).mean())
    plain = pictures - pictures.mean((1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(plain * window)) ** 2 / side**4
    y, x = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    frequency, angle = np.hypot(y, x), np.arctan2(y, x)
    direction = np.round(angle / (np.pi / SECTORS)) % SECTORS
    bands = [
        (frequency >= low) & (frequency < high) & (direction == k)
        for low, high in itertools.pairwise(OCTAVES)
        for k in range(SECTORS)
    ]
    return np.log(np.stack([power[:, band].sum(1) for band in bands], 1) + NOISE)


def steady(parts: np.ndarray) -> bool:
    """Whether the quarters (4, H, W) of a tile have a texture, and all the same one."""
    contrast = parts.std((1, 2)).mean()
    bands = spectra(parts)
    return bool(
        contrast >= CONTRAST
        and np.abs(bands - bands.mean(0)).mean() <= UNSTEADY
        and parts.mean((1, 2)).std() <= DRIFT * contrast
    )


def apart(spectrum: np.ndarray, others: Iterable[np.ndarray]) -> bool:
    """Whether a material's spectrum differs from those of all others."""
    return all(np.abs(spectrum - other).mean() >= APART for other in others)


def filled(mask: Tensor) -> bool:
    """Whether the holes of a silhouette (SIZE, SIZE) are at most MOST_HOLES of it."""
    solid = mask.numpy() > 0.5
    return bool(ndimage.binary_fill_holes(solid).sum() <= (1 + MOST_HOLES) * solid.sum())


def choose_materials(folder: Path) -> list[list[Path]]:
    """For each of REAL_LISTS the files of CANDIDATES materials of distinct categories."""
    good: dict[str, list[tuple[Path, np.ndarray]]] = {}
    for path in in_order(folder, "*.webp"):
        tile = open_tile(path)
        if tile.shape[-2:] == (2 * SIZE, 2 * SIZE) and steady(parts := quarters(tile)):
            good.setdefault(category(path), []).append((path, spectra(parts).mean(0)))
    order = sorted(good, key=lambda name: records.sha256(name.encode()))
    lists: list[list[Path]] = []
    taken_categories: set[str] = set()
    for _ in REAL_LISTS:
        taken: dict[Path, np.ndarray] = {}
        for name in sorted(order, key=lambda name: name in taken_categories):  # stable: new categories first
            free = [(path, bands) for path, bands in good[name] if not any(path in old for old in lists)]
            fitting = (pair for pair in free if apart(pair[1], taken.values()))
            if len(taken) < CANDIDATES and (pair := next(fitting, None)) is not None:
                taken[pair[0]] = pair[1]
        lists.append(list(taken))
        taken_categories |= {category(path) for path in taken}
    return lists


def choose_silhouettes(folder: Path) -> list[list[Path]]:
    """For each of REAL_LISTS the files of CANDIDATES silhouettes; every third, but the last, is pierced."""
    known = named_outlines()
    things: set[str] = set()

    def fitting(part: str) -> Iterator[Path]:
        nonlocal known
        for path in in_order(folder / part, "*.png"):
            thing = category(path).removeprefix("noto-")
            mask = resized(fit_silhouette(path)[None], SIZE) > 0.5
            if (
                thing not in things
                and mask.float().mean() >= LEAST_AREA
                and (part == "pierced" or filled(mask[0]))
                and float(measure.iou_matrix(mask, known).max()) <= TOO_ALIKE
            ):
                things.add(thing)
                known = torch.cat([known, mask])
                yield path

    sources = {True: fitting("pierced"), False: fitting("silhouettes")}
    turns = [number % 3 == 0 and number // 3 < PIERCED_COUNT for number in range(CANDIDATES)]
    try:
        return [[next(sources[turn]) for turn in turns] for _ in REAL_LISTS]
    except StopIteration:
        raise ValueError(f"{folder} has too few silhouettes for {len(REAL_LISTS)} lists") from None


def write(source: Path, target: Path = BUNDLED) -> None:
    """Choose both lists from `source` and write them, with their files, into `target`."""
    silhouettes, materials = choose_silhouettes(source), choose_materials(source / "materials")
    with together(target) as scratch:
        for name, outlines, tiles in zip(REAL_LISTS, silhouettes, materials, strict=True):
            if len(tiles) < CANDIDATES:
                raise ValueError(f"{source} has {len(tiles)} materials for the {name} list, not {CANDIDATES}")
            listed = {
                "references": CANDIDATES,
                "silhouettes": [_entry(path, scratch) for path in outlines],
                "materials": [_entry(path, scratch) for path in tiles],
            }
            (scratch / f"{name}.json").write_text(json.dumps(listed, indent=1) + "\n")


def _entry(path: Path, target: Path) -> dict[str, str]:
    name = f"real/{path.parent.name}/{path.name}"
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target / name)
    return {"name": path.stem, "file": name, "sha256": records.sha256(path)}


def main(argv: list[str] | None = None) -> None:
    """Choose the lists of real silhouettes and materials and write them into escd/data/references."""
    parser = argparse.ArgumentParser(prog="python -m escd.evaluation.lists", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="holds silhouettes, pierced and materials")
    write(parser.parse_args(argv).folder)


if __name__ == "__main__":
    run_command(main)
