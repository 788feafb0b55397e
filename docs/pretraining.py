"""Writes the tables of escd/pretrain/README.md: `python docs/pretraining.py`.

They come from `training.json` and from the records, so that the page holds no result typed by hand.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any

from escd import records
from escd.pretrain import trials
from escd.pretrain.__main__ import STAGES, WEIGHTS

README = records.ROOT / "escd" / "pretrain" / "README.md"
# Stage -> (network, training data).
STAGE_DATA = {
    "autoencoder": (
        "autoencoder, 64 x 64 px to latents of 16 x 16",
        "rendered images, half of them frames full of material",
    ),
    "words": ("text tower", "captions"),
    "towers": ("image tower, against the frozen text tower", "images with captions; pairs of one attribute"),
    "unet": ("UNet and both attribute filters", "latents with captions, 5 of 8 with a pseudo-word"),
}
# Beginnings of GPU names; for a CPU, training.json has the instruction set.
GPUS = ("NVIDIA", "AMD", "Tesla")
HELD_OUT_PAIRS = 256  # images in the batch that scores TowerStage; each kind of pair has half of them


def newest(kind: str, **config: Any) -> dict[str, Any]:
    """The metrics of the last record of a kind whose config has these values."""
    *_, record = [r for r in records.all(kind) if config.items() <= r.config.items()]
    return record.metrics


def scores(stage: str, last: dict[str, float]) -> tuple[str, str]:
    """Held-out scores of a shipped stage, and the score of chance or of the simplest answer."""
    obeyed = newest("obedience", backbone="mini")
    shapes, patterns = len(obeyed["by_shape"]), len(obeyed["by_pattern"])
    if stage == "autoencoder":
        world = newest("autoencoder", images="world", backbone="mini")
        return f"PSNR {world['psnr']:.1f} dB", f"{world['pca_psnr']:.1f} dB (linear code)"
    if stage == "words":
        return f"loss of the shape's name {last['shape']:.4f}", f"{math.log(shapes + 1):.2f}"
    if stage == "towers":
        pairs = math.log(HELD_OUT_PAIRS / 2)
        return (
            f"loss: captions {last['clip']:.2f}, appearance {last['appearance']:.2f}, "
            f"shape {last['shape']:.2f}",
            f"{math.log(HELD_OUT_PAIRS):.2f}, {pairs:.2f}, {pairs:.2f}",
        )
    return (
        f"loss {last['mse']:.3f}, with `*m` {last['shape']:.3f}, with `*a` {last['appearance']:.3f}; "
        f"prompts: shape {percent(obeyed['shape'])}, pattern {percent(obeyed['pattern'])}",
        f"1.0 (predicting zero); {percent(1 / shapes)}, {percent(1 / patterns)}",
    )


def time_by_device(runs: list[dict[str, Any]]) -> str:
    """The training time of a stage on each kind of device."""
    seconds: dict[str, float] = defaultdict(float)
    for run in runs:
        where = run["environment"]
        cores = where["processes"] * where["threads"]
        cpu = f"{cores} CPU core{'s' if cores > 1 else ''}"
        seconds[where["device"] if where["device"].startswith(GPUS) else cpu] += run["seconds"]
    return ", ".join(f"{duration(total)} on {name}" for name, total in seconds.items())


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def stages_table() -> str:
    """A row for each stage: its data, training time and scores."""
    training = json.loads((WEIGHTS / "training.json").read_text())
    lines = [
        "| stage | learns | from | images: recipe | shipped | time, shipped | held-out score | chance |",
        "|---|---|---|--:|--:|---|---|---|",
    ]
    for name, stage in STAGES.items():
        run = training[name]
        runs = [*run.get("earlier", ()), run]
        score, chance = scores(name, run["scores"][-1])
        images = f"{stage.loop.images:,} | {sum(r['images'] for r in runs):,}"
        cells = (f"`{name}`", *STAGE_DATA[name], images, time_by_device(runs), score, chance)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_table() -> str:
    """Prompts obeyed by the UNet at some checkpoints of its training."""
    curve = sorted(records.all("curve"), key=lambda r: r.config["images"])
    most = max(r.config["references"] for r in curve)
    curve = [r for r in curve if r.config["references"] == most]
    shown = [curve[k * (len(curve) - 1) // 3] for k in range(4)]
    names = ("background", "colours", "shape", "pattern")
    lines = ["| UNet, images | " + " | ".join(names) + " |", "|--:|" + "--:|" * len(names)]
    for record in shown:
        shares = " | ".join(percent(record.metrics["obeyed"][name]) for name in names)
        lines.append(f"| {record.config['images']:,} | {shares} |")
    return "\n".join(lines)


def trials_table() -> str:
    """A row for each recorded trial: its score, and the difference from the recipe's."""
    lines = [
        "| stage | change | images | time | held-out score | difference |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for stage in trials.CHANGES:
        recipe: dict[int, float] = {}
        for record in trials.results(stage):
            images, change = record.config["images"], record.config["change"]
            tiles = record.metrics.get("tiles")
            score = tiles["psnr"] if tiles else record.metrics["scores"][-1]["mse"]
            text = f"{score:.1f} dB, {percent(tiles['detail'])}" if tiles else f"{score:.3f}"
            alone = images not in recipe
            if change == "none":
                recipe.setdefault(images, score)
            difference = "" if alone else f"{score - recipe[images]:+.{1 if tiles else 3}f}"
            seed = f", seed {record.seed}" if record.seed else ""
            name = "the recipe" if change == "none" else change.replace("latents", "latent channels")
            time = duration(record.metrics["trained_seconds"])
            cells = (f"`{stage}`", name + seed, f"{images:,}", time, text, difference)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"stages": stages_table, "curve": curve_table, "trials": trials_table}


def rewritten(text: str) -> str:
    """The README with new tables between its marks; ValueError where it lacks a mark."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
        before, first, rest = text.partition(begin)
        _, last, after = rest.partition(end)
        if not (first and last):
            raise ValueError(
                f"{README.name} lacks {begin.strip()} or {end.strip()}, which a table stands between"
            )
        text = before + begin + table() + end + after
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
