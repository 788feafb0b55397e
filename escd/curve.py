"""What `mini` can do at each checkpoint of its UNet's training: `python -m escd.curve` makes the records.

Training keeps the averaged UNet of every evaluation under `runs/pretrain/unet/checkpoints/<images>`. Each is
asked a fixed set of prompts and tuned on a few development references, and the scores are kept as records,
since the checkpoints themselves are not: so it shows whether more training still helps the method.
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
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm

from . import records
from .backbone import MODELS, Backbone, load_backbone
from .fusion import AttributeFilter
from .judges import WEIGHTS
from .pretrain.loop import RUNS
from .references import load_references
from .study import ObedienceConfig, Study, StudyConfig
from .tuning import TuningConfig

# What each attribute's transfer and its leakage are retrieved by.
SCORED = (("shape", "silhouette", "texture_material"), ("appearance", "material", "silhouette"))
CHECKPOINTS = RUNS / "unet" / "checkpoints"


@dataclass(frozen=True)
class CurveConfig:
    """One checkpoint: how many images its UNet has seen, and what it is asked."""

    images: int
    prompts: int = 256
    # The first so many of the development list; with none, nothing is tuned.
    references: int = 3
    backbone: str = "mini"
    seed: int = 0
    sampler_steps: int = 25
    guidance_scale: float = 4.0


def score_checkpoint(config: CurveConfig, folder: Path) -> dict[str, Any]:
    """Obedience, and transfer and leakage of each attribute in its own half, of the UNet in `folder`.

    The pseudo-words start from the checkpoint's own filters, where it has any, else from the plain words: the
    shipped filters read another UNet's features.
    """
    study = Study(backbones={config.backbone: _backbone(config.backbone, folder)})
    same = {name: getattr(config, name) for name in ("backbone", "seed", "sampler_steps", "guidance_scale")}
    obeyed = study.score(ObedienceConfig(prompts=config.prompts, **same))
    metrics: dict[str, Any] = {"obeyed": {k: v for k, v in obeyed.items() if not k.startswith("by_")}}
    few = list(load_references(which="development"))[: config.references]
    for name, wanted, unwanted in SCORED if few else ():
        tuning = TuningConfig.of(name, seed=config.seed)
        rows = [
            study.score(StudyConfig(name, one.id, "customized", tuning, list="development", **same))
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


def seconds_at(images: int, weights: Path) -> float | None:
    """Training time of the UNet up to a checkpoint, from the training record; None where it does not say."""
    trained = json.loads((weights / "training.json").read_text())["unet"]
    ends, images_before, seconds_before = {0: 0.0}, 0, 0.0
    for run in trained.get("earlier", []):
        images_before, seconds_before = images_before + run["images"], seconds_before + run["seconds"]
        ends[images_before] = seconds_before
    for score in trained["scores"]:
        ends[images_before + score["images"]] = seconds_before + score["seconds"]
    return ends.get(images)


@cache
def points(backbone: str = "mini") -> list[records.Record]:
    """The curve by images seen; of a checkpoint that was asked more than once, the record made last."""
    found = [r for r in records.all(CurveConfig) if r.config["backbone"] == backbone]
    newest = {record.config["images"]: record for record in found}
    return [newest[images] for images in sorted(newest)]


def main(argv: list[str] | None = None) -> None:
    """Score the checkpoints that have no record yet."""
    parser = argparse.ArgumentParser(prog="python -m escd.curve", description=main.__doc__)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, metavar="FOLDER")
    parser.add_argument("--prompts", type=int, default=CurveConfig.prompts)
    parser.add_argument("--references", type=int, default=CurveConfig.references, metavar="N")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # so that one worker gives the bits that several give
    state = PartialState(cpu=not torch.cuda.is_available())
    folders = sorted(path.parent for path in arguments.checkpoints.glob("*/unet"))
    if not folders:
        parser.error(f"no checkpoints in {arguments.checkpoints}: training the UNet leaves them there")
    judges = records.sha256(WEIGHTS / "judges")
    mine = folders[state.process_index :: state.num_processes]
    for folder in tqdm(mine, unit="checkpoint", disable=not state.is_local_main_process):
        config = CurveConfig(int(folder.name), arguments.prompts, arguments.references)
        filters = folder / "filters"
        records.get(
            config,
            lambda config, folder=folder: score_checkpoint(config, folder),
            inputs={
                "UNet": records.sha256(folder / "unet"),
                # read only where something is tuned
                **({"filters": records.sha256(filters)} if arguments.references and filters.exists() else {}),
                "judges": judges,
                "references development": load_references(which="development").sha256,
            },
        )
    state.wait_for_everyone()
    if state.is_main_process:
        for record in points():
            obeyed = ", ".join(f"{k} {100 * v:.0f} %" for k, v in record.metrics["obeyed"].items())
            print(f"{record.config['images']:>9,} images: {obeyed}")


if __name__ == "__main__":
    main()
