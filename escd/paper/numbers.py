"""The numbers of the README and the paper, from the records.

No result is typed by hand. `numbers` gives each a key and a rounded text; `write_numbers` puts them into
README.md and `paper/numbers.tex`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open

from .. import paths, records
from ..backbone import hub
from ..evaluation.autoencoder import IMAGE_SETS
from ..evaluation.configs import EQUAL_SIZE
from ..evaluation.formats import decimals, percent, signed
from ..evaluation.judges import HEADS
from ..evaluation.real_tables import AppearanceRow, Row, ShapeRow
from ..files import write_text
from ..method.attributes import ATTRIBUTES
from ..method.guidance import BACKBONE, CUSTOMIZED
from ..pretrain import ablation, trials
from ..pretrain.autoencoder import LATENT_CHANNELS
from .methods import method_numbers, methods_at_size_in_words, methods_in_latex, methods_in_words
from .results import (
    STEPS_OF,
    alike,
    at_full_size,
    backbone_records,
    composed,
    contrast,
    cost_records,
    images_seen,
    latent_channels,
    pairs,
    results,
    step_costs,
    training,
)
from .tables import LEAKAGE_PLACES, alike_table, arms_of, results_table

README = paths.ROOT / "README.md"
NUMBERS = paths.ROOT / "paper" / "numbers.tex"
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"


def numbers() -> dict[str, str]:
    """Every number of the README and the paper: key -> text, rounded as it is to be read.

    Shares are percentages without the sign; what is undefined is "--". KeyError where a record is missing.
    """
    values = _backbone_numbers() | _study_numbers() | _tuning_numbers() | _size_numbers()
    values |= method_numbers()
    for latents, record in trials.by_latents().items():
        values["rate.images"] = f"{record.config['images']:,}"
        for name in IMAGE_SETS:
            scores, key = record.metrics[name], f"rate.{latents}.{name}"
            for of, code in (("", ""), ("linear_", "pca_")):
                values[f"{key}.{of}psnr"] = f"{scores[f'{code}psnr']:.1f}"
                values[f"{key}.{of}detail"] = percent(scores[f"{code}detail"])
    values["filters.weights"] = ablation.weights_in_words()
    for arm, row in ablation.rows().items():
        values |= {f"filters.{arm.replace(' ', '_')}.{name}": text for name, text in row.items()}
    return values


def _backbone_numbers() -> dict[str, str]:
    """Size and training of `mini`, its autoencoder, the judges, and prompts obeyed."""
    weights = sorted(hub.MODELS["mini"].folder.rglob("*.safetensors"))
    autoencoders, (judges, obedience) = backbone_records()
    values = {
        "backbone.latents": str(latent_channels()),
        "backbone.images_seen": f"{images_seen(training()['unet']):,}",
        "backbone.parameters_m": f"{sum(_parameters(path) for path in weights) / 1e6:.1f}",
        "backbone.mb": f"{sum(path.stat().st_size for path in weights) / 1e6:.0f}",
        # of the least accurate head
        "backbone.judge_accuracy": f"{100 * min(judges.metrics[name] for name in HEADS):.1f}",
        "backbone.judged_patterns": f"{100 * judges.metrics['pattern_judged']:.0f}",
        "obedience.prompts": str(obedience.config["prompts"]),
    }
    for name, key in (("background",) * 2, ("colours", "colour"), ("pattern",) * 2, ("shape",) * 2):
        values[f"obedience.{key}"] = percent(obedience.metrics[name])
    for record in autoencoders:
        key = f"autoencoder.{record.config['images']}"
        values[f"{key}.psnr"] = f"{record.metrics['psnr']:.1f}"
        values[f"{key}.pca"] = f"{record.metrics['pca_psnr']:.1f}"
        values[f"{key}.detail"] = percent(record.metrics["detail"])
    return values


def _guidance(used: Iterable[records.Record]) -> str:
    """The scale of guidance of the study's runs, of each attribute where they differ."""
    scales = {r.config["attribute"]: r.config["guidance_scale"] for r in used if r.kind == "study"}
    if len(set(scales.values())) == 1:
        return f"{next(iter(scales.values())):g}"
    return " and ".join(f"{scale:g} ({attribute})" for attribute, scale in scales.items())


def _guidance_from(used: Iterable[records.Record]) -> str:
    """Which UNet predicts the branch without the prompt in the study's runs; ValueError where they differ."""
    (start,) = {record.config["guidance_from"] for record in used}
    return {BACKBONE: "untouched backbone", CUSTOMIZED: "customized UNet"}[start]


def _study_numbers() -> dict[str, str]:
    """Every arm of the study, and what the arms gain beside each other."""
    found = results()
    one = next(record for record in found.used if record.kind == "study")
    values = {
        "study.references": str(found.references),
        "study.prompts": str(len(one.metrics["prompts"])),
        "study.sampler_steps": str(one.config["sampler_steps"]),
        "study.guidance": _guidance(found.used),
        "study.guidance_from": _guidance_from(found.used),
    }
    for mode in found.rows.keys() - {"both"}:
        for arm, row in arms_of(found, mode):
            key = f"{mode.replace(', ', '_')}.{_key(arm)}"
            values |= {f"{key}.{name}": text for name, text in _row_numbers(row).items()}
    for arm, pair in pairs(found).items():
        shares = ("silhouette", "texture", "colour", "right")
        values |= {f"composition.{_key(arm)}.{name}": percent(getattr(pair, name)) for name in shares}
    gains = {"composition": composed()} if pairs(found) else {}
    for attribute in ATTRIBUTES.values():
        other = {"encoder": "decoder", "decoder": "encoder"}[attribute.part]
        for what, gain in contrast(attribute.name, attribute.part, other).items():
            gains[f"{attribute.name}.{what.lower()}"] = gain
        for part, one_part in alike(attribute.name).items():
            if part in EQUAL_SIZE:
                key = f"{attribute.name}.{_key(part)}"
                texts = _row_numbers(one_part.row)
                values |= {f"{key}.{name}": text for name, text in texts.items()}
                values[f"{key}.mb"] = f"{one_part.megabytes:.1f}"
                gains |= {f"{key}.{what.lower()}": gain for what, gain in one_part.beyond.items()}
    for key, gain in gains.items():
        ends = {"": gain.mean, "_low": gain.low, "_high": gain.high}
        places = LEAKAGE_PLACES if key.endswith(".leakage") else 2
        values |= {f"{key}.gain{end}": signed(value, places) for end, value in ends.items()}
    return values


def _tuning_numbers() -> dict[str, str]:
    """Steps, seconds and file size of each attribute's tuning on `mini`."""
    values = {}
    for record in cost_records():
        key = f"tuning.{record.config['tuning']['attribute']}"
        values["tuning.threads"] = str(record.config["threads"])
        values[f"{key}.steps"] = str(record.metrics["steps"])
        values[f"{key}.seconds"] = f"{record.metrics['seconds']:.0f}"
        values[f"{key}.mb"] = f"{record.metrics['megabytes']:.1f}"
    return values


def _size_numbers() -> dict[str, str]:
    """Cost at Stable Diffusion 1.5's size; empty where it is not recorded."""
    values = {}
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
    return values


def _key(name: str) -> str:
    """An arm's or a part's name as a piece of a key."""
    return name.translate(str.maketrans("/. ", "___", "()"))


def _row_numbers(row: Row) -> dict[str, str]:
    texts = {key.replace("colours", "colour"): percent(value) for key, value in row.obeyed.items()}
    if isinstance(row, ShapeRow):
        texts |= {"iou": decimals(row.iou), "retrieval": percent(row.first)}
        leakage = row.texture_leakage
    else:
        assert isinstance(row, AppearanceRow)
        leakage = row.leakage
        for name, one in (("texture", row.texture), ("colour", row.colour)):
            texts |= {
                name: percent(one.first),
                f"{name}_rank": decimals(one.rank, 1),
                f"{name}_distance": decimals(one.distance),
            }
    if leakage is not None:
        ends = {"": leakage.mean, "_low": leakage.low, "_high": leakage.high}
        texts |= {f"leakage{end}": signed(value, LEAKAGE_PLACES) for end, value in ends.items()}
    return texts


def _parameters(path: Path) -> int:
    with safe_open(path, "pt") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())


def write_numbers(readme: Path = README, macros: Path = NUMBERS) -> None:
    """Put the numbers between the README's marks, and as macros and tables into the paper's folder.

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
    write_text(macros.with_name("methods.tex"), methods_in_latex())


def _size_in_words(v: Mapping[str, str]) -> list[str]:
    """The README's lines on the method at Stable Diffusion's size."""
    if "size.gb" not in v:
        return []
    return [
        "",
        f"Cost at Stable Diffusion 1.5's size (random weights, {v['size.pixels']} px, float32, CPU): three "
        f"tuning steps with their preparation take {v['size.shape.seconds']} s for a shape and "
        f"{v['size.appearance.seconds']} s for an appearance, with at most {v['size.gb']} GB of memory. "
        f"The files have {v['size.shape.mb']} and {v['size.appearance.mb']} MB in full, "
        f"{v['size.shape.mb_at_16']} and {v['size.appearance.mb_at_16']} MB at rank 16.",
    ]


def _steps_in_words() -> list[str]:
    """The README's lines on the cost of a step beside the alternatives."""
    record = at_full_size("tuning_cost")
    if record is None:
        return []
    config, measures = record.config, ("step", "gradients", "peak", "flops")
    lines = [
        "",
        "Cost of a tuning step at that size, relative to tuning the whole UNet "
        f"({config['rounds']} interleaved rounds; {config['dtype']}, {config['pixels']} px, batch "
        f"{config['batch']}, {record.threads} CPU threads, AdamW):",
        "",
        "| tuning | time | without the optimiser | memory | arithmetic |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, row in step_costs().items():
        lines.append(f"| {name} | " + " | ".join(f"{row[measure]:.2f}" for measure in measures) + " |")
    default = 'Default for an appearance at this size: no gradients in the frozen encoder ("half").'
    return [*lines, "", default]


def _alike_in_words() -> list[str]:
    """The README's lines on the halves at equal size."""
    rows = alike_table()
    if not rows:
        return []
    references = {record.config["reference"] for record in results().alike}
    title = (
        "Equal size: parts of the decoder about as large as the encoder, the same prompts of "
        f"{len(references)} references (differences from the encoder in IoU and in the share retrieved by "
        "texture, 95 % intervals):"
    )
    return [title, "", rows, ""]


def _filters_in_words() -> list[str]:
    """The README's lines on the ablation of the filters."""
    found = records.all(ablation.AblationConfig)
    if not found:
        return []
    config = found[0].config
    return [
        "Ablation of the attribute filters, at zero tuning steps: each row removes one thing and retrains "
        f"the filters on {config['images']:,} images with the UNet frozen (differences from the first row, "
        f"95 % intervals; {config['references']} development references; results of "
        f"{ablation.weights_in_words()}):",
        "",
        ablation.table(),
        "",
    ]


def _rates_in_words(values: Mapping[str, str]) -> list[str]:
    """The README's lines on more latent channels; none where they are not recorded."""
    latents = [str(number) for number in trials.by_latents()]
    if len(latents) < 2:
        return []

    def each(score: str) -> str:
        of_each = [values[f"rate.{number}.tiles.{score}"] for number in latents]
        return f"{', '.join(of_each[:-1])} and {of_each[-1]}"

    return [
        f"More latent channels reconstruct better: with {', '.join(latents[:-1])} and {latents[-1]} of them, "
        f"trained alike on {values['rate.images']} images, the tiles have {each('psnr')} dB and keep "
        f"{each('detail')} % of their high-frequency energy ([figure](figures/autoencoder_rate.png)). `mini` "
        f"has {values['backbone.latents']}, Stable Diffusion {LATENT_CHANNELS}.",
        "",
    ]


def _summary(values: Mapping[str, str]) -> str:
    """The README's block."""
    v = values
    sets = IMAGE_SETS
    lines = [
        f"`mini` has {v['backbone.parameters_m']} M parameters in {v['backbone.mb']} MB; its UNet was "
        f"trained on {v['backbone.images_seen']} rendered images.",
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
        f"`mini` draws what a prompt names: the background in {v['obedience.background']} %, the colours in "
        f"{v['obedience.colour']} %, the pattern in {v['obedience.pattern']} % and the shape in "
        f"{v['obedience.shape']} % of {v['obedience.prompts']} new prompts, one image each. The judges are "
        f"classifiers, at least {v['backbone.judge_accuracy']} % accurate on held-out renders whose answer "
        "is clear after the autoencoder (for the pattern, "
        f"{v['backbone.judged_patterns']} % of the renders).",
        "",
        f"Customization from one image: {v['study.references']} references, {v['study.prompts']} prompts "
        f"each, {v['study.sampler_steps']} DDIM steps, guidance {v['study.guidance']} from the "
        f"{v['study.guidance_from']}:",
        "",
        results_table(),
        "",
        *_alike_in_words(),
        *_filters_in_words(),
        f"Cost on `mini`, on {v['tuning.threads']} CPU threads: {v['tuning.shape.steps']} steps for a shape "
        f"({v['tuning.shape.seconds']} s, {v['tuning.shape.mb']} MB) and {v['tuning.appearance.steps']} for "
        f"an appearance ({v['tuning.appearance.seconds']} s, {v['tuning.appearance.mb']} MB).",
        *methods_in_words(),
        *_size_in_words(v),
        *_steps_in_words(),
        *methods_at_size_in_words(),
    ]
    return "\n".join(lines)
