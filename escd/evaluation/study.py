"""The runs of the probing study: what each part of the UNet transfers from one image, and what leaks.

One run tunes one part on one reference, generates an image for each of four prompts that name *other*
attributes, and scores them (paper, section "Protocol"): does the wanted attribute transfer, is the rest of
the prompt obeyed, does the unwanted attribute leak? Every run is one frozen config (`configs`) and one
record; `python -m escd.study` (`study_command`) makes the missing ones, `tables` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import paths, records
from ..backbone.hub import MODELS
from ..backbone.model import Backbone
from ..data import world
from ..loading import load_backbone
from ..method.config import TuningConfig
from ..method.customization import Customization
from ..method.low_rank import low_rank, relative_error
from ..method.pipeline import ESCDPipeline
from . import kept
from .answers import accuracies, still_clear, targets_of
from .autoencoder import autoencoder_scores, image_sets
from .configs import (
    AutoencoderConfig,
    CompositionConfig,
    JudgesConfig,
    ListConfig,
    ObedienceConfig,
    RankConfig,
    StudyConfig,
)
from .judges import HEADS, Judgement, Judges, load_judges
from .method_configs import MethodConfig, MethodPairConfig
from .method_scores import score_curve, score_pair
from .prompts import Prompt, prompts_for, prompts_for_pair
from .references import LISTS, REAL_LISTS, Reference, References, load_references
from .scores import (
    oracle_images,
    oracle_reconstructions,
    prompt_obedience,
    quiet,
    score_customization,
    score_images,
)

RUNS = paths.RUNS / "study"  # keeps the customizations, so that no part is tuned twice
FULL_RANK = 1 << 20  # larger than the rank of any weight


class Study:
    """Runs configs on one device; backbones, judges and references are loaded once.

    folder: silhouettes and materials for configs of the lists "folder", "folder 2" and so on. backbones:
    backbones that are loaded already, by the name that configs give them.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        device: str | torch.device | None = None,
        backbones: dict[str, Backbone] | None = None,
    ) -> None:
        self.folder, self.device = folder, device
        self._backbones: dict[str, Backbone] = dict(backbones or {})
        self._weights: dict[str, str] = {}
        # `Record.learnt` of the current run.
        self.learnt: dict[str, dict[str, Any]] = {}

    def run(self, config: Any, stored: Path | None = None) -> records.Record:
        """The stored record of a config; where there is none, the config is run and its record stored."""
        return records.get(
            config,
            self.score,
            inputs=self.inputs(config),
            device=self.backbone(config.backbone).device,
            folder=stored,
            learnt=lambda: self.learnt,
        )

    def score(self, config: Any) -> dict[str, Any]:
        """Metrics of one config, by its kind."""
        self.learnt = {}
        scorers = {
            StudyConfig: self._score_attribute,
            CompositionConfig: self._score_composition,
            RankConfig: self._score_rank,
            MethodConfig: lambda config: score_curve(self, config, RUNS),
            MethodPairConfig: lambda config: score_pair(self, config),
            ObedienceConfig: self._score_obedience,
            AutoencoderConfig: self._score_autoencoder,
            JudgesConfig: self._score_judges,
        }
        return scorers[type(config)](config)

    def backbone(self, name: str) -> Backbone:
        if name not in self._backbones:
            self._backbones[name] = load_backbone(name, device=self.device)
        return self._backbones[name]

    def weights(self, name: str) -> str:
        """`kept.weights_sha256` of a backbone, computed once."""
        if name not in self._weights:
            self._weights[name] = kept.weights_sha256(self.backbone(name))
        return self._weights[name]

    def judges(self) -> Judges:
        return _judges()

    def references(self, name: str) -> References:
        """The list of references of this name; ValueError for "folder" where no folder is given."""
        if name in (*LISTS, *REAL_LISTS):
            return load_references(which=name)
        if self.folder is None:
            known = ", ".join((*LISTS, *REAL_LISTS))
            raise ValueError(f"the list {name!r} is one of {known}, or needs a folder")
        return _folder(self.folder, int(name.removeprefix("folder") or 1))

    def inputs(self, config: Any) -> dict[str, str]:
        """sha256 of the inputs of a run: weights of the backbone and of the judges, references."""
        model = MODELS.get(config.backbone)
        shipped = model is not None and model.folder is not None
        weights = shipped_weights(config.backbone) if shipped else self.weights(config.backbone)
        inputs = {f"backbone {config.backbone}": weights}
        for tuning in vars(config).values():
            if isinstance(tuning, TuningConfig) and tuning.needs_e4t:
                inputs |= kept.e4t_inputs(tuning, self.backbone(config.backbone))
        if not isinstance(config, AutoencoderConfig):
            inputs["judges"] = _sha256(paths.WEIGHTS / "judges")
        if isinstance(config, ListConfig):
            inputs[f"references {config.list}"] = self.references(config.list).sha256
        return inputs

    # ---- the kinds of run

    def _score_attribute(self, config: StudyConfig) -> dict[str, Any]:
        listed = self.references(config.list)
        reference = listed[config.reference]
        prompts = prompts_for(reference, config.attribute)
        learnt = {}
        about: dict[str, Any] = {}
        if config.kind == "customized":
            learnt = {
                config.attribute: self.learn(config.attribute, reference, config.tuning, config.backbone)
            }
            about["megabytes"] = learnt[config.attribute].nbytes / 1e6
        scores = self._scored(config, prompts, reference, reference, learnt)
        return {"prompts": [one.text for one in prompts], **scores, **about}

    def _score_composition(self, config: CompositionConfig) -> dict[str, Any]:
        listed = self.references(config.list)
        shape, appearance = listed[config.shape], listed[config.appearance]
        prompts = prompts_for_pair(shape, appearance)
        learnt = {}
        if config.kind == "customized":
            learnt = {
                "shape": self.learn("shape", shape, config.shape_tuning, config.backbone),
                "appearance": self.learn("appearance", appearance, config.appearance_tuning, config.backbone),
            }
        return {
            "prompts": [one.text for one in prompts],
            **self._scored(config, prompts, shape, appearance, learnt),
        }

    def _score_rank(self, config: RankConfig) -> dict[str, Any]:
        reference = self.references(config.list)[config.reference]
        learnt = self.learn(config.attribute, reference, config.tuning, config.backbone)
        small = learnt
        if config.rank is not None or config.exportable:
            small = low_rank(learnt, config.rank or FULL_RANK, only_exportable=config.exportable)
            self.learnt[config.attribute]["sha256"] = kept.sha256_of(small)
        prompts = prompts_for(reference, config.attribute)
        return {
            "megabytes": small.nbytes / 1e6,
            "error": relative_error(small, learnt),
            **self._scored(config, prompts, reference, reference, {config.attribute: small}),
        }

    def _scored(
        self, config: StudyConfig | CompositionConfig | RankConfig, prompts: Sequence[Prompt],
        shape: Reference, appearance: Reference, learnt: dict[str, Customization],
    ) -> dict[str, list]:  # fmt: skip
        listed, backbone = self.references(config.list), self.backbone(config.backbone)
        kind = "customized" if isinstance(config, RankConfig) else config.kind
        images = None
        if kind == "ceiling":
            images = oracle_reconstructions(prompts, shape, appearance, backbone)
        elif kind in ("lossless", "flat"):
            images = oracle_images(prompts, shape, appearance, flat=kind == "flat")
        elif kind == "copy":
            images = shape.image.expand(len(prompts), -1, -1, -1)
        if images is not None:
            return score_images(images, prompts, shape, appearance, listed, self.judges())
        return score_customization(
            quiet(ESCDPipeline(backbone, **learnt)), prompts, shape, appearance, listed, self.judges(),
            seed=config.seed, sampler_steps=config.sampler_steps, guidance_scale=config.guidance_scale,
            guidance_rescale=config.guidance_rescale, guidance_from=config.guidance_from,
        )  # fmt: skip

    def learn(
        self, attribute: str, reference: Reference, tuning: TuningConfig, backbone: str
    ) -> Customization:
        """The customization of one reference; `runs/study` keeps it for compositions and ranks."""
        learnt = kept.learn(
            RUNS, attribute, reference, tuning, self.backbone(backbone), self.weights(backbone)
        )
        self.learnt[attribute] = learnt.as_dict()
        return learnt.customization

    def knows(self, attribute: str, reference: Reference, tuning: TuningConfig, backbone: str) -> bool:
        """Whether `learn` would take the customization from `runs/study`."""
        return kept.knows(RUNS, attribute, reference, tuning, self.backbone(backbone), self.weights(backbone))

    def _score_obedience(self, config: ObedienceConfig) -> dict[str, Any]:
        return prompt_obedience(
            self.backbone(config.backbone), config.prompts, config.seed, judges=self.judges(),
            sampler_steps=config.sampler_steps, guidance_scale=config.guidance_scale,
            guidance_rescale=config.guidance_rescale,
        )  # fmt: skip

    def _score_autoencoder(self, config: AutoencoderConfig) -> dict[str, Any]:
        images, others = image_sets()[config.images]
        return autoencoder_scores(self.backbone(config.backbone).vae, images, others)

    def _score_judges(self, config: JudgesConfig) -> dict[str, Any]:
        held_out = world.World(seed=9016, split=config.split, named_shapes=0.5, named_appearances=0.5)
        backbone, judged, targets = self.backbone(config.backbone), [], []
        for first in range(0, config.pictures, 128):
            part = held_out.batch(range(first, min(first + 128, config.pictures)))
            decoded = backbone.decode_latents(backbone.encode_images(part.image)).float().cpu()
            judged.append(self.judges()(decoded))
            targets.append(still_clear(decoded, targets_of(part)))
        joined = {
            field.name: torch.cat([getattr(s, field.name) for s in judged]) for field in fields(Judgement)
        }
        answers = {name: torch.cat([target[name] for target in targets]) for name in HEADS}
        clear = {name: answer.view(len(answer), -1)[:, 0] >= 0 for name, answer in answers.items()}
        judged = {f"{name}_judged": float(which.float().mean()) for name, which in clear.items()}
        return accuracies(Judgement(**joined), answers) | judged


@cache
def _judges() -> Judges:
    return load_judges()


@cache
def _folder(folder: str | Path, twenty: int) -> References:
    return load_references(folder, twenty=twenty)


def shipped_weights(backbone: str) -> str:
    """sha256 of the files of a backbone that ships with the package, without E4T's.

    What E4T pretrained is an input of E4T's own runs alone.
    """
    return _sha256(MODELS[backbone].folder)


@cache
def _sha256(folder: Path) -> str:
    return records.sha256(folder, without="e4t")
