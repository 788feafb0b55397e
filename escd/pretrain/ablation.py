"""Ablation of the attribute filters: `python -m escd.pretrain.ablation`.

Each arm starts from the shipped filters, removes one thing and retrains them on the same images, with the
UNet frozen. It is scored at zero tuning steps on the development references: what its pseudo-words
transfer. (From random weights 8,000 images are too few: only the arm whose reference is its target leaves the
floor.)
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .. import paths, records
from ..backbone.hub import MODELS
from ..ending import run_command
from ..evaluation.judges import load_judges
from ..evaluation.measure import paired_bootstrap
from ..evaluation.prompts import PROMPTS, prompts_for
from ..evaluation.references import load_references
from ..evaluation.scores import score_customization
from ..method.attributes import ATTRIBUTES
from ..method.pipeline import ESCDPipeline
from ..method.tuning import customize
from . import loop
from .unet import UNetStage

# Arm -> its text in the tables.
ARMS = {
    "all": "as shipped, retrained like the others",
    "no features": "without the UNet's features",
    "no tower": "without the image tower",
    "no word": "an article instead of the sub-attribute's word",
    "class word": "a class word instead of the sub-attribute's word",
    "not told": "without the probe losses",
    "own picture": "without these, and the reference is the target (E4T)",
}
WORDS = {"no word": "a", "class word": "object"}


@dataclass(frozen=True)
class AblationConfig:
    """Filters retrained on `images` images and scored on the development references."""

    arm: str
    backbone: str = "mini"
    references: int = 12
    images: int = 8_000
    seed: int = 0


class Nothing(nn.Module):
    """Zeros, in the place of a filter's layer whose input is removed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.width)


class AblationStage(UNetStage):
    """The shipped filters with one thing removed, and the shipped UNet, frozen."""

    loop = loop.LoopConfig(images=8_000, batch_size=64, learning_rate=3e-4, decay=0.6, ema_decay=0.98)
    # Every caption holds a pseudo-word.
    shares = (0.4375, 0.4375, 0.125)

    def __init__(self, device: torch.device, folder: Path, arm: str) -> None:
        super().__init__(device, folder)
        self.name = f"ablation {arm}"
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.module.unet.load_state_dict(unet.state_dict())
        self.module.unet.requires_grad_(False)
        self.module.load(folder)
        for learnt in self.module.filters.values():
            if arm == "no features":
                learnt.project_down = Nothing(learnt.config.hidden)
            if arm == "no tower":
                learnt.project_cls = Nothing(learnt.config.hidden)
        if arm in WORDS:
            embedding = self.backbone.word_embedding(WORDS[arm])
            self.backbone.word_embedding = lambda _: embedding.clone()
        if arm == "own picture":
            self.partners = (0, 0)
        if arm in ("own picture", "not told"):
            self.module.probe_weight = 0.0

    def export(self, folder: Path) -> None:
        """Export nothing: the filters are scored in memory."""


def score(config: AblationConfig) -> dict[str, Any]:
    """Train one arm and score its pseudo-words; "shape" and "appearance" hold one value for each image.

    A killed training resumes; its state is removed once it is scored.
    """
    folder, stages = MODELS[config.backbone].folder, []

    def make(device: torch.device) -> AblationStage:
        stages.append(AblationStage(device, folder, config.arm))
        stages[-1].generator.manual_seed(config.seed)
        return stages[-1]

    scratch = paths.RUNS / "ablation" / config.arm.replace(" ", "-")
    scratch.mkdir(parents=True, exist_ok=True)
    errors = loop.train(make, weights=scratch, images=config.images, evaluations=1)["scores"][-1]
    backbone, listed, judges = stages[0].backbone, load_references(which="development"), load_judges()
    stages[0].module.requires_grad_(False).eval()
    metrics: dict[str, Any] = {"errors": {name: errors[name] for name in ATTRIBUTES}}
    for name in ATTRIBUTES:
        wanted = ("iou", "silhouette") if name == "shape" else ("combined", "material")
        metrics[name] = {key: [] for key in wanted}
        for reference in list(listed)[: config.references]:
            untuned = customize(reference.image, name, backbone, steps=0, seed=config.seed)
            pipe = ESCDPipeline(backbone, **{name: untuned})
            pipe.set_progress_bar_config(disable=True)
            prompts = prompts_for(reference, name)
            scores = score_customization(
                pipe, prompts, reference, reference, listed, judges, seed=config.seed
            )
            for key in wanted:
                metrics[name][key] += scores[key]
    shutil.rmtree(loop.RUNS / stages[0].name)
    return metrics


def inputs(config: AblationConfig) -> dict[str, str]:
    """sha256 of what an arm's scores depend on."""
    folder = MODELS[config.backbone].folder
    return {
        "UNet": records.sha256(folder / "unet"),
        "filters": records.sha256(folder / "filters"),
        "judges": records.sha256(paths.WEIGHTS / "judges"),
        "references development": load_references(which="development").sha256,
    }


def rows(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """The recorded arms and their scores as rounded texts; empty where the first arm has no record.

    Untuned pseudo-words on the development references: `iou` and `silhouettes` retrieved among 20 with "*m",
    `materials` retrieved and the combined `distance` with "*a"; shares in %. For the other arms also
    `iou_difference` and `distance_difference` from the first arm, on the same references and prompts, with
    their 95 % bootstrap intervals.
    """
    metrics = {r.config["arm"]: r.metrics for r in records.all(AblationConfig, folder=folder)}
    texts: dict[str, dict[str, str]] = {}
    for arm in ARMS if "all" in metrics else ():
        if arm not in metrics:
            continue
        shape, look = (metrics[arm][name] for name in ATTRIBUTES)
        overlaps = _none_as(0.0, shape["iou"])
        texts[arm] = {
            "iou": f"{np.mean(overlaps):.2f}",
            "silhouettes": f"{100 * np.mean(_none_as(False, shape['silhouette'])):.0f}",
            "materials": f"{100 * np.mean(_none_as(False, look['material'])):.0f}",
            "distance": f"{np.mean([far for far in look['combined'] if far is not None]):.1f}",
        }
        if arm != "all":
            whole_shape, whole_look = (metrics["all"][name] for name in ATTRIBUTES)
            texts[arm] |= {
                "iou_difference": _difference(overlaps, _none_as(0.0, whole_shape["iou"])),
                "distance_difference": _difference(look["combined"], whole_look["combined"]),
            }
    return texts


def weights_in_words(folder: Path | None = None) -> str:
    """Which weights the records are from: "the weights that ship" or "earlier weights"."""
    stored = records.all(AblationConfig, folder=folder)
    now = all(r.inputs == inputs(records.config_of(r, AblationConfig)) for r in stored)
    return "the weights that ship" if now else "earlier weights"


def table(folder: Path | None = None) -> str:
    """`rows` as a Markdown table; empty where there are none."""
    lines = [
        "| filters | IoU | difference | silhouettes | materials | distance | difference |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    arms = rows(folder)
    for arm, row in arms.items():
        cells = [
            row["iou"],
            row.get("iou_difference", ""),
            row["silhouettes"] + " %",
            row["materials"] + " %",
            row["distance"],
            row.get("distance_difference", ""),
        ]
        lines.append(f"| {ARMS[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if arms else ""


def _none_as(value: float, scores: Sequence[float | None]) -> list[float]:
    """Scores with `value` for images without a foreground, which have none."""
    return [value if score is None else score for score in scores]


def _difference(scores: Sequence[float | None], others: Sequence[float | None]) -> str:
    """Mean difference and interval over images scored in both; whole references are resampled."""
    both = [
        (a, b, k // PROMPTS)
        for k, (a, b) in enumerate(zip(scores, others, strict=True))
        if a is not None and b is not None
    ]
    mine, theirs, reference = zip(*both, strict=True)
    difference = paired_bootstrap(mine, theirs, groups=reference)
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score every arm without a record (in parallel: start it twice, with different arms)."""
    parser = argparse.ArgumentParser(prog="python -m escd.pretrain.ablation", description=main.__doc__)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--images", type=int, default=AblationConfig.images, help="images per arm")
    parser.add_argument("--records", type=Path, help="folder of the records (default: figures/records)")
    arguments = parser.parse_args(argv)
    for arm in arguments.arms:
        config = AblationConfig(arm, images=arguments.images)
        record = records.get(config, score, inputs=inputs(config), folder=arguments.records)
        print(f"{arm}: {record.metrics['errors']}", flush=True)


if __name__ == "__main__":
    run_command(main)
