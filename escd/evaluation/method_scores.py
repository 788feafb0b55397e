"""Scores a published method: after each of several numbers of steps, and on two references together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..backbone.model import Backbone
from ..method.config import TuningConfig
from ..method.cost import tuning_cost
from ..method.customization import Customization
from ..method.mixing import mix_layers
from ..method.pipeline import ESCDPipeline
from ..method.snapshots import Snapshot, Snapshots
from ..method.tuning import customize
from . import kept
from .judges import Judges
from .method_configs import MIXED, MethodConfig, MethodPairConfig
from .prompts import prompts_for, prompts_for_pair
from .references import Reference, References
from .scores import quiet, score_customization


class Loaded(Protocol):
    """What `study.Study` has loaded, and the customizations that it keeps."""

    def backbone(self, name: str) -> Backbone: ...

    def weights(self, name: str) -> str: ...

    def judges(self) -> Judges: ...

    def references(self, name: str) -> References: ...

    def learn(
        self, attribute: str, reference: Reference, tuning: TuningConfig, backbone: str
    ) -> Customization: ...


def score_curve(study: Loaded, config: MethodConfig, folder: Path) -> dict[str, Any]:
    """Scores after each budget, in "curve", with the seconds of tuning until then and the size.

    Seconds begin with the reference and end with the last step; nothing that scores is counted, and the
    class images are counted apart, in "prior_seconds" (0 where there are none). "memory_gb" is what tuning
    holds at its peak (`tuning_cost`): counted, because a process that tunes one method after the other
    cannot measure it. `folder` keeps each snapshot as the study's own customizations.
    """
    reference = study.references(config.list)[config.reference]
    backbone = study.backbone(config.backbone)
    prompts = prompts_for(reference, config.attribute)
    # The tuning is over before the first image is drawn.
    taken = list(runs(config, reference, backbone))
    curve, prior_seconds = [], 0.0
    for snapshot, prior in taken:
        learnt, prior_seconds = snapshot.customization, max(prior_seconds, prior)
        tuning = replace(config.tuning, steps=learnt.steps)
        about = kept.keep(
            folder, reference, snapshot, tuning, backbone, study.weights(config.backbone), prior
        )
        scores = score_customization(
            quiet(ESCDPipeline(backbone, **{config.attribute: learnt})), prompts, reference, reference,
            study.references(config.list), study.judges(),
            seed=config.seed, sampler_steps=config.sampler_steps, guidance_scale=config.guidance_scale,
            guidance_rescale=config.guidance_rescale, guidance_from=config.guidance_from,
        )  # fmt: skip
        point = {"steps": learnt.steps, "seconds": round(snapshot.seconds, 3)}
        curve.append(point | {"megabytes": learnt.nbytes / 1e6, "sha256": about.sha256, **scores})
    return {
        "prompts": [one.text for one in prompts],
        "prior_seconds": round(prior_seconds, 3),
        "memory_gb": tuning_cost(backbone, _longest(config)).total / 2**30,
        "curve": curve,
    }


def runs(config: MethodConfig, reference: Reference, backbone: Backbone) -> Iterator[tuple[Snapshot, float]]:
    """The snapshot after each budget, and the seconds of its run's class images.

    One run where the rate is constant, else a run for each budget.
    """
    budgets = config.budgets
    together = [budgets] if config.tuning.constant_rate else [(steps,) for steps in budgets]
    for steps in together:
        snapshots = Snapshots(steps)
        customize(
            reference.image, config.attribute, backbone, config=replace(config.tuning, steps=steps[-1]),
            progress=False, keep_interrupted=False, snapshots=snapshots,
        )  # fmt: skip
        for snapshot in snapshots.taken:
            yield snapshot, snapshots.prior_seconds if snapshot.customization.steps else 0.0


def _longest(config: MethodConfig) -> TuningConfig:
    return replace(config.tuning, steps=max(1, config.budgets[-1]))


def score_pair(study: Loaded, config: MethodPairConfig) -> dict[str, Any]:
    """Scores of images that combine the method's results on two references (`MethodPairConfig.way`).

    All methods have the same prompts. P+ mixes its embeddings into one pseudo-word, the shape's, so `*a` is
    read as its plain word there.
    """
    listed, backbone = study.references(config.list), study.backbone(config.backbone)
    shape, appearance = listed[config.shape], listed[config.appearance]
    learnt = {
        "shape": study.learn("shape", shape, config.shape_tuning, config.backbone),
        "appearance": study.learn("appearance", appearance, config.appearance_tuning, config.backbone),
    }
    if config.way == MIXED:
        learnt = {"shape": mix_layers(learnt["shape"], learnt["appearance"], backbone)}
    prompts = prompts_for_pair(shape, appearance)
    scores = score_customization(
        quiet(ESCDPipeline(backbone, **learnt)), prompts, shape, appearance, listed, study.judges(),
        seed=config.seed, sampler_steps=config.sampler_steps, guidance_scale=config.guidance_scale,
        guidance_rescale=config.guidance_rescale, guidance_from=config.guidance_from,
    )  # fmt: skip
    return {"prompts": [one.text for one in prompts], "way": config.way, **scores}
