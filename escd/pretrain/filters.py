"""Attribute filters for a pretrained backbone, from a folder of images: `python -m escd.pretrain filters`.

`mini`'s filters learn together with its UNet (`escd.pretrain.unet`). A large text-to-image model has words
between its words already and stays frozen here; the filters learn to write them from a person's own images.
Nobody has labelled these, so the pairs are made: of one image two views that share its shape (or its
appearance) and nothing else, as tuning makes them (`escd.method.views`), one for the filter to read and one
to be denoised under a prompt that says the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image

from ..backbone.diffusion import loss_weight
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

NEEDED = 8  # images: fewer than that say nothing about the next one
# Share of the images that are kept for the evaluation.
KEPT = 0.1
# Images whose features give the mean and the deviation the filters take for each feature.
STANDARD = 64


@dataclass
class Pairs:
    """Some rows of one attribute: embeds_ref (N, W) of the references, latents and prompts of the targets.

    truth: what is to be told of the attribute, (N, K); known: (N,) of which rows it is known.
    """

    attribute: str
    embeds_ref: Tensor
    x_0: Tensor
    prompts: list[str]
    truth: Tensor
    known: Tensor


class FilterLoss(FiltersInTraining):
    """Eq. 2 on the targets, under prompts whose pseudo-word the filter made from the references (Eq. 5)."""

    def forward(self, batch: list[Pairs]) -> tuple[Tensor, dict[str, Tensor]]:
        logs = {}
        for pairs in batch:
            word = self.backbone.word_embedding(ATTRIBUTES[pairs.attribute].word)
            v = self.filters[pairs.attribute](pairs.embeds_ref, word).float()
            logs[pairs.attribute] = self.error(pairs, v)
            if pairs.known.any():
                told = self.told(pairs.attribute, pairs.embeds_ref[pairs.known], pairs.truth[pairs.known])
                logs[f"{pairs.attribute}, told"] = told
        return torch.stack(list(logs.values())).sum(), logs

    def error(self, pairs: Pairs, v: Tensor) -> Tensor:
        """The UNet's weighted squared error, a scalar, where the pseudo-word is v, (D,) or (N, D)."""
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
        # A run's state is of one backbone, whose filters are what it learns.
        self.name = f"{self.name}-{self.backbone.identity_without_filters}"
        kept = max(1, round(KEPT * len(files)))
        self.learnt, self.unseen = files[kept:], files[:kept]
        first = torch.stack([self._open(file) for file in self.learnt[:STANDARD]])
        features = torch.cat([self._features(x, seed=0) for x in first.split(4)])
        for learnt in self.module.filters.values():
            learnt.standardise(features)
        self.fixed = [pairs for k in range(4) for pairs in self._pairs(self.unseen, k * len(self.unseen), 8)]

    def load(self, folder: Path) -> None:
        """Go on from filters that `export` wrote."""
        self.module.load(folder)

    def _open(self, file: Path) -> Tensor:
        return open_image(file, self.backbone.image_size).to(self.device)

    def _features(self, images: Tensor, seed: int) -> Tensor:
        return extract_features(self.backbone, images, seed=seed).float()

    def _pairs(self, files: list[Path], first: int, count: int) -> list[Pairs]:
        """The pairs first ... first + count - 1: half of them for each attribute."""
        out = []
        for name, attribute in ATTRIBUTES.items():
            config = TuningConfig.of(attribute, views=2, augmentation=1.0)
            references, targets, prompts, masks = [], [], [], []
            for k in range(first, first + max(1, count // 2)):
                image = self._open(files[k % len(files)])
                views, _, said = views_of(Reference(image), replace(config, seed=k))
                # A person's reference is an image as it is; a changed one teaches what not to read of it.
                references.append(image if k // len(files) % 2 == 0 else views[0])
                targets.append(views[1])
                usable = readable(self.backbone, attribute.token, said[1], PROMPTS[config.recipe])
                prompts.append(usable[k // len(files) % len(usable)])
                masks.append(foreground_mask(image[None]))
            inside = torch.cat([mask for mask, _ in masks])[:, None].float().to(self.device)
            images = torch.stack(references)
            out.append(
                Pairs(
                    attribute=name,
                    embeds_ref=self._features(images, seed=first),
                    x_0=self.backbone.encode_images(torch.stack(targets)).float(),
                    prompts=prompts,
                    truth=outlines(inside) if name == "shape" else materials(images, inside),
                    # A view of another outline shows its material elsewhere.
                    known=torch.tensor(
                        [
                            not failed[0] and (name == "shape" or k // len(files) % 2 == 0)
                            for k, (_, failed) in enumerate(masks, first)
                        ],
                        device=self.device,
                    ),
                )
            )
        return out

    def batch(self, first: int, count: int) -> list[Pairs]:
        return self._pairs(self.learnt, first, count)

    def evaluate(self) -> dict[str, float]:
        """The error on images kept apart, with the filters' pseudo-words and with the plain words.

        The same noise for both: a filter is worth its while when the first is the lower.
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
        """Rows: images kept apart; a picture of the shape of each; one of its appearance, at zero steps."""
        images = torch.stack([self._open(file) for file in self.unseen[:4]])
        rows = [images.float().cpu()]
        for name, attribute in ATTRIBUTES.items():
            for image in images:
                read = customize(image, attribute, self.backbone, steps=0)
                pipe = ESCDPipeline(self.backbone, **{name: read})
                pipe.set_progress_bar_config(disable=True)
                drawn = pipe(
                    PROMPTS[name][0].format(attribute.token),
                    num_inference_steps=15,
                    generator=torch.Generator().manual_seed(0),
                    output_type="pt",
                ).images
                rows.append(drawn.float().cpu() * 2 - 1)
        save_image(torch.cat(rows) * 0.5 + 0.5, path, nrow=len(images))

    def export(self, folder: Path) -> None:
        self.module.export(folder)


def images_to_learn_from(folder: Path) -> list[Path]:
    """The images in a folder and those inside it; ValueError where they are too few."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with images to learn from")
    files = image_files(folder, deep=True)
    if len(files) < NEEDED:
        raise ValueError(
            f"{folder} holds {len(files)} images; filters are to serve images they have never seen, and "
            f"cannot learn that from fewer than {NEEDED} (some thousands serve well)"
        )
    return files
