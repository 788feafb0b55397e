"""Reads the grid of rates and steps (`grid_configs`) and chooses the best point of each method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import records
from ..files import write_text
from ..method.config import TuningConfig
from .formats import decimals, markdown_table
from .method_configs import GRID_LIST, OURS, MethodConfig
from .runs import values

# The scores in [0, 1] that say how well an attribute is transferred.
QUALITY = {"shape": ("iou",), "appearance": ("texture_likeness", "colour_likeness")}
CRITERION = (
    "mean of transfer (shape: IoU; appearance: likeness of texture and of colour) and obedience (share of "
    "what the prompts name), over all images; of equal ones the fewest steps"
)


@dataclass(frozen=True)
class Point:
    """One point of the grid: a method's tuning, its number of steps, and its scores over the references."""

    method: str
    attribute: str
    factor: float
    tuning: TuningConfig
    steps: int
    transfer: float
    obeyed: float
    references: int

    @property
    def score(self) -> float:
        """What the best point is chosen by (CRITERION)."""
        return (self.transfer + self.obeyed) / 2

    @property
    def rates(self) -> dict[str, float | int]:
        """The settings of a preset that this point changes, where the preset has them."""
        names = ("learning_rate", "word_learning_rate", "bias_learning_rate")
        rates = {name: getattr(self.tuning, name) for name in names}
        return {name: rate for name, rate in rates.items() if rate is not None} | {"steps": self.steps}


def transfer(metrics: Mapping[str, Sequence[Any]], attribute: str) -> float:
    """Mean quality of an attribute's images; one without a foreground has 0."""
    return float(np.mean([np.mean(values([(None, metrics)], name, 0.0)) for name in QUALITY[attribute]]))


def obedience(metrics: Mapping[str, Any]) -> float:
    """Share of what the prompts name that the images show."""
    asked = [answers for name, answers in metrics.items() if name.startswith("obeyed_")]
    return float(np.mean([np.mean(answers) for answers in asked]))


def points(results: Iterable[records.Record], which: str = GRID_LIST) -> list[Point]:
    """The points of the grid on a list, each over the references that all points of its method have.

    A reference of which some factor is missing does not count.
    """
    found: dict[tuple[str, str], dict[float, dict[str, tuple[MethodConfig, list]]]] = {}
    for record in results:
        if record.kind != records.kind_of(MethodConfig) or record.config["list"] != which:
            continue
        config = records.config_of(record, MethodConfig)
        of_method = found.setdefault((config.method, config.attribute), {})
        of_method.setdefault(config.factor, {})[config.reference] = (config, record.metrics["curve"])
    grid = []
    for (method, attribute), by_factor in found.items():
        shared = sorted(set.intersection(*(set(runs) for runs in by_factor.values())))
        for factor, runs in by_factor.items() if shared else ():
            config = runs[shared[0]][0]
            for place, steps in enumerate(config.budgets):
                scored = [runs[reference][1][place] for reference in shared]
                grid.append(
                    Point(
                        method, attribute, factor, config.tuning, steps,
                        float(np.mean([transfer(one, attribute) for one in scored])),
                        float(np.mean([obedience(one) for one in scored])),
                        len(shared),
                    )
                )  # fmt: skip
    return grid


def best(grid: Iterable[Point]) -> dict[tuple[str, str], Point]:
    """The best point of each method and attribute by `CRITERION`."""
    chosen: dict[tuple[str, str], Point] = {}
    for point in grid:
        key = (point.method, point.attribute)
        if key not in chosen or _rank(point) > _rank(chosen[key]):
            chosen[key] = point
    return chosen


def _rank(point: Point) -> tuple[float, int]:
    return point.score, -point.steps


def table(grid: Sequence[Point]) -> str:
    """Every point in Markdown; the best of each method and attribute in bold."""
    chosen = best(grid).values()
    heads = ["method", "attribute", "factor", "steps", "transfer", "obeyed", "score", "references"]
    rows = []
    for point in grid:
        score = decimals(point.score, 3)
        rows.append([
            point.method, point.attribute, f"{point.factor:g}", str(point.steps), decimals(point.transfer, 3),
            decimals(point.obeyed, 3), f"**{score}**" if point in chosen else score, str(point.references),
        ])  # fmt: skip
    return f"The best (bold) by {CRITERION}.\n\n{markdown_table(heads, rows)}"


def write_rates(grid: Iterable[Point], path: Path) -> dict[str, dict[str, dict[str, float | int]]]:
    """Write the best rates and steps of each published method to the file that the presets read.

    Ours has its defaults in `escd.method.config`, where its own study has them: they are not written.
    """
    rates: dict[str, dict[str, dict[str, float | int]]] = {}
    for (method, attribute), point in sorted(best(grid).items()):
        if method not in OURS:
            rates.setdefault(method, {})[attribute] = point.rates
    write_text(path, json.dumps(rates, indent=1) + "\n")
    return rates
