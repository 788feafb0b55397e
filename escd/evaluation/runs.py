"""The stored runs of the study by mode and arm, and what the tables take from the runs of one arm.

A picture without a foreground has None for a score. Each caller says what counts instead: a miss where the
score is a transfer, a full leak where it is a leakage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import records
from .configs import CompositionConfig, StudyConfig
from .measure import Interval, paired_bootstrap

Metrics = dict[str, Any]
Runs = Sequence[tuple[Any, Metrics]]  # config and metrics of each run of one arm
CONFIGS = {"study": StudyConfig, "composition": CompositionConfig}


def by_arm(
    results: Iterable[records.Record], mode_of: Callable[[Any], str]
) -> tuple[dict[str, dict[str, Runs]], dict[Any, Metrics]]:
    """The runs of `results` by mode and arm, and the metrics of each floor by its config.

    Records of other kinds than the study's two are ignored.
    """
    runs: dict[str, dict[str, list[tuple[Any, Metrics]]]] = {}
    floors: dict[Any, Metrics] = {}
    for record in results:
        if record.kind not in CONFIGS:
            continue
        config = records.config_of(record, CONFIGS[record.kind])
        runs.setdefault(mode_of(config), {}).setdefault(config.arm, []).append((config, record.metrics))
        if config.kind == "floor":
            floors[config] = record.metrics
    return runs, floors


def values(runs: Runs, score: str, missing: Any) -> list[Any]:
    """A score of every picture; `missing` where there is no foreground."""
    return [missing if value is None else value for _, metrics in runs for value in metrics[score]]


def mean(runs: Runs, score: str, missing: Any) -> float:
    """The mean of `values`."""
    return float(np.mean(values(runs, score, missing)))


def mean_of_known(runs: Runs, score: str) -> float | None:
    """The mean over the pictures that have a foreground, for a distance, which has no worst value.

    None where no picture has one.
    """
    known = [value for value in values(runs, score, None) if value is not None]
    return float(np.mean(known)) if known else None


def obeyed(runs: Runs) -> dict[str, float]:
    """Share of pictures that show what their prompts name, by attribute."""
    names = [name for name in runs[0][1] if name.startswith("obeyed_")]
    return {name.removeprefix("obeyed_"): mean(runs, name, False) for name in names}


def pair_shares(runs: Runs) -> dict[str, float]:
    """Shares of pictures with the right silhouette, texture and colour; "right": with all three."""
    names = {"silhouette": "silhouette", "texture": "texture_first", "colour": "colour_first"}
    right = {name: values(runs, score, False) for name, score in names.items()}
    shares = {name: float(np.mean(of_one)) for name, of_one in right.items()}
    return shares | {"right": float(np.mean(np.all(list(right.values()), axis=0)))}


def leakage(runs: Runs, floors: dict[Any, Metrics], score: str) -> Interval:
    """The unwanted similarity `score` less the floor's, picture by picture, over whole references.

    Raises KeyError where the floor of a reference is not stored.
    """
    base, groups = [], []
    for config, metrics in runs:
        floor = replace(config, kind="floor", tuning=None)
        if floor not in floors:
            raise KeyError(f"no floor is stored for {config.reference} ({config.attribute})")
        # A floor without a foreground shows nothing of the reference; any other run counts as a full leak.
        base += [0.0 if value is None else value for value in floors[floor][score]]
        groups += [config.reference] * len(metrics[score])
    return paired_bootstrap(values(runs, score, 1.0), base, groups=groups)
