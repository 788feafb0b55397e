"""The study's tables: one row per arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import records
from .configs import CompositionConfig, StudyConfig
from .measure import Interval, paired_bootstrap


@dataclass(frozen=True)
class Row:
    """One arm of the table over all its pictures; shares and similarities lie in [0, 1].

    `transfer` holds the wanted attribute's scores, `obeyed` what the prompts named, `leakage` the unwanted
    attribute's similarity less the floor's, with its interval (None for floor and ceiling), `leaked` the
    share of pictures in which the unwanted attribute is the nearest of the candidates, `failed` that
    without a foreground.
    """

    pictures: int
    transfer: dict[str, float]
    obeyed: dict[str, float]
    leakage: Interval | None
    leaked: float | None
    failed: float


def table(found: Iterable[records.Record]) -> dict[str, dict[str, Row]]:
    """Rows by mode ("shape", "appearance", "composition") and arm, from records of this study.

    Raises KeyError when a customised run's floor is not among them.
    """
    by_arm: dict[tuple[str, str], list[tuple[Any, dict]]] = {}
    floors: dict[Any, dict] = {}
    kinds = {"study": StudyConfig, "composition": CompositionConfig}
    for record in found:
        if record.kind not in kinds:
            continue
        config = records.config_of(record, kinds[record.kind])
        mode = config.attribute if record.kind == "study" else "composition"
        by_arm.setdefault((mode, config.arm), []).append((config, record.metrics))
        if config.kind == "floor":
            floors[_floor_of(config)] = record.metrics
    rows: dict[str, dict[str, Row]] = {}
    for (mode, arm), runs in by_arm.items():
        rows.setdefault(mode, {})[arm] = _row(mode, runs, floors)
    return rows


def _floor_of(config: StudyConfig | CompositionConfig) -> Any:
    if isinstance(config, StudyConfig):
        return replace(config, kind="floor", tuning=None)
    return replace(config, kind="floor", shape_tuning=None, appearance_tuning=None)


def _row(mode: str, runs: list[tuple[Any, dict]], floors: dict[Any, dict]) -> Row:
    def gather(name: str, missing: Any) -> list:
        """A score of every picture; `missing` where the foreground failed."""
        return [missing if value is None else value for _, metrics in runs for value in metrics[name]]

    def mean(name: str, missing: Any) -> float:
        return float(np.mean(gather(name, missing)))

    failed = gather("failed", None)
    shapes = {"iou": mean("iou", 0.0), "retrieval": mean("silhouette", False)}
    # A distance has no worst value: the mean is over the pictures that have a foreground; retrieval counts
    # them all.
    distances = [value for value in gather("combined", None) if value is not None]
    # By both colour and texture, which colour decides, and by texture alone.
    materials = {"retrieval": mean("material", False), "texture": mean("texture_material", False)}
    if distances:
        materials["distance"] = float(np.mean(distances))
    if mode == "composition":
        both = [a and b for a, b in zip(gather("silhouette", False), gather("material", False), strict=True)]
        transfer = {
            "silhouette": shapes["retrieval"],
            "iou": shapes["iou"],
            "material": materials["retrieval"],
        }
        transfer |= {"distance": materials["distance"]} if distances else {}
        transfer["both"] = float(np.mean(both))
    else:
        transfer = shapes if mode == "shape" else materials
    kept = {
        name.removeprefix("obeyed_"): mean(name, False)
        for name in runs[0][1] if name.startswith("obeyed_")
    }  # fmt: skip
    leakage = leaked = None
    unwanted = {"shape": ("texture_similarity", "texture_material"), "appearance": ("iou", "silhouette")}
    if mode in unwanted:
        similarity, nearest = unwanted[mode]
        customized = runs[0][0].kind == "customized"
        leaked = mean(nearest, customized)
        if customized:
            base, groups = [], []
            for config, metrics in runs:
                floor = _floor_of(config)
                if floor not in floors:
                    raise KeyError(f"no floor is stored for {config.reference} ({mode})")
                # A floor without a foreground has nothing of the reference; one of the method counts as a
                # leak.
                base += [0.0 if value is None else value for value in floors[floor][similarity]]
                groups += [config.reference] * len(metrics[similarity])
            leakage = paired_bootstrap(gather(similarity, 1.0), base, groups=groups)
    return Row(len(failed), transfer, kept, leakage, leaked, float(np.mean(failed)))


def show(rows: dict[str, dict[str, Row]]) -> str:
    """The table as text."""
    lines = []
    for mode, arms in rows.items():
        for arm, row in arms.items():
            parts = [f"{name} {value:.2f}" for name, value in row.transfer.items()]
            parts += [f"{name} {100 * value:.0f} %" for name, value in row.obeyed.items()]
            if row.leakage is not None:
                parts.append(
                    f"leakage {row.leakage.mean:+.3f} [{row.leakage.low:+.3f}, {row.leakage.high:+.3f}]"
                )
            if row.leaked is not None:
                parts.append(f"leaked {100 * row.leaked:.0f} %")
            parts.append(f"failed {100 * row.failed:.0f} %")
            lines.append(f"{mode:>11}  {arm:<10} {row.pictures:>4} pictures: " + ", ".join(parts))
    return "\n".join(lines)
