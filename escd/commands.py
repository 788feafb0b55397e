"""`python -m escd`: customize an attribute of an image, generate with it, export it; without a notebook."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from .backbone.hub import MODELS
from .backbone.model import Backbone
from .backbone.parts import NO_PART, parameters_of
from .data.images import open_image_and_mask
from .drawn import Drawn, find, named
from .ending import Ending
from .files import require_folder, require_writable, save_elsewhere, save_unused, whole
from .loading import load_backbone
from .method.attributes import ATTRIBUTES, resolve_attribute
from .method.baselines import METHODS, method_named
from .method.config import TuningConfig
from .method.cost import require_memory, time_in_words, tuning_cost
from .method.customization import Customization, load_customization, steps_of
from .method.export import export
from .method.guidance import LARGE_SCALE, PLAIN_SCALE, UNCONDITIONAL, default_guidance
from .method.inputs import MOST
from .method.low_rank import low_rank, megabytes_at
from .method.pipeline import ESCDPipeline
from .method.tuning import customize
from .records import sha256

# What `generate` draws with where neither an option nor the picture of --like says otherwise.
DRAWING = {
    "negative_prompt": None,
    "seed": 0,
    "images": 1,
    "steps": 25,
    "guidance_scale": None,
    "guidance_from": None,
    "shape_strength": 1.0,
    "appearance_strength": 1.0,
    "backbone": "mini",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0, or 2 after one line on what is wrong with the input; 130, 143 or 129 when it was told to end by Ctrl-C,
    SIGTERM or SIGHUP.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console need not know the characters of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with Ending() as ending:
            options = _parser().parse_args(arguments)
            options.run(options, ending)
    except KeyboardInterrupt as told:
        print(f"escd: {ending}{told}", file=sys.stderr)
        return ending.code
    except (OSError, ValueError, FloatingPointError, MemoryError) as error:
        print(f"escd: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _say(text: str) -> None:
    """Print a line of the result; whoever reads it may have left before (`| head`)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m escd", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    learn = commands.add_parser("customize", help="learn the shape or the appearance of one image")
    learn.add_argument("image", type=Path, help="the reference image")
    learn.add_argument("--attribute", required=True, metavar="NAME", help="shape or appearance")
    learn.add_argument("--mask", type=Path, help="image of the same size, white on the subject")
    learn.add_argument("--method", default="escd", metavar="NAME", help=f"{', '.join(METHODS)}; default escd")
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
    draw.add_argument("prompt", nargs="?", help="*m is the customized shape, *a the customized appearance")
    draw.add_argument(
        "--like",
        type=Path,
        metavar="FILE",
        help="an image of generate: its settings are used again, and other options replace them",
    )
    draw.add_argument("--shape", type=Path, metavar="FILE", help="a customized shape, from escd customize")
    draw.add_argument("--appearance", type=Path, metavar="FILE", help="a customized appearance")
    draw.add_argument("--shape-strength", type=float, metavar="S", help="0: none, 1 (default): as learnt")
    draw.add_argument("--appearance-strength", type=float, metavar="S")
    draw.add_argument("--negative-prompt")
    draw.add_argument("--images", type=int, metavar="N", help="how many; default 1")
    draw.add_argument("--seed", type=int, help="of the first image; the next ones count on; default 0")
    draw.add_argument("--steps", type=int, help="sampling steps; default 25")
    draw.add_argument(
        "--guidance-scale",
        type=float,
        help=f"default on mini: {PLAIN_SCALE:g}, or {default_guidance(ATTRIBUTES).guidance_scale:g} with *m "
        f"or *a in the prompt; on large backbones {LARGE_SCALE:g}",
    )
    draw.add_argument(
        "--guidance-from",
        choices=UNCONDITIONAL,
        help="which UNet predicts the branch without the prompt; default: that of the attributes in it",
    )
    draw.add_argument("--output", type=Path, default=Path("."), metavar="DIR", help="folder for the images")
    draw.add_argument(
        "--overwrite", action="store_true", help="replace seed-N.png; default: write seed-N-2.png beside it"
    )
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
    draw.set_defaults(backbone=None)
    return parser


def _customize(options: argparse.Namespace, ending: Ending) -> None:
    attribute = resolve_attribute(options.attribute)
    open_image_and_mask(options.image, 64, options.mask)  # a bad image is told before the backbone is loaded
    output = options.output or Path(f"{options.image.stem}-{attribute.name}.safetensors")
    require_writable(output)
    given = {name: getattr(options, name) for name in ("steps", "learning_rate", "rank", "seed")}
    method = method_named(options.method)
    method.config(attribute, None, options.part, **given)  # and bad numbers
    backbone = load_backbone(options.backbone, filters=options.filters)
    config = method.config(attribute, backbone, options.part, **given)
    require_writable(output, _bytes_of(backbone, config))
    cost = tuning_cost(backbone, config)
    require_memory(cost, backbone.device)
    least = f", {time_in_words(cost)} at least" if backbone.device.type == "cpu" else ""
    _say(f"Tuning takes {cost}{least}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "interrupted after")  # what comes of it is said below
        learnt = customize(
            options.image, attribute, backbone, mask=options.mask, config=config, callback=ending.after_step
        )
    if ending.signal is None:
        _say(f"{_keep(learnt, output)}: {learnt}")
    elif not learnt.steps:
        raise KeyboardInterrupt(" before the first step: nothing was learnt, and nothing is written")
    else:
        done = f" after {learnt.steps} of {config.steps} steps; what was learnt is kept in "
        raise KeyboardInterrupt(f"{done}{_keep(learnt, output, cut_short=True)}")


def _bytes_of(backbone: Backbone, config: TuningConfig) -> int:
    """About as many bytes as the file of a customization has."""
    trained = {} if config.part == NO_PART else parameters_of(backbone.unet, config.part)
    read = sum(p.numel() for p in backbone.e4t.encoder.parameters()) if config.latent_encoder else 0
    return int(megabytes_at(trained, config.rank or sys.maxsize) * 1e6) + 2 * read + 100_000  # and its header


def _keep(learnt: Customization, output: Path, cut_short: bool = False) -> Path:
    """Save what was learnt, and return where.

    Cut short, it does not replace a file that has more steps, or that is something else. Raises OSError when
    it could not be written to `output`, and says where it is instead.
    """
    try:
        there = steps_of(output) if output.exists() else -1
        if cut_short and (there is None or there > learnt.steps):
            other = output.with_name(f"{output.stem}-{learnt.steps}-steps{output.suffix}")
            return save_unused(other, learnt.save)
        return learnt.save(output)
    except OSError as error:
        kept = save_elsewhere(output, learnt.save)
        raise OSError(f"{error}; what was learnt is kept in {kept}") from error


def _generate(options: argparse.Namespace, _ending: Ending) -> None:
    like = None if options.like is None else Drawn.read(options.like)
    if options.prompt is None and like is None:
        raise ValueError("say what to draw: a prompt, or --like FILE")
    if options.images is not None and options.images < 1:
        raise ValueError(f"--images must be from 1 on, not {options.images}")
    require_folder(options.output)
    files = {name: _file_of(name, options, like) for name in ATTRIBUTES}
    said, seeds, wanted = _settings(options, like)
    if options.backbone is None and said["backbone"] not in MODELS and not Path(said["backbone"]).is_dir():
        # A picture may come from a stranger: nothing is downloaded for what it says.
        raise ValueError(
            f"{options.like} was drawn on the backbone {said['backbone']}: say that it is meant (--backbone)"
        )
    backbone = load_backbone(said["backbone"])
    if like is not None and options.backbone is None and backbone.identity != like.backbone_identity:
        raise ValueError(
            f"{options.like} was drawn on the backbone {like.backbone} ({like.backbone_identity}), which is "
            f"not the one of that name here ({backbone.identity}): say where it is (--backbone)"
        )
    loaded = {n: None if file is None else load_customization(file, backbone) for n, file in files.items()}
    about = {name: None if file is None else named(file) for name, file in files.items()}
    about |= {f"{name}_sha256": None if file is None else sha256(file) for name, file in files.items()}
    pipe = ESCDPipeline(backbone, **loaded)
    images = pipe(
        said["prompt"],
        negative_prompt=said["negative_prompt"],
        num_inference_steps=said["steps"],
        guidance_scale=said["guidance_scale"],
        guidance_from=said["guidance_from"],
        shape_strength=said["shape_strength"],
        appearance_strength=said["appearance_strength"],
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    # Of this call, where none was given.
    said |= {"guidance_scale": pipe.guidance_scale, "guidance_from": pipe.guidance_from}
    said |= {"first_seed": seeds[0], "images": len(seeds), "backbone": named(said["backbone"])}
    written = []
    for seed, image in zip(seeds, images, strict=True):
        if seed in wanted:
            drawn = Drawn(**said | about | {"seed": seed}, backbone_identity=backbone.identity)
            written.append(_write(partial(drawn.save, image), options.output / f"seed-{seed}.png", options))
    for file in written:
        _say(str(file))


def _settings(options: argparse.Namespace, like: Drawn | None) -> tuple[dict, range, Sequence[int]]:
    """How to draw, the seeds of the batch, and which of them are wanted.

    What is not said is as in the picture to draw like, or else as in DRAWING. A picture comes out to the bit
    in the batch it was drawn in.
    """
    names = ("prompt", *DRAWING)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    said = DRAWING | ({} if like is None else {name: getattr(like, name) for name in names}) | given
    again = like is not None and not {"seed", "images"} & given.keys()
    first = like.first_seed if again else said["seed"]
    count = like.images if again else given.get("images", DRAWING["images"])
    if count > MOST:
        raise ValueError(f"at most {MOST} images are drawn at once, not {count}")
    seeds = range(first, first + count)
    return said, seeds, (like.seed,) if again else seeds


def _file_of(attribute: str, options: argparse.Namespace, like: Drawn | None) -> Path | None:
    """The customization to draw with: the one that is said, or the one the picture to draw like had."""
    given: Path | None = getattr(options, attribute)
    if given is not None:
        if not given.is_file():
            raise FileNotFoundError(f"no customization at {given}")
        return given
    if like is None or getattr(like, attribute) is None:
        return None
    name, digest = getattr(like, attribute), getattr(like, f"{attribute}_sha256")
    found = find(name, digest, (Path("."), options.like.parent))
    if found is None:
        raise FileNotFoundError(
            f"{options.like} was drawn with the {attribute} in {name} (sha256 {digest[:12]}...), which is "
            f"neither here nor beside it: say where it is (--{attribute} FILE)"
        )
    return found


def _write(save: Callable[[Path], object], path: Path, options: argparse.Namespace) -> Path:
    """Write a picture under its name, or the next free one, and return that."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not options.overwrite:
            return save_unused(path, save)
        with whole(path) as unfinished:
            save(unfinished)
        return path
    except OSError as error:
        raise OSError(f"{error}; the picture is kept in {save_elsewhere(path, save)}") from error


def _scale_elsewhere(customization: Customization, backbone: Backbone) -> float:
    """The scale of guidance for programs whose branch without the prompt is customized, too."""
    return default_guidance([customization.attribute], backbone, "customized").guidance_scale


def _export(options: argparse.Namespace, _ending: Ending) -> None:
    if not options.file.is_file():
        raise FileNotFoundError(f"no customization at {options.file}")
    folder = options.output or options.file.with_suffix("")
    require_folder(folder)
    backbone = load_backbone(options.backbone)
    customization = load_customization(options.file, backbone)
    if options.rank is not None:
        customization = low_rank(customization, options.rank)
    exported = export(customization, folder, options.file.stem)
    for file in exported.files:
        _say(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    token = customization.attribute.token
    word = exported.trigger
    _say(f"the word to type: in diffusers {token}, in A1111 {word}, in ComfyUI embedding:{word}")
    _say(f"the scale of guidance to begin with there: {_scale_elsewhere(customization, backbone):g}")
    if exported.left_behind:
        _say(f"diffusers' LoRA carries none of {len(exported.left_behind)} changed biases and norms")
