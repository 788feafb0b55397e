"""The tables of the real lists: texture and colour apart, filled and pierced outlines apart, with controls.

`real_tables` makes the rows from records of `escd.study`, `markdown` writes them. A picture without a
foreground counts as a miss, takes the last rank, and counts as a full leak; distances are means over the
pictures that have one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import records
from .configs import CompositionConfig, StudyConfig
from .formats import decimals, interval, markdown_table, share_of
from .measure import Interval
from .references import CANDIDATES, REAL_LISTS, load_references
from .runs import CONFIGS, Metrics, Runs, by_arm, leakage, mean, mean_of_known, obeyed, pair_shares, values


@dataclass(frozen=True)
class Retrieval:
    """How well a picture's texture or colour is retrieved among the candidates.

    first: share of pictures for which the reference's is the nearest (chance 1 / 20). rank: mean number of
    candidates as near or nearer (chance 9.5). distance: mean distance; None where no picture has a
    foreground, and for both together.
    """

    first: float
    rank: float
    distance: float | None


@dataclass(frozen=True)
class _Common:
    """What every row says: its pictures, and the shares that show what the prompts name or have failed."""

    pictures: int
    obeyed: dict[str, float]
    failed: float


@dataclass(frozen=True, kw_only=True)
class AppearanceRow(_Common):
    """One arm of appearance.

    leakage: the silhouette's IoU less the floor's; None for the floor. leaked: share of pictures whose
    silhouette is retrieved as the reference's.
    """

    texture: Retrieval
    colour: Retrieval
    both: Retrieval
    leakage: Interval | None
    leaked: float


@dataclass(frozen=True, kw_only=True)
class ShapeRow(_Common):
    """One arm of shape, over filled or pierced outlines.

    first: share of pictures whose silhouette is retrieved as the reference's. Leakage: likeness less the
    floor's; None for the floor. leaked: share of pictures whose texture is retrieved as the reference's.
    """

    iou: float
    first: float
    texture_leakage: Interval | None
    colour_leakage: Interval | None
    leaked: float


@dataclass(frozen=True, kw_only=True)
class PairRow(_Common):
    """One arm of both attributes in one pass: shares retrieved; `right`: silhouette, texture and colour."""

    silhouette: float
    texture: float
    colour: float
    right: float


Row = AppearanceRow | ShapeRow | PairRow
MODES = ("appearance", "shape, filled", "shape, pierced", "both")


def real_tables(
    results: Iterable[records.Record], *, pierced_apart: bool = True
) -> dict[str, dict[str, Row]]:
    """Rows by mode (of MODES, those that have any) and arm, from records on one of the real lists.

    pierced_apart: False puts all outlines into one table, "shape".
    Records on other lists are ignored. Raises ValueError where the records are on two real lists, KeyError
    where the floor that a leakage is measured from is not among them.
    """
    real = [r for r in results if r.kind in CONFIGS and r.config["list"] in REAL_LISTS]
    lists = sorted({record.config["list"] for record in real})
    if len(lists) > 1:
        raise ValueError(f"these records are on the lists {' and '.join(lists)}: make a table of each")
    runs, floors = by_arm(real, _mode if pierced_apart else _mode_of_all)
    return {
        mode: {arm: row_of(of_arm, floors) for arm, of_arm in runs[mode].items()}
        for mode in ("shape", *MODES)
        if mode in runs
    }


def row_of(runs: Runs, floors: dict[Any, Metrics]) -> Row:
    """The row of one arm's runs; `floors`: the metrics of each floor by its config."""
    config = runs[0][0]
    if isinstance(config, CompositionConfig):
        return _pair(runs, floors)
    return (_appearance if config.attribute == "appearance" else _shape)(runs, floors)


def _mode_of_all(config: StudyConfig | CompositionConfig) -> str:
    return "both" if isinstance(config, CompositionConfig) else config.attribute


def _mode(config: StudyConfig | CompositionConfig) -> str:
    if _mode_of_all(config) != "shape":
        return _mode_of_all(config)
    pierced = load_references(which=config.list)[config.reference].silhouette.pierced
    return "shape, pierced" if pierced else "shape, filled"


def _common(runs: Runs) -> dict[str, Any]:
    """The fields that every row has."""
    failed = values(runs, "failed", None)
    return {"pictures": len(failed), "obeyed": obeyed(runs), "failed": float(np.mean(failed))}


def _retrieval(runs: Runs, name: str) -> Retrieval:
    return Retrieval(
        mean(runs, f"{name}_first", False),
        mean(runs, f"{name}_rank", CANDIDATES - 1),
        None if name == "both" else mean_of_known(runs, f"{name}_distance"),
    )


def _leakage(runs: Runs, floors: dict[Any, Metrics], score: str) -> Interval | None:
    return None if _is_floor(runs) else leakage(runs, floors, score)


def _leaked(runs: Runs, score: str) -> float:
    return mean(runs, score, not _is_floor(runs))


def _is_floor(runs: Runs) -> bool:
    return runs[0][0].kind == "floor"


def _appearance(runs: Runs, floors: dict[Any, Metrics]) -> AppearanceRow:
    return AppearanceRow(
        **_common(runs),
        texture=_retrieval(runs, "texture"),
        colour=_retrieval(runs, "colour"),
        both=_retrieval(runs, "both"),
        leakage=_leakage(runs, floors, "iou"),
        leaked=_leaked(runs, "silhouette"),
    )


def _shape(runs: Runs, floors: dict[Any, Metrics]) -> ShapeRow:
    return ShapeRow(
        **_common(runs),
        iou=mean(runs, "iou", 0.0),
        first=mean(runs, "silhouette", False),
        texture_leakage=_leakage(runs, floors, "texture_likeness"),
        colour_leakage=_leakage(runs, floors, "colour_likeness"),
        leaked=_leaked(runs, "texture_first"),
    )


def _pair(runs: Runs, _floors: dict[Any, Metrics]) -> PairRow:
    return PairRow(**_common(runs), **pair_shares(runs))


# ------------------------------------------------------------------------------------------------------------
# as text

# The order of the rows: lower controls, customizations, upper controls.
FIRST, LAST = ("floor", "flat", "word"), ("ceiling", "lossless", "copy")
ARMS = {
    "floor": "untouched backbone",
    "flat": "flat area of the material's mean colour",
    "word": "pseudo-word only",
    "encoder": "encoder tuned",
    "decoder": "decoder tuned",
    "all": "whole UNet tuned",
    "encoder (source)": "encoder tuned, plain recipe",
    "decoder (source)": "decoder tuned, plain recipe",
    "ours": "shape in the encoder, appearance in the decoder",
    "reversed": "the other way round",
    "ceiling": "right answer after the autoencoder",
    "lossless": "right answer",
    "copy": "copy of the reference",
}
OBEYED = {
    "appearance": ("shape", "background"),
    "shape": ("pattern", "colours", "background"),
    "shape, filled": ("pattern", "colours", "background"),
    "shape, pierced": ("pattern", "colours", "background"),
    "both": ("background",),
}
HEADS = {
    "appearance": (
        "texture first", "rank", "distance", "colour first", "rank", "distance", "both first", "rank",
        "leakage of shape (95 %)", "leaked",
    ),
    "shape": ("IoU", "retrieved", "leakage of texture (95 %)", "leakage of colour (95 %)", "leaked"),
    "both": ("silhouette", "texture", "colour", "all three"),
}  # fmt: skip


def markdown(tables: dict[str, dict[str, Row]]) -> str:
    """The tables in Markdown, one after the other."""
    return "\n\n".join(markdown_table_of(mode, rows) for mode, rows in tables.items())


def markdown_table_of(mode: str, rows: dict[str, Row]) -> str:
    """The table of one mode (of MODES, or an attribute), its rows by arm or name."""
    heads = [mode, *HEADS[mode.split(",")[0]], *OBEYED[mode], "no foreground", "pictures"]
    lines = []
    for arm in sorted(rows, key=_order):
        row = rows[arm]
        obeyed_shares = [share_of(row.obeyed[name]) for name in OBEYED[mode]]
        last = [share_of(row.failed), str(row.pictures)]
        lines.append([ARMS.get(arm, arm), *_cells(row), *obeyed_shares, *last])
    return markdown_table(heads, lines)


def _order(arm: str) -> tuple[int, int]:
    if arm in FIRST:
        return 0, FIRST.index(arm)
    return (2, LAST.index(arm)) if arm in LAST else (1, 0)


def _cells(row: Row) -> list[str]:
    if isinstance(row, AppearanceRow):
        return [
            *_retrieval_cells(row.texture),
            decimals(row.texture.distance),
            *_retrieval_cells(row.colour),
            decimals(row.colour.distance, 1),
            *_retrieval_cells(row.both),
            interval(row.leakage, 3),
            share_of(row.leaked),
        ]
    if isinstance(row, ShapeRow):
        leakages = [interval(row.texture_leakage, 3), interval(row.colour_leakage, 3)]
        return [decimals(row.iou), share_of(row.first), *leakages, share_of(row.leaked)]
    return [share_of(share) for share in (row.silhouette, row.texture, row.colour, row.right)]


def _retrieval_cells(retrieval: Retrieval) -> list[str]:
    return [share_of(retrieval.first), decimals(retrieval.rank, 1)]
