"""The tables of results in Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from ..evaluation.formats import decimals, interval, markdown_table, share_of
from ..evaluation.real_tables import ARMS, FIRST, LAST, AppearanceRow, Row, ShapeRow
from ..evaluation.references import DEFAULT_LIST
from .results import Results, alike, appearances, pairs, results, shapes

# What else `alike` calls by name.
PLACES = {
    "encoder": "encoder",
    "decoder/attentions": "decoder's transformer blocks",
    "up.1": "decoder's middle block",
    "decoder": "decoder",
}
LEAKAGE_PLACES = 3  # there is so little of it that two decimals would hide on which side of none it lies
OUTLINES = {"shape, filled": "shape, filled outlines", "shape, pierced": "shape, pierced outlines"}


def results_table(which: str = DEFAULT_LIST) -> str:
    """The study as Markdown tables: filled and pierced shapes, appearance, and both in one pass."""
    found = results(which)
    tables = [
        _table(
            f"{name} ({_images(shapes(found, mode))})",
            ["IoU", "retrieved", "pattern", "colours", "background", "leakage of texture (95 %)"],
            {arm: _shape_cells(row) for arm, row in shapes(found, mode).items()},
        )
        for mode, name in OUTLINES.items()
        if mode in found.rows
    ]
    tables.append(
        _table(
            f"appearance ({_images(appearances(found))})",
            [
                "first by texture", "rank", "distance", "first by colour", "rank", "distance", "shape",
                "background", "leakage of shape (95 %)",
            ],
            {arm: _appearance_cells(row) for arm, row in appearances(found).items()},
        )
    )  # fmt: skip
    if pairs(found):
        shares = ("silhouette", "texture", "colour", "right")
        cells = {arm: [share_of(getattr(row, name)) for name in shares] for arm, row in pairs(found).items()}
        tables.append(_table("both in one pass", ["silhouette", "texture", "colour", "all three"], cells))
    return "\n\n".join(tables)


def _images(rows: Mapping[str, Row]) -> str:
    """How many images an arm has."""
    return f"{rows['floor'].pictures} images"


def _table(name: str, heads: list[str], cells: Mapping[str, list[str]]) -> str:
    return markdown_table([name, *heads], [[ARMS[arm], *cells[arm]] for arm in ordered(cells)])


def ordered(rows: Mapping[str, object]) -> list[str]:
    """The arms in the order of the tables: lower controls, customizations, upper controls."""
    tuned = [arm for arm in ARMS if arm in rows and arm not in (*FIRST, *LAST)]
    return [
        *(arm for arm in FIRST if arm in rows), *tuned, *(arm for arm in LAST if arm in rows),
    ]  # fmt: skip


def _shape_cells(row: ShapeRow) -> list[str]:
    obeyed = [share_of(row.obeyed[name]) for name in ("pattern", "colours", "background")]
    leakage = interval(row.texture_leakage, LEAKAGE_PLACES)
    return [decimals(row.iou), share_of(row.first), *obeyed, leakage]


def _appearance_cells(row: AppearanceRow) -> list[str]:
    retrieved = [
        text
        for one in (row.texture, row.colour)
        for text in (share_of(one.first), decimals(one.rank, 1), decimals(one.distance, 2))
    ]
    obeyed = [share_of(row.obeyed[name]) for name in ("shape", "background")]
    return [*retrieved, *obeyed, interval(row.leakage, LEAKAGE_PLACES)]


def alike_table(which: str = DEFAULT_LIST) -> str:
    """`alike` of both attributes as a Markdown table; empty where there is none."""
    shape, look = (alike(name, which) for name in ("shape", "appearance"))
    lines = []
    for part in shape:
        a, b = shape[part], look[part]
        assert isinstance(a.row, ShapeRow) and isinstance(b.row, AppearanceRow)
        lines.append([
            PLACES[part],
            f"{a.megabytes:.1f}",
            decimals(a.row.iou),
            interval(a.beyond["IoU"]) if a.beyond else "",
            share_of(a.row.first),
            share_of(b.row.texture.first),
            interval(b.beyond["texture"]) if b.beyond else "",
            share_of(b.row.colour.first),
        ])  # fmt: skip
    heads = [
        "tuned", "MB", "shape: IoU", "difference", "retrieved", "appearance: first by texture", "difference",
        "first by colour",
    ]  # fmt: skip
    return markdown_table(heads, lines) if lines else ""


def arms_of(found: Results, mode: str) -> list[tuple[str, Row]]:
    """The arms of a mode with their rows, in the order of the tables."""
    return [(arm, found.rows[mode][arm]) for arm in ordered(found.rows[mode])]
