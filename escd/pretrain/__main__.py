"""``python -m escd.pretrain``: train `mini` stage by stage, or filters for another backbone; resumable; also
under ``accelerate launch``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from .. import paths
from ..ending import run_command
from .autoencoder import LATENT_CHANNELS, MOST_CHANNELS, AutoencoderStage
from .filters import FilterStage, images_to_learn_from
from .loop import Stage, train
from .towers import TowerStage
from .unet import UNetStage
from .words import WordStage

STAGES = {stage.name: stage for stage in (AutoencoderStage, WordStage, TowerStage, UNetStage)}
WEIGHTS = paths.WEIGHTS / "mini"
FILTERS = paths.RUNS / "filters"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train the named stages in order."""
    parser = argparse.ArgumentParser(prog="python -m escd.pretrain", description=__doc__)
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"which of {', '.join(STAGES)} (default: all, in this order); or filters, for another backbone, "
        "from a folder of images",
    )
    parser.add_argument(
        "--backbone", default="sd15", help="for filters: sd15, a folder or a hub id (default: sd15)"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="for filters: images to learn from")
    parser.add_argument("--images", type=int, help="images this stage sees in all (default: the recipe's)")
    parser.add_argument("--learning-rate", type=float, help="its peak (default: the recipe's)")
    parser.add_argument(
        "--batch-size", type=int, help="images a step, over all processes (default: the recipe's)"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help=f"where to export (default: the package's own weights; of filters: {FILTERS}/BACKBONE)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first (minutes; then a quarter faster)",
    )
    parser.add_argument(
        "--further", action="store_true", help="start from the exported weights instead of from random ones"
    )
    parser.add_argument(
        "--latents",
        type=int,
        default=LATENT_CHANNELS,
        metavar="N",
        help=f"numbers at each place of the autoencoder's latents (default: SD's {LATENT_CHANNELS}); the "
        "UNet takes as many as the autoencoder beside it has",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    arguments = parser.parse_args(argv)
    own = arguments.stages == [FilterStage.name]
    if own and arguments.data is None:
        parser.error("filters learn from images: --data FOLDER")
    if arguments.data is not None and not own:
        parser.error("--data is for the stage filters, which runs alone")
    unknown = [s for s in arguments.stages if s not in STAGES and not own]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    if arguments.images is not None and arguments.images < 1:
        parser.error("--images must be positive")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error("--batch-size must be positive")
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1:
        parser.error("--learning-rate must lie between 0 and 1")
    if (
        arguments.further
        and not own
        and (fixed := [s for s in arguments.stages or STAGES if not hasattr(STAGES[s], "load")])
    ):
        parser.error(
            f"--further is not for {', '.join(fixed)}: what was trained on it would have to begin anew"
        )
    if not 1 <= arguments.latents <= MOST_CHANNELS:
        parser.error(f"--latents must lie between 1 and {MOST_CHANNELS}")
    if arguments.latents != LATENT_CHANNELS and arguments.weights is None:
        parser.error(
            f"what ships has {LATENT_CHANNELS} latent channels: train another number into a folder of your "
            "own (--weights; with --further it grows what lies there)"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    weights = arguments.weights or (FILTERS / Path(arguments.backbone).name if own else WEIGHTS)
    makers: dict[str, Callable[[torch.device], Stage]] = {
        name: lambda device, stage=stage: stage(device, weights) for name, stage in STAGES.items()
    }
    makers[AutoencoderStage.name] = lambda device: AutoencoderStage(device, weights, arguments.latents)
    makers[FilterStage.name] = lambda device: FilterStage(device, arguments.backbone, arguments.data)
    try:
        if own:
            images_to_learn_from(arguments.data)  # told before the backbone is loaded
        weights.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in arguments.stages or STAGES:
        train(
            makers[name],
            weights=weights,
            images=arguments.images,
            compile=arguments.compile,
            further=arguments.further,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
        )
        print(f"{name}: weights in {weights}")
    if own:
        print(f"escd.load_backbone({arguments.backbone!r}, filters={str(weights)!r}) takes them")


if __name__ == "__main__":
    run_command(main)
