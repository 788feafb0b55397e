"""``python -m escd.pretrain``: train `mini` stage by stage; resumable; also under ``accelerate launch``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .autoencoder import AutoencoderStage
from .loop import train
from .towers import TowerStage
from .unet import UNetStage
from .words import WordStage

STAGES = {stage.name: stage for stage in (AutoencoderStage, WordStage, TowerStage, UNetStage)}
WEIGHTS = Path(__file__).resolve().parents[1] / "weights" / "mini"


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train the named stages in order."""
    parser = argparse.ArgumentParser(prog="python -m escd.pretrain", description=__doc__)
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"which of {', '.join(STAGES)} (default: all, in this order)",
    )
    parser.add_argument("--images", type=int, help="images this stage sees in all (default: the recipe's)")
    parser.add_argument("--learning-rate", type=float, help="its peak (default: the recipe's)")
    parser.add_argument(
        "--weights", type=Path, default=WEIGHTS, help="where to export (default: the package's own weights)"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks first (minutes; then a quarter faster)",
    )
    parser.add_argument(
        "--further", action="store_true", help="start from the exported weights instead of from random ones"
    )
    parser.add_argument("--threads", type=int, help="CPU threads of this process")
    arguments = parser.parse_args(argv)
    unknown = [s for s in arguments.stages if s not in STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; known: {', '.join(STAGES)}")
    if arguments.images is not None and arguments.images < 1:
        parser.error("--images must be positive")
    if arguments.learning_rate is not None and not 0 < arguments.learning_rate < 1:
        parser.error("--learning-rate must lie between 0 and 1")
    if arguments.further and (
        fixed := [s for s in arguments.stages or STAGES if not hasattr(STAGES[s], "load")]
    ):
        parser.error(
            f"--further is not for {', '.join(fixed)}: what was trained on it would have to begin anew"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.weights.mkdir(parents=True, exist_ok=True)
    for name in arguments.stages or STAGES:
        stage = STAGES[name]
        train(
            lambda device, stage=stage: stage(device, arguments.weights),
            weights=arguments.weights,
            images=arguments.images,
            compile=arguments.compile,
            further=arguments.further,
            learning_rate=arguments.learning_rate,
        )
        print(f"{name}: weights in {arguments.weights}")


if __name__ == "__main__":
    main()
