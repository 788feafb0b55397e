"""The tables of the real lists: texture and colour apart, filled and pierced outlines apart, with controls.

`real_tables` makes the rows from records of `escd.study`, `markdown` writes them. A picture without a
foreground counts as a miss, takes the last rank, and counts as a full leak; distances are means over the
pictures that have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import records
from .configs import CompositionConfig, StudyConfig
from .measure import Interval, paired_bootstrap
from .references import CANDIDATES, REAL_LISTS, load_references


@dataclass(frozen=True)
class Found:
    """How a picture's texture or colour is found among the candidates.

    `first`: share found first (chance 1 / 20). `rank`: mean number of candidates as near or nearer (chance
    9.5). `distance`: mean distance, None where no picture has a foreground, and for both together.
    """

    first: float
    rank: float
    distance: float | None


@dataclass(frozen=True)
class AppearanceRow:
    """One arm of appearance. `leakage`: the silhouette's IoU less the floor's; None for the floor.

    `leaked`: share of pictures whose silhouette is found to be the reference's.
    """

    pictures: int
    texture: Found
    colour: Found
    both: Found
    obeyed: dict[str, float]
    leakage: Interval | None
    leaked: float
    failed: float


@dataclass(frozen=True)
class ShapeRow:
    """One arm of shape, over filled or pierced outlines. Leakage: likeness less the floor's.

    `leaked`: share of pictures whose texture is found to be the reference's.
    """

    pictures: int
    iou: float
    first: float
    obeyed: dict[str, float]
    texture_leakage: Interval | None
    colour_leakage: Interval | None
    leaked: float
    failed: float


@dataclass(frozen=True)
class PairRow:
    """One arm of both attributes in one pass: shares found first; `right`: silhouette, texture and colour."""

    pictures: int
    silhouette: float
    texture: float
    colour: float
    right: float
    obeyed: dict[str, float]
    failed: float


Row = AppearanceRow | ShapeRow | PairRow
MODES = ("appearance", "shape, filled", "shape, pierced", "both")


def real_tables(found: Iterable[records.Record]) -> dict[str, dict[str, Row]]:
    """Rows by mode (of MODES, those that have any) and arm, from records on one of the real lists.

    Other records are passed over. Raises ValueError where the records are on two lists, KeyError where the
    floor that a leakage is measured from is not among them.
    """
    runs: dict[str, dict[str, list[tuple[Any, dict]]]] = {mode: {} for mode in MODES}
    floors: dict[Any, dict] = {}
    lists = set()
    classes = {"study": StudyConfig, "composition": CompositionConfig}
    for record in found:
        if record.kind not in classes or record.config["list"] not in REAL_LISTS:
            continue
        config = records.config_of(record, classes[record.kind])
        lists.add(config.list)
        runs[_mode(config)].setdefault(config.arm, []).append((config, record.metrics))
        if config.kind == "floor":
            floors[config] = record.metrics
    if len(lists) > 1:
        raise ValueError(
            f"these records are on the lists {' and '.join(sorted(lists))}: make a table of each"
        )
    make = {"appearance": _appearance, "both": _pair}
    return {
        mode: {arm: make.get(mode, _shape)(some, floors) for arm, some in arms.items()}
        for mode, arms in runs.items()
        if arms
    }


def _mode(config: StudyConfig | CompositionConfig) -> str:
    if isinstance(config, CompositionConfig):
        return "both"
    if config.attribute == "appearance":
        return "appearance"
    pierced = load_references(which=config.list)[config.reference].silhouette.pierced
    return "shape, pierced" if pierced else "shape, filled"


Runs = Sequence[tuple[Any, dict]]


def _values(runs: Runs, name: str, missing: Any) -> list:
    """A score of every picture; `missing` where there was no foreground."""
    return [missing if value is None else value for _, metrics in runs for value in metrics[name]]


def _mean(runs: Runs, name: str, missing: Any) -> float:
    return float(np.mean(_values(runs, name, missing)))


def _found(runs: Runs, name: str) -> Found:
    seen = [v for v in _values(runs, f"{name}_distance", None) if v is not None] if name != "both" else []
    return Found(
        _mean(runs, f"{name}_first", False),
        _mean(runs, f"{name}_rank", CANDIDATES - 1),
        float(np.mean(seen)) if seen else None,
    )


def _obeyed(runs: Runs) -> dict[str, float]:
    names = [name for name in runs[0][1] if name.startswith("obeyed_")]
    return {name.removeprefix("obeyed_"): _mean(runs, name, False) for name in names}


def _leakage(runs: Runs, floors: dict[Any, dict], name: str) -> Interval | None:
    if runs[0][0].kind == "floor":
        return None
    base, groups = [], []
    for config, metrics in runs:
        floor = replace(config, kind="floor", tuning=None)
        if floor not in floors:
            raise KeyError(f"no floor is stored for {config.reference} ({config.attribute})")
        # A floor without a foreground has nothing of the reference.
        base += [0.0 if value is None else value for value in floors[floor][name]]
        groups += [config.reference] * len(metrics[name])
    return paired_bootstrap(_values(runs, name, 1.0), base, groups=groups)


def _leaked(runs: Runs, name: str) -> float:
    return _mean(runs, name, runs[0][0].kind != "floor")


def _appearance(runs: Runs, floors: dict[Any, dict]) -> AppearanceRow:
    return AppearanceRow(
        pictures=len(_values(runs, "failed", None)),
        texture=_found(runs, "texture"),
        colour=_found(runs, "colour"),
        both=_found(runs, "both"),
        obeyed=_obeyed(runs),
        leakage=_leakage(runs, floors, "iou"),
        leaked=_leaked(runs, "silhouette"),
        failed=_mean(runs, "failed", None),
    )


def _shape(runs: Runs, floors: dict[Any, dict]) -> ShapeRow:
    return ShapeRow(
        pictures=len(_values(runs, "failed", None)),
        iou=_mean(runs, "iou", 0.0),
        first=_mean(runs, "silhouette", False),
        obeyed=_obeyed(runs),
        texture_leakage=_leakage(runs, floors, "texture_likeness"),
        colour_leakage=_leakage(runs, floors, "colour_likeness"),
        leaked=_leaked(runs, "texture_first"),
        failed=_mean(runs, "failed", None),
    )


def _pair(runs: Runs, floors: dict[Any, dict]) -> PairRow:
    names = ("silhouette", "texture_first", "colour_first")
    each = [_values(runs, name, False) for name in names]
    return PairRow(
        len(each[0]),
        *(float(np.mean(values)) for values in each),
        right=float(np.mean(np.all(each, 0))),
        obeyed=_obeyed(runs),
        failed=_mean(runs, "failed", None),
    )


# ------------------------------------------------------------------------------------------------------------
# as text

# Rows in the order they are read in: controls of the lower end, what was learnt, controls of the upper end.
FIRST, LAST = ("floor", "flat", "word"), ("ceiling", "lossless", "copy")
ARMS = {
    "floor": "untouched backbone",
    "flat": "flat area of the mean colour",
    "word": "pseudo-word only",
    "encoder": "encoder tuned",
    "decoder": "decoder tuned",
    "all": "whole UNet tuned",
    "encoder (source)": "encoder, source's recipe",
    "decoder (source)": "decoder, source's recipe",
    "ours": "shape in the encoder, appearance in the decoder",
    "reversed": "shape in the decoder, appearance in the encoder",
    "ceiling": "right answer through the autoencoder",
    "lossless": "right answer, lossless",
    "copy": "copy of the reference",
}
OBEYED = {
    "appearance": ("shape", "background"),
    "shape, filled": ("pattern", "colours", "background"),
    "shape, pierced": ("pattern", "colours", "background"),
    "both": ("background",),
}
HEADS = {
    "appearance": (
        "texture first", "rank", "distance", "colour first", "rank", "distance", "both first", "rank",
        "leakage of shape (95 %)", "found as leaked",
    ),
    "shape": (
        "IoU", "found first", "leakage of texture (95 %)", "leakage of colour (95 %)", "found as leaked",
    ),
    "both": ("silhouette", "texture", "colour", "all three"),
}  # fmt: skip


def markdown(tables: dict[str, dict[str, Row]]) -> str:
    """The tables in Markdown, one after the other."""
    return "\n\n".join(_markdown(mode, rows) for mode, rows in tables.items())


def _markdown(mode: str, rows: dict[str, Row]) -> str:
    heads = [mode, *HEADS[mode.split(",")[0]], *OBEYED[mode], "no foreground", "pictures"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for arm in sorted(rows, key=_order):
        row = rows[arm]
        named = [_share(row.obeyed[name]) for name in OBEYED[mode]]
        cells = [ARMS.get(arm, arm), *_cells(row), *named, _share(row.failed), str(row.pictures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _order(arm: str) -> tuple[int, int]:
    if arm in FIRST:
        return 0, FIRST.index(arm)
    return (2, LAST.index(arm)) if arm in LAST else (1, 0)


def _cells(row: Row) -> list[str]:
    if isinstance(row, AppearanceRow):
        found = [
            cell
            for one, digits in ((row.texture, 2), (row.colour, 1))
            for cell in (_share(one.first), f"{one.rank:.1f}", _number(one.distance, digits))
        ]
        both = [_share(row.both.first), f"{row.both.rank:.1f}"]
        return [*found, *both, _interval(row.leakage), _share(row.leaked)]
    if isinstance(row, ShapeRow):
        leakages = [_interval(row.texture_leakage), _interval(row.colour_leakage)]
        return [f"{row.iou:.2f}", _share(row.first), *leakages, _share(row.leaked)]
    return [_share(share) for share in (row.silhouette, row.texture, row.colour, row.right)]


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _number(value: float | None, digits: int) -> str:
    return "--" if value is None else f"{value:.{digits}f}"


def _interval(value: Interval | None) -> str:
    return "--" if value is None else f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
