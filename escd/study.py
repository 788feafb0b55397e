"""The probing study: what each part of the UNet takes from one image, and what it should not have taken.

One run tunes one part on one reference, draws a picture for each of four prompts that ask for something
*else*, and scores them (paper, section "Protocol"): is the wanted attribute there, was the rest of the
prompt obeyed, did the unwanted attribute leak? Every run is one frozen config and one record; `python -m
escd.study` makes those that are missing, under `accelerate launch` spread over the workers, and `table`
reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from . import backbone as backbones
from . import kept, measure, records, texture, world
from .artefacts import low_rank, relative_error
from .backbone import Backbone, load_backbone
from .customization import ATTRIBUTES, Customization
from .ending import run_command
from .judges import (
    HEADS,
    WEIGHTS,
    Judgement,
    Judges,
    accuracies,
    load_judges,
    obeyed,
    still_clear,
    targets_of,
)
from .measure import Interval, paired_bootstrap
from .parts import NO_PART
from .pipeline import ESCDPipeline
from .references import (
    LISTS,
    REAL_LISTS,
    Reference,
    References,
    compose_reference,
    load_references,
    named_outlines,
)
from .tuning import TuningConfig
from .world import BACKGROUNDS, COLOUR_RGB, COLOURS, PATTERNS, SHAPES, SIZE

RUNS = Path(os.environ.get("ESCD_RUNS", "runs")) / "study"  # what was learnt, so that no part is tuned twice
PROMPTS = 4  # prompts a reference, one picture each
NEAR_COLOUR = 30.0  # CIELAB: a named colour this near to a tenth of a material is not another colour
NEAR_SHAPE = 0.7  # aligned IoU: a named shape this like a silhouette is not another shape
RANKS = (1, 2, 4, 8, 16, 32, 64)  # of a customization's change
FULL_RANK = 1 << 20  # above that of any weight
BATCH = 16  # pictures generated at once; bits are promised at equal batch shape
Kind = Literal["floor", "customized", "ceiling", "lossless", "flat", "copy"]


# ------------------------------------------------------------------------------------------------------------
# runs


@dataclass(frozen=True)
class StudyConfig:
    """One attribute of one reference: tuned, or a control of the same prompts."""

    # "shape" or "appearance".
    attribute: str
    # Id of the reference in its list.
    reference: str
    # "floor": the untouched backbone; "ceiling": the autoencoder's reconstruction of a right answer;
    # "lossless": the right answer itself; "flat": the same, filled with the material's mean colour (for an
    # appearance); "copy": the reference, whatever was asked for, which is what full leakage would score.
    kind: Kind
    # How it was learnt; None for the others.
    tuning: TuningConfig | None = None
    # Which list the reference and its candidates are from: of LISTS, of REAL_LISTS, or "folder", "folder 2"
    # and so on.
    list: str = "evaluation"
    backbone: str = "mini"
    # First seed of the pictures' noise.
    seed: int = 0
    sampler_steps: int = 25
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.kind == "flat" and self.attribute != "appearance":
            raise ValueError(f"a flat colour is a control of an appearance, not of {self.attribute!r}")

    @property
    def arm(self) -> str:
        """What the tables call it: the kind, "word" (the pseudo-word at zero steps), or the part tuned.

        A part tuned on the reference as it is (`augmentation` 0: the source's recipe) is "PART (source)".
        """
        return _arm(self.kind, self.tuning)


@dataclass(frozen=True)
class CompositionConfig:
    """The shape of one reference with the appearance of another, in one pass a step."""

    shape: str
    appearance: str
    kind: Kind
    shape_tuning: TuningConfig | None = None
    appearance_tuning: TuningConfig | None = None
    list: str = "evaluation"
    backbone: str = "mini"
    seed: int = 0
    sampler_steps: int = 25
    guidance_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.kind == "copy":
            raise ValueError("a pair has two references: none of them is a copy of both")

    @property
    def arm(self) -> str:
        """The kind, "ours" (shape: encoder, appearance: decoder), "reversed", or the parts by name."""
        arms = _arm(self.kind, self.shape_tuning), _arm(self.kind, self.appearance_tuning)
        named = {("encoder", "decoder"): "ours", ("decoder", "encoder"): "reversed"}
        return named.get(arms, arms[0] if arms[0] == arms[1] else " x ".join(arms))


@dataclass(frozen=True)
class RankConfig:
    """A customization of the study brought to a low rank, and asked what `StudyConfig` asks."""

    attribute: str
    reference: str
    tuning: TuningConfig
    # At most this rank for the change of each weight; None keeps it in full.
    rank: int | None
    # Leave out what an exported LoRA cannot carry: the changes of biases and norms.
    exportable: bool = False
    list: str = "evaluation"
    backbone: str = "mini"
    seed: int = 0
    sampler_steps: int = 25
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class ObedienceConfig:
    """Fresh prompts with named attributes, one picture each, judged."""

    prompts: int = 512
    backbone: str = "mini"
    seed: int = 0
    sampler_steps: int = 25
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class AutoencoderConfig:
    """Reconstruction of pictures the autoencoder never saw, beside a linear code of the same rate."""

    images: str  # of IMAGE_SETS
    backbone: str = "mini"


@dataclass(frozen=True)
class JudgesConfig:
    """What share of held-out pictures the judges judge right after the autoencoder."""

    pictures: int = 4096
    split: str = "train"  # the families the judges learnt, other pictures; "heldout": families they never saw
    backbone: str = "mini"


def _arm(kind: str, tuning: TuningConfig | None) -> str:
    if kind != "customized":
        return kind
    if tuning is None:
        raise ValueError("a customized run says how it was tuned")
    if tuning.part == NO_PART:
        return "word" if tuning.steps == 0 else tuning.part
    return tuning.part if tuning.augmentation else f"{tuning.part} (source)"


# ------------------------------------------------------------------------------------------------------------
# prompts


@dataclass(frozen=True)
class Asked:
    """What one prompt asks for; None where it does not say, or where a pseudo-word stands."""

    text: str
    background: str
    shape: str | None = None
    pattern: str | None = None
    colours: tuple[str, ...] | None = None


def prompts_for(reference: Reference, attribute: str, count: int = PROMPTS) -> list[Asked]:
    """Prompts that ask for other named attributes than the reference has, drawn from its id alone.

    shape: "a *m shape with PATTERN COLOURS appearance on a BACKGROUND background"; appearance: "a SHAPE
    shape with *a appearance on a BACKGROUND background". Colours near a tenth of the material, shapes like
    the silhouette and the reference's own background are not asked for; patterns, shapes and backgrounds
    repeat only when all of them have been asked for.
    """
    draw = _generator(f"{reference.id} {attribute}")
    grounds = _cycle(draw, [name for name in BACKGROUNDS if name != reference.background], count)
    if attribute == "shape":
        patterns, allowed = _cycle(draw, PATTERNS, count), other_colours(reference.material.tile)
        asked = []
        for pattern, ground in zip(patterns, grounds, strict=True):
            colours = tuple(_cycle(draw, allowed, 1 if pattern == "solid" else 2))
            look = f"{pattern} {' and '.join(colours)}"
            text = f"a *m shape with {look} appearance on a {ground} background"
            asked.append(Asked(text, ground, pattern=pattern, colours=colours))
        return asked
    if attribute == "appearance":
        shapes = _cycle(draw, other_shapes(reference.mask), count)
        return [
            Asked(f"{_article(shape)} shape with *a appearance on a {ground} background", ground, shape=shape)
            for shape, ground in zip(shapes, grounds, strict=True)
        ]
    raise ValueError(f"there are prompts for shape and for appearance, not for {attribute!r}")


def prompts_for_pair(shape: Reference, appearance: Reference, count: int = PROMPTS) -> list[Asked]:
    """Prompts "a *m shape with *a appearance on a BACKGROUND background", a background neither has."""
    draw = _generator(f"{shape.id} {appearance.id}")
    taken = (shape.background, appearance.background)
    grounds = _cycle(draw, [name for name in BACKGROUNDS if name not in taken], count)
    return [Asked(f"a *m shape with *a appearance on a {ground} background", ground) for ground in grounds]


def other_colours(tile: Tensor) -> list[str]:
    """Named colours farther than NEAR_COLOUR from at least nine tenths of a material (3, H, W)."""
    lab = measure.to_lab(tile[None] * 2 - 1)[0].reshape(-1, 3)
    table = torch.tensor([COLOUR_RGB[name] for name in COLOURS])[:, :, None, None]
    named = measure.to_lab(table * 2 - 1)[:, 0, 0]
    near = (np.linalg.norm(lab[:, None] - named, axis=-1) < NEAR_COLOUR).mean(0)
    return [name for name, share in zip(COLOURS, near, strict=True) if share < 0.1]


def other_shapes(mask: Tensor) -> list[str]:
    """Named shapes that a silhouette (H, W) is not like: aligned IoU below NEAR_SHAPE."""
    like = measure.iou_matrix(mask[None], named_outlines())[0].view(len(SHAPES), -1).amax(1)
    return [name for name, iou in zip(SHAPES, like.tolist(), strict=True) if iou < NEAR_SHAPE]


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def _cycle(draw: np.random.Generator, names: Sequence[str], count: int) -> list[str]:
    """`count` names in a random order, none a second time before all have come once."""
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += [names[i] for i in draw.permutation(len(names))]
    return chosen[:count]


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# ------------------------------------------------------------------------------------------------------------
# scores


SCORES = (
    "iou", "silhouette", "colour", "texture", "combined", "material", "texture_material", "texture_similarity"
)  # fmt: skip


def score_images(
    images: Tensor,
    asked: Sequence[Asked],
    shape: Reference,
    appearance: Reference,
    listed: References,
    judges: Judges,
) -> dict[str, list]:
    """Everything the protocol measures on images (N, 3, H, W) in [-1, 1], one entry an image.

    Against the silhouette of `shape`: aligned `iou`, and whether it is the nearest of the list's candidates
    (`silhouette`). Against the material of `appearance`: `colour` and `texture` distance, whether it is the
    nearest of the candidates by both (`material`) and by texture alone (`texture_material`), and
    `texture_similarity`: 1 at no distance, 0 at that of the other candidates. On the real lists also texture
    and colour apart (`texture.Candidates.score`). `obeyed`: what each prompt named. `failed`: no foreground
    found; the scores of such an image are None, and `table` counts it as a miss and as a leak.
    """
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
    masks, failed = measure.foreground_mask(images)
    ious = measure.iou_matrix(masks.float(), listed.silhouette_masks.float())  # (N, 20)
    own = listed.silhouettes.index(shape.silhouette), listed.materials.index(appearance.material)
    others = [c for i, c in enumerate(listed.appearances) if i != own[1]]
    unlike = float(np.mean([measure.texture_distance(listed.appearances[own[1]], c) for c in others]))
    scores: dict[str, list] = {"failed": failed.tolist()}
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        row: dict[str, Any] = dict.fromkeys(SCORES if listed.looks is None else SCORES + texture.SCORES)
        if not failed[i]:
            look = measure.appearance_of(image, mask)
            mine = listed.appearances[own[1]]
            rough = measure.texture_distance(look, mine)
            row = {
                "iou": float(ious[i, own[0]]),
                "silhouette": int(ious[i].argmax()) == own[0],
                "colour": measure.colour_distance(look, mine),
                "texture": rough,
                "combined": measure.combined_distance(look, mine),
                "material": _nearest(measure.combined_distance, look, listed.appearances) == own[1],
                "texture_material": _nearest(measure.texture_distance, look, listed.appearances) == own[1],
                "texture_similarity": float(np.clip(1 - rough / unlike, 0, 1)),
            }
            if listed.looks is not None:
                row |= listed.looks.score(image, mask, own[1])
        for name, value in row.items():
            scores.setdefault(name, []).append(value)
    seen = judges(images)
    for name in ("shape", "pattern", "colours", "background"):
        wanted = [getattr(one, name) for one in asked]
        if None not in wanted:
            scores[f"obeyed_{name}"] = obeyed(seen, **{name: wanted})[name].tolist()
    return scores


def _nearest(distance: Callable, look: measure.Appearance, candidates: Sequence[measure.Appearance]) -> int:
    return measure.retrieval(lambda query, candidate: -distance(query, candidate), look, candidates)


def score_customization(
    pipe: ESCDPipeline, asked: Sequence[Asked], shape: Reference, appearance: Reference, listed: References,
    judges: Judges, *, seed: int = 0, sampler_steps: int = 25, guidance_scale: float = 4.0,
) -> dict[str, list]:  # fmt: skip
    """Draw one picture a prompt with a pipeline and score them (`score_images`).

    A pseudo-word the pipeline has not loaded is replaced by its word: so an empty pipeline gives the floor.
    """
    texts = [one.text for one in asked]
    for attribute in ATTRIBUTES.values():
        if attribute.token not in pipe.customizations:
            texts = [text.replace(attribute.token, attribute.word) for text in texts]
    images = generate(pipe, texts, seed, sampler_steps, guidance_scale)
    return score_images(images, asked, shape, appearance, listed, judges)


def generate(
    pipe: ESCDPipeline, prompts: Sequence[str], seed: int, sampler_steps: int, guidance_scale: float
) -> Tensor:
    """One picture a prompt, (N, 3, H, W) in [-1, 1]; picture i starts from the noise of seed + i."""
    images = []
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        noise = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        out = pipe(
            part,
            num_inference_steps=sampler_steps,
            guidance_scale=guidance_scale,
            generator=noise,
            output_type="pt",
        )
        images.append(out.images.float().cpu() * 2 - 1)
    return torch.cat(images)


@torch.no_grad()
def right_answers(
    asked: Sequence[Asked], shape: Reference, appearance: Reference, backbone: Backbone
) -> Tensor:
    """What each prompt asks for, painted, and then reconstructed by the autoencoder: the ceiling."""
    latents = backbone.encode_images(painted_answers(asked, shape, appearance, backbone.image_size))
    return backbone.decode_latents(latents).float().cpu()


def painted_answers(
    asked: Sequence[Asked], shape: Reference, appearance: Reference, size: int = SIZE, *, flat: bool = False
) -> Tensor:
    """What each prompt asks for, painted: (N, 3, size, size).

    The silhouette is `shape`'s unless the prompt names one, the material `appearance`'s unless it names a
    pattern; `flat`: its mean colour alone.
    """
    images = []
    for number, one in enumerate(asked):
        mask = shape.silhouette.mask
        if one.shape is not None:
            mask = named_outlines()[3 * SHAPES.index(one.shape)].float()
        tile = appearance.material.tile
        if flat:
            tile = tile.mean((1, 2), keepdim=True).expand_as(tile)
        if one.pattern is not None:
            draws = world.Draws(0, torch.tensor([number]))
            named = [torch.tensor([COLOURS.index(name)]) for name in (one.colours[0], one.colours[-1])]
            painted = world.as_painted(torch.tensor([PATTERNS.index(one.pattern)]), *named)
            rgb = [torch.tensor([COLOUR_RGB[COLOURS[int(k)]]]) for k in painted]
            tile = world.paint_pattern(draws, one.pattern, *rgb)[0]
        images.append(compose_reference(mask, tile, one.background, size)[0])
    return torch.stack(images)


# ------------------------------------------------------------------------------------------------------------
# one run


class Study:
    """Runs configs of one backbone on one device: what they share is loaded once.

    folder: silhouettes and materials that take the place of the bundled lists, for configs of the list
    "folder". backbones: loaded ones, for configs that name them.
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
        # What the record of the run in hand says of the customizations it scores, by attribute.
        self.learnt: dict[str, dict[str, Any]] = {}

    def run(self, config: Any, stored: Path | None = None) -> records.Record:
        """The stored record of a config, or that of running it now."""
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
        """sha256 of all that a backbone computes with; read once, for a backbone does not change."""
        if name not in self._weights:
            self._weights[name] = kept.weights_sha256(self.backbone(name))
        return self._weights[name]

    def judges(self) -> Judges:
        return _judges()

    def references(self, name: str) -> References:
        """The list of this name."""
        if name in (*LISTS, *REAL_LISTS):
            return load_references(which=name)
        if self.folder is None:
            known = ", ".join((*LISTS, *REAL_LISTS))
            raise ValueError(f"the list {name!r} is one of {known}, or needs a folder")
        return _folder(self.folder, int(name.removeprefix("folder") or 1))

    def inputs(self, config: Any) -> dict[str, str]:
        """sha256 of what a config's numbers come from: weights of the backbone, judges, references."""
        model = backbones.MODELS.get(config.backbone)
        shipped = model is not None and model.folder is not None
        weights = _folder_sha256(model.folder) if shipped else self.weights(config.backbone)
        inputs = {f"backbone {config.backbone}": weights}
        if not isinstance(config, AutoencoderConfig):
            inputs["judges"] = records.sha256(WEIGHTS / "judges")
        if isinstance(config, StudyConfig | CompositionConfig | RankConfig):
            inputs[f"references {config.list}"] = self.references(config.list).sha256
        return inputs

    # ---- the kinds of run

    def _score_attribute(self, config: StudyConfig) -> dict[str, Any]:
        listed = self.references(config.list)
        reference = listed[config.reference]
        asked = prompts_for(reference, config.attribute)
        learnt = {}
        about: dict[str, Any] = {}
        if config.kind == "customized":
            learnt = {
                config.attribute: self.learn(config.attribute, reference, config.tuning, config.backbone)
            }
            about["megabytes"] = learnt[config.attribute].nbytes / 1e6
        scores = self._scored(config, asked, reference, reference, learnt)
        return {"prompts": [one.text for one in asked], **scores, **about}

    def _score_composition(self, config: CompositionConfig) -> dict[str, Any]:
        listed = self.references(config.list)
        shape, appearance = listed[config.shape], listed[config.appearance]
        asked = prompts_for_pair(shape, appearance)
        learnt = {}
        if config.kind == "customized":
            learnt = {
                "shape": self.learn("shape", shape, config.shape_tuning, config.backbone),
                "appearance": self.learn("appearance", appearance, config.appearance_tuning, config.backbone),
            }
        return {
            "prompts": [one.text for one in asked],
            **self._scored(config, asked, shape, appearance, learnt),
        }

    def _score_rank(self, config: RankConfig) -> dict[str, Any]:
        reference = self.references(config.list)[config.reference]
        learnt = self.learn(config.attribute, reference, config.tuning, config.backbone)
        small = learnt
        if config.rank is not None or config.exportable:
            small = low_rank(learnt, config.rank or FULL_RANK, only_exportable=config.exportable)
            self.learnt[config.attribute]["sha256"] = kept.sha256_of(small)
        asked = prompts_for(reference, config.attribute)
        return {
            "megabytes": small.nbytes / 1e6,
            "error": relative_error(small, learnt),
            **self._scored(config, asked, reference, reference, {config.attribute: small}),
        }

    def _scored(
        self, config: StudyConfig | CompositionConfig | RankConfig, asked: Sequence[Asked], shape: Reference,
        appearance: Reference, learnt: dict[str, Customization],
    ) -> dict[str, list]:  # fmt: skip
        listed, backbone = self.references(config.list), self.backbone(config.backbone)
        kind = "customized" if isinstance(config, RankConfig) else config.kind
        images = None
        if kind == "ceiling":
            images = right_answers(asked, shape, appearance, backbone)
        elif kind in ("lossless", "flat"):
            images = painted_answers(asked, shape, appearance, flat=kind == "flat")
        elif kind == "copy":
            images = shape.image.expand(len(asked), -1, -1, -1)
        if images is not None:
            return score_images(images, asked, shape, appearance, listed, self.judges())
        return score_customization(
            _quiet(ESCDPipeline(backbone, **learnt)), asked, shape, appearance, listed, self.judges(),
            seed=config.seed, sampler_steps=config.sampler_steps, guidance_scale=config.guidance_scale,
        )  # fmt: skip

    def learn(
        self, attribute: str, reference: Reference, tuning: TuningConfig, backbone: str
    ) -> Customization:
        """The customization of one reference; kept under `runs/study`, since compositions use it again."""
        made = kept.learn(
            RUNS, attribute, reference, tuning, self.backbone(backbone), self.weights(backbone)
        )
        self.learnt[attribute] = made.told()
        return made.customization

    def _score_obedience(self, config: ObedienceConfig) -> dict[str, Any]:
        return prompt_obedience(
            self.backbone(config.backbone), config.prompts, config.seed, judges=self.judges(),
            sampler_steps=config.sampler_steps, guidance_scale=config.guidance_scale,
        )  # fmt: skip

    def _score_autoencoder(self, config: AutoencoderConfig) -> dict[str, Any]:
        images, others = image_sets()[config.images]
        return autoencoder_scores(self.backbone(config.backbone).vae, images, others)

    def _score_judges(self, config: JudgesConfig) -> dict[str, Any]:
        unseen = world.World(seed=9016, split=config.split, named_shapes=0.5, named_appearances=0.5)
        backbone, seen, targets = self.backbone(config.backbone), [], []
        for first in range(0, config.pictures, 128):
            part = unseen.batch(range(first, min(first + 128, config.pictures)))
            decoded = backbone.decode_latents(backbone.encode_images(part.image)).float().cpu()
            seen.append(self.judges()(decoded))
            targets.append(still_clear(decoded, targets_of(part)))
        joined = {
            field.name: torch.cat([getattr(s, field.name) for s in seen]) for field in fields(Judgement)
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


@cache
def _folder_sha256(folder: Path) -> str:
    return records.sha256(folder)


def _quiet(pipe: ESCDPipeline) -> ESCDPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------------------------------------
# the backbone itself


def named_prompts(count: int, seed: int) -> list[Asked]:
    """Prompts that name everything, each factor drawn evenly; two colours but for "solid"."""
    draw = np.random.default_rng(seed)
    asked = []
    for _ in range(count):
        shape, pattern, ground = (
            names[draw.integers(len(names))] for names in (SHAPES, PATTERNS, BACKGROUNDS)
        )
        colours = tuple(COLOURS[i] for i in draw.permutation(len(COLOURS))[: 1 if pattern == "solid" else 2])
        look = f"{pattern} {' and '.join(colours)}"
        text = f"{_article(shape)} shape with {look} appearance on a {ground} background"
        asked.append(Asked(text, ground, shape, pattern, colours))
    return asked


def prompt_obedience(
    backbone: Backbone, n: int = 512, seed: int = 0, *, judges: Judges | None = None,
    sampler_steps: int = 25, guidance_scale: float = 4.0,
) -> dict[str, Any]:  # fmt: skip
    """Share of `n` fresh prompts obeyed, by one picture each, in every attribute and in all at once."""
    asked = named_prompts(n, seed)
    pipe = _quiet(ESCDPipeline(backbone))
    images = generate(pipe, [one.text for one in asked], seed, sampler_steps, guidance_scale)
    seen = (judges or load_judges())(images)
    names = ("shape", "pattern", "colours", "background")
    right = obeyed(seen, **{name: [getattr(one, name) for one in asked] for name in names})
    shares: dict[str, Any] = {name: float(right[name].float().mean()) for name in names}
    shares["all"] = float(torch.stack(list(right.values())).all(0).float().mean())
    for name, words in (("shape", SHAPES), ("pattern", PATTERNS)):
        rows = {word: [i for i, one in enumerate(asked) if getattr(one, name) == word] for word in words}
        shares[f"by_{name}"] = {word: float(right[name][r].float().mean()) for word, r in rows.items() if r}
    return shares


PATCH = 8  # pixels, each way, that the linear code sees at once


@torch.no_grad()
def autoencoder_scores(vae: AutoencoderKL, images: Tensor, others: Tensor) -> dict[str, float]:
    """PSNR and detail of reconstructions of images (N, 3, 64, 64) in [-1, 1], beside those of a linear code.

    `psnr` is the mean over images, in dB; `detail` the share of the energy above a quarter of the sampling
    frequency that the reconstructions still have. `pca_psnr` and `pca_detail` are those of a principal
    component analysis of 8 x 8 patches to as many numbers as the latents have for them (16 of `mini`), fitted
    on `others`: the best linear code for its patch, and better than one of 4 x 4 patches to 4 numbers.
    """
    halvings = len(vae.config.block_out_channels) - 1
    numbers = vae.config.latent_channels * PATCH**2 // 4**halvings
    decoded = []
    for part in images.split(64):
        latents = vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()
        decoded.append(vae.decode(latents).sample.clamp(-1, 1).float().cpu())
    scores: dict[str, float] = {"images": len(images)}
    for prefix, made in (("", torch.cat(decoded)), ("pca_", linear_code(images, others, numbers))):
        error = (made - images).square().flatten(1).mean(1).clamp(min=1e-10)
        scores[f"{prefix}psnr"] = float((10 * torch.log10(4 / error)).mean())
        scores[f"{prefix}detail"] = float(_fine_energy(made).sum() / _fine_energy(images).sum())
    return scores


def linear_code(images: Tensor, others: Tensor, numbers: int) -> Tensor:
    """Images after the principal components of patches of `others`: PATCH**2 pixels to so many numbers."""

    def patches(x: Tensor) -> Tensor:
        return F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)  # (N, patches, 3 PATCH**2)

    known = patches(others).flatten(0, 1)
    mean = known.mean(0)
    basis = torch.linalg.eigh(torch.cov((known - mean).T))[1][:, -numbers:]
    coded = (patches(images) - mean) @ basis @ basis.T + mean
    return F.fold(coded.transpose(1, 2), images.shape[-2:], PATCH, stride=PATCH).clamp(-1, 1)


def _fine_energy(images: Tensor) -> Tensor:
    """Energy (N,) above a quarter of the sampling frequency, in any direction."""
    spectrum = torch.fft.fft2(images).abs().square()  # (N, 3, H, W)
    frequency = torch.fft.fftfreq(images.shape[-1])
    fine = (frequency[None].square() + frequency[:, None].square()).sqrt() > 0.25
    return (spectrum * fine).sum((1, 2, 3))


IMAGE_SETS = ("world", "photographs", "tiles")
# Photographs inside scikit-image; the others fit the linear code.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
OTHER_PHOTOGRAPHS = ("motorcycle_left.png", "motorcycle_right.png")


@cache
def image_sets() -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures the autoencoder never saw, and others to fit the linear code on: set -> (N, 3, 64, 64) twice.

    world: renders of held-out families (the code is fitted on training ones). photographs: every 128 px
    window of four photographs, at 64 px (fitted on a fifth scene). tiles: the materials of the evaluation
    list, each at its four quarter turns (fitted on those of the development list).
    """
    held_out, known = world.World(seed=9017, split="heldout"), world.World(seed=9017)
    tiles, others = (
        torch.cat([_turned(m.tile) for m in load_references(which=name).materials]) for name in LISTS
    )
    return {
        "world": (held_out.batch(range(256)).image, known.batch(range(512)).image),
        "photographs": (_windows(PHOTOGRAPHS), _windows(OTHER_PHOTOGRAPHS)),
        "tiles": (tiles * 2 - 1, others * 2 - 1),
    }


def _turned(tile: Tensor) -> Tensor:
    return torch.stack([torch.rot90(tile, turn, (1, 2)) for turn in range(4)])


def _windows(names: Sequence[str], window: int = 128) -> Tensor:
    found = []
    for name in names:
        picture = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for top in range(0, picture.height - window + 1, window // 2):
            for left in range(0, picture.width - window + 1, window // 2):
                part = picture.crop((left, top, left + window, top + window))
                pixels = np.array(part.resize((SIZE, SIZE), Image.Resampling.BOX))
                found.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------------------
# the grid and its table

PARTS = ("encoder", "decoder", "all")
# Parts of the decoder with about as many weights as the encoder (on `mini` 2.13 and 1.88 million beside 2.08;
# the decoder has 5.32), to tell what a half can do from what its size can.
ALIKE = ("decoder/attentions", "up.1")


def configs(
    listed: References, *, backbone: str = "mini", attributes: Sequence[str] = tuple(ATTRIBUTES),
    parts: Sequence[str] = PARTS, seed: int = 0, composition: bool = True,
) -> list[StudyConfig | CompositionConfig]:  # fmt: skip
    """The quick study of a list: floor, word, each part and ceiling of both attributes; both compositions.

    A composition takes the shape of each reference and the appearance of the next. The real lists have more
    arms: the source's recipe (each attribute's own half on the reference as it is), a lossless right answer,
    a copy of the reference, and, for an appearance and for both, a flat colour.
    """
    real = listed.name in REAL_LISTS
    grid: list[StudyConfig | CompositionConfig] = []
    word = {a: TuningConfig.of(a, NO_PART, steps=0, seed=seed) for a in attributes}
    tunings = {(a, part): TuningConfig.of(a, part, seed=seed) for a in attributes for part in parts}
    for reference in listed:
        for attribute in attributes:
            base = StudyConfig(
                attribute, reference.id, "floor", list=listed.name, backbone=backbone, seed=seed
            )
            learnt = [word[attribute], *(tunings[attribute, part] for part in parts)]
            grid += [base, *(replace(base, kind="customized", tuning=tuning) for tuning in learnt)]
            grid.append(replace(base, kind="ceiling"))
            if real:
                source = TuningConfig.of(attribute, augmentation=0.0, seed=seed)
                grid.append(replace(base, kind="customized", tuning=source))
                grid += [replace(base, kind=kind) for kind in ("lossless", "copy")]
                grid += [replace(base, kind="flat")] if attribute == "appearance" else []
    if composition and {"encoder", "decoder"} <= set(parts) and {"shape", "appearance"} <= set(attributes):
        for reference, following in zip(listed, [*[*listed][1:], listed[0]], strict=True):
            pair = CompositionConfig(
                reference.id, following.id, "floor", list=listed.name, backbone=backbone, seed=seed
            )
            grid += [pair, replace(pair, kind="ceiling")]
            grid += [replace(pair, kind=kind) for kind in ("lossless", "flat") if real]
            for one, other in (("encoder", "decoder"), ("decoder", "encoder")):
                grid.append(replace(
                    pair, kind="customized",
                    shape_tuning=tunings["shape", one], appearance_tuning=tunings["appearance", other],
                ))  # fmt: skip
    return grid


def rank_configs(listed: References, *, backbone: str = "mini", seed: int = 0) -> list[RankConfig]:
    """Each attribute learnt the default way: in full, at each of `RANKS`, and as far as it can travel."""
    grid = []
    for reference in listed:
        for attribute in ATTRIBUTES:
            full = RankConfig(
                attribute, reference.id, TuningConfig.of(attribute, seed=seed), None,
                list=listed.name, backbone=backbone, seed=seed,
            )  # fmt: skip
            grid += [full, *(replace(full, rank=rank) for rank in RANKS), replace(full, exportable=True)]
    return grid


def alike_configs(listed: References, *, backbone: str = "mini", seed: int = 0) -> list[StudyConfig]:
    """Both attributes, learnt in each part of the decoder that is as large as the encoder (`ALIKE`)."""
    grid = configs(listed, backbone=backbone, parts=ALIKE, seed=seed, composition=False)
    return [config for config in grid if config.arm in ALIKE]


def share(grid: Sequence[Any], worker: int, workers: int) -> list[Any]:
    """What one of several workers runs of a grid: all runs of every so many references.

    Each reference is learnt in the same ways, so that no worker has more to learn than another, and what one
    has learnt for the tables it uses again for the ranks.
    """
    groups: dict[Any, list[Any]] = {}
    for config in grid:
        about = getattr(config, "reference", None) or getattr(config, "shape", None) or config
        groups.setdefault((type(config), about), []).append(config)
    mine, of_kind = [], dict.fromkeys((kind for kind, _ in groups), 0)
    for (kind, _), group in groups.items():
        if of_kind[kind] % workers == worker:
            mine += group
        of_kind[kind] += 1
    return mine


def backbone_configs(backbone: str = "mini") -> list[Any]:
    """What is measured of a backbone by itself."""
    autoencoder = [AutoencoderConfig(name, backbone) for name in IMAGE_SETS]
    return [*autoencoder, JudgesConfig(backbone=backbone), ObedienceConfig(backbone=backbone)]


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


def main(argv: list[str] | None = None) -> None:
    """Make the records of the study that are missing, then print its table."""
    parser = argparse.ArgumentParser(prog="python -m escd.study", description=main.__doc__)
    parser.add_argument("--backbone", default="mini", help="what load_backbone is to load (default: mini)")
    parser.add_argument(
        "--list", choices=(*LISTS, *REAL_LISTS), default="evaluation", help="references (default: evaluation)"
    )
    parser.add_argument("--folder", type=Path, help="use its silhouettes/*.png and materials/*.webp instead")
    parser.add_argument(
        "--twenty", type=int, default=1, metavar="K", help="the folder's K-th list of twenty (default: 1)"
    )
    parser.add_argument("--references", type=int, metavar="N", help="the first N references only")
    parser.add_argument("--attributes", nargs="+", choices=tuple(ATTRIBUTES), default=tuple(ATTRIBUTES))
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, help="parts to tune (default: encoder decoder all)"
    )
    parser.add_argument("--ranks", action="store_true", help="also what is left of each at a low rank")
    parser.add_argument(
        "--alike", action="store_true", help="also the parts of the decoder that are of mini's encoder's size"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--records", type=Path, help="folder of the records (default: figures/records, or runs)"
    )
    arguments = parser.parse_args(argv)
    if arguments.twenty < 1 or (arguments.twenty > 1 and not arguments.folder):
        parser.error("--twenty counts the lists of a --folder, from 1")
    torch.set_num_threads(1)  # so that one worker gives the bits that several give
    state = PartialState(cpu=not torch.cuda.is_available())
    study = Study(arguments.folder, state.device if state.device.type == "cuda" else None)
    # What a stranger's folder gives is no number of this project's.
    stored = arguments.records or (RUNS / "records" if arguments.folder else records.FOLDER)
    listed = study.references(f"folder {arguments.twenty}" if arguments.folder else arguments.list)
    if arguments.references is not None:
        listed = replace(listed, references=listed.references[: arguments.references])
    chosen = {name: getattr(arguments, name) for name in ("backbone", "attributes", "parts", "seed")}
    grid: list[Any] = configs(listed, **chosen)
    if not arguments.folder:
        grid = [*backbone_configs(arguments.backbone), *grid]
    about = {"backbone": arguments.backbone, "seed": arguments.seed}
    further = rank_configs(listed, **about) if arguments.ranks else []
    further += alike_configs(listed, **about) if arguments.alike else []
    mine = share([*grid, *further], state.process_index, state.num_processes)
    for config in tqdm(mine, unit="run", disable=not state.is_local_main_process):
        study.run(config, stored)
    state.wait_for_everyone()
    if state.is_main_process:
        made = (records.get(c, folder=stored, inputs=study.inputs(c)) for c in (*grid, *further))
        if arguments.list in REAL_LISTS and not arguments.folder:
            from . import tables  # which reads what is made here

            print(tables.markdown(tables.real_tables(made)))
        else:
            print(show(table(made)))


if __name__ == "__main__":
    run_command(main)
