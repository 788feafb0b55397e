"""The recipe of `mini`, one change at a time: `python -m escd.pretrain.trials` trains and scores each.

A trial trains one stage from random weights on a few images, with its recipe or with one change of it. Images
and first weights are the same for all trials of a stage.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .. import paths, records
from ..backbone.hub import MODELS
from ..backbone.image_tower import ImageTower
from ..ending import run_command
from ..evaluation.autoencoder import IMAGE_SETS, autoencoder_scores, image_sets
from ..evaluation.references import LISTS, load_references
from . import loop
from .autoencoder import LATENT_CHANNELS, AutoencoderLoss, AutoencoderStage
from .unet import UNetStage

# Changes of each stage: a field of its loop, the autoencoder's latent channels ("latents"), or the weight of
# a perceptual term (1.0: about a third of the rest of the loss at the start).
CHANGES: dict[str, dict[str, dict[str, float]]] = {
    "autoencoder": {
        "none": {},
        "8 latents": {"latents": 8},
        "16 latents": {"latents": 16},
        "perceptual term": {"perceptual": 1.0},
    },
    "unet": {
        "none": {},
        "batches of 32": {"batch_size": 32},
        "batches of 128": {"batch_size": 128},
        "half the rate": {"learning_rate": 4e-4},
        "twice the rate": {"learning_rate": 1.6e-3},
        "a rate that falls in the last third": {"decay": 0.33},
        "no average": {"ema_decay": 0.0},
    },
}
EVALUATIONS = {"autoencoder": 6, "unet": 2}  # per training; the UNet's generate images


@dataclass(frozen=True)
class TrialConfig:
    """A stage trained from random weights on `images` images, with one change."""

    stage: str
    change: str
    images: int
    backbone: str = "mini"
    seed: int = 0


class PerceptualLoss(AutoencoderLoss):
    """With a perceptual term (Zhang et al. 2018): distances of the image tower's tokens in each layer."""

    def __init__(self, tower: ImageTower, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.__dict__["tower"] = tower.eval().requires_grad_(False)  # kept out of this module's state

    def perceptual(self, decoded: Tensor, image: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self._tokens(image)
        tokens = self._tokens(decoded)
        distances = [(a - b).square().sum(-1).mean() for a, b in zip(tokens, wanted, strict=True)]
        return self.weight * torch.stack(distances).mean()

    def _tokens(self, images: Tensor) -> list[Tensor]:
        """The output of each layer of the tower (N, tokens, width), normalised to unit length."""
        layers: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, out: layers.append(F.normalize(out.float(), dim=-1)))
            for block in self.tower.visual.transformer.resblocks
        ]
        try:
            self.tower(images)
        finally:
            for hook in hooks:
                hook.remove()
        return layers


def _stage(config: TrialConfig, device: torch.device) -> loop.Stage:
    """The stage with its change."""
    folder, change = MODELS[config.backbone].folder, CHANGES[config.stage][config.change]
    if config.stage == "unet":
        stage: Any = UNetStage(device, folder)
        stage.generator.manual_seed(config.seed)
    else:
        stage = AutoencoderStage(device, folder, int(change.get("latents", LATENT_CHANNELS)))
        if weight := change.get("perceptual"):
            tower = ImageTower.from_pretrained(folder / "image_tower", torch_dtype=torch.float32)
            start = stage.module.vae.state_dict()
            stage.module = PerceptualLoss(tower.to(device), weight)
            stage.module.vae.load_state_dict(start)
    stage.name = _name(config)
    stage.loop = loop_of(config, stage.loop)
    return stage


def _name(config: TrialConfig) -> str:
    """Name of the folders of a trial's state and weights."""
    return f"trial {config.stage} {config.change} {config.images} {config.seed}".replace(" ", "-")


def loop_of(config: TrialConfig, recipe: loop.LoopConfig) -> loop.LoopConfig:
    """The recipe's loop with the trial's change."""
    change = CHANGES[config.stage][config.change]
    return replace(recipe, seed=config.seed, **{k: v for k, v in change.items() if hasattr(recipe, k)})


def score(config: TrialConfig) -> dict[str, Any]:
    """Train and score; "scores" holds the stage's own evaluations.

    For the autoencoder also `evaluation.autoencoder.autoencoder_scores` on each image set. A killed training
    resumes; its state is removed once it is scored.
    """
    scratch = paths.RUNS / "trials" / _name(config)
    scratch.mkdir(parents=True, exist_ok=True)
    trained = loop.train(
        lambda device: _stage(config, device),
        weights=scratch,
        images=config.images,
        evaluations=EVALUATIONS[config.stage],
    )
    metrics = {name: trained[name] for name in ("config", "scores", "environment")}
    metrics["trained_seconds"] = trained["seconds"]
    if config.stage == "autoencoder":
        vae = AutoencoderKL.from_pretrained(scratch / "vae", torch_dtype=torch.float32).eval()
        metrics["latents"] = vae.config.latent_channels
        metrics |= {name: autoencoder_scores(vae, *images) for name, images in image_sets().items()}
    shutil.rmtree(loop.RUNS / trained["stage"])
    return metrics


def inputs(config: TrialConfig) -> dict[str, str]:
    """sha256 of what a trial's scores depend on, except the world."""
    folder = MODELS[config.backbone].folder
    if config.stage == "unet":
        return {name: records.sha256(folder / name) for name in ("vae", "text_encoder", "image_tower")}
    hashes = {f"references {name}": load_references(which=name).sha256 for name in LISTS}
    if "perceptual" in CHANGES[config.stage][config.change]:
        hashes["image_tower"] = records.sha256(folder / "image_tower")
    return hashes


def results(stage: str) -> list[records.Record]:
    """The records of a stage's trials, sorted by number of images, then in the order of CHANGES."""
    order = list(CHANGES[stage])
    trials = [r for r in records.all(TrialConfig) if r.config["stage"] == stage]
    return sorted(
        trials, key=lambda r: (r.config["images"], order.index(r.config["change"]), r.config["seed"])
    )


def by_latents() -> dict[int, records.Record]:
    """Trials of the autoencoder by its latent channels, all with the same number of images."""
    same = ("none", *(name for name, change in CHANGES["autoencoder"].items() if "latents" in change))
    trials = [r for r in results("autoencoder") if r.config["change"] in same]
    most = max((r.config["images"] for r in trials), default=0)
    return {r.metrics["latents"]: r for r in trials if r.config["images"] == most}


def table(stage: str) -> str:
    """A stage's trials in Markdown, a row each; empty where there are none.

    Autoencoder: PSNR and share of high-frequency energy kept on each image set, and the same for a linear
    code of its rate. UNet: held-out errors (`UNetStage.evaluate`) in thousandths.
    """
    trials = results(stage)
    if stage == "unet":
        scores = ("mse", "mse_noisy", "shape", "appearance")
        heads = ("plain captions", "their noisier half", "`*m`", "`*a`")
        rows = [(r, [f"{1000 * r.metrics['scores'][-1][k]:.1f}" for k in scores]) for r in trials]
    else:
        heads = tuple(h for name in IMAGE_SETS for h in (name, "linear code"))
        rows = [
            (
                r,
                [
                    f"{r.metrics[name][f'{code}psnr']:.1f} dB, {100 * r.metrics[name][f'{code}detail']:.0f} %"
                    for name in IMAGE_SETS
                    for code in ("", "pca_")
                ],
            )
            for r in trials
        ]
    lines = [" | ".join(["| changed | images", *heads]) + " |", "|---|--:|" + "--:|" * len(heads)]
    for record, cells in rows:
        seed = f", seed {record.seed}" if record.seed else ""
        start = [f"| {record.config['change']}{seed}", f"{record.config['images']:,}"]
        lines.append(" | ".join([*start, *cells]) + " |")
    return "\n".join(lines) if trials else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score every change without a record (in parallel: start it twice, with different changes)."""
    parser = argparse.ArgumentParser(prog="python -m escd.pretrain.trials", description=main.__doc__)
    parser.add_argument("stage", choices=tuple(CHANGES))
    parser.add_argument("--changes", nargs="+", metavar="CHANGE", help="default: all, and none")
    parser.add_argument("--images", type=int, required=True, help="images per trial")
    parser.add_argument("--seed", type=int, default=0, help="of noise, time steps and the pictures' order")
    parser.add_argument("--records", type=Path, help="folder of the records (default: figures/records)")
    arguments = parser.parse_args(argv)
    changes = arguments.changes or tuple(CHANGES[arguments.stage])
    if unknown := [change for change in changes if change not in CHANGES[arguments.stage]]:
        known = ", ".join(map(repr, CHANGES[arguments.stage]))
        parser.error(f"unknown change {unknown[0]!r}; known: {known}")
    if arguments.images < 1:
        parser.error("--images must be positive")
    for change in changes:
        config = TrialConfig(arguments.stage, change, arguments.images, seed=arguments.seed)
        record = records.get(config, score, inputs=inputs(config), folder=arguments.records)
        print(f"{change}: {record.metrics['scores'][-1]}", flush=True)


if __name__ == "__main__":
    run_command(main)
