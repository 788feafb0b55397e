"""Generated images that are stored with a record."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

from .. import files, records
from ..data.world import World
from ..evaluation.references import DEFAULT_LIST, Reference, load_references
from ..method.attributes import ATTRIBUTES
from ..method.config import TuningConfig
from ..method.guidance import CUSTOMIZED, PLAIN_SCALE, Start, default_guidance
from ..method.pipeline import ESCDPipeline
from ..records import Record
from .canvas import pixels
from .results import study, weights_of


@dataclass(frozen=True)
class SheetConfig:
    """One run of the pipeline over several prompts, with customizations of references."""

    prompts: tuple[str, ...]
    # Ids of references of `list`, and how their shape and their appearance are tuned.
    shape: str | None = None
    appearance: str | None = None
    shape_tuning: TuningConfig | None = None
    appearance_tuning: TuningConfig | None = None
    backbone: str = "mini"
    seed: int = 0
    steps: int = 25
    guidance_scale: float = PLAIN_SCALE
    list: str = DEFAULT_LIST
    guidance_from: Start = CUSTOMIZED


def sheet(prompts: Sequence[str], shape: str | None = None, appearance: str | None = None) -> SheetConfig:
    """A sheet of prompts, with each attribute tuned by default."""
    return SheetConfig(
        tuple(prompts),
        shape,
        appearance,
        TuningConfig.of("shape") if shape else None,
        TuningConfig.of("appearance") if appearance else None,
        **asdict(
            default_guidance(name for name, used in (("shape", shape), ("appearance", appearance)) if used)
        ),
        list=DEFAULT_LIST,
    )


@dataclass(frozen=True)
class ProcessConfig:
    """An image of the world while it is noised, and one while it is generated from noise."""

    prompt: str
    sample: int  # the image's number in World(seed=0)
    shown: tuple[int, ...]  # numbers of steps taken from noise
    backbone: str = "mini"
    seed: int = 0
    steps: int = 25
    guidance_scale: float = PLAIN_SCALE


def stored_images(config: SheetConfig | ProcessConfig) -> tuple[Record, list[np.ndarray]]:
    """A config's record and its images, (H, W, 3) uint8 each; generated where there is no record.

    Raises ValueError when the stored pixels are not the record's.
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

    record = records.get(config, run, inputs=_inputs(config), device="cpu", learnt=lambda: study().learnt)
    strip = np.asarray(Image.open(path).convert("RGB"))
    if records.sha256(strip) != record.metrics["pixels"]:
        raise ValueError(f"{path.name} does not hold the pixels of its record: remove both, then draw again")
    return record, np.split(strip, record.metrics["images"], axis=1)


def drawable(config: SheetConfig | ProcessConfig) -> bool:
    """Whether the images of a config are stored, or need no tuning because all it shows is kept."""
    if not records.missing([config], _inputs):
        return True
    return all(study().knows(*tuned) for tuned in _tuned(config))


def _tuned(config: SheetConfig | ProcessConfig) -> list[tuple[str, Reference, TuningConfig, str]]:
    """Of each customization that a config shows: attribute, reference, tuning and backbone."""
    return [
        (
            name,
            load_references(which=config.list)[reference],
            getattr(config, f"{name}_tuning"),
            config.backbone,
        )
        for name in ATTRIBUTES
        if (reference := getattr(config, name, None)) is not None
    ]


def _inputs(config: SheetConfig | ProcessConfig) -> dict[str, str]:
    """sha256 of what a config's images depend on: weights and references."""
    inputs = dict(weights_of(config.backbone))
    for name in {getattr(config, "shape", None), getattr(config, "appearance", None)} - {None}:
        inputs |= load_references(which=config.list)[name].inputs
    return inputs


def _pipeline(config: SheetConfig | ProcessConfig) -> ESCDPipeline:
    learnt = {tuned[0]: study().learn(*tuned) for tuned in _tuned(config)}
    pipe = ESCDPipeline(study().backbone(config.backbone), **learnt)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _make_sheet(config: SheetConfig) -> tuple[list[np.ndarray], dict]:
    out = _pipeline(config)(
        list(config.prompts),
        num_inference_steps=config.steps,
        guidance_scale=config.guidance_scale,
        guidance_from=config.guidance_from,
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
    # t = 0 is the image itself; the schedule has no such time.
    noised = [scheduler.add_noise(x_0, noise, torch.tensor([t])) if t else x_0 for t in times]
    latents = torch.cat([*noised, *(taken[step] for step in config.shown)])
    return [pixels(image) for image in backbone.decode_latents(latents)], {"times": times}


MAKERS = {SheetConfig: _make_sheet, ProcessConfig: _make_process}
