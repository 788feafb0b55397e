"""`python -m escd.pretrain`: train `mini` stage by stage, E4T's encoder, or filters for another backbone.

A killed training resumes; `accelerate launch` trains on several processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from .. import paths
from .autoencoder import LATENT_CHANNELS, MOST_CHANNELS, AutoencoderStage
from .e4t import E4TStage
from .filters import FilterStage, images_to_learn_from
from .loop import Stage, train
from .optimizers import OPTIMIZERS
from .towers import TowerStage
from .unet import UNetStage
from .words import WordStage

STAGES = {stage.name: stage for stage in (AutoencoderStage, WordStage, TowerStage, UNetStage)}
# Those that are trained only where they are named: of mini, and of another backbone.
KNOWN = {**STAGES, E4TStage.name: E4TStage}
ELSEWHERE = (FilterStage.name, E4TStage.name)
WEIGHTS = paths.WEIGHTS / "mini"
FILTERS = paths.RUNS / "filters"

# Of the loop, as the command line has them.
OPTIONS = ("images", "compile", "further", "learning_rate", "batch_size", "optimizer")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train the named stages in order."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    filters = arguments.stages == [FilterStage.name]
    elsewhere = filters or (arguments.stages == [E4TStage.name] and arguments.data is not None)
    if problem := _problem(arguments, elsewhere):
        parser.error(problem)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    default = FILTERS / Path(arguments.backbone).name if elsewhere else WEIGHTS
    weights = arguments.weights or default
    try:
        if elsewhere:
            images_to_learn_from(arguments.data)  # an error before the backbone is loaded
        weights.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    makers = _makers(arguments, weights)
    for name in arguments.stages or STAGES:
        train(makers[name], weights=weights, **{option: getattr(arguments, option) for option in OPTIONS})
        print(f"{name}: weights in {weights}")
    if elsewhere:
        print(f"escd.load_backbone({arguments.backbone!r}, filters={str(weights)!r}) takes them")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m escd.pretrain", description=__doc__)
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"some of {', '.join(STAGES)} (default: all, in this order), and e4t, for the method of that "
        "name; or, for another backbone and from a folder of images, filters or e4t alone",
    )
    parser.add_argument(
        "--backbone", default="sd15", help="with --data: sd15, a folder or a hub id (default: sd15)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="for filters, or e4t of another backbone: training images"
    )
    parser.add_argument("--images", type=int, help="training images in all (default: the recipe's)")
    parser.add_argument("--learning-rate", type=float, help="its peak (default: the recipe's)")
    parser.add_argument(
        "--batch-size", type=int, help="images per step, over all processes (default: the recipe's)"
    )
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="muon: for the matrices and kernels inside the UNet; for the stage unet (default: the recipe's)",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help=f"where to export (default: the package's own weights; with --data: {FILTERS}/BACKBONE)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first (takes minutes; then a fifth less time per step)",
    )
    parser.add_argument(
        "--further", action="store_true", help="start from the exported weights instead of from random ones"
    )
    parser.add_argument(
        "--latents",
        type=int,
        default=LATENT_CHANNELS,
        metavar="N",
        help=f"latent channels of the autoencoder (default: SD's {LATENT_CHANNELS}); the UNet takes as many "
        "as the autoencoder beside it has",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        metavar="FOLDER",
        help="for the stage unet with --further: the weights before the UNet grew; it learns not to lean on "
        "its added channels",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    return parser


def _problem(arguments: argparse.Namespace, elsewhere: bool) -> str | None:
    """What is wrong with the arguments, in a line; None where nothing is."""
    stages = arguments.stages or list(STAGES)
    unknown = [name for name in stages if name not in KNOWN and not elsewhere]
    fixed = [name for name in stages if name in STAGES and not hasattr(STAGES[name], "load")]
    checks = (
        (elsewhere and arguments.data is None, "filters learn from images: --data FOLDER"),
        (
            not elsewhere and arguments.data is not None,
            f"--data is for {' or '.join(ELSEWHERE)}, which runs alone then",
        ),
        (unknown, f"unknown stage {''.join(unknown[:1])!r}; known: {', '.join(KNOWN)}"),
        (arguments.images is not None and arguments.images < 1, "--images must be positive"),
        (arguments.batch_size is not None and arguments.batch_size < 1, "--batch-size must be positive"),
        (
            arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1,
            "--learning-rate must lie between 0 and 1",
        ),
        (
            arguments.optimizer == "muon" and stages != [UNetStage.name],
            f"--optimizer muon is for the stage {UNetStage.name} alone",
        ),
        (
            arguments.teacher is not None and not (stages == [UNetStage.name] and arguments.further),
            f"--teacher is for the stage {UNetStage.name} alone, with --further",
        ),
        (
            arguments.teacher is not None and not (arguments.teacher / "unet" / "config.json").is_file(),
            f"--teacher: {arguments.teacher} has no unet/config.json",
        ),
        (
            arguments.further and fixed,
            f"--further is not for {', '.join(fixed)}: later stages would have to start anew",
        ),
        (
            not 1 <= arguments.latents <= MOST_CHANNELS,
            f"--latents must lie between 1 and {MOST_CHANNELS}",
        ),
        (
            arguments.latents != LATENT_CHANNELS and arguments.weights is None,
            "--latents is for a folder of your own: name it with --weights (with --further, the autoencoder "
            "in it grows)",
        ),
    )
    return next((line for wrong, line in checks if wrong), None)


def _makers(arguments: argparse.Namespace, weights: Path) -> dict[str, Callable[[torch.device], Stage]]:
    """How each stage is made on a device."""
    makers: dict[str, Callable[[torch.device], Stage]] = {
        name: lambda device, stage=stage: stage(device, weights) for name, stage in KNOWN.items()
    }
    makers[AutoencoderStage.name] = lambda device: AutoencoderStage(device, weights, arguments.latents)
    makers[UNetStage.name] = lambda device: UNetStage(device, weights, arguments.teacher)
    makers[FilterStage.name] = lambda device: FilterStage(device, arguments.backbone, arguments.data)
    if arguments.data is not None:
        makers[E4TStage.name] = lambda device: E4TStage(device, arguments.backbone, arguments.data)
    return makers
