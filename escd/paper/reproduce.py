"""Runs stored records again and compares."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .. import records
from ..evaluation.configs import StudyConfig
from ..evaluation.kept import learn_now
from ..evaluation.references import Reference
from ..evaluation.study import Study
from ..method.config import TuningConfig
from ..method.customization import Customization
from ..records import Record

REPEATS, REPEAT_SECONDS = 2, 60.0


class FreshStudy(Study):
    """A study that tunes every part again, without the customizations that earlier runs kept."""

    def learn(
        self, attribute: str, reference: Reference, tuning: TuningConfig, backbone: str = "mini"
    ) -> Customization:
        return learn_now(reference.image, attribute, tuning, self.backbone(backbone)).customization


def repeatable(stored: Sequence[Record], count: int = REPEATS) -> list[Record]:
    """At most `count` records that any clone can run again in a minute each, chosen by the commit."""
    cheap = [r for r in stored if r.kind == "study" and r.device == "cpu" and _seconds(r) <= REPEAT_SECONDS]
    turn = records.commit() or ""
    return sorted(cheap, key=lambda r: hashlib.sha256(f"{turn}{r.key}".encode()).hexdigest())[:count]


def _seconds(record: Record) -> float:
    """Seconds to run a record again, with the tuning of customizations that were kept from earlier runs."""
    return record.seconds + sum(one["seconds"] for one in record.learnt.values() if one["kept"])


def run_again(
    stored: Sequence[Record],
    everything: Sequence[Record],
    score: Callable[[Any], Mapping[str, Any]] | None = None,
) -> list[str]:
    """Run records again; returns a line for each difference.

    On the record's platform (machine, instruction set, threads, versions) results must be equal to the bit.
    Elsewhere, each score's mean over a run's images may differ by three standard errors, from the spread over
    images within the runs of `everything`; a yes-or-no score may always differ in one image.
    """
    score = score or FreshStudy(device="cpu").score
    lines = []
    threads = torch.get_num_threads()
    for record in stored:
        torch.set_num_threads(record.threads)  # the number of threads decides the order of sums
        try:
            fresh = score(records.config_of(record, StudyConfig))
            same = records.same_platform(record, "cpu")
        finally:
            torch.set_num_threads(threads)
        if same:
            differing = records.differences(record, fresh)
        else:
            means = dataclasses.replace(record, metrics=_means(record.metrics))
            differing = records.differences(means, _means(fresh), _bounds(record, everything))
        name = f"{record.config['attribute']} of {record.config['reference']}, {record.key[:8]}"
        verdict = "differs" if differing else "the same bits" if same else "within its bounds"
        print(f"{name}: {verdict}")
        lines += [f"{name}: {line}" for line in differing]
    return lines


def _means(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The mean of each score over a run's images; None where no image has it."""
    numbers_of = {
        name: [float(v) for v in values if v is not None]
        for name, values in metrics.items()
        if isinstance(values, list) and not any(isinstance(v, str) for v in values)
    }
    return {name: float(np.mean(values)) if values else None for name, values in numbers_of.items()}


def _bounds(record: Record, everything: Sequence[Record]) -> dict[str, float]:
    """Three standard errors of each score's mean over a run's images, at least one image's yes or no."""
    alike = [
        r for r in everything if r.kind == record.kind and r.config["attribute"] == record.config["attribute"]
    ]
    bounds = {}
    for name in _means(record.metrics):
        runs = [[float(v) for v in r.metrics[name] if v is not None] for r in alike if name in r.metrics]
        runs = [run for run in runs if len(run) > 1]
        if runs:
            variance = float(np.mean([np.var(run, ddof=1) for run in runs]))
            values = record.metrics[name]
            # Where nearly all are right, the spread underestimates the error of a few images.
            one = 1 / len(values) if all(isinstance(v, bool) for v in values if v is not None) else 0.0
            bounds[name] = max(3 * math.sqrt(variance / len(values)), one)
    return bounds
