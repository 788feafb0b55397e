"""What the records say: the numbers of the README, the paper and the tables, and whether they come out again.

No result is typed by hand. `numbers` gives each a key and a rounded text; `write_numbers` puts them into
README.md and `paper/numbers.tex`; `run_again` runs some of the records once more and compares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from . import backbone as backbones
from . import records
from .cost import relative
from .customization import ATTRIBUTES, Customization
from .files import write_text
from .judges import HEADS
from .kept import learn_now
from .measure import Interval, paired_bootstrap
from .pretrain import ablation, trials
from .pretrain.autoencoder import LATENT_CHANNELS
from .records import Record
from .references import Reference, load_references
from .study import (
    ALIKE,
    IMAGE_SETS,
    AutoencoderConfig,
    CompositionConfig,
    RankConfig,
    Row,
    Study,
    StudyConfig,
    alike_configs,
    backbone_configs,
    configs,
    rank_configs,
    table,
)
from .tuning import TuningConfig

README = records.ROOT / "README.md"
NUMBERS = records.ROOT / "paper" / "numbers.tex"
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"
ARMS = {
    "floor": "untouched backbone",
    "word": "pseudo-word only",
    "encoder": "encoder tuned",
    "decoder": "decoder tuned",
    "all": "whole UNet tuned",
    "ceiling": "autoencoder",
}
# What else `alike` calls by name.
PLACES = {
    "encoder": "encoder",
    "decoder/attentions": "decoder's transformer blocks",
    "up.1": "decoder's middle block",
    "decoder": "decoder",
}
WANTED = {"shape": "silhouette", "appearance": "material"}  # the retrieval that is an attribute's transfer
REPEATS, REPEAT_SECONDS = 2, 60.0
LEAKAGE_PLACES = 3  # there is so little of it that two decimals would hide on which side of none it lies


class FreshStudy(Study):
    """A study that learns every part anew: what an earlier run left behind proves nothing."""

    def learn(
        self, attribute: str, reference: Reference, tuning: TuningConfig, backbone: str = "mini"
    ) -> Customization:
        return learn_now(reference.image, attribute, tuning, self.backbone(backbone)).customization


@cache
def study() -> Study:
    """The study on the CPU, where its bits can be had again."""
    return Study(device="cpu")


@dataclass(frozen=True)
class CostConfig:
    """What it costs to learn one attribute of one reference on a few CPU threads."""

    tuning: TuningConfig
    reference: str
    threads: int = 2
    list: str = "development"
    backbone: str = "mini"


def cost(config: CostConfig) -> dict[str, float]:
    """Seconds of one tuning, and the size of what it leaves."""
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


# --------------------------------------------------------------------------------
# results


@dataclass(frozen=True)
class Results:
    """The study's table, by mode and arm, and the records it is made from."""

    rows: dict[str, dict[str, Row]]
    references: int  # for which every arm is stored
    used: tuple[Record, ...]
    alike: tuple[Record, ...]  # of the decoder's parts as large as the encoder; empty where one is missing


def current(config: Any) -> Record:
    """The stored record of a config, made from the inputs that are here now; KeyError where there is none."""
    return records.get(config, inputs=study().inputs(config))


def results(which: str = "evaluation") -> Results:
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
    alike = [stored(config) for config in alike_configs(study().references(which))]
    return Results(table(used), references, used, tuple(alike) if None not in alike else ())


def _fingerprint() -> str:
    files = [records.FOLDER / f"{kind}.jsonl" for kind in ("study", "composition")]
    return "".join(records.sha256(file) for file in files if file.exists())


def results_table(which: str = "evaluation") -> str:
    """The study as two Markdown tables: transfer, obedience and leakage of each part, and composition."""
    found = results(which)
    lines = []
    for mode, wanted in (("shape", "IoU"), ("appearance", "distance")):
        other = "texture" if mode == "shape" else "shape"
        asked = list(found.rows[mode]["floor"].obeyed)
        heads = [mode, wanted, "retrieved", *(["by texture alone"] if mode == "appearance" else []), *asked]
        lines += [
            f"| {' | '.join(heads)} | leakage of {other} (95 %) |",
            "|---|" + "--:|" * len(heads),
        ]
        for arm, row in _arms(found, mode):
            cells = [_decimals(row.transfer.get(wanted.lower())), _share(row.transfer["retrieval"])]
            cells += [_share(row.transfer["texture"])] if mode == "appearance" else []
            cells += [_share(row.obeyed[name]) for name in asked]
            cells.append(_interval(row.leakage, LEAKAGE_PLACES))
            lines.append(f"| {ARMS[arm]} | " + " | ".join(cells) + " |")
        lines.append("")
    if "composition" in found.rows:
        lines += ["| both in one pass | silhouette | material | both |", "|---|--:|--:|--:|"]
        names = {
            "floor": "untouched backbone",
            "ours": "shape in the encoder, appearance in the decoder",
            "reversed": "the other way round",
            "ceiling": "autoencoder",
        }
        for arm, name in names.items():
            got = found.rows["composition"][arm].transfer
            lines.append(
                f"| {name} | " + " | ".join(_share(got[k]) for k in ("silhouette", "material", "both")) + " |"
            )
    return "\n".join(lines).rstrip("\n")


def contrast(attribute: str, one: str, other: str, which: str = "evaluation") -> dict[str, Interval]:
    """What tuning part `one` gives beyond tuning part `other`, picture by picture, with 95 % intervals.

    `transfer`: is the wanted attribute retrieved; of a shape also `IoU`; `leakage`: similarity of the
    unwanted one. A picture without a foreground counts as a miss and as a leak; whole references are
    resampled.
    """
    wanted, unwanted = WANTED[attribute], {"shape": "texture_similarity", "appearance": "iou"}[attribute]
    overlap = [("IoU", "iou", 0.0)] if attribute == "shape" else []
    scores = [("transfer", wanted, 0.0), *overlap, ("leakage", unwanted, 1.0)]
    by_arm: dict[str, dict[str, dict]] = {one: {}, other: {}}
    found = results(which)
    for record in (*found.used, *found.alike):
        if record.kind == "study" and record.config["attribute"] == attribute:
            arm = records.config_of(record, StudyConfig).arm
            if arm in by_arm:
                by_arm[arm][record.config["reference"]] = record.metrics
    names = sorted(by_arm[one])
    groups = [name for name in names for _ in by_arm[one][name]["failed"]]

    def gathered(arm: str, score: str, missing: float) -> list[float]:
        values = [value for name in names for value in by_arm[arm][name][score]]
        return [missing if value is None else float(value) for value in values]

    return {
        what: paired_bootstrap(gathered(one, score, missing), gathered(other, score, missing), groups=groups)
        for what, score, missing in scores
    }


@dataclass(frozen=True)
class Alike:
    """A part of the UNet beside the encoder, for one attribute."""

    megabytes: float  # of what was learnt, in half precision
    row: Row
    beyond: dict[str, Interval]  # `contrast` with the encoder; empty for the encoder itself


def alike(attribute: str, which: str = "evaluation") -> dict[str, Alike]:
    """The encoder, the decoder, and the decoder's parts of the encoder's size; empty before they are run."""
    found = results(which)
    rows = table([*found.used, *found.alike])[attribute]
    sizes: dict[str, list[float]] = defaultdict(list)
    for record in (*found.used, *found.alike):
        if "megabytes" in record.metrics and record.config["attribute"] == attribute:  # something was learnt
            sizes[records.config_of(record, StudyConfig).arm].append(record.metrics["megabytes"])
    return {
        part: Alike(
            float(np.mean(sizes[part])),
            rows[part],
            {} if part == "encoder" else contrast(attribute, part, "encoder", which),
        )
        for part in (("encoder", *ALIKE, "decoder") if found.alike else ())
    }


def alike_table(which: str = "evaluation") -> str:
    """`alike` of both attributes as a Markdown table; empty where there is none."""
    shape, look = (alike(name, which) for name in ("shape", "appearance"))
    lines = [
        "| tuned | MB | shape: IoU | difference | retrieved "
        "| appearance: distance | retrieved | difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for part in shape:
        a, b = shape[part], look[part]
        cells = [
            f"{a.megabytes:.1f}",
            _decimals(a.row.transfer["iou"]),
            _interval(a.beyond["IoU"]) if a.beyond else "",
            _share(a.row.transfer["retrieval"]),
            _decimals(b.row.transfer.get("distance")),
            _share(b.row.transfer["retrieval"]),
            _interval(b.beyond["transfer"]) if b.beyond else "",
        ]
        lines.append(f"| {PLACES[part]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if shape else ""


def composed(one: str = "ours", other: str = "reversed", which: str = "evaluation") -> Interval:
    """How much more of the pictures have both attributes right under arm `one` than under arm `other`.

    Picture by picture, with the 95 % interval over pairs of references.
    """
    by_arm: dict[str, dict[str, list[bool]]] = {one: {}, other: {}}
    for record in results(which).used:
        if record.kind == "composition":
            config, got = records.config_of(record, CompositionConfig), record.metrics
            if config.arm in by_arm:
                both = zip(got["silhouette"], got["material"], strict=True)
                by_arm[config.arm][f"{config.shape} {config.appearance}"] = [bool(s and m) for s, m in both]
    pairs = sorted(by_arm[one])
    first, second = ([right for pair in pairs for right in by_arm[arm][pair]] for arm in (one, other))
    return paired_bootstrap(first, second, groups=[pair for pair in pairs for _ in by_arm[one][pair]])


def experiments(attribute: str, which: str = "development") -> list[tuple[TuningConfig, int, Row]]:
    """What was tried on a list's references: each way of tuning, on how many references, and its scores."""
    runs: dict[TuningConfig, list[Record]] = defaultdict(list)
    floors: dict[str, Record] = {}
    for record in records.all(StudyConfig):
        if record.config["attribute"] != attribute or record.config["list"] != which:
            continue
        config = records.config_of(record, StudyConfig)
        if record.inputs != study().inputs(config):  # tried on other weights than these
            continue
        if config.kind == "floor":
            floors[config.reference] = record
        elif config.kind == "customized":
            runs[config.tuning].append(record)
    tried = []
    for tuning, made in runs.items():
        beside = [floors[record.config["reference"]] for record in made]
        rows = table([*made, *beside])[attribute]
        (arm,) = rows.keys() - {"floor"}
        tried.append((tuning, len(made), rows[arm]))
    return tried


@dataclass(frozen=True)
class AtRank:
    """An attribute's customizations at one rank: mean over the references' pictures, and size of each."""

    rank: int | None  # None: in full
    exportable: bool
    transfer: dict[str, float]
    error: float
    megabytes: float
    references: int


def ranks(which: str = "evaluation") -> tuple[dict[str, list[AtRank]], list[Record]]:
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


def smallest_rank(attribute: str, found: Sequence[AtRank], within: float = 0.02) -> AtRank | None:
    """The smallest rank that keeps the transfer to `within` of the full change's, relatively; None if none.

    Transfer is the aligned IoU for a shape and the share of materials retrieved for an appearance.
    """
    score = "iou" if attribute == "shape" else "retrieval"
    full = next(one for one in found if one.rank is None and not one.exportable)
    enough = [
        one
        for one in found
        if one.rank is not None and one.transfer[score] >= (1 - within) * full.transfer[score]
    ]
    return min(enough, key=lambda one: one.rank, default=None)


def _arms(found: Results, mode: str) -> list[tuple[str, Row]]:
    return [(arm, found.rows[mode][arm]) for arm in ARMS if arm in found.rows[mode]]


def _decimals(value: float | None) -> str:
    return "--" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "--" if value is None else f"{100 * value:.0f} %"


def _signed(value: float, places: int = 2) -> str:
    text = f"{value:+.{places}f}"
    return text if float(text) else text.replace("-", "+")  # no minus nought


def _interval(found: Interval | None, places: int = 2) -> str:
    if found is None:
        return "--"
    mean, low, high = (_signed(value, places) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


# --------------------------------------------------------------------------------
# numbers by name


# The stages of pretraining, in the order they are trained in.
STAGES = ("autoencoder", "words", "towers", "unet")


def training(backbone: str = "mini") -> dict[str, dict]:
    """The account of how a shipped backbone was trained: stage -> configuration, cost, scores, loss curve."""
    account = json.loads((backbones.MODELS[backbone].folder / "training.json").read_text())
    return {stage: account[stage] for stage in STAGES}


def images_seen(record: Mapping[str, Any]) -> int:
    """Images a stage has seen, with those of the trainings it went on from."""
    return record["images"] + sum(one["images"] for one in record.get("earlier", ()))


def numbers() -> dict[str, str]:
    """Every number of the README and the paper: key -> text, rounded as it is to be read.

    Shares are percentages without the sign; what is undefined is "--". KeyError where a record is missing.
    """
    folder = backbones.MODELS["mini"].folder
    weights = sorted(folder.rglob("*.safetensors"))
    found = results()
    autoencoders, (judges, obedience) = _backbone_records()
    values = {
        "backbone.images_seen": f"{images_seen(training()['unet']):,}",
        "backbone.parameters_m": f"{sum(_parameters(path) for path in weights) / 1e6:.1f}",
        "backbone.mb": f"{sum(path.stat().st_size for path in weights) / 1e6:.0f}",
        # of the head that is right least often
        "backbone.judge_accuracy": f"{100 * min(judges.metrics[name] for name in HEADS):.1f}",
        "backbone.judged_patterns": f"{100 * judges.metrics['pattern_judged']:.0f}",
        "obedience.prompts": str(obedience.config["prompts"]),
    }
    for name, key in (("background",) * 2, ("colours", "colour"), ("pattern",) * 2, ("shape",) * 2):
        values[f"obedience.{key}"] = _percent(obedience.metrics[name])
    for record in autoencoders:
        key = f"autoencoder.{record.config['images']}"
        values[f"{key}.psnr"] = f"{record.metrics['psnr']:.1f}"
        values[f"{key}.pca"] = f"{record.metrics['pca_psnr']:.1f}"
        values[f"{key}.detail"] = _percent(record.metrics["detail"])
    for mode in ("shape", "appearance"):
        for arm, row in _arms(found, mode):
            values |= {f"{mode}.{arm}.{name}": text for name, text in _row_numbers(mode, row).items()}
    for arm, row in found.rows.get("composition", {}).items():
        values |= {
            f"composition.{arm}.{k}": _percent(row.transfer[k]) for k in ("silhouette", "material", "both")
        }
    gains = {"composition": composed()} if "composition" in found.rows else {}
    for attribute in ATTRIBUTES.values():
        other = {"encoder": "decoder", "decoder": "encoder"}[attribute.part]
        for what, gain in contrast(attribute.name, attribute.part, other).items():
            gains[f"{attribute.name}.{what.lower()}"] = gain
        for part, one in alike(attribute.name).items():
            if part in ALIKE:
                key = f"{attribute.name}.{part.replace('/', '_').replace('.', '_')}"
                texts = _row_numbers(attribute.name, one.row)
                values |= {f"{key}.{name}": text for name, text in texts.items()}
                values[f"{key}.mb"] = f"{one.megabytes:.1f}"
                gains |= {f"{key}.{what.lower()}": gain for what, gain in one.beyond.items()}
    for key, gain in gains.items():
        ends = {"": gain.mean, "_low": gain.low, "_high": gain.high}
        places = LEAKAGE_PLACES if key.endswith(".leakage") else 2
        values |= {f"{key}.gain{end}": _signed(value, places) for end, value in ends.items()}
    one = next(record for record in found.used if record.kind == "study")
    values |= {
        "study.references": str(found.references),
        "study.prompts": str(len(one.metrics["prompts"])),
        "study.sampler_steps": str(one.config["sampler_steps"]),
        "study.guidance": f"{one.config['guidance_scale']:g}",
    }
    for record in cost_records():
        key = f"tuning.{record.config['tuning']['attribute']}"
        values["tuning.threads"] = str(record.config["threads"])
        values[f"{key}.steps"] = str(record.metrics["steps"])
        values[f"{key}.seconds"] = f"{record.metrics['seconds']:.0f}"
        values[f"{key}.mb"] = f"{record.metrics['megabytes']:.1f}"
    if (record := at_full_size("size")) is not None:
        seconds, sizes = record.metrics["seconds"], record.metrics["mb_at_rank"]
        for attribute in ATTRIBUTES.values():
            key = f"size.{attribute.name}"
            tuned = seconds[f"{attribute.name}: {record.config['steps']} steps"]
            values[f"{key}.seconds"] = f"{tuned:.0f}"
            values[f"{key}.mb"] = f"{record.metrics['file_mb'][attribute.name]:.0f}"
            values[f"{key}.mb_at_16"] = f"{sizes[attribute.part]['16']:.0f}"
        values["size.pixels"] = str(record.config["pixels"])
        values["size.gb"] = f"{max(record.metrics['peak_gb'].values()):.0f}"
    for name, row in step_costs().items():
        values |= {f"step.{STEPS_OF[name]}.{key}": f"{ratio:.2f}" for key, ratio in row.items()}
    for latents, record in trials.by_latents().items():
        values["rate.images"] = f"{record.config['images']:,}"
        for name in IMAGE_SETS:
            scores, key = record.metrics[name], f"rate.{latents}.{name}"
            for of, code in (("", ""), ("linear_", "pca_")):
                values[f"{key}.{of}psnr"] = f"{scores[f'{code}psnr']:.1f}"
                values[f"{key}.{of}detail"] = _percent(scores[f"{code}detail"])
    values["filters.weights"] = ablation.weights_in_words()
    for arm, row in ablation.rows().items():
        values |= {f"filters.{arm.replace(' ', '_')}.{name}": text for name, text in row.items()}
    return values


def at_full_size(kind: str) -> Record | None:
    """The newest record of a kind at Stable Diffusion 1.5's size on a CPU: "size", "tuning_cost"."""
    made = [r for r in records.all(kind) if r.config["size"] == "sd15" and r.device == "cpu"]
    return made[-1] if made else None


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


def cost_records() -> list[Record]:
    """What each attribute costs with its defaults; measured where that is not stored."""
    first = load_references(which="development")[0].id
    runs = [CostConfig(TuningConfig.of(attribute), first) for attribute in ATTRIBUTES]
    return [records.get(run, cost, inputs=weights_of(run.backbone), device="cpu") for run in runs]


@cache
def weights_of(backbone: str) -> dict[str, str]:
    """sha256 of a shipped backbone's files, as a record's inputs have it."""
    return {f"backbone {backbone}": records.sha256(backbones.MODELS[backbone].folder)}


def _backbone_records() -> tuple[list[Record], list[Record]]:
    """Records of the autoencoder's three sets; of the judges and of obedience."""
    found = [(config, current(config)) for config in backbone_configs()]
    of_sets = [record for config, record in found if isinstance(config, AutoencoderConfig)]
    return of_sets, [record for config, record in found if not isinstance(config, AutoencoderConfig)]


def _row_numbers(mode: str, row: Row) -> dict[str, str]:
    name = "iou" if mode == "shape" else "distance"
    texts = {name: _decimals(row.transfer.get(name)), "retrieval": _percent(row.transfer["retrieval"])}
    if "texture" in row.transfer:
        texts["texture"] = _percent(row.transfer["texture"])
    texts |= {key.replace("colours", "colour"): _percent(value) for key, value in row.obeyed.items()}
    if row.leakage is not None:
        ends = {"": row.leakage.mean, "_low": row.leakage.low, "_high": row.leakage.high}
        texts |= {f"leakage{end}": _signed(value, LEAKAGE_PLACES) for end, value in ends.items()}
    return texts


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _parameters(path: Path) -> int:
    with safe_open(path, "pt") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())


# --------------------------------------------------------------------------------
# where they are written


def write_numbers(readme: Path = README, macros: Path = NUMBERS) -> None:
    """Put the numbers between the README's marks, and as macros into the paper's folder.

    Raises ValueError when the README lacks its marks.
    """
    values = numbers()
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{readme.name} has no {BEGIN} ... {END} to put the numbers between")
    write_text(readme, before + BEGIN + "\n" + _summary(values) + "\n" + END + after)
    lines = ["% Written by `python -m escd.draw` from figures/records: do not edit."]
    lines += [rf"\escddef{{{key}}}{{{value}}}" for key, value in sorted(values.items())]
    write_text(macros, "\n".join(lines) + "\n")


def _size_in_words(v: Mapping[str, str]) -> list[str]:
    """The README's lines on the method at Stable Diffusion's size."""
    if "size.gb" not in v:
        return []
    return [
        "",
        f"At Stable Diffusion 1.5's size, with random weights, at {v['size.pixels']} px, in float32 on a "
        "CPU, three tuning steps with all that has to be prepared take "
        f"{v['size.shape.seconds']} s for a shape and {v['size.appearance.seconds']} s for an appearance, "
        f"and {v['size.gb']} GB at the most. What is kept is {v['size.shape.mb']} and "
        f"{v['size.appearance.mb']} MB in full, {v['size.shape.mb_at_16']} and "
        f"{v['size.appearance.mb_at_16']} MB at rank 16.",
    ]


def _steps_in_words() -> list[str]:
    """The README's lines on what a step costs beside the alternatives."""
    record = at_full_size("tuning_cost")
    if record is None:
        return []
    config, measures = record.config, ("step", "gradients", "peak", "flops")
    lines = [
        "",
        f"One step there beside its alternatives, measured side by side ({config['rounds']} rounds; "
        f"{config['dtype']}, {config['pixels']} px, batch {config['batch']}, {record.threads} CPU threads, "
        "AdamW), as shares of tuning the whole UNet:",
        "",
        "| tuning | time | without the optimiser | memory | arithmetic |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in step_costs().items():
        lines.append(f"| {name} | " + " | ".join(f"{row[measure]:.2f}" for measure in measures) + " |")
    default = 'At this size an appearance is tuned with the frozen encoder without gradients ("half").'
    return [*lines, "", default]


def _alike_in_words() -> list[str]:
    """The README's lines on the halves at equal size."""
    made = alike_table()
    if not made:
        return []
    said = (
        "The halves at equal size: parts of the decoder that take about as much as the encoder, on the same "
        "references and prompts (differences from the encoder, in IoU and in the share of pictures "
        "retrieved, with their 95 % intervals):"
    )
    return [said, "", made, ""]


def _filters_in_words() -> list[str]:
    """The README's lines on what of the filters is needed."""
    made = records.all(ablation.AblationConfig)
    if not made:
        return []
    config = made[0].config
    return [
        "The attribute filters alone, at zero tuning steps, with one thing taken away from them at a "
        f"time and {config['images']:,} pictures to get over it behind the frozen UNet (differences from the "
        f"first row with their 95 % intervals; {config['references']} development references; of "
        f"{ablation.weights_in_words()}):",
        "",
        ablation.table(),
        "",
    ]


def _rates_in_words(values: Mapping[str, str]) -> list[str]:
    """What more latents at a place would bring; nothing where there is no record of it."""
    latents = [str(number) for number in trials.by_latents()]
    if len(latents) < 2:
        return []

    def each(score: str) -> str:
        of_each = [values[f"rate.{number}.tiles.{score}"] for number in latents]
        return f"{', '.join(of_each[:-1])} and {of_each[-1]}"

    return [
        f"Trained alike on {values['rate.images']} images, autoencoders with {', '.join(latents[:-1])} and "
        f"{latents[-1]} latents at a place have {each('psnr')} dB on the tiles and keep {each('detail')} % "
        "of their high-frequency energy ([figure](figures/autoencoder_rate.png)); "
        f"`mini` has {LATENT_CHANNELS}, as Stable Diffusion has.",
        "",
    ]


def _summary(values: Mapping[str, str]) -> str:
    """The README's block."""
    v = values
    sets = IMAGE_SETS
    lines = [
        f"`mini` has {v['backbone.parameters_m']} M parameters in {v['backbone.mb']} MB; its UNet has seen "
        f"{v['backbone.images_seen']} rendered images.",
        "",
        "| autoencoder, held-out images | " + " | ".join(sets) + " |",
        "|---|" + "--:|" * 3,
        "| PSNR | " + " | ".join(f"{v[f'autoencoder.{name}.psnr']} dB" for name in sets) + " |",
        "| linear code (PCA) of the same rate | "
        + " | ".join(f"{v[f'autoencoder.{n}.pca']} dB" for n in sets)
        + " |",
        "| high-frequency energy kept | "
        + " | ".join(f"{v[f'autoencoder.{n}.detail']} %" for n in sets)
        + " |",
        "",
        *_rates_in_words(v),
        f"Of {v['obedience.prompts']} fresh prompts, one image each, the judges (right on at least "
        f"{v['backbone.judge_accuracy']} % of the held-out renders whose answer is clear after the "
        f"autoencoder; for the pattern these are {v['backbone.judged_patterns']} % of them) find the "
        f"background obeyed in {v['obedience.background']} %, the colours in {v['obedience.colour']} %, "
        f"the pattern in {v['obedience.pattern']} % and the shape in {v['obedience.shape']} %.",
        "",
        f"One reference image, {v['study.references']} references, {v['study.prompts']} prompts each, "
        f"{v['study.sampler_steps']} DDIM steps, guidance {v['study.guidance']}:",
        "",
        results_table(),
        "",
        *_alike_in_words(),
        *_filters_in_words(),
        f"Learning takes {v['tuning.shape.steps']} steps for a shape ({v['tuning.shape.seconds']} s on "
        f"{v['tuning.threads']} CPU threads, {v['tuning.shape.mb']} MB) and "
        f"{v['tuning.appearance.steps']} for an appearance "
        f"({v['tuning.appearance.seconds']} s, {v['tuning.appearance.mb']} MB).",
        *_size_in_words(v),
        *_steps_in_words(),
    ]
    return "\n".join(lines)


# --------------------------------------------------------------------------------
# again


def repeatable(found: Sequence[Record], count: int = REPEATS) -> list[Record]:
    """At most `count` records that any clone can run again in a minute each; the commit says which."""
    cheap = [r for r in found if r.kind == "study" and r.device == "cpu" and _seconds(r) <= REPEAT_SECONDS]
    turn = records.commit() or ""
    return sorted(cheap, key=lambda r: hashlib.sha256(f"{turn}{r.key}".encode()).hexdigest())[:count]


def _seconds(record: Record) -> float:
    """What running a record again takes: what an earlier run learnt and kept is learnt again, too."""
    return record.seconds + sum(one["seconds"] for one in record.learnt.values() if one["kept"])


def run_again(
    found: Sequence[Record],
    everything: Sequence[Record],
    score: Callable[[Any], Mapping[str, Any]] | None = None,
) -> list[str]:
    """Run records again; what differs, one line each, none if they come out the same.

    Where machine, instruction set, threads and versions are the record's, to the bit. Elsewhere each score's
    mean over a run's pictures may differ by three standard errors of such a mean, taken from the spread over
    pictures (each has a prompt and a seed of its own) within the runs of `everything`; of a score that is
    yes or no, one picture may always turn.
    """
    score = score or FreshStudy(device="cpu").score
    lines = []
    threads = torch.get_num_threads()
    for record in found:
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
    """The mean of each score over a run's pictures; None where no picture has it."""
    numbers_of = {
        name: [float(v) for v in values if v is not None]
        for name, values in metrics.items()
        if isinstance(values, list) and not any(isinstance(v, str) for v in values)
    }
    return {name: float(np.mean(values)) if values else None for name, values in numbers_of.items()}


def _bounds(record: Record, everything: Sequence[Record]) -> dict[str, float]:
    """Three standard errors of each score's mean over a run's pictures, but one picture's yes or no."""
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
            # Where nearly all are right, the spread says nothing of how few pictures a run has.
            one = 1 / len(values) if all(isinstance(v, bool) for v in values if v is not None) else 0.0
            bounds[name] = max(3 * math.sqrt(variance / len(values)), one)
    return bounds
