"""The runs of the study: one frozen config each, and the grids that the tables need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..backbone.parts import NO_PART
from ..method.attributes import ATTRIBUTES
from ..method.config import TuningConfig
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
    guidance_scale: float = 4.0


@dataclass(frozen=True)
class StudyConfig(SamplingConfig):
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
class CompositionConfig(SamplingConfig):
    """The shape of one reference with the appearance of another, in one pass a step."""

    shape: str
    appearance: str
    kind: Kind
    shape_tuning: TuningConfig | None = None
    appearance_tuning: TuningConfig | None = None
    list: str = "evaluation"

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
class RankConfig(SamplingConfig):
    """A customization of the study brought to a low rank, and asked what `StudyConfig` asks."""

    attribute: str
    reference: str
    tuning: TuningConfig
    # At most this rank for the change of each weight; None keeps it in full.
    rank: int | None
    # Leave out what an exported LoRA cannot carry: the changes of biases and norms.
    exportable: bool = False
    list: str = "evaluation"


@dataclass(frozen=True)
class ObedienceConfig(SamplingConfig):
    """Fresh prompts with named attributes, one picture each, judged."""

    prompts: int = 512


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


PARTS = ("encoder", "decoder", "all")
# Parts of the decoder with about as many weights as the encoder (on `mini` 2.13 and 1.88 million beside 2.08;
# the decoder has 5.32), to tell what a half can do from what its size can.
EQUAL_SIZE = ("decoder/attentions", "up.1")


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


def equal_size_configs(listed: References, *, backbone: str = "mini", seed: int = 0) -> list[StudyConfig]:
    """Both attributes, learnt in each part of the decoder that is as large as the encoder (`EQUAL_SIZE`)."""
    grid = configs(listed, backbone=backbone, parts=EQUAL_SIZE, seed=seed, composition=False)
    return [config for config in grid if config.arm in EQUAL_SIZE]


def shard(grid: Sequence[Any], worker: int, workers: int) -> list[Any]:
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
