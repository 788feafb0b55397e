"""Attribute filters for a pretrained backbone, from a folder of images: `python -m escd.pretrain filters`.

The backbone stays frozen (`mini`'s filters are trained together with its UNet: `escd.pretrain.unet`). The
images have no labels. Each pair is two views of one image that share only its shape (or only its appearance),
from the augmentation of tuning (`escd.method.views`): the filter reads one, the other is denoised under a
prompt that names the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from ..backbone.diffusion import loss_weight
from ..backbone.model import Backbone
from ..data.foreground import foreground_mask
from ..data.images import image_files, open_image
from ..loading import load_backbone
from ..method.attributes import ATTRIBUTES
from ..method.config import TuningConfig
from ..method.encoder import extract_features
from ..method.pipeline import ESCDPipeline
from ..method.reference import Reference
from ..method.step import autocast_dtype
from ..method.tuning import customize
from ..method.views import PROMPTS, readable, views_of
from .diffusion_loss import FiltersInTraining, denoising_error
from .loop import LoopConfig
from .pairs import materials, outlines

NEEDED = 8  # images at least
HELD_OUT = 0.1  # share of the images for the evaluation
STANDARD = 64  # images that the mean and deviation of each feature come from
SAMPLER_STEPS = 15  # of an image in the grid


@dataclass
class Pairs:
    """A batch of one attribute: embeds_ref (N, W) of the references, latents and prompts of the targets.

    probe_targets: (N, K); probed: (N,) bool, the rows with a valid probe target.
    """

    attribute: str
    embeds_ref: Tensor
    x_0: Tensor
    prompts: list[str]
    probe_targets: Tensor
    probed: Tensor


class FilterLoss(FiltersInTraining):
    """Eq. 2 on the targets, under prompts with the references' pseudo-words (Eq. 5), plus the probe loss."""

    def forward(self, batch: list[Pairs]) -> tuple[Tensor, dict[str, Tensor]]:
        logs = {}
        for pairs in batch:
            word = self.backbone.word_embedding(ATTRIBUTES[pairs.attribute].word)
            v = self.filters[pairs.attribute](pairs.embeds_ref, word).float()
            logs[pairs.attribute] = self.error(pairs, v)
            rows = pairs.probed
            if rows.any():
                logs[f"{pairs.attribute}, probe"] = self.probe_loss(
                    pairs.attribute, pairs.embeds_ref[rows], pairs.probe_targets[rows]
                )
        return torch.stack(list(logs.values())).sum(), logs

    def error(self, pairs: Pairs, v: Tensor) -> Tensor:
        """Weighted squared error, a scalar, with the pseudo-word's embedding v, (D,) or (N, D)."""
        backbone, unet = self.backbone, self.backbone.unet
        text = backbone.encode_prompt(pairs.prompts, {ATTRIBUTES[pairs.attribute].token: v}).to(unet.dtype)
        t = torch.randint(0, backbone.scheduler.config.num_train_timesteps, (len(pairs.x_0),))
        t = t.to(pairs.x_0.device)
        error = denoising_error(
            lambda x_t, t: unet(x_t.to(unet.dtype), t, text).sample, backbone.scheduler, pairs.x_0, t
        )
        return (error * loss_weight(backbone.scheduler, t)).mean()


class FilterStage:
    """Trains the filters of `backbone` on the images in the folder `data`."""

    name = "filters"
    loop = LoopConfig(images=50_000, batch_size=8, learning_rate=5e-4, decay=0.5, ema_decay=0.999)

    def __init__(self, device: torch.device, backbone: str | Path, data: Path) -> None:
        files = images_to_learn_from(data)
        torch.manual_seed(14)
        dtype = autocast_dtype(device) if device.type == "cuda" else None
        self.backbone = load_backbone(backbone, device=device, dtype=dtype)
        self.module = FilterLoss(self.backbone).to(device)
        self.device, self.heavy = device, []
        # One state for each backbone.
        self.name = f"{self.name}-{self.backbone.identity_without_filters}"
        kept = max(1, round(HELD_OUT * len(files)))
        self.files, self.held_out = files[kept:], files[:kept]
        first = torch.stack([self._open(file) for file in self.files[:STANDARD]])
        features = torch.cat([self._features(x, seed=0) for x in first.split(4)])
        for learnt in self.module.filters.values():
            learnt.standardise(features)
        self.fixed = [
            pairs for k in range(4) for pairs in self._pairs(self.held_out, k * len(self.held_out), 8)
        ]

    def load(self, folder: Path) -> None:
        """Take filters that `export` wrote."""
        self.module.load(folder)

    def _open(self, file: Path) -> Tensor:
        return open_image(file, self.backbone.image_size).to(self.device)

    def _features(self, images: Tensor, seed: int) -> Tensor:
        return extract_features(self.backbone, images, seed=seed).float()

    def _pairs(self, files: list[Path], first: int, count: int) -> list[Pairs]:
        """The pairs first ... first + count - 1: half of them for each attribute."""
        batches = []
        for name, attribute in ATTRIBUTES.items():
            config = TuningConfig.of(attribute, views=2, augmentation=1.0, true_scale=False)
            references, targets, prompts, masks = [], [], [], []
            for k in range(first, first + max(1, count // 2)):
                image = self._open(files[k % len(files)])
                views, _, known = views_of(Reference(image), replace(config, seed=k))
                # A person's reference is an unchanged image; an augmented one teaches what to ignore.
                references.append(image if k // len(files) % 2 == 0 else views[0])
                targets.append(views[1])
                usable = readable(self.backbone, attribute.token, known[1], PROMPTS[config.recipe])
                prompts.append(usable[k // len(files) % len(usable)])
                masks.append(foreground_mask(image[None]))
            mask = torch.cat([each for each, _ in masks])[:, None].float().to(self.device)
            images = torch.stack(references)
            batches.append(
                Pairs(
                    attribute=name,
                    embeds_ref=self._features(images, seed=first),
                    x_0=self.backbone.encode_images(torch.stack(targets)).float(),
                    prompts=prompts,
                    probe_targets=outlines(mask) if name == "shape" else materials(images, mask),
                    # A view with another outline has its material outside this mask.
                    probed=torch.tensor(
                        [
                            not failed[0] and (name == "shape" or k // len(files) % 2 == 0)
                            for k, (_, failed) in enumerate(masks, first)
                        ],
                        device=self.device,
                    ),
                )
            )
        return batches

    def batch(self, first: int, count: int) -> list[Pairs]:
        """Pairs of the training images."""
        return self._pairs(self.files, first, count)

    def evaluate(self) -> dict[str, float]:
        """Error on held-out images with the filters' pseudo-words, and with the plain words instead.

        Both with the same noise: a filter helps when the first is lower.
        """
        scores: dict[str, list[float]] = {}
        for k, pairs in enumerate(self.fixed):
            word = self.backbone.word_embedding(ATTRIBUTES[pairs.attribute].word)
            v = self.module.filters[pairs.attribute](pairs.embeds_ref, word).float()
            for kind, embedding in ((pairs.attribute, v), (f"{pairs.attribute}, plain word", word.float())):
                with torch.random.fork_rng():
                    torch.manual_seed(k)
                    scores.setdefault(kind, []).append(float(self.module.error(pairs, embedding)))
        return {kind: round(sum(errors) / len(errors), 5) for kind, errors in scores.items()}

    def grid(self, path: Path) -> None:
        """Rows: held-out images; images with their shapes, with their appearances, at zero tuning steps."""
        images = torch.stack([self._open(file) for file in self.held_out[:4]])
        prompts = {name: prompts[0] for name, prompts in PROMPTS.items()}
        save_untuned(path, self.backbone, images, prompts)

    def export(self, folder: Path) -> None:
        """Write the filters."""
        self.module.export(folder)


def save_untuned(
    path: Path, backbone: Backbone, images: Tensor, prompts: Mapping[str, str], method: str | None = None
) -> None:
    """A grid of images (N, 3, H, W) in [-1, 1]; below, a row of each under each attribute's prompt, untuned.

    "{}" in a prompt is the pseudo-word; method: as for `customize`.
    """
    rows = [images.float().cpu()]
    for name, prompt in prompts.items():
        for image in images:
            pipe = ESCDPipeline(backbone, **{name: customize(image, name, backbone, method=method, steps=0)})
            pipe.set_progress_bar_config(disable=True)
            drawn = pipe(
                prompt.format(ATTRIBUTES[name].token),
                num_inference_steps=SAMPLER_STEPS,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            ).images
            rows.append(drawn.float().cpu() * 2 - 1)
    save_image(torch.cat(rows) * 0.5 + 0.5, path, nrow=len(images))


def images_to_learn_from(folder: Path) -> list[Path]:
    """The images in a folder and its subfolders; ValueError where they are too few."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with images to learn from")
    files = image_files(folder, deep=True)
    if len(files) < NEEDED:
        raise ValueError(
            f"{folder} holds {len(files)} images; filters must generalise to other images, which needs at "
            f"least {NEEDED} (some thousands work well)"
        )
    return files
