"""`python -m escd`: customize an attribute of an image, generate with it, export it; without a notebook."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .artefacts import export, low_rank
from .backbone import load_backbone
from .cost import require_memory, time_in_words, tuning_cost
from .customization import load_customization, resolve_attribute
from .images import open_image_and_mask
from .pipeline import ESCDPipeline
from .tuning import TuningConfig, customize


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, or 2 after one line on what is wrong with the input."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        print(f"escd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m escd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    learn = commands.add_parser("customize", help="learn the shape or the appearance of one image")
    learn.add_argument("image", type=Path, help="the reference image")
    learn.add_argument("--attribute", required=True, metavar="NAME", help="shape or appearance")
    learn.add_argument("--mask", type=Path, help="image of the same size, white on the subject")
    learn.add_argument("--steps", type=int, help="tuning steps")
    learn.add_argument("--learning-rate", type=float)
    learn.add_argument("--part", help="part of the UNet to tune, e.g. encoder, decoder, all, up.1/attn2")
    learn.add_argument("--rank", type=int, help="learn a change of this rank: a small file; default: in full")
    learn.add_argument("--seed", type=int, default=0)
    learn.add_argument(
        "--filters", type=Path, metavar="DIR", help="attribute filters from python -m escd.pretrain filters"
    )
    learn.add_argument(
        "--output", type=Path, metavar="FILE", help="default: IMAGE-ATTRIBUTE.safetensors, here"
    )
    learn.set_defaults(run=_customize)

    draw = commands.add_parser("generate", help="draw images of a prompt")
    draw.add_argument("prompt", help="*m is the customized shape, *a the customized appearance")
    draw.add_argument("--shape", type=Path, metavar="FILE", help="a customized shape, from escd customize")
    draw.add_argument("--appearance", type=Path, metavar="FILE", help="a customized appearance")
    draw.add_argument("--shape-strength", type=float, default=1.0, metavar="S", help="0: none, 1: as learned")
    draw.add_argument("--appearance-strength", type=float, default=1.0, metavar="S")
    draw.add_argument("--negative-prompt")
    draw.add_argument("--images", type=int, default=1, metavar="N", help="how many; default 1")
    draw.add_argument("--seed", type=int, default=0, help="of the first image; the next ones count on")
    draw.add_argument("--steps", type=int, default=25, help="sampling steps; default 25")
    draw.add_argument("--guidance-scale", type=float, default=4.0)
    draw.add_argument("--output", type=Path, default=Path("."), metavar="DIR", help="folder for the images")
    draw.set_defaults(run=_generate)

    small = commands.add_parser(
        "export", help="write a customization as LoRA and embedding, for other programs"
    )
    small.add_argument("file", type=Path, help="what escd customize wrote")
    small.add_argument("--rank", type=int, help="of each weight's change; default: as it is")
    small.add_argument("--output", type=Path, metavar="DIR", help="default: a folder named as the file")
    small.set_defaults(run=_export)

    for command in (learn, draw, small):
        command.add_argument(
            "--backbone", default="mini", help="mini, sd15, a folder or a hub id; default mini"
        )
    return parser


def _customize(options: argparse.Namespace) -> None:
    attribute = resolve_attribute(options.attribute)
    open_image_and_mask(options.image, 64, options.mask)  # a bad image is told before the backbone is loaded
    output = options.output or Path(f"{options.image.stem}-{attribute.name}.safetensors")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"no folder {output.parent} to write {output.name} to")
    given = {name: getattr(options, name) for name in ("steps", "learning_rate", "rank", "seed")}
    TuningConfig.of(attribute, options.part, **given)  # and bad numbers
    backbone = load_backbone(options.backbone, filters=options.filters)
    config = TuningConfig.of(attribute, options.part, backbone, **given)
    cost = tuning_cost(backbone, config)
    require_memory(cost, backbone.device)
    least = f", {time_in_words(cost)} at least" if backbone.device.type == "cpu" else ""
    print(f"Tuning takes {cost}{least}", flush=True)
    customization = customize(options.image, attribute, backbone, mask=options.mask, config=config)
    customization.save(output)
    print(f"{output}: {customization}")


def _generate(options: argparse.Namespace) -> None:
    if options.images < 1:
        raise ValueError(f"--images must be from 1 on, not {options.images}")
    for file in (options.shape, options.appearance):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no customization at {file}")
    backbone = load_backbone(options.backbone)
    shape, appearance = (
        None if file is None else load_customization(file, backbone)
        for file in (options.shape, options.appearance)
    )
    pipe = ESCDPipeline(backbone, shape=shape, appearance=appearance)
    seeds = range(options.seed, options.seed + options.images)
    images = pipe(
        options.prompt,
        negative_prompt=options.negative_prompt,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        shape_strength=options.shape_strength,
        appearance_strength=options.appearance_strength,
        num_images_per_prompt=options.images,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    options.output.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        file = options.output / f"seed-{seed}.png"
        image.save(file)
        print(file)


def _export(options: argparse.Namespace) -> None:
    if not options.file.is_file():
        raise FileNotFoundError(f"no customization at {options.file}")
    customization = load_customization(options.file, load_backbone(options.backbone))
    if options.rank is not None:
        customization = low_rank(customization, options.rank)
    exported = export(customization, options.output or options.file.with_suffix(""))
    for file in (exported.lora, exported.web_ui, exported.embedding):
        if file is not None:
            print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    if exported.left_behind:
        print(f"left behind, as a LoRA carries none: {len(exported.left_behind)} biases and norms")


if __name__ == "__main__":
    sys.exit(main())
