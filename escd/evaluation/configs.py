"""The runs of the study: one frozen config each, and the grids that the tables need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..backbone.parts import NO_PART
from ..method.attributes import ATTRIBUTES
from ..method.config import TuningConfig
from ..method.guidance import CUSTOMIZED, PLAIN_SCALE, default_guidance
from .autoencoder import IMAGE_SETS
from .references import REAL_LISTS, References

RANKS = (1, 2, 4, 8, 16, 32, 64)  # of a customization's change
Kind = Literal["floor", "customized", "ceiling", "lossless", "flat", "copy"]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How images are generated: what the configs of generated images share."""

    backbone: str = "mini"
    # Seed of the first image's noise; image i has seed + i.
    seed: int = 0
    sampler_steps: int = 25
    guidance_scale: float = PLAIN_SCALE
    guidance_rescale: float = 0.0
    guidance_from: str = CUSTOMIZED


@dataclass(frozen=True, kw_only=True)
class ListConfig(SamplingConfig):
    """Images that are scored against the candidates of a list of references."""

    # Of LISTS or REAL_LISTS, or "folder", "folder 2" and so on.
    list: str = "evaluation"


@dataclass(frozen=True)
class StudyConfig(ListConfig):
    """One attribute of one reference: tuned, or a control of the same prompts."""

    # "shape" or "appearance".
    attribute: str
    # Id of the reference in its list.
    reference: str
    # "customized", or a control. "floor": the untouched backbone. "lossless": an oracle image, painted as the
    # prompt says. "ceiling": the oracle image through the autoencoder. "flat": the oracle image filled with
    # the material's mean colour (for an appearance). "copy": the reference, whatever the prompt says; its
    # scores are those of full leakage.
    kind: Kind
    # None for a control.
    tuning: TuningConfig | None = None

    def __post_init__(self) -> None:
        if self.kind == "flat" and self.attribute != "appearance":
            raise ValueError(f"a flat colour is a control of an appearance, not of {self.attribute!r}")

    @property
    def arm(self) -> str:
        """Its name in the tables: the kind, "word" (the pseudo-word at zero steps), or the tuned part.

        A part tuned without augmentation (the source's recipe) is "PART (source)".
        """
        return _arm(self.kind, self.tuning)


@dataclass(frozen=True)
class CompositionConfig(ListConfig):
    """The shape of one reference with the appearance of another, in one pass per step.

    `shape` and `appearance` are ids of references in the list; a control has no tuning.
    """

    shape: str
    appearance: str
    kind: Kind
    shape_tuning: TuningConfig | None = None
    appearance_tuning: TuningConfig | None = None

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
class RankConfig(ListConfig):
    """A customization of the study at a low rank, scored on the prompts of `StudyConfig`."""

    attribute: str
    reference: str
    tuning: TuningConfig
    # At most this rank for the change of each weight; None keeps it in full.
    rank: int | None
    # Leave out what an exported LoRA cannot carry: the changes of biases and norms.
    exportable: bool = False


@dataclass(frozen=True)
class ObedienceConfig(SamplingConfig):
    """Prompt obedience of a backbone: prompts that name every attribute, one image each, judged."""

    prompts: int = 512


@dataclass(frozen=True)
class AutoencoderConfig:
    """Reconstruction of held-out images by the autoencoder, beside a linear code of the same rate."""

    images: str  # of IMAGE_SETS
    backbone: str = "mini"


@dataclass(frozen=True)
class JudgesConfig:
    """Accuracy of the judges on held-out images, after the autoencoder."""

    pictures: int = 4096
    split: str = "train"  # new images of the families the judges are trained on; "heldout": new families
    backbone: str = "mini"


def _arm(kind: str, tuning: TuningConfig | None) -> str:
    if kind != "customized":
        return kind
    if tuning is None:
        raise ValueError("a customized run says how it was tuned: give its tuning")
    if tuning.part == NO_PART:
        return "word" if tuning.steps == 0 else tuning.part
    return tuning.part if tuning.augmentation else f"{tuning.part} (source)"


PARTS = ("encoder", "decoder", "all")
# Parts of the decoder with about as many weights as the encoder: on `mini` 2.13 and 1.88 million, the encoder
# has 2.08 and the decoder 5.32. They separate the effect of the half from that of its size.
EQUAL_SIZE = ("decoder/attentions", "up.1")


def configs(
    listed: References, *, backbone: str = "mini", attributes: Sequence[str] = tuple(ATTRIBUTES),
    parts: Sequence[str] = PARTS, seed: int = 0, composition: bool = True,
) -> list[StudyConfig | CompositionConfig]:  # fmt: skip
    """The study of a list: for each attribute floor, word, each part, and ceiling; and both compositions.

    A composition takes the shape of each reference and the appearance of the next. The real lists have more
    arms: the source's recipe (each attribute's own half, without augmentation), the lossless oracle image, a
    copy of the reference, and, for appearance and composition, a flat colour.
    """
    real = listed.name in REAL_LISTS
    grid: list[StudyConfig | CompositionConfig] = []
    word = {a: TuningConfig.of(a, NO_PART, steps=0, seed=seed) for a in attributes}
    tunings = {(a, part): TuningConfig.of(a, part, seed=seed) for a in attributes for part in parts}
    for reference in listed:
        for attribute in attributes:
            base = StudyConfig(
                attribute, reference.id, "floor", list=listed.name, backbone=backbone, seed=seed,
                **asdict(default_guidance([attribute])),
            )  # fmt: skip
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
                reference.id, following.id, "floor", list=listed.name, backbone=backbone, seed=seed,
                **asdict(default_guidance(ATTRIBUTES)),
            )  # fmt: skip
            grid += [pair, replace(pair, kind="ceiling")]
            grid += [replace(pair, kind=kind) for kind in ("lossless", "flat") if real]
            for one, other in (("encoder", "decoder"), ("decoder", "encoder")):
                grid.append(replace(
                    pair, kind="customized",
                    shape_tuning=tunings["shape", one], appearance_tuning=tunings["appearance", other],
                ))  # fmt: skip
    return grid


def rank_configs(listed: References, *, backbone: str = "mini", seed: int = 0) -> list[RankConfig]:
    """Each attribute with its default tuning: in full, at each of `RANKS`, and as exported."""
    grid = []
    for reference in listed:
        for attribute in ATTRIBUTES:
            full = RankConfig(
                attribute, reference.id, TuningConfig.of(attribute, seed=seed), None,
                list=listed.name, backbone=backbone, seed=seed, **asdict(default_guidance([attribute])),
            )  # fmt: skip
            scale = {"shape": 4.0, "appearance": 2.0}[attribute]
            elsewhere = {"guidance_from": CUSTOMIZED, "guidance_scale": scale}
            grid += [full, *(replace(full, rank=rank) for rank in RANKS)]
            grid.append(replace(full, exportable=True, **elsewhere))
    return grid


def equal_size_configs(listed: References, *, backbone: str = "mini", seed: int = 0) -> list[StudyConfig]:
    """Both attributes, tuned in each part of the decoder that is as large as the encoder (`EQUAL_SIZE`)."""
    grid = configs(listed, backbone=backbone, parts=EQUAL_SIZE, seed=seed, composition=False)
    return [config for config in grid if config.arm in EQUAL_SIZE]


def shard(grid: Sequence[Any], worker: int, workers: int) -> list[Any]:
    """The part of a grid that one of several workers runs: all runs of every `workers`-th reference.

    Every reference has the same tunings, so the workers tune equally much, and the runs at low ranks use the
    customizations of the same worker.
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
    """The runs that score a backbone itself: its autoencoder, the judges after it, its prompt obedience."""
    autoencoder = [AutoencoderConfig(name, backbone) for name in IMAGE_SETS]
    return [*autoencoder, JudgesConfig(backbone=backbone), ObedienceConfig(backbone=backbone)]
