"""Scores of `mini` at each checkpoint of its training: `python -m escd.evaluation.curve` makes the records.

Training keeps the averaged model of every evaluation under `runs/pretrain/<stage>/checkpoints/<images>`. A
UNet is scored on a fixed set of prompts and tuned on a few development references; an autoencoder
reconstructs held-out images. The records show whether more training still helps; the checkpoints are not
published.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, UNet2DConditionModel
from tqdm.auto import tqdm

from .. import paths, records
from ..backbone.hub import MODELS
from ..backbone.model import Backbone
from ..ending import run_command
from ..loading import load_backbone
from ..method.config import TuningConfig
from ..method.fusion import AttributeFilter
from .autoencoder import autoencoder_scores, image_sets
from .configs import ObedienceConfig, SamplingConfig, StudyConfig
from .references import load_references
from .study import Study

# Attribute, the score of its transfer, the score of its leakage.
SCORED = (("shape", "silhouette", "texture_material"), ("appearance", "material", "silhouette"))
# How each is tuned: fixed here, so that the points of a curve stay comparable when defaults change.
TUNING: dict[str, dict[str, Any]] = {
    "shape": {"steps": 160, "batch_size": 16, "dropout": 0.15, "noise_level": 0.4, "true_scale": False},
    "appearance": {"steps": 40, "batch_size": 8, "dropout": 0.0, "noise_level": None, "true_scale": False},
}
STAGES = ("unet", "autoencoder")


@dataclass(frozen=True)
class CurveConfig(SamplingConfig):
    """One checkpoint of the UNet, after training on `images` images, and what it is scored on."""

    images: int
    prompts: int = 256
    # How many references of the development list; with 0, nothing is tuned.
    references: int = 3


@dataclass(frozen=True)
class ReconstructionCurveConfig:
    """One checkpoint of the autoencoder, after training on `images` images."""

    images: int
    backbone: str = "mini"


def score_autoencoder(config: ReconstructionCurveConfig, folder: Path) -> dict[str, Any]:
    """PSNR and detail of each image set (`escd.evaluation.autoencoder.autoencoder_scores`)."""
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    metrics: dict[str, Any] = {}
    for name, (images, others) in image_sets().items():
        scores = autoencoder_scores(vae, images, others)
        metrics[name] = {key: scores[key] for key in ("psnr", "detail")}
    trained = MODELS[config.backbone].folder
    return metrics | {"trained_seconds": seconds_at(config.images, trained, "autoencoder")}


def score_checkpoint(config: CurveConfig, folder: Path) -> dict[str, Any]:
    """Obedience, and transfer and leakage of each attribute in its own half, of the UNet in `folder`.

    The pseudo-words start from the checkpoint's own filters if it has any, else from the plain words, because
    the shipped filters are trained on another UNet's features.
    """
    study = Study(backbones={config.backbone: _backbone(config.backbone, folder)})
    same = {name: getattr(config, name) for name in ("backbone", "seed", "sampler_steps")}
    obeyed = study.score(
        ObedienceConfig(prompts=config.prompts, guidance_scale=config.guidance_scale, **same)
    )
    metrics: dict[str, Any] = {"obeyed": {k: v for k, v in obeyed.items() if not k.startswith("by_")}}
    few = list(load_references(which="development"))[: config.references]
    for name, wanted, unwanted in SCORED if few else ():
        tuning = TuningConfig.of(name, seed=config.seed, **TUNING[name])
        rows = [
            study.score(
                StudyConfig(
                    name,
                    one.id,
                    "customized",
                    tuning,
                    list="development",
                    guidance_scale=config.guidance_scale,
                    **same,
                )
            )
            for one in few
        ]
        metrics[name] = {
            "retrieved": _mean(rows, wanted, False),
            "leaked": _mean(rows, unwanted, True),
            "iou": _mean(rows, "iou", 0.0),
        }
    return metrics | {"trained_seconds": seconds_at(config.images, MODELS[config.backbone].folder)}


def _backbone(name: str, folder: Path) -> Backbone:
    backbone = load_backbone(name)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    backbone.unet.load_state_dict(unet.state_dict())
    backbone.filters = {
        path.name: AttributeFilter.from_pretrained(path, torch_dtype=torch.float32).eval()
        for path in sorted((folder / "filters").glob("*"))
    }
    return backbone


def _mean(rows: list[dict[str, list]], name: str, failed: float) -> float:
    return float(np.mean([failed if value is None else value for row in rows for value in row[name]]))


def seconds_at(images: int, weights: Path, stage: str = "unet") -> float | None:
    """Training time of a stage up to a checkpoint, from `training.json`; None where it has no such entry."""
    trained = json.loads((weights / "training.json").read_text())[stage]
    ends, images_before, seconds_before = {0: 0.0}, 0, 0.0
    for run in trained.get("earlier", []):
        images_before, seconds_before = images_before + run["images"], seconds_before + run["seconds"]
        ends[images_before] = seconds_before
    for score in trained["scores"]:
        ends[images_before + score["images"]] = seconds_before + score["seconds"]
    return ends.get(images)


@cache
def points(backbone: str = "mini", stage: str = "unet") -> list[records.Record]:
    """The curve, by number of training images; the newest record of each checkpoint."""
    kind = CurveConfig if stage == "unet" else ReconstructionCurveConfig
    stored = [r for r in records.all(kind) if r.config["backbone"] == backbone]
    newest = {record.config["images"]: record for record in stored}
    return [newest[images] for images in sorted(newest)]


def in_words(record: records.Record) -> str:
    """A point's scores, on one line."""
    metrics = record.metrics
    if "obeyed" not in metrics:
        sets = {name: scores for name, scores in metrics.items() if name != "trained_seconds"}
        return ", ".join(f"{name} {scores['psnr']:.1f} dB" for name, scores in sets.items())
    parts = ["obeyed: " + ", ".join(f"{k} {100 * v:.0f} %" for k, v in metrics["obeyed"].items())]
    for name, *_ in SCORED:
        if name in metrics:
            shares = ", ".join(f"{key} {100 * metrics[name][key]:.0f} %" for key in ("retrieved", "leaked"))
            parts.append(f"{name}: {shares}, IoU {metrics[name]['iou']:.2f}")
    return "; ".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Score the checkpoints that have no record yet."""
    parser = argparse.ArgumentParser(prog="python -m escd.evaluation.curve", description=main.__doc__)
    parser.add_argument("--stage", choices=STAGES, default="unet")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="default: where training keeps them"
    )
    parser.add_argument("--prompts", type=int, default=CurveConfig.prompts)
    parser.add_argument("--references", type=int, default=CurveConfig.references, metavar="N")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # one process and several processes give the same bits
    state = PartialState(cpu=not torch.cuda.is_available())
    kept = arguments.checkpoints or paths.RUNS / "pretrain" / arguments.stage / "checkpoints"
    folders = sorted(path.parent for path in kept.glob("*/unet" if arguments.stage == "unet" else "*/vae"))
    if not folders:
        parser.error(f"no checkpoints in {kept}: training the {arguments.stage} leaves them there")
    mine = folders[state.process_index :: state.num_processes]
    for folder in tqdm(mine, unit="checkpoint", disable=not state.is_local_main_process):
        if arguments.stage == "autoencoder":
            reconstructs = ReconstructionCurveConfig(int(folder.name))
            records.get(
                reconstructs,
                lambda config, folder=folder: score_autoencoder(config, folder),
                inputs={"autoencoder": records.sha256(folder / "vae")},
            )
            continue
        config = CurveConfig(int(folder.name), arguments.prompts, arguments.references)
        filters = folder / "filters"
        records.get(
            config,
            lambda config, folder=folder: score_checkpoint(config, folder),
            inputs={
                "UNet": records.sha256(folder / "unet"),
                # read only where something is tuned
                **({"filters": records.sha256(filters)} if arguments.references and filters.exists() else {}),
                "judges": records.sha256(paths.WEIGHTS / "judges"),
                "references development": load_references(which="development").sha256,
            },
        )
    state.wait_for_everyone()
    if state.is_main_process:
        for record in points(stage=arguments.stage):
            print(f"{record.config['images']:>9,} images: {in_words(record)}")


if __name__ == "__main__":
    run_command(main)
