"""Scores of customization on a person's own subjects: CLIP-T, CLIP-I, DINO, silhouette IoU.

`python -m escd.evaluate SUBJECTS --attribute shape` learns the attribute from one image of every subject and
generates other objects with it, in the twenty scenes of the DreamBooth data set (Ruiz et al. 2023). The
folder of that data set can be passed as it is. Each score is reported beside the floor: the same prompts and
noise on the untouched backbone, with the attribute's plain word in place of the pseudo-word.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import create_model_from_pretrained, get_tokenizer
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModel

from .. import records
from ..backbone.hub import OPENCLIP, open_clip_file
from ..backbone.model import Backbone
from ..data import foreground
from ..data.images import image_files, open_image_and_mask
from ..files import whole
from ..loading import load_backbone
from ..method.attributes import ATTRIBUTES, resolve_attribute
from ..method.config import TuningConfig
from ..method.cost import require_memory, tuning_cost
from ..method.guidance import LARGE_SCALE
from ..method.pipeline import ESCDPipeline
from . import measure
from .configs import SamplingConfig
from .kept import learn_now

# The scenes of the prompts: those of the DreamBooth data set.
SCENES = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on a cobblestone street",
    "on top of pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with a blue house in the background",
    "on top of a purple rug in a forest",
    "with a wheat field in the background",
    "with a tree and autumn leaves in the background",
    "with the Eiffel Tower in the background",
    "floating on top of water",
    "floating in an ocean of milk",
    "on top of green grass with sunflowers around it",
    "on top of a mirror",
    "on top of the sidewalk in a crowded street",
    "on top of a dirt road",
    "on top of a white rug",
)
# The objects of the prompts: for shape those that come in many shapes, for appearance in many materials.
CARRIERS = {
    "shape": ("a cake", "a cushion", "a candle", "a wooden sculpture"),
    "appearance": ("a teapot", "a chair", "a cat", "a car"),
}
PHRASES = {"shape": "{} in the shape of {}", "appearance": "{} with the appearance of {}"}
MASK = ".mask"  # of NAME.png: NAME.mask.png


@dataclass(frozen=True)
class EvaluationConfig(SamplingConfig):
    """One subject: its attribute learnt from one image, or the floor."""

    subject: str
    tuning: TuningConfig
    backbone: str = field(kw_only=True)  # without a default
    floor: bool = False
    prompts: int = len(SCENES)
    # Images per prompt.
    images: int = 1
    guidance_scale: float = field(default=LARGE_SCALE, kw_only=True)
    # The networks that score.
    clip: str = OPENCLIP.architecture
    dino: str | None = None


@dataclass(frozen=True)
class Subject:
    """One image of a subject, and its mask or None."""

    name: str
    image: Path
    mask: Path | None


def subjects_in(folder: Path) -> list[Subject]:
    """The subjects of a folder: its images, or the first image of each folder in it.

    `NAME.mask.png` beside an image is its mask, white on the subject. Raises FileNotFoundError when there is
    no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} of subjects")

    def images(where: Path) -> list[Path]:
        return [file for file in image_files(where) if not file.stem.endswith(MASK)]

    chosen = [(f.stem, f) for f in images(folder)]
    chosen += [(d.name, images(d)[0]) for d in sorted(folder.iterdir()) if d.is_dir() and images(d)]
    if not chosen:
        raise FileNotFoundError(f"{folder} holds no images, nor folders of them")
    subjects = [Subject(n, f, f.with_name(f"{f.stem}{MASK}.png")) for n, f in chosen]
    return [s if s.mask.is_file() else Subject(s.name, s.image, None) for s in subjects]


def carriers_and_scenes(attribute: str, count: int) -> list[tuple[str, str]]:
    """`count` distinct pairs of an object that carries the attribute and a scene."""
    carriers = CARRIERS[attribute]
    # The scenes are a multiple of the carriers, so each round of scenes starts with another carrier.
    return [(carriers[(k + k // len(SCENES)) % len(carriers)], SCENES[k % len(SCENES)]) for k in range(count)]


class Scorers:
    """The networks that score.

    clip: a safetensors file of the OpenCLIP model in `OPENCLIP`; None downloads it from the hub. dino: hub id
    or folder of a DINO model; None scores without DINO.
    """

    def __init__(self, device: torch.device, clip: Path | None = None, dino: str | None = None) -> None:
        self.device = device
        file = open_clip_file(clip, "CLIP-T and CLIP-I are scored by a CLIP", "pass --clip FILE")
        model, preprocess = create_model_from_pretrained(OPENCLIP.architecture, str(file), device=device)
        self.clip = model.eval(), preprocess, get_tokenizer(OPENCLIP.architecture)
        self.dino = None
        if dino is not None:
            network = AutoModel.from_pretrained(dino, use_safetensors=True).to(device).eval()
            self.dino = network, AutoImageProcessor.from_pretrained(dino)

    @torch.no_grad()
    def clip_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit embeddings (N, D) of images."""
        model, preprocess, _ = self.clip
        pixels = torch.stack([preprocess(image) for image in images]).to(self.device)
        return F.normalize(model.encode_image(pixels).float(), dim=-1)

    @torch.no_grad()
    def clip_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings (N, D) of texts."""
        model, _, tokenizer = self.clip
        return F.normalize(model.encode_text(tokenizer(list(texts)).to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def dino_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit CLS tokens (N, D) of images."""
        model, processor = self.dino
        inputs = processor(images=list(images), return_tensors="pt").to(self.device)
        return F.normalize(model(**inputs).last_hidden_state[:, 0].float(), dim=-1)

    def score(
        self,
        images: Sequence[Image.Image],
        texts: Sequence[str],
        reference: Image.Image,
        mask: Tensor | None,
    ) -> dict[str, list[float | None]]:
        """Cosines of each image with its text (CLIP-T) and with the reference (CLIP-I, DINO), and IoU.

        mask: the reference's silhouette (H, W); None where it is not known, and then there is no IoU. The IoU
        of an image without a foreground is None.
        """
        embeddings = self.clip_images(images)
        scores: dict[str, list[float | None]] = {
            "clip_t": (embeddings * self.clip_texts(texts)).sum(1).tolist(),
            "clip_i": (embeddings @ self.clip_images([reference])[0]).tolist(),
        }
        if self.dino is not None:
            scores["dino"] = (self.dino_images(images) @ self.dino_images([reference])[0]).tolist()
        if mask is not None:
            pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
            masks, failed = foreground.foreground_mask(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
            mask = F.interpolate(mask[None, None].float(), masks.shape[-2:], mode="area")[0]
            iou = measure.aligned_iou(masks.float(), (mask > 0.5).float().expand(len(masks), -1, -1))
            scores["iou"] = [None if no else float(x) for x, no in zip(iou, failed, strict=True)]
        return scores


def evaluate(
    subject: Subject, config: EvaluationConfig, backbone: Backbone, scorers: Scorers, output: Path,
    learnt: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores of one subject, or of its floor; the images are written to the folder `output`.

    learnt: a dictionary that receives `Record.learnt`. CLIP-I and DINO compare images with the *whole*
    reference, so a higher score is not always better for one attribute: read them beside floor and CLIP-T.
    """
    attribute = resolve_attribute(config.tuning.attribute)
    picture, mask = open_image_and_mask(subject.image, backbone.image_size, subject.mask)
    if mask is None:
        masks, failed = foreground.foreground_mask(picture[None])
        mask = None if failed[0] else masks.view(1, *picture.shape[-2:]).float()
    pipe = ESCDPipeline(backbone)
    if not config.floor:
        customized = learn_now(
            subject.image, attribute.name, config.tuning, backbone, subject.mask, progress=True
        )
        if learnt is not None:
            learnt[attribute.name] = customized.as_dict()
        pipe = ESCDPipeline(backbone, **{attribute.name: customized.customization})
    pipe.set_progress_bar_config(disable=True)
    word = attribute.word if config.floor else attribute.token
    images, texts = [], []
    for thing, scene in carriers_and_scenes(attribute.name, config.prompts):
        images += pipe(
            f"{PHRASES[attribute.name].format(thing, word)} {scene}",
            num_inference_steps=config.sampler_steps,
            guidance_scale=config.guidance_scale,
            guidance_rescale=config.guidance_rescale,
            guidance_from=config.guidance_from,
            num_images_per_prompt=config.images,
            generator=[torch.Generator().manual_seed(config.seed + j) for j in range(config.images)],
        ).images
        # CLIP-T scores whether the rest of the prompt is obeyed, so its text leaves the attribute out.
        texts += [f"{thing} {scene}"] * config.images
    folder = output / f"{subject.name}-{attribute.name}" / ("floor" if config.floor else "learnt")
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        with whole(folder / f"{k:03d}.png") as unfinished:
            image.save(unfinished)
    reference = ((picture.cpu() / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
    silhouette = None if mask is None else mask[0].cpu()
    return scorers.score(images, texts, Image.fromarray(reference), silhouette)


def main(argv: list[str] | None = None) -> None:
    """Learn an attribute of each subject in a folder and score what is drawn with it."""
    parser = argparse.ArgumentParser(prog="python -m escd.evaluate", description=main.__doc__)
    parser.add_argument("subjects", type=Path, help="folder of images, or of a folder of images a subject")
    parser.add_argument("--attribute", required=True, choices=tuple(ATTRIBUTES))
    parser.add_argument("--backbone", default="sd15", help="what load_backbone is to load (default: sd15)")
    parser.add_argument(
        "--filters", type=Path, metavar="DIR", help="attribute filters from python -m escd.pretrain filters"
    )
    parser.add_argument("--steps", type=int, help="tuning steps")
    parser.add_argument("--rank", type=int, help="learn a change of this rank")
    parser.add_argument(
        "--prompts", type=int, default=len(SCENES), help=f"a subject (default: {len(SCENES)})"
    )
    parser.add_argument("--images", type=int, default=1, help="for each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clip", type=Path, help=f"safetensors of {OPENCLIP.repository} (default: from the hub)"
    )
    parser.add_argument("--dino", help="hub id or folder, such as facebook/dino-vits16 (default: not scored)")
    parser.add_argument("--output", type=Path, default=Path("runs") / "evaluation", metavar="DIR")
    arguments = parser.parse_args(argv)
    most = len(SCENES) * len(CARRIERS[arguments.attribute])
    if not 1 <= arguments.prompts <= most or arguments.images < 1:
        parser.error(f"--prompts must be from 1 to {most}, --images from 1 on")
    try:
        subjects = subjects_in(arguments.subjects)
        given = {name: getattr(arguments, name) for name in ("steps", "rank", "seed")}
        TuningConfig.of(arguments.attribute, **given)  # raises for bad numbers before the backbone is loaded
        for subject in subjects:
            open_image_and_mask(subject.image, 64, subject.mask)  # and for bad images
        backbone = load_backbone(arguments.backbone, filters=arguments.filters)
        tuning = TuningConfig.of(arguments.attribute, None, backbone, **given)
        require_memory(tuning_cost(backbone, tuning), backbone.device)
        scorers = Scorers(backbone.device, arguments.clip, arguments.dino)
    except (OSError, ValueError, TypeError, MemoryError) as error:
        parser.error(" ".join(str(error).split()))
    results: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    runs = [(subject, floor) for subject in subjects for floor in (True, False)]
    for subject, floor in tqdm(runs, desc="evaluation", unit="run"):
        config = EvaluationConfig(
            subject=subject.name,
            tuning=tuning,
            backbone=backbone.name,
            floor=floor,
            prompts=arguments.prompts,
            images=arguments.images,
            seed=arguments.seed,
            dino=arguments.dino and Path(arguments.dino).name,
        )
        inputs = {"image": records.sha256(subject.image), "backbone": backbone.identity}
        files = {"mask": subject.mask, "clip": arguments.clip, "filters": arguments.filters}
        if arguments.dino and Path(arguments.dino).is_dir():
            files["dino"] = Path(arguments.dino)
        inputs |= {name: records.sha256(file) for name, file in files.items() if file is not None}
        learnt: dict[str, dict[str, Any]] = {}
        record = records.get(
            config,
            lambda config, subject=subject, learnt=learnt: evaluate(
                subject, config, backbone, scorers, arguments.output, learnt
            ),
            inputs=inputs,
            device=backbone.device,
            folder=arguments.output,
            learnt=lambda learnt=learnt: learnt,
        )
        results[floor].append(record.metrics)
    print(show(results))
    print(f"{arguments.output}: the images, and evaluation.jsonl with every score and its config")


def show(results: dict[bool, list[dict[str, Any]]]) -> str:
    """A table: the mean of each score over subjects, for the floor and for the learnt attribute."""
    names = list(dict.fromkeys(name for metrics in results[False] for name in metrics))
    lines = [f"{'':22}" + "".join(f"{name:>10}" for name in names)]
    for floor, label in ((True, "untouched backbone"), (False, "attribute learnt")):
        cells = []
        for name in names:
            values = [x for metrics in results[floor] for x in metrics.get(name, []) if x is not None]
            cells.append(f"{sum(values) / len(values):10.3f}" if values else f"{'--':>10}")
        lines.append(f"{label:22}" + "".join(cells))
    return "\n".join(lines)
