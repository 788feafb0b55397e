"""What the records say: the numbers of the README, the paper and the tables, and whether they come out again.

No result is typed by hand. `numbers` gives each a key and a rounded text; `write_numbers` puts them into
README.md and `paper/numbers.tex`; `run_again` runs some of the records once more and compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from .. import paths, records
from ..backbone import hub
from ..evaluation.autoencoder import IMAGE_SETS
from ..evaluation.configs import EQUAL_SIZE
from ..evaluation.formats import decimals, percent, signed
from ..evaluation.judges import HEADS
from ..evaluation.tables import Row
from ..files import write_text
from ..method.attributes import ATTRIBUTES
from ..pretrain import ablation, trials
from ..pretrain.autoencoder import LATENT_CHANNELS
from .results import (
    STEPS_OF,
    alike,
    at_full_size,
    backbone_records,
    composed,
    contrast,
    cost_records,
    images_seen,
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
    folder = hub.MODELS["mini"].folder
    weights = sorted(folder.rglob("*.safetensors"))
    found = results()
    autoencoders, (judges, obedience) = backbone_records()
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
        values[f"obedience.{key}"] = percent(obedience.metrics[name])
    for record in autoencoders:
        key = f"autoencoder.{record.config['images']}"
        values[f"{key}.psnr"] = f"{record.metrics['psnr']:.1f}"
        values[f"{key}.pca"] = f"{record.metrics['pca_psnr']:.1f}"
        values[f"{key}.detail"] = percent(record.metrics["detail"])
    for mode in ("shape", "appearance"):
        for arm, row in arms_of(found, mode):
            values |= {f"{mode}.{arm}.{name}": text for name, text in _row_numbers(mode, row).items()}
    for arm, row in found.rows.get("composition", {}).items():
        values |= {
            f"composition.{arm}.{k}": percent(row.transfer[k]) for k in ("silhouette", "material", "both")
        }
    gains = {"composition": composed()} if "composition" in found.rows else {}
    for attribute in ATTRIBUTES.values():
        other = {"encoder": "decoder", "decoder": "encoder"}[attribute.part]
        for what, gain in contrast(attribute.name, attribute.part, other).items():
            gains[f"{attribute.name}.{what.lower()}"] = gain
        for part, one in alike(attribute.name).items():
            if part in EQUAL_SIZE:
                key = f"{attribute.name}.{part.replace('/', '_').replace('.', '_')}"
                texts = _row_numbers(attribute.name, one.row)
                values |= {f"{key}.{name}": text for name, text in texts.items()}
                values[f"{key}.mb"] = f"{one.megabytes:.1f}"
                gains |= {f"{key}.{what.lower()}": gain for what, gain in one.beyond.items()}
    for key, gain in gains.items():
        ends = {"": gain.mean, "_low": gain.low, "_high": gain.high}
        places = LEAKAGE_PLACES if key.endswith(".leakage") else 2
        values |= {f"{key}.gain{end}": signed(value, places) for end, value in ends.items()}
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
                values[f"{key}.{of}detail"] = percent(scores[f"{code}detail"])
    values["filters.weights"] = ablation.weights_in_words()
    for arm, row in ablation.rows().items():
        values |= {f"filters.{arm.replace(' ', '_')}.{name}": text for name, text in row.items()}
    return values


def _row_numbers(mode: str, row: Row) -> dict[str, str]:
    name = "iou" if mode == "shape" else "distance"
    texts = {name: decimals(row.transfer.get(name)), "retrieval": percent(row.transfer["retrieval"])}
    if "texture" in row.transfer:
        texts["texture"] = percent(row.transfer["texture"])
    texts |= {key.replace("colours", "colour"): percent(value) for key, value in row.obeyed.items()}
    if row.leakage is not None:
        ends = {"": row.leakage.mean, "_low": row.leakage.low, "_high": row.leakage.high}
        texts |= {f"leakage{end}": signed(value, LEAKAGE_PLACES) for end, value in ends.items()}
    return texts


def _parameters(path: Path) -> int:
    with safe_open(path, "pt") as stored:
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())


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
