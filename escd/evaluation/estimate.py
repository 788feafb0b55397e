"""How long the missing runs of a study will take, from the seconds of stored runs on the same device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .. import records
from ..method.config import TuningConfig
from .configs import CompositionConfig, RankConfig, StudyConfig
from .method_configs import MethodConfig, MethodPairConfig
from .prompts import PROMPTS


def seconds(
    missing: Sequence[Any], device: torch.device | str | None, folder: Path | None = None
) -> tuple[float, int]:
    """Seconds of the runs in one process, and for how many of them no time is stored on this device.

    A run takes the median of the stored runs of its group (kind, attribute, part and steps; of a published
    method, which and how many steps), or of its kind where the group has none. Before any published method
    is stored, its run is estimated roughly from the study's (`_rough`). Learning is counted once for each
    customization, since it is kept. In records older than `Record.learnt`, the seconds of a run include those
    of learning.
    """
    scoring: dict[Any, list[float]] = defaultdict(list)
    learning: dict[Any, list[float]] = defaultdict(list)
    here = records.platform_of(device)["device"]
    for kind in {type(config) for config in missing} | {StudyConfig}:
        for record in records.all(kind, folder=folder):
            if record.device != here:
                continue
            config = records.config_of(record, kind)
            new = sum(one["seconds"] for one in record.learnt.values() if not one["kept"])
            for group in (_group(config), kind):
                scoring[group].append(record.seconds - new)
            for attribute, _, tuning in _learnt(config):
                if attribute in record.learnt:
                    learning[attribute, tuning].append(record.learnt[attribute]["seconds"])
    times = [
        scoring.get(_group(config)) or scoring.get(type(config)) or _rough(config, scoring, learning)
        for config in missing
    ]
    to_learn = {one for config in missing for one in _learnt(config)}
    total = sum(median(known) for known in times if known)
    total += sum(median(learning.get((attribute, tuning), [0.0])) for attribute, _, tuning in to_learn)
    return total, times.count(None)


def _rough(
    config: Any, scoring: Mapping[Any, list[float]], learning: Mapping[Any, list[float]]
) -> list[float] | None:
    """Seconds of a published method from those of the study: of a noised view, and of a generated image.

    None for another run, and where the study has none of these.
    """
    images = [each / PROMPTS for each in scoring.get(StudyConfig, [])]
    views = [
        each / (tuning.steps * tuning.batch_size)
        for (_, tuning), times in learning.items()
        for each in times
        if tuning.steps
    ]
    if isinstance(config, MethodPairConfig) and images:
        return [PROMPTS * median(images)]
    if not isinstance(config, MethodConfig) or not images or not views:
        return None
    tuning, budgets = config.tuning, config.budgets
    steps = max(budgets) if tuning.constant_rate else sum(budgets)
    each_step = tuning.batch_size * (2 if tuning.prior_images else 1)
    drawn = tuning.prior_images + PROMPTS * len(budgets)
    return [steps * each_step * median(views) + drawn * median(images)]


def _group(config: Any) -> tuple:
    if isinstance(config, MethodConfig):
        return MethodConfig, config.method, config.attribute, config.budgets
    if isinstance(config, MethodPairConfig):
        return MethodPairConfig, config.method
    tunings = tuple((tuning.part, tuning.steps) for *_, tuning in _learnt(config))
    kind = getattr(config, "kind", None)
    # These controls generate nothing either.
    kind = "ceiling" if kind in ("lossless", "flat", "copy") else kind
    return type(config), kind, getattr(config, "attribute", None), tunings


def _learnt(config: Any) -> Iterator[tuple[str, str, TuningConfig]]:
    """Attribute, reference and tuning of each customization that a run scores."""
    if isinstance(config, CompositionConfig):
        if config.kind == "customized":
            yield "shape", config.shape, config.shape_tuning
            yield "appearance", config.appearance, config.appearance_tuning
    elif isinstance(config, StudyConfig | RankConfig) and config.tuning is not None:
        yield config.attribute, config.reference, config.tuning


def in_words(missing: int, total: int, seconds: float, unknown: int, processes: int = 1) -> str:
    """What the study says before it starts."""
    if not missing:
        return f"all {total} runs are stored"
    text = f"{missing} of {total} runs are missing"
    if unknown < missing:
        text += f": about {_time(seconds / processes)}"
        text += f" in {processes} processes" if processes > 1 else ""
    if unknown:
        text += f" (no estimate for {unknown} of them: nothing alike is stored from this device)"
    return text


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
