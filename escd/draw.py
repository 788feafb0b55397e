"""Every figure of the paper, one function per stem: `python -m escd.draw [stem ...]`.

Without a stem all of them are drawn, README.md and paper/numbers.tex get their numbers, and then two records
are run again to see whether they still come out. A figure that shows generated images takes them from a
record as well (kind "sheet" or "process", the pixels beside it as a PNG), so that a clone draws the paper's
images and not merely similar ones; where weights or references have changed since, they are made anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from PIL import Image
from tqdm.auto import tqdm

from escd import backbone as backbones
from escd import files, records
from escd.canvas import (
    APPEARANCE,
    COLUMN,
    FROZEN,
    INK,
    MUTED,
    PAGE,
    SHAPE,
    TINTS,
    TOWER,
    Canvas,
    Drawing,
    house_style,
    image_grid,
    pixels,
)
from escd.curve import points
from escd.customization import ATTRIBUTES, Customization
from escd.encoder import GRIDS, TIMESTEP, feature_widths
from escd.ending import run_command
from escd.fusion import AttributeFilter
from escd.halves import down_path
from escd.numbers import (
    ARMS,
    at_full_size,
    ranks,
    repeatable,
    results,
    run_again,
    study,
    training,
    weights_of,
    write_numbers,
)
from escd.pipeline import ESCDPipeline
from escd.pretrain import trials
from escd.records import Record
from escd.references import load_references
from escd.study import IMAGE_SETS
from escd.tuning import TuningConfig
from escd.world import SHAPES, World

FIGURES = records.FOLDER.parent
HALVES = ("encoder", "decoder")
SET_COLOURS = (INK, MUTED, APPEARANCE)  # of study.IMAGE_SETS

STEMS: dict[str, Stem] = {}


@dataclass(frozen=True)
class Stem:
    """A figure of the paper: the function that draws it, and the notebook that explains it."""

    draw: Callable[[], Drawing]
    notebook: str


def figure(notebook: str) -> Callable[[Callable[[], Drawing]], Callable[[], Drawing]]:
    """Make a function a stem of the paper's figures; it is drawn in the house style."""

    def register(draw: Callable[[], Drawing]) -> Callable[[], Drawing]:
        STEMS[draw.__name__] = Stem(house_style()(draw), f"notebooks/{notebook}.ipynb")
        return STEMS[draw.__name__].draw

    return register


# --------------------------------------------------------------------------------
# images kept with a record


@dataclass(frozen=True)
class SheetConfig:
    """One run of the pipeline over several prompts, with what was learnt from references."""

    prompts: tuple[str, ...]
    # Ids of evaluation references, and how their shape and their appearance were learnt.
    shape: str | None = None
    appearance: str | None = None
    shape_tuning: TuningConfig | None = None
    appearance_tuning: TuningConfig | None = None
    backbone: str = "mini"
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 4.0


def sheet(prompts: Sequence[str], shape: str | None = None, appearance: str | None = None) -> SheetConfig:
    """The sheet of some prompts with each attribute learnt the default way."""
    return SheetConfig(
        tuple(prompts),
        shape,
        appearance,
        TuningConfig.of("shape") if shape else None,
        TuningConfig.of("appearance") if appearance else None,
    )


@dataclass(frozen=True)
class ProcessConfig:
    """A picture of the world noised, and one made from noise, both looked at on the way."""

    prompt: str
    sample: int  # the picture's number in World(seed=0)
    shown: tuple[int, ...]  # how many of the steps from noise have been taken
    backbone: str = "mini"
    seed: int = 0
    steps: int = 25
    guidance_scale: float = 4.0


def stored_images(config: SheetConfig | ProcessConfig) -> tuple[Record, list[np.ndarray]]:
    """A config's record and its images, (H, W, 3) uint8 each; they are made where the record is not there.

    Raises ValueError when the stored pixels are not those the record was made with.
    """
    folder = records.FOLDER / "images"
    path = folder / f"{records.key_of(config)[:16]}.png"

    def run(config: SheetConfig | ProcessConfig) -> dict:
        study().learnt = {}
        images, metrics = MAKERS[type(config)](config)
        folder.mkdir(parents=True, exist_ok=True)
        strip = np.concatenate(images, axis=1)  # (H, N W, 3)
        with files.whole(path) as unfinished:
            Image.fromarray(strip).save(unfinished, optimize=True)
        return {"images": len(images), "pixels": records.sha256(strip), **metrics}

    record = records.get(
        config, run, inputs=_inputs(config), device="cpu", learnt=lambda: study().learnt
    )
    strip = np.asarray(Image.open(path).convert("RGB"))
    if records.sha256(strip) != record.metrics["pixels"]:
        raise ValueError(f"{path.name} does not hold the pixels of its record: remove both, then draw again")
    return record, np.split(strip, record.metrics["images"], axis=1)


def _inputs(config: SheetConfig | ProcessConfig) -> dict[str, str]:
    """sha256 of everything a config's images were made from: weights and references."""
    inputs = dict(weights_of(config.backbone))
    for name in {getattr(config, "shape", None), getattr(config, "appearance", None)} - {None}:
        inputs |= load_references()[name].inputs
    return inputs


def _pipeline(config: SheetConfig | ProcessConfig) -> ESCDPipeline:
    learnt = {
        attribute: _learnt(config.backbone, attribute, reference, getattr(config, f"{attribute}_tuning"))
        for attribute in ATTRIBUTES
        if (reference := getattr(config, attribute, None)) is not None
    }
    pipe = ESCDPipeline(study().backbone(config.backbone), **learnt)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _learnt(backbone: str, attribute: str, reference: str, tuning: TuningConfig) -> Customization:
    return study().learn(attribute, load_references()[reference], tuning, backbone)


def _make_sheet(config: SheetConfig) -> tuple[list[np.ndarray], dict]:
    out = _pipeline(config)(
        list(config.prompts),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(config.seed),
    )
    return [pixels(image) for image in out.images], {}


def _make_process(config: ProcessConfig) -> tuple[list[np.ndarray], dict]:
    """Noised latents decoded, then latents being denoised; and the diffusion times of both."""
    backbone = study().backbone(config.backbone)
    pipe = _pipeline(config)
    noise = torch.randn((1, *backbone.latent_shape), generator=torch.Generator().manual_seed(config.seed))
    taken = {0: noise}

    def look(_pipe: ESCDPipeline, step: int, _t: int, tensors: dict) -> dict:
        taken[step + 1] = tensors["latents"].clone()
        return tensors

    pipe(
        config.prompt,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        latents=noise,
        callback_on_step_end=look,
    )
    scheduler = copy.deepcopy(backbone.scheduler)
    scheduler.set_timesteps(config.steps)
    times = [*scheduler.timesteps.tolist(), 0]
    times = [times[step] for step in config.shown]
    x_0 = backbone.encode_images(World(seed=0)[config.sample].image[None])
    # t = 0 is the picture itself: the schedule has no such time
    noised = [scheduler.add_noise(x_0, noise, torch.tensor([t])) if t else x_0 for t in times]
    latents = torch.cat([*noised, *(taken[step] for step in config.shown)])
    return [pixels(image) for image in backbone.decode_latents(latents)], {"times": times}


MAKERS = {SheetConfig: _make_sheet, ProcessConfig: _make_process}

# --------------------------------------------------------------------------------
# diagrams


@figure("03_method")
def diagram_pipeline() -> Drawing:
    """The method: visual features, fusion with the sub-attribute's word, tuning; then generation."""
    reference = load_references().references[0]
    canvas = Canvas(PAGE, 3.3)
    upper, lower = 2.52, 1.62  # the lines of shape and of appearance
    middle = (upper + lower) / 2

    canvas.image(reference.image, (0.04, middle - 0.33), 0.66)
    canvas.text((0.37, middle - 0.42), "reference $x_0$", va="top", size=6.5)

    canvas.panel((0.86, 1.12), 1.62, 2.16, "1  visual features")
    canvas.text((1.41, upper + 0.36), "$(x_t,\\ t,\\ $“”$)$", size=6.5, va="bottom")
    canvas.half((1.10, upper), 0.62, (0.62, 0.26), "UNet\ndown")
    canvas.box((1.41, lower), 0.66, 0.40, "OpenCLIP\nViT", fill=FROZEN, size=6.5)
    canvas.arrow((0.70, middle), (0.94, middle), (0.94, upper), (1.10, upper))
    canvas.arrow((0.70, middle), (0.94, middle), (0.94, lower), (1.08, lower))
    canvas.arrow((1.72, upper), (2.02, upper), (2.02, middle + 0.075))
    canvas.arrow((1.74, lower), (2.02, lower), (2.02, middle - 0.075))
    canvas.text((1.93, upper + 0.06), "$F_{down}$", size=6.5, va="bottom")
    canvas.text((1.93, lower - 0.06), "CLS", size=6.5, va="top")
    canvas.sum((2.02, middle))
    canvas.arrow((2.095, middle), (2.66, middle), head=False)
    canvas.text((2.27, middle + 0.05), "embeds$_{ref}$", size=6, va="bottom")

    canvas.panel((2.56, 1.12), 1.42, 2.16, "2  fusion")
    canvas.panel((4.06, 1.12), 2.82, 2.16, "3  attribute-aware fine-tuning")
    for y, name, colour in ((upper, "shape", SHAPE), (lower, "appearance", APPEARANCE)):
        attribute = ATTRIBUTES[name]
        canvas.arrow((2.66, middle), (2.66, y), (2.75, y))
        canvas.box((3.06, y), 0.62, 0.36, f"{attribute.name}\nfilter", fill=TINTS[colour], size=6.5)
        canvas.arrow((3.37, y), (3.485, y))
        canvas.text((3.56, y - 0.36), f"$e($“{attribute.word}”$)$", size=6)
        canvas.arrow((3.56, y - 0.29), (3.56, y - 0.075))
        canvas.sum((3.56, y))
        canvas.arrow((3.635, y), (4.18, y))
        canvas.text((3.83, y + 0.09), attribute.token, size=7.5, weight="bold")
        canvas.box((4.46, y), 0.56, 0.36, "CLIP\ntext", fill=FROZEN, size=6.5)
        canvas.arrow((4.74, y), (5.02, y))
        canvas.unet(
            (5.02, y), 1.15, 0.56, **{half: FROZEN for half in HALVES} | {attribute.part: TINTS[colour]}
        )
        canvas.arrow((6.17, y), (6.42, y))
        canvas.text((6.64, y), "$\\Vert\\epsilon-\\epsilon_\\theta\\Vert^2$", size=6.5)

    line = 0.47
    canvas.panel((0.02, 0.02), 6.86, 0.98)
    canvas.text((0.12, 0.86), "generation", weight="bold", ha="left")
    canvas.box((1.42, line), 2.2, 0.30, "“a *m shape with *a appearance\non a gray background”", size=6.5)
    canvas.arrow((2.52, line), (2.83, line))
    canvas.box((3.11, line), 0.56, 0.36, "CLIP\ntext", fill=FROZEN, size=6.5)
    canvas.arrow((3.39, line), (3.66, line))
    canvas.unet((3.66, line), 1.3, 0.62, encoder=TINTS[SHAPE], decoder=TINTS[APPEARANCE])
    canvas.text((3.93, 0.10), "$W_0+s_m\\Delta W_{enc}$", size=6)
    canvas.text((4.70, 0.10), "$W_0+s_a\\Delta W_{dec}$", size=6)
    canvas.arrow((4.96, line), (5.25, line))
    canvas.box((5.50, line), 0.5, 0.34, "VAE\ndecoder", fill=FROZEN, size=6.5)
    canvas.arrow((5.75, line), (5.99, line))
    canvas.box((6.35, line), 0.72, 0.72, "new image")
    return canvas.figure


@figure("03_method")
def diagram_encoder() -> Drawing:
    """Stage 1: pooled maps of the way down through the UNet, beside the CLS token of the image tower."""
    backbone = study().backbone("mini")
    maps = _down_maps(backbone)
    cls_width, down_width = feature_widths(backbone)
    canvas = Canvas(COLUMN, 2.75)

    reference = load_references().references[0].image
    canvas.image(reference, (0.03, 1.12), 0.50)
    canvas.text((0.28, 1.08), f"$x_0$\n{backbone.image_size}$^2$ px", va="top", size=6)

    # the way down, one box a map, as tall as the map is wide
    top, left, right = 2.24, 0.98, 3.29
    canvas.arrow((0.28, 1.62), (0.28, top), (0.55, top))
    canvas.box((0.68, top), 0.26, 0.24, "$\\mathcal{E}$", fill=FROZEN)
    canvas.text((0.68, top + 0.30), f"$x_t$, $t={TIMESTEP}$", size=6)
    canvas.text((0.68, top - 0.24), "prompt “”", size=6)
    pitch = (right - left) / len(maps)
    middles = [left + (i + 0.5) * pitch for i in range(len(maps))]
    canvas.arrow((0.81, top), (middles[0] - 0.30 * pitch, top))
    for i, (x, (name, channels, size)) in enumerate(zip(middles, maps, strict=True)):
        canvas.box((x, top), 0.6 * pitch, 0.22 + 0.36 * size / maps[0][2], f"{channels}", fill=FROZEN, size=6)
        canvas.text((x, top + 0.38), name, size=5.8)
        canvas.text((x, top - 0.37), f"{size} × {size}", size=5.2, colour=MUTED)
        canvas.arrow((x, top - 0.44), (x, 1.66))
        if i:
            canvas.arrow((middles[i - 1] + 0.30 * pitch, top), (x - 0.30 * pitch, top))
    grids = " and ".join(f"{grid} × {grid}" for grid in GRIDS)
    canvas.box(((left + right) / 2, 1.56), right - left, 0.20, f"means over a grid of {grids}", size=6.2)

    # F_down, in pieces as long as each map's share of it
    start = left
    for i, (_, channels, _) in enumerate(maps):
        length = (right - left) * channels * sum(grid * grid for grid in GRIDS) / down_width
        canvas.strip((start, 1.20), length, fill=FROZEN if i % 2 else "white")
        canvas.arrow((middles[i], 1.46), (start + length / 2, 1.27))
        start += length
    canvas.text((right, 1.04), f"$F_{{down}}$   {down_width}", size=6.5, ha="right")

    patch = backbone.image_tower.config.patch_size
    canvas.arrow((0.28, 0.80), (0.28, 0.66), (left, 0.66))
    canvas.box((left + 0.62, 0.66), 1.24, 0.26, f"OpenCLIP ViT, patch {patch}", fill=TOWER, size=6.2)

    share = (right - left) * max(0.06, cls_width / (cls_width + down_width))
    canvas.arrow((left + share / 2, 0.53), (left + share / 2, 0.21))
    canvas.text((left + share / 2 + 0.06, 0.37), f"CLS   {cls_width}", size=6.5, ha="left")
    canvas.arrow((2.62, 1.13), (2.62, 0.21))
    canvas.strip((left, 0.14), share, fill=TOWER)
    canvas.strip((left + share, 0.14), right - left - share, fill=FROZEN)
    canvas.text((left - 0.06, 0.14), f"embeds$_{{ref}}$   {cls_width + down_width}", size=6.5, ha="right")
    return canvas.figure


def _down_maps(backbone: backbones.Backbone) -> list[tuple[str, int, int]]:
    """(name, channels, width) of every feature map stage 1 pools."""
    x_t = torch.zeros(1, *backbone.latent_shape)
    maps = down_path(backbone.unet, x_t, torch.tensor([TIMESTEP]), backbone.encode_prompt([""]))
    names = ["in"]
    for k, block in enumerate(backbone.unet.down_blocks):
        names += [f"down {k}"] * len(block.resnets) + ["↓"] * (block.downsamplers is not None)
    return [(name, h.shape[1], h.shape[3]) for name, h in zip([*names, "mid"], maps, strict=True)]


@figure("03_method")
def diagram_filter() -> Drawing:
    """Stage 2: features of the reference and the sub-attribute's word in, the pseudo-word's embedding out."""
    backbone = study().backbone("mini")
    sizes = (backbone.filters.get("shape") or AttributeFilter.for_backbone(backbone)).config
    canvas = Canvas(COLUMN, 1.72)
    inputs = (
        (1.42, "CLS", sizes.cls_width, "standardise, linear", TOWER),
        (0.86, "$F_{down}$", sizes.down_width, "standardise, linear\nby cell; linear", FROZEN),
        (0.30, "$e(w)$", sizes.word_width, "norm, linear", TINTS[SHAPE]),
    )
    for y, name, length, layers, fill in inputs:
        canvas.strip((0.04, y), 0.34, fill=fill)
        canvas.text((0.21, y + 0.15), name, size=6.5)
        canvas.text((0.21, y - 0.15), f"{length}", size=6)
        canvas.arrow((0.38, y), (0.54, y))
        canvas.box((0.97, y), 0.86, 0.32, layers, size=6)
        canvas.text((1.51, y + 0.08), f"{sizes.hidden}", size=6)
    middle = inputs[1][0]
    for y in (inputs[0][0], inputs[2][0]):
        canvas.arrow((1.40, y), (1.62, y), (1.62, middle + math.copysign(0.075, y - middle)))
    canvas.arrow((1.40, middle), (1.545, middle))
    canvas.sum((1.62, middle), ";")
    canvas.arrow((1.695, middle), (1.86, middle))
    hidden = 2 * sizes.hidden
    layers = "\n".join(f"linear {length}" for length in (hidden, hidden, sizes.word_width))
    layers += f"\nup to {sizes.reach:g}$|e|$"
    canvas.box((2.20, middle), 0.68, 0.62, layers, size=6)
    canvas.arrow((2.54, middle), (2.745, middle))
    canvas.sum((2.82, middle))
    # the word goes round the network: an untrained filter gives the word itself
    canvas.arrow((0.21, 0.09), (0.21, 0.04), (2.82, 0.04), (2.82, middle - 0.075))
    canvas.arrow((2.895, middle), (3.0, middle))
    canvas.strip((3.0, middle), 0.29, fill=TINTS[SHAPE])
    canvas.text((3.145, middle + 0.15), "$v_w$", size=7)
    canvas.text((3.145, middle - 0.15), f"{sizes.word_width}", size=6)
    return canvas.figure


# --------------------------------------------------------------------------------
# figures of images

SAMPLE_LOOKS = (  # appearance, background: one row of samples each
    ("solid red", "gray"),
    ("striped blue and white", "pink"),
    ("dotted yellow and purple", "cyan"),
    ("checkered black and orange", "beige"),
)
ASKED_LOOKS = (
    ("solid red", "pink"),
    ("striped blue and white", "beige"),
    ("dotted green and yellow", "gray"),
)
ASKED_SHAPES = (("star", "cyan"), ("heart", "beige"), ("circle", "pink"))
FORWARD_SAMPLE = 0  # of World(seed=0)
SHOWN_REFERENCES = 4  # the first of the evaluation list, whatever they are


@figure("01_preliminaries")
def backbone_samples() -> Drawing:
    """Named shapes by named appearances, as the untouched backbone draws them: one seed, nothing chosen."""
    used, rows = [], []
    for look, ground in SAMPLE_LOOKS:
        prompts = tuple(_prompt(_a(shape), look, ground) for shape in SHAPES)
        record, images = stored_images(sheet(prompts))
        used.append(record)
        rows.append(images)
    # pattern, colours and background under each other
    labels = [
        "\n".join([*look.replace(" and ", ", ").split(" ", 1), ground]) for look, ground in SAMPLE_LOOKS
    ]
    drawing = image_grid(rows, row_labels=labels, column_labels=SHAPES, label_width=0.82)
    return drawing.made_from(used)


@figure("01_preliminaries")
def forward_backward() -> Drawing:
    """Above, a picture is noised; below, read from right to left, one is made from the same noise."""
    config = ProcessConfig(
        prompt="a star shape with striped red and white appearance on a cyan background",
        sample=FORWARD_SAMPLE,
        shown=(25, 23, 20, 16, 12, 8, 4, 0),
    )
    record, images = stored_images(config)
    drawing = image_grid(
        [images[: len(config.shown)], images[len(config.shown) :]],
        row_labels=["forward\n$q(x_t\\,|\\,x_0)$", "backward\n$p_\\theta(x_{t-1}|\\,x_t)$"],
        column_labels=[f"$t = {t}$" for t in record.metrics["times"]],
        label_width=0.8,
    )
    return drawing.made_from([record])


@figure("03_method")
def transfer_examples() -> Drawing:
    """One image in, its shape or its appearance out, for real silhouettes and materials."""
    shown = load_references().references[:SHOWN_REFERENCES]
    used, rows = [], []
    for reference in shown:
        shape_record, shapes = stored_images(
            sheet([_prompt("a *m", *asked) for asked in ASKED_LOOKS], shape=reference.id)
        )
        look_record, looks = stored_images(
            sheet([_prompt(_a(name), "*a", ground) for name, ground in ASKED_SHAPES], appearance=reference.id)
        )
        used += [shape_record, look_record]
        rows.append([reference.image, *shapes, *looks])
    asked = [f"{what}\n{ground}".replace(" and ", ", ") for what, ground in ASKED_LOOKS + ASKED_SHAPES]
    drawing = image_grid(
        rows, column_labels=["reference", *asked], column_gaps=(0, len(ASKED_LOOKS)), label_height=0.34
    )
    return drawing.made_from(used)


@figure("03_method")
def composition_grid() -> Drawing:
    """The shape of each row's reference with the appearance of each column's, in one pass a step."""
    shown = load_references().references[:SHOWN_REFERENCES]
    used, rows = [], [[None, *(reference.image for reference in shown)]]
    for row in shown:
        images = []
        for column in shown:
            record, made = stored_images(_composed(row.id, column.id))
            used.append(record)
            images += made
        rows.append([row.image, *images])
    drawing = image_grid(rows, width=COLUMN, column_gaps=(0,), row_gaps=(0,))
    return drawing.made_from(used)


def _composed(shape: str, appearance: str) -> SheetConfig:
    return sheet([_prompt("a *m", "*a", "gray")], shape, appearance)


def _prompt(shape: str, look: str, ground: str) -> str:
    return f"{shape} shape with {look} appearance on a {ground} background"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# --------------------------------------------------------------------------------
# figures of numbers


@figure("04_training")
def pretraining_curve() -> Drawing:
    """Loss of every stage of pretraining against the images it has seen."""
    stages = training()
    drawing = Drawing(PAGE, 1.75, layout="constrained")
    for axes, (name, record) in zip(drawing.subplots(1, len(stages)), stages.items(), strict=True):
        seen = [point["images"] / 1000 for point in record["curve"]]
        axes.plot(seen, [point["loss"] for point in record["curve"]])
        seen_what = "captions" if name == "words" else "images"  # that stage looks at no picture
        axes.set(title=name, xlabel=f"thousand {seen_what}", yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.grid(True, axis="y")
    drawing.axes[0].set_ylabel("training loss")
    return drawing


@figure("04_training")
def training_scores() -> Drawing:
    """What each checkpoint of the UNet and of the autoencoder can do, and what it had cost."""
    found, reconstructed = points(), points(stage="autoencoder")
    tuned = [record for record in found if "shape" in record.metrics]
    drawing = Drawing(PAGE, 2.0, layout="constrained")
    prompts, shape, look, psnr = drawing.subplots(1, 4)
    colours = {"background": FROZEN, "colours": MUTED, "pattern": APPEARANCE, "shape": SHAPE}
    for name, colour in colours.items():
        shares = [100 * r.metrics["obeyed"][name] for r in found]
        prompts.plot(_millions(found), shares, "o-", color=colour, label=name)
    prompts.set(title="prompts obeyed, %")
    panels = ((shape, "shape", "silhouette", SHAPE), (look, "appearance", "material", APPEARANCE))
    for axes, name, wanted, colour in panels:
        retrieved, leaked = ([100 * r.metrics[name][k] for r in tuned] for k in ("retrieved", "leaked"))
        axes.plot(_millions(tuned), retrieved, "o-", color=colour, label=wanted)
        axes.plot(_millions(tuned), leaked, "o--", color=MUTED, label="other attribute")
        axes.set(title=f"{name}: retrieved, %")
    for name, colour in zip(IMAGE_SETS, SET_COLOURS, strict=True):
        values = [r.metrics[name]["psnr"] for r in reconstructed]
        psnr.plot(_millions(reconstructed), values, "o-", color=colour, label=name)
    psnr.set(title="autoencoder, dB", ylim=(None, max(psnr.get_ylim()[1], 36)))  # room for the legend
    for axes in (prompts, shape, look):
        axes.set(ylim=(0, 103))
    for axes, shown in ((prompts, found), (shape, tuned), (look, tuned), (psnr, reconstructed)):
        axes.grid(True, axis="y")
        axes.legend(loc="upper left" if axes is psnr else "best")
        axes.set(xlabel="million images")
        _hours_above(axes, shown)
    return drawing.made_from([*found, *reconstructed])


@figure("04_training")
def autoencoder_rate() -> Drawing:
    """What more latents at each place bring: the autoencoder trained with so many, and a linear code."""
    found = trials.by_latents()
    drawing = Drawing(COLUMN, 2.0, layout="constrained")
    latents = list(found)
    for axes, score, title, scale in zip(
        drawing.subplots(1, 2), ("psnr", "detail"), ("PSNR, dB", "fine energy kept, %"), (1, 100), strict=True
    ):
        for name, colour in zip(IMAGE_SETS, SET_COLOURS, strict=True):
            for code, line in (("", "o-"), ("pca_", "o--")):
                values = [scale * found[n].metrics[name][code + score] for n in latents]
                axes.plot(latents, values, line, color=colour, mfc="white" if code else colour, label=name)
        axes.set(title=title, xlabel="latents at a place", xscale="log")
        axes.set_xticks(latents, [str(n) for n in latents])
        axes.minorticks_off()
        axes.grid(True, axis="y")
    handles = drawing.axes[0].get_lines()
    linear = Line2D([], [], color=INK, ls="--", marker="o", mfc="white", label="linear code")
    drawing.legend(handles=[*handles[::2], linear], loc="outside lower center", ncols=4)
    return drawing.made_from(list(found.values()))


def _millions(found: Sequence[Record]) -> list[float]:
    return [record.config["images"] / 1e6 for record in found]


def _hours_above(axes: Axes, found: Sequence[Record]) -> None:
    """The hours of training that points of the curve had cost, where no other label is near."""
    seen = _millions(found)
    told: dict[float, str] = {}
    for at, record in zip(seen, found, strict=True):
        seconds = record.metrics["trained_seconds"]
        if seconds is not None and all(at - other > (seen[-1] - seen[0]) / 4 for other in told):
            told[at] = f"{seconds / 3600:.1f} h"
    axes.secondary_xaxis("top").set_xticks(list(told), list(told.values()))


@figure("02_probing_study")
def leakage_table() -> Drawing:
    """Transfer and leakage of each tuned part, for both attributes; filled: the method's choice."""
    found = results()
    drawing = Drawing(COLUMN, 2.75, layout="constrained")
    arms = list(ARMS)[::-1]
    colours = {"encoder": SHAPE, "decoder": APPEARANCE}
    for axes, attribute in zip(drawing.subplots(2, 2, sharey=True), ATTRIBUTES.values(), strict=True):
        transfer, leakage = axes
        for y, arm in enumerate(arms):
            row, colour = found.rows[attribute.name][arm], colours.get(arm, INK)
            look = {"color": colour, "mfc": colour if arm == attribute.part else "white", "zorder": 2}
            share = 100 * row.transfer["retrieval"]
            transfer.plot([0, share], [y, y], color=FROZEN, lw=0.8, zorder=1)
            transfer.plot(share, y, "o", **look)
            transfer.annotate(
                f"{share:.0f}", (share, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=6
            )
            if row.leakage is not None:
                leakage.plot([row.leakage.low, row.leakage.high], [y, y], color=colour, lw=1, zorder=1)
                leakage.plot(row.leakage.mean, y, "o", **look)
        leakage.axvline(0, color=MUTED, lw=0.6, zorder=0)
        transfer.set(xlim=(0, 118), xticks=(0, 50, 100), xlabel="retrieved of 20, %")
        transfer.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
        other = "texture" if attribute.name == "shape" else "shape"
        transfer.set_ylabel(attribute.name)
        leakage.set_xlabel(f"leakage of {other}")
        leakage.xaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
        for each in axes:
            each.tick_params(axis="y", length=0)
    return drawing.made_from([record for record in found.used if record.kind == "study"])


@figure("03_method")
def transfer_by_rank() -> Drawing:
    """What is left of each attribute when the change of every weight is brought to a rank, and its size."""
    found, used = ranks()
    if not found:
        raise KeyError("figures/records has no reference at every rank: `make study` makes it")
    large = at_full_size("size")
    drawing = Drawing(COLUMN, 2.9 if large is None else 4.2, layout="constrained")
    scores = {"shape": ("iou", "shape, IoU"), "appearance": ("retrieval", "appearance, retrieved")}
    panels = drawing.subplots(2 if large is None else 3, 1, sharex=True)
    for axes, attribute in zip(panels[:2], ATTRIBUTES.values(), strict=True):
        score, label = scores[attribute.name]
        rows, colour = found[attribute.name], SHAPE if attribute.part == "encoder" else APPEARANCE
        low = [row for row in rows if row.rank is not None]
        full = next(row for row in rows if row.rank is None and not row.exportable)
        travels = next(row for row in rows if row.exportable)
        axes.axhline(full.transfer[score], color=INK, lw=0.8, label=f"in full, {full.megabytes:.0f} MB")
        axes.axhline(
            travels.transfer[score], color=colour, lw=1.6, ls=":", label="in full, no biases and norms"
        )
        axes.plot([row.rank for row in low], [row.transfer[score] for row in low], "o-", color=colour)
        for row in low:
            axes.annotate(
                f"{row.megabytes:.1f}",
                (row.rank, row.transfer[score]),
                xytext=(0, -9),
                textcoords="offset points",
                ha="center",
                fontsize=6,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([row.rank for row in low], [str(row.rank) for row in low])
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.1 * max(row.transfer[score] for row in rows))
        axes.grid(True, axis="y")
        axes.legend(loc="lower right")
    if large is not None:
        axes = panels[2]
        for attribute in ATTRIBUTES.values():
            sizes = large.metrics["mb_at_rank"][attribute.part]
            kept = [(int(rank), mb) for rank, mb in sizes.items() if int(rank) <= low[-1].rank]
            full = large.metrics["file_mb"][attribute.name]
            colour = SHAPE if attribute.part == "encoder" else APPEARANCE
            label = f"{attribute.name} ({full:.0f} in full)"
            axes.plot(*zip(*kept, strict=True), "o-", color=colour, label=label)
        axes.set_yscale("log")
        axes.set_ylabel("SD 1.5's size, MB")
        axes.grid(True, axis="y")
        axes.legend(loc="lower right")
    panels[-1].set_xlabel("rank of each weight's change (below points: MB)")
    return drawing.made_from(used if large is None else [*used, large])


# --------------------------------------------------------------------------------
# the figures folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw figures; all of them, then write the numbers and run two records again, if none is named."""
    parser = argparse.ArgumentParser(prog="python -m escd.draw", description=main.__doc__)
    parser.add_argument(
        "stems", nargs="*", metavar="stem", help=f"one of {', '.join(STEMS)}; all of them if none"
    )
    stems = parser.parse_args(arguments).stems
    if unknown := sorted(set(stems) - STEMS.keys()):
        parser.error(f"no figure is called {', '.join(unknown)}; there are {', '.join(STEMS)}")
    draw_figures(stems or list(STEMS))
    if stems:
        return
    write_numbers()
    found = results().used
    again = repeatable(found)
    if not again:
        print("No stored record can be run again here: they were made on other devices, or take too long.")
    if differing := run_again(again, found):
        raise SystemExit("These records do not come out again:\n" + "\n".join(differing))
    print("Figures: figures/; what each was made from: figures/manifest.json; the numbers: README.md")


def draw_figures(stems: Sequence[str], folder: Path = FIGURES) -> None:
    """Draw each stem as PDF and PNG, and say in manifest.json what it was made from."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    progress = tqdm(stems, unit="figure")
    for stem in progress:
        progress.set_description(stem)
        drawing = STEMS[stem].draw()
        drawn = drawing.save(folder / stem)
        made = {
            "notebook": STEMS[stem].notebook,
            "records": [record.key for record in drawing.records],
            "commit": records.commit(),
            "versions": records.versions() | {"matplotlib": matplotlib.__version__},
            "sha256": {file.name: records.sha256(file) for file in drawn},
        }
        before = entries.get(stem, {})
        if made | {"commit": None} != before | {"commit": None}:  # else it is as it was, and keeps its commit
            entries[stem] = made
        # after every figure, so that the manifest holds whatever else goes wrong
        text = json.dumps({stem: entries[stem] for stem in STEMS if stem in entries}, indent=1)
        files.write_text(manifest, text + "\n")


if __name__ == "__main__":
    run_command(main)
