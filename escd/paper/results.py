"""Results: what the stored records say, as objects that tables, figures and notebooks read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from .. import records
from ..backbone import hub
from ..evaluation.configs import (
    EQUAL_SIZE,
    AutoencoderConfig,
    CompositionConfig,
    RankConfig,
    StudyConfig,
    backbone_configs,
    configs,
    equal_size_configs,
    rank_configs,
)
from ..evaluation.kept import learn_now
from ..evaluation.measure import Interval, paired_bootstrap
from ..evaluation.real_tables import AppearanceRow, PairRow, Row, ShapeRow, real_tables
from ..evaluation.references import DEFAULT_LIST, load_references
from ..evaluation.study import Study, shipped_weights
from ..method.attributes import ATTRIBUTES
from ..method.config import TuningConfig
from ..method.cost import relative
from ..records import Record

# The scores of an attribute's transfer and leakage by name, with what counts where there is no foreground.
SCORES: dict[str, dict[str, tuple[str, float]]] = {
    "shape": {"retrieval": ("silhouette", 0.0), "IoU": ("iou", 0.0), "leakage": ("texture_likeness", 1.0)},
    "appearance": {
        "texture": ("texture_first", 0.0),
        "colour": ("colour_first", 0.0),
        "leakage": ("iou", 1.0),
    },
}
WANTED = {"shape": "silhouette", "appearance": "texture_first"}  # the retrieval that is a rank's transfer


@cache
def study() -> Study:
    """The study on the CPU, where it is reproducible to the bit."""
    return Study(device="cpu")


@dataclass(frozen=True)
class Results:
    """The study's tables and records.

    rows: by mode (`real_tables.MODES`, and "shape" for filled and pierced outlines together) and arm.
    """

    rows: dict[str, dict[str, Row]]
    references: int  # for which every arm is stored
    used: tuple[Record, ...]
    # Of the decoder's parts as large as the encoder, over the references for which all of them are stored.
    alike: tuple[Record, ...]


def current(config: Any) -> Record:
    """The stored record of a config with the present inputs; KeyError where there is none."""
    return records.get(config, inputs=study().inputs(config))


def results(which: str = DEFAULT_LIST) -> Results:
    """The study of a bundled list, over the references whose every arm is stored; KeyError where none is."""
    return _results(which, _fingerprint())


@cache
def _results(which: str, _state: str) -> Results:
    kinds = (StudyConfig, CompositionConfig)
    found = {record.key: record for kind in kinds for record in records.all(kind)}
    groups: dict[tuple[type, str], list[Record | None]] = defaultdict(list)
    inputs: dict[type, dict[str, str]] = {}

    def stored(config: StudyConfig | CompositionConfig) -> Record | None:
        kind, record = type(config), found.get(records.key_of(config))
        if kind not in inputs:
            inputs[kind] = study().inputs(config)
        return record if record is not None and record.inputs == inputs[kind] else None

    for config in configs(study().references(which)):
        name = config.reference if isinstance(config, StudyConfig) else config.shape
        groups[type(config), name].append(stored(config))
    whole = {group: runs for group, runs in groups.items() if None not in runs}
    references = sum(kind is StudyConfig for kind, _ in whole)
    if not references:
        raise KeyError(f"figures/records has no reference of the {which} list in full: `make study` makes it")
    used = tuple(record for runs in whole.values() for record in runs)
    parts: dict[str, list[Record | None]] = defaultdict(list)
    for config in equal_size_configs(study().references(which)):
        parts[config.reference].append(stored(config))
    alike = [
        record
        for name, runs in parts.items()
        if None not in runs and (StudyConfig, name) in whole
        for record in runs
    ]
    return Results(tables_of(used), references, used, tuple(alike))


def tables_of(used: Iterable[Record]) -> dict[str, dict[str, Row]]:
    """The rows of records on a real list: of all outlines together, and of filled and pierced ones apart."""
    used = list(used)
    return real_tables(used, pierced_apart=False) | real_tables(used)


def shapes(found: Results, mode: str = "shape") -> dict[str, ShapeRow]:
    """The arms of the shape tables."""
    return {arm: row for arm, row in found.rows[mode].items() if isinstance(row, ShapeRow)}


def appearances(found: Results) -> dict[str, AppearanceRow]:
    """The arms of the appearance table."""
    return {arm: row for arm, row in found.rows["appearance"].items() if isinstance(row, AppearanceRow)}


def pairs(found: Results) -> dict[str, PairRow]:
    """The arms of the table of both attributes in one pass; none before there are any."""
    return {arm: row for arm, row in found.rows.get("both", {}).items() if isinstance(row, PairRow)}


def _fingerprint() -> str:
    files = [records.FOLDER / f"{kind}.jsonl" for kind in ("study", "composition")]
    return "".join(records.sha256(file) for file in files if file.exists())


def contrast(
    attribute: str, one: str, other: str, which: str = DEFAULT_LIST, among: Collection[str] | None = None
) -> dict[str, Interval]:
    """Differences of tuning part `one` from tuning part `other`, image by image, with 95 % intervals.

    By the names of `SCORES`. An image without a foreground counts as a miss and as a leak; whole references
    are resampled. among: ids of the references that count; None is all that are stored in full.
    """
    by_arm: dict[str, dict[str, dict]] = {one: {}, other: {}}
    found = results(which)
    for record in (*found.used, *found.alike):
        if record.kind == "study" and record.config["attribute"] == attribute:
            arm = records.config_of(record, StudyConfig).arm
            if arm in by_arm and (among is None or record.config["reference"] in among):
                by_arm[arm][record.config["reference"]] = record.metrics
    names = sorted(by_arm[one])
    groups = [name for name in names for _ in by_arm[one][name]["failed"]]

    def gathered(arm: str, score: str, missing: float) -> list[float]:
        values = [value for name in names for value in by_arm[arm][name][score]]
        return [missing if value is None else float(value) for value in values]

    return {
        what: paired_bootstrap(gathered(one, score, missing), gathered(other, score, missing), groups=groups)
        for what, (score, missing) in SCORES[attribute].items()
    }


@dataclass(frozen=True)
class Alike:
    """A part of the UNet beside the encoder, for one attribute."""

    megabytes: float  # of what was learnt, in half precision
    row: Row
    beyond: dict[str, Interval]  # `contrast` with the encoder; empty for the encoder itself


def alike(attribute: str, which: str = DEFAULT_LIST) -> dict[str, Alike]:
    """The encoder, the decoder, and the decoder's parts of the encoder's size; empty before they are run.

    All over the references of `Results.alike`.
    """
    found = results(which)
    if not found.alike:
        return {}
    names = {record.config["reference"] for record in found.alike}
    runs = [r for r in (*found.used, *found.alike) if r.config.get("reference") in names]
    rows = tables_of(runs)[attribute]
    sizes: dict[str, list[float]] = defaultdict(list)
    for record in runs:
        if "megabytes" in record.metrics and record.config["attribute"] == attribute:  # something was learnt
            sizes[records.config_of(record, StudyConfig).arm].append(record.metrics["megabytes"])
    return {
        part: Alike(
            float(np.mean(sizes[part])),
            rows[part],
            {} if part == "encoder" else contrast(attribute, part, "encoder", which, names),
        )
        for part in ("encoder", *EQUAL_SIZE, "decoder")
    }


def composed(one: str = "ours", other: str = "reversed", which: str = DEFAULT_LIST) -> Interval:
    """Difference of arm `one` from arm `other` in the share of images with shape, texture and colour right.

    Image by image, with the 95 % interval over pairs of references.
    """
    by_arm: dict[str, dict[str, list[bool]]] = {one: {}, other: {}}
    for record in results(which).used:
        if record.kind == "composition":
            config, got = records.config_of(record, CompositionConfig), record.metrics
            if config.arm in by_arm:
                each = (got["silhouette"], got["texture_first"], got["colour_first"])
                right = [all(scores) for scores in zip(*each, strict=True)]
                by_arm[config.arm][f"{config.shape} {config.appearance}"] = right
    names = sorted(by_arm[one])
    first, second = ([right for name in names for right in by_arm[arm][name]] for arm in (one, other))
    return paired_bootstrap(first, second, groups=[name for name in names for _ in by_arm[one][name]])


@dataclass(frozen=True)
class AtRank:
    """An attribute's customizations at one rank: mean scores over images, and mean size."""

    rank: int | None  # None: in full
    exportable: bool
    transfer: dict[str, float]
    error: float
    megabytes: float
    references: int


def ranks(which: str = DEFAULT_LIST) -> tuple[dict[str, list[AtRank]], list[Record]]:
    """What is left of each attribute at a low rank, and the records that say so; empty where none is stored.

    Over the references whose every rank is stored.
    """
    stored = {record.key: record for record in records.all(RankConfig)}
    runs: dict[str, dict[tuple[int | None, bool], list[Record]]] = {}
    used: list[Record] = []
    inputs: dict[str, str] | None = None
    whole: dict[tuple[str, str], list[RankConfig]] = defaultdict(list)
    for config in rank_configs(study().references(which)):
        whole[config.attribute, config.reference].append(config)
    for (attribute, _), wanted in whole.items():
        inputs = inputs or study().inputs(wanted[0])
        made = [stored.get(records.key_of(config)) for config in wanted]
        if any(record is None or record.inputs != inputs for record in made):
            continue
        used += made
        for config, record in zip(wanted, made, strict=True):
            runs.setdefault(attribute, {}).setdefault((config.rank, config.exportable), []).append(record)
    return {
        attribute: [
            AtRank(
                rank,
                exportable,
                {
                    name: float(np.mean([value or 0.0 for r in made for value in r.metrics[score]]))
                    for name, score in (("iou", "iou"), ("retrieval", WANTED[attribute]))
                },
                float(np.mean([r.metrics["error"] for r in made])),
                float(np.mean([r.metrics["megabytes"] for r in made])),
                len(made),
            )
            for (rank, exportable), made in by_rank.items()
        ]
        for attribute, by_rank in runs.items()
    }, used


def smallest_rank(attribute: str, ranks: Sequence[AtRank], within: float = 0.02) -> AtRank | None:
    """The smallest rank that keeps the transfer to `within` of the full change's, relatively; None if none.

    Transfer is the aligned IoU for a shape and the share retrieved by texture for an appearance.
    """
    score = "iou" if attribute == "shape" else "retrieval"
    full = next(one for one in ranks if one.rank is None and not one.exportable)
    enough = [
        one
        for one in ranks
        if one.rank is not None and one.transfer[score] >= (1 - within) * full.transfer[score]
    ]
    return min(enough, key=lambda one: one.rank, default=None)


# The stages of pretraining, in the order they are trained in.
STAGES = ("autoencoder", "words", "towers", "unet")


def training(backbone: str = "mini") -> dict[str, dict]:
    """The account of how a shipped backbone was trained: stage -> configuration, cost, scores, loss curve."""
    account = json.loads((hub.MODELS[backbone].folder / "training.json").read_text())
    return {stage: account[stage] for stage in STAGES}


def images_seen(record: Mapping[str, Any]) -> int:
    """Training images of a stage, with those of earlier trainings."""
    return record["images"] + sum(one["images"] for one in record.get("earlier", ()))


def latent_channels(backbone: str = "mini") -> int:
    """How many latent channels a shipped backbone has."""
    return int(
        json.loads((hub.MODELS[backbone].folder / "vae" / "config.json").read_text())["latent_channels"]
    )


def at_full_size(kind: str) -> Record | None:
    """The newest record of a kind at Stable Diffusion 1.5's size on a CPU: "size", "tuning_cost"."""
    stored = [r for r in records.all(kind) if r.config["size"] == "sd15" and r.device == "cpu"]
    return stored[-1] if stored else None


# What `benchmarks/tuning_cost.py` compares, and the paper's keys; the others are held to the first.
STEPS_OF = {
    "whole UNet (DreamBooth)": "whole",
    "keys and values (Custom Diffusion)": "attention",
    "LoRA, rank 16 (peft)": "lora",
    "pseudo-word (Textual Inversion)": "word",
    "shape": "shape",
    "appearance": "appearance",
    "appearance, frozen encoder without gradients": "half",
    "appearance, encoder outputs kept": "kept",
    "whole UNet, with class images (DreamBooth)": "dreambooth",
    "keys and values, with class images (Custom Diffusion)": "custom_diffusion",
    "pseudo-word of each layer (P+)": "p_plus",
    "whole UNet, latents read first (E4T)": "e4t",
}


def step_costs() -> dict[str, dict[str, float]]:
    """What a step of each way of tuning takes of what a step of the whole UNet takes, at full size.

    step: its time; gradients: without the optimiser's part; peak: of memory; flops. Empty without a record.
    """
    record = at_full_size("tuning_cost")
    if record is None:
        return {}
    whole, flops = next(iter(STEPS_OF)), record.metrics["flops"]
    rows = relative(record.metrics["rounds"], to=whole)
    return {name: row | {"flops": flops[name] / flops[whole]} for name, row in rows.items()}


@dataclass(frozen=True)
class CostConfig:
    """Cost of tuning one attribute of one reference on a few CPU threads."""

    tuning: TuningConfig
    reference: str
    threads: int = 2
    list: str = "development"
    backbone: str = "mini"


def cost(config: CostConfig) -> dict[str, float]:
    """Steps and seconds of one tuning, and the customization's size."""
    reference = load_references(which=config.list)[config.reference]
    backbone = study().backbone(config.backbone)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        learnt = learn_now(reference.image, config.tuning.attribute, config.tuning, backbone)
    finally:
        torch.set_num_threads(threads)
    size = learnt.customization.nbytes
    return {"steps": learnt.about.steps, "seconds": learnt.about.seconds, "megabytes": size / 1e6}


def cost_records() -> list[Record]:
    """Each attribute's cost with its defaults; measured where it is not stored."""
    first = load_references(which="development")[0].id
    runs = [CostConfig(TuningConfig.of(attribute), first) for attribute in ATTRIBUTES]
    return [records.get(run, cost, inputs=weights_of(run.backbone), device="cpu") for run in runs]


def weights_of(backbone: str) -> dict[str, str]:
    """sha256 of a shipped backbone's files, as a record's inputs have it."""
    return {f"backbone {backbone}": shipped_weights(backbone)}


def backbone_records() -> tuple[list[Record], list[Record]]:
    """Records of the autoencoder's three sets; of the judges and of obedience."""
    pairs = [(config, current(config)) for config in backbone_configs()]
    of_sets = [record for config, record in pairs if isinstance(config, AutoencoderConfig)]
    return of_sets, [record for config, record in pairs if not isinstance(config, AutoencoderConfig)]
