"""The study's tables: one row per arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import records
from .configs import CompositionConfig, StudyConfig
from .formats import interval, share_of
from .measure import Interval
from .runs import Metrics, Runs, by_arm, leakage, mean, mean_of_known, obeyed, values

# Mode -> the scores of the unwanted attribute: its similarity, and whether it is the nearest candidate.
UNWANTED = {"shape": ("texture_similarity", "texture_material"), "appearance": ("iou", "silhouette")}


@dataclass(frozen=True)
class Row:
    """One arm of the table over all its pictures; shares and similarities lie in [0, 1].

    transfer: scores of the wanted attribute. obeyed: share of pictures that show what the prompts name, by
    attribute. leakage: similarity of the unwanted attribute less the floor's, with its interval; None but
    for customizations. leaked: share of pictures in which the unwanted attribute is the nearest of the
    candidates; None for compositions. failed: share of pictures without a foreground.
    """

    pictures: int
    transfer: dict[str, float]
    obeyed: dict[str, float]
    leakage: Interval | None
    leaked: float | None
    failed: float


def table(results: Iterable[records.Record]) -> dict[str, dict[str, Row]]:
    """Rows by mode ("shape", "appearance", "composition") and arm, from records of this study.

    Raises KeyError when a customized run's floor is not among them.
    """
    runs, floors = by_arm(results, _mode)
    return {
        mode: {arm: _row(mode, of_arm, floors) for arm, of_arm in arms.items()} for mode, arms in runs.items()
    }


def _mode(config: StudyConfig | CompositionConfig) -> str:
    return config.attribute if isinstance(config, StudyConfig) else "composition"


def _row(mode: str, runs: Runs, floors: dict[Any, Metrics]) -> Row:
    transfer = {"shape": _shape_transfer, "appearance": _appearance_transfer, "composition": _both_transfer}
    failed = values(runs, "failed", None)
    leaks = leaked = None
    if mode in UNWANTED:
        similarity, nearest = UNWANTED[mode]
        customized = runs[0][0].kind == "customized"
        # Without a foreground, a customization counts as a leak; a control does not.
        leaked = mean(runs, nearest, customized)
        leaks = leakage(runs, floors, similarity) if customized else None
    return Row(len(failed), transfer[mode](runs), obeyed(runs), leaks, leaked, float(np.mean(failed)))


def _shape_transfer(runs: Runs) -> dict[str, float]:
    return {"iou": mean(runs, "iou", 0.0), "retrieval": mean(runs, "silhouette", False)}


def _appearance_transfer(runs: Runs) -> dict[str, float]:
    """Retrieval by colour and texture together, which colour decides, and by texture alone."""
    shares = {
        "retrieval": mean(runs, "material", False),
        "texture": mean(runs, "texture_material", False),
    }
    return shares | _distance(runs)


def _both_transfer(runs: Runs) -> dict[str, float]:
    silhouettes, materials = values(runs, "silhouette", False), values(runs, "material", False)
    shares = {
        "silhouette": mean(runs, "silhouette", False),
        "iou": mean(runs, "iou", 0.0),
        "material": mean(runs, "material", False),
    }
    both = [a and b for a, b in zip(silhouettes, materials, strict=True)]
    return shares | _distance(runs) | {"both": float(np.mean(both))}


def _distance(runs: Runs) -> dict[str, float]:
    distance = mean_of_known(runs, "combined")
    return {} if distance is None else {"distance": distance}


def show(rows: dict[str, dict[str, Row]]) -> str:
    """The table as text."""
    return "\n".join(_line(mode, arm, row) for mode, arms in rows.items() for arm, row in arms.items())


def _line(mode: str, arm: str, row: Row) -> str:
    parts = [f"{name} {value:.2f}" for name, value in row.transfer.items()]
    parts += [f"{name} {share_of(value)}" for name, value in row.obeyed.items()]
    if row.leakage is not None:
        parts.append(f"leakage {interval(row.leakage, 3)}")
    if row.leaked is not None:
        parts.append(f"leaked {share_of(row.leaked)}")
    parts.append(f"failed {share_of(row.failed)}")
    return f"{mode:>11}  {arm:<10} {row.pictures:>4} pictures: " + ", ".join(parts)
