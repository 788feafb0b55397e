"""Stage 4 of pretraining: the UNet of `mini`, and with it the attribute filters, under frozen towers (Eq. 2).

Captions have a word for twelve outlines and six patterns. A UNet that has read nothing else has no use for a
pseudo-word that stands for a thirteenth, however well a filter describes it. So part of every step is
cross-image pairs: a filter reads a reference that shares only its shape (or only its appearance) with the
picture to be denoised, its pseudo-word stands in the caption, and UNet and filters learn from the one error,
as E4T's encoder and weight offsets do (Gal et al. 2023). A large text-to-image model has read enough captions
to do without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import save_image
from transformers import CLIPTokenizerFast

from ..backbone.diffusion import target_of
from ..backbone.image_tower import ImageTower
from ..backbone.model import Backbone
from ..data.captions import draw_caption
from ..data.names import BACKGROUNDS, COLOURS, PATTERNS, SHAPES
from ..data.world import World
from ..method.attributes import ATTRIBUTES
from ..method.encoder import extract_features
from .autoencoder import LATENT_CHANNELS
from .diffusion_loss import DiffusionLoss, Step, rank_and_count
from .loop import LoopConfig
from .networks import grow_unet, make_scheduler, make_unet
from .pairs import (
    MATERIAL,
    OUTLINE,
    PORTION,
    PROBED,
    QUARTET,
    SAME_APPEARANCE,
    SAME_SHAPE,
    Pictures,
    materials,
    outlines,
    pair_captions,
    quartets,
)
from .towers import load_text_tower

CAPTION_DROPOUT = 0.1
# Encoding a picture costs a fifth of a training step on the CPU; each latent is used about this many times,
# with new noise, a new timestep and a new caption.
REUSE = {"cpu": 4, "cuda": 4, "mps": 2}
BANK, BEGUN = 8_192, 512  # pictures kept for that, and painted before the first step; multiples of QUARTET
RINGS = ("latents", "outlines", "materials", "features")  # what is kept of each of them as a row
# Share of the pictures whose shape, and whose appearance, has a name: only these teach the prompt's words.
# The rest keeps the UNet able to draw what has no name, which is what a person brings. Twelve outlines are
# soon known by name; the patterns come last.
NAMED_SHAPES, NAMED_APPEARANCES = 0.3, 0.65
# Share of a step's pictures under a caption with "*m", with "*a", and with both; the rest has plain captions.
WITH_SHAPE, WITH_APPEARANCE, WITH_BOTH = 0.3125, 0.1875, 0.125


class UNetStage:
    name = "unet"
    loop = LoopConfig(
        images=420_000, batch_size=64, learning_rate=8e-4, warmup=0.015, decay=0.8, ema_decay=0.999
    )

    # Of a step's pictures: under "*m", "*a" and both; and where in its four the picture lies that is read for
    # each of the two.
    shares = (WITH_SHAPE, WITH_APPEARANCE, WITH_BOTH)
    partners = (SAME_SHAPE, SAME_APPEARANCE)

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.device = device
        torch.manual_seed(13)
        channels = AutoencoderKL.load_config(folder / "vae")["latent_channels"]
        self.module = DiffusionLoss(lambda unet: self._frozen(folder, unet), channels)
        self.backbone = self.module.backbone
        # A graph of kernels gains nothing by being compiled.
        _, several = rank_and_count()
        self.heavy = [self.module.unet] if device.type != "cuda" or several > 1 else []
        self.workers = max(1, (os.cpu_count() or 2) // several - 1) if device.type == "cuda" else 0
        self.portions: Iterator | None = None
        self.taken = 0  # portions
        self.first = 0
        self.world = World(
            seed=13, named_shapes=NAMED_SHAPES, named_appearances=NAMED_APPEARANCES, varied=True
        )
        self.reuse = REUSE[device.type]
        self.generator = torch.Generator().manual_seed(13)
        # The ring of pictures: what of them is used again, row by row.
        self.latents = torch.empty(BANK, *self.backbone.latent_shape, device=device)
        self.outlines = torch.empty(BANK, OUTLINE**2, device=device)
        self.materials = torch.empty(BANK, MATERIAL, device=device)
        self.features = torch.empty(0)
        self.captions: list[tuple[list[str], ...]] = [()] * BANK
        self.painted = self.steps = 0
        self.unseen = World(seed=9013, device=device)
        b = self.unseen.batch(range(512))
        self.fixed = (self._encode(b.image), [c[0] for c in b.captions])

    def _frozen(self, folder: Path, unet: UNet2DConditionModel) -> Backbone:
        """The backbone around a UNet in training: everything else of it is frozen."""
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        tower = ImageTower.from_pretrained(folder / "image_tower", torch_dtype=torch.float32)
        return Backbone(
            vae=vae.to(self.device).eval().requires_grad_(False),
            text_encoder=load_text_tower(folder, self.device),
            tokenizer=CLIPTokenizerFast.from_pretrained(folder / "tokenizer"),
            unet=unet.to(self.device),
            scheduler=make_scheduler(),
            image_tower=tower.to(self.device).eval().requires_grad_(False),
        )

    def _encode(self, images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            return self.backbone.encode_images(images).float()

    def _features(self, images: Tensor, x_0: Tensor, seed: int) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return extract_features(self.backbone, images, seed=seed, x_0=x_0).float()

    def load(self, folder: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        latents = self.module.unet.config.in_channels
        if unet.config.in_channels < latents:
            unet = grow_unet(unet, latents)
        self.module.unet.load_state_dict(unet.state_dict())
        if latents > LATENT_CHANNELS:
            self.module.grown(LATENT_CHANNELS)
        self.module.load(folder)

    def state_dict(self) -> dict[str, Any]:
        """The ring of pictures, and where the random numbers and the painting stand."""
        filled = min(self.painted, BANK)
        rings = {name: getattr(self, name)[:filled].clone() for name in RINGS}
        counts = {name: getattr(self, name) for name in ("painted", "steps", "first", "taken")}
        return {
            **rings, **counts, "captions": self.captions[:filled], "generator": self.generator.get_state()
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("painted", "steps", "first", "taken"):
            setattr(self, name, state[name])
        filled, width = state["features"].shape[0], state["features"].shape[1:]
        if filled:
            self.features = torch.empty(BANK, *width, dtype=torch.half, device=self.device)
        for name in RINGS:
            getattr(self, name)[:filled] = state[name].to(self.device)
        self.captions[:filled] = state["captions"]
        self.generator.set_state(state["generator"])
        self.portions = None  # painted on from where they were

    def _pictures(self, first: int, count: int) -> tuple[Tensor, Tensor, list[tuple[list[str], ...]]]:
        """So many new pictures, their masks and captions.

        On the CPU those from number `first` on. For a GPU workers paint ahead, one portion after the other
        from the training's first picture on, and `count` is rounded up to whole ones.
        """
        if not self.workers:
            b = quartets(self.world, torch.arange(first, first + count))
            return b.image.to(self.device), b.mask.to(self.device), pair_captions(b)
        if self.portions is None:
            pictures = Pictures(self.world, self.first, *rank_and_count(), self.taken)
            # A generator of its own, for it draws a number for its workers whenever it begins.
            self.portions = iter(
                DataLoader(
                    pictures, None, num_workers=self.workers, collate_fn=tuple, prefetch_factor=4,
                    generator=torch.Generator(),
                )
            )  # fmt: skip
        portions = [next(self.portions) for _ in range(-(-count // PORTION))]
        self.taken += len(portions)
        images, masks, captions = zip(*portions, strict=True)
        images, masks = (torch.cat(parts).to(self.device) for parts in (images, masks))
        return images, masks, [each for some in captions for each in some]

    def _paint(self, first: int, count: int) -> int:
        image, mask, captions = self._pictures(first, count)
        x_0 = self._encode(image)
        features = self._features(image, x_0, first)
        if not len(self.features):
            self.features = torch.empty(BANK, features.shape[1], dtype=torch.half, device=self.device)
            for learnt in self.module.filters.values():
                if (learnt.deviation == 1).all():  # never told
                    learnt.standardise(features)
        rows = (self.painted + torch.arange(len(image))) % BANK
        self.latents[rows], self.features[rows] = x_0, features.half()
        self.outlines[rows], self.materials[rows] = outlines(mask), materials(image, mask)
        for row, said in zip(rows.tolist(), captions, strict=True):
            self.captions[row] = said
        self.painted += len(image)
        return len(image)

    def batch(self, first: int, count: int) -> Step:
        fresh = max(QUARTET, count // self.reuse // QUARTET * QUARTET)
        if self.workers:  # a GPU encodes many pictures as fast as a few
            fresh, self.steps = 0 if self.steps % self.reuse else count, self.steps + 1
        if not self.painted:
            self.first = first - rank_and_count()[0] * count  # that of process 0
            # These also set what the filters take for the mean and the deviation of a feature.
            fresh = BEGUN
        if fresh:
            fresh = self._paint(first, fresh)
        new = (self.painted - fresh + torch.arange(min(fresh, count))) % BANK
        old = torch.randint(0, min(self.painted, BANK), (count - len(new),), generator=self.generator)
        rows = torch.cat([new, old])[torch.randperm(count, generator=self.generator)]
        return self._step(rows, torch.rand(count, 2, generator=self.generator).tolist())

    def _step(self, rows: Tensor, u: list[list[float]]) -> Step:
        count = len(rows)
        shape, appearance, both = (max(1, round(count * share)) for share in self.shares)
        plain = count - shape - appearance - both
        kinds = [0] * plain + [1] * shape + [2] * appearance + [3] * both
        prompts = [
            "" if not kind and drop < CAPTION_DROPOUT else draw_caption(self.captions[row][kind], pick)
            for row, kind, (drop, pick) in zip(rows.tolist(), kinds, u, strict=True)
        ]
        m = torch.cat([rows[plain : plain + shape], rows[count - both :]])
        a = rows[plain + shape :]
        told = torch.randint(0, min(self.painted, BANK), (PROBED,), generator=self.generator)
        return Step(
            x_0=self.latents[rows],
            prompts=prompts,
            shape=shape,
            appearance=appearance,
            both=both,
            shape_from=self.features[m ^ self.partners[0]].float(),
            appearance_from=self.features[a ^ self.partners[1]].float(),
            told_from=self.features[told].float(),
            outline=self.outlines[told],
            material=self.materials[told],
        )

    def evaluate(self) -> dict[str, float]:
        """The mean squared error on fixed pictures, noise and timesteps: comparable along the run.

        `mse`, `mse_noisy`: under plain captions, over all timesteps and over the noisier half; `shape`,
        `appearance`: under captions whose pseudo-word the filter read off another picture; all of the latent
        channels that were not added, and `_added` of those that were.
        """
        x_0, captions = self.fixed
        errors = self._errors(x_0, self.backbone.encode_prompt(captions))
        error, added = errors[:, : self.module.old].mean(1), errors[:, self.module.old :]
        noisy = error[len(error) // 2 :]
        scores = {"mse": float(error.mean()), "mse_noisy": float(noisy.mean())}
        if added.numel():
            scores["mse_added"] = float(added.mean())
        b = quartets(self.unseen, torch.arange(1 << 20, (1 << 20) + 256, device=self.device))
        x_0 = self._encode(b.image)
        read = self._features(b.image, x_0, 0)
        rows, said = torch.arange(len(x_0)), pair_captions(b)
        for kind, (name, turned) in enumerate((("shape", SAME_SHAPE), ("appearance", SAME_APPEARANCE)), 1):
            attribute = ATTRIBUTES[name]
            v = self.module.filters[name](read[rows ^ turned], self.backbone.word_embedding(attribute.word))
            prompts = [captions[kind][0] for captions in said]
            errors = self._errors(x_0, self.backbone.encode_prompt(prompts, {attribute.token: v.float()}))
            scores[name] = float(errors[:, : self.module.old].mean())
            if added.numel():
                scores[f"{name}_added"] = float(errors[:, self.module.old :].mean())
        return {name: round(score, 5) for name, score in scores.items()}

    def _errors(self, x_0: Tensor, text: Tensor) -> Tensor:
        """Squared error (N, C) of fixed noise at timesteps spread evenly over the schedule."""
        scheduler = self.module.scheduler
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
        t = torch.linspace(0, 999, len(x_0)).round().long().to(x_0.device)
        x_t, target = scheduler.add_noise(x_0, noise, t), target_of(scheduler, x_0, noise, t)
        # forward: a compiled UNet would be compiled again for this batch
        predicted = [
            self.module.unet.forward(x_t[k], t[k], text[k]).sample for k in torch.arange(len(x_0)).split(64)
        ]
        return (torch.cat(predicted).float() - target).square().mean((2, 3))

    def sample(self, text: Tensor) -> Tensor:
        """Images (N, 3, 64, 64) in [-1, 1] under text (N, L, D): 15 steps of DDIM, guidance 4, seed 0.

        Not by `ESCDPipeline`, which would compile a compiled UNet again for another batch.
        """
        scheduler = make_scheduler()
        scheduler.set_timesteps(15)
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(len(text), *self.backbone.latent_shape, generator=noise).to(self.device)
        text = torch.cat([text, self.backbone.encode_prompt([""]).expand(len(text), -1, -1)])
        for t in scheduler.timesteps:
            conditional, unconditional = self.module.unet.forward(torch.cat([x, x]), t, text).sample.chunk(2)
            x = scheduler.step(unconditional + 4.0 * (conditional - unconditional), t, x).prev_sample
        return self.backbone.decode_latents(x)

    def grid(self, path: Path) -> None:
        """Rows: prompts with names; references; their shapes and their appearances at zero steps."""
        prompts = [
            f"a {SHAPES[k % 12]} shape with {PATTERNS[k % 6]} {COLOURS[k % 8]}"
            f"{'' if k % 6 == 0 else ' and ' + COLOURS[(k + 3) % 8]} appearance "
            f"on a {BACKGROUNDS[k % 4]} background"
            for k in range(12)
        ]
        images = [self.sample(self.backbone.encode_prompt(prompts))]
        references = World(seed=9014, named_shapes=0.0, named_appearances=0.0, device=self.device)
        image = references.batch(range(12)).image
        read = self._features(image, self._encode(image), 0)
        asked = {
            "shape": [
                f"a *m shape with solid {COLOURS[k % 8]} appearance on a pink background" for k in range(12)
            ],
            "appearance": [f"a {SHAPES[k]} shape with *a appearance on a gray background" for k in range(12)],
        }
        images += [image]
        for name, attribute in ATTRIBUTES.items():
            v = self.module.filters[name](read, self.backbone.word_embedding(attribute.word)).float()
            images += [self.sample(self.backbone.encode_prompt(asked[name], {attribute.token: v}))]
        save_image(torch.cat(images) * 0.5 + 0.5, path, nrow=12)

    def export(self, folder: Path) -> None:
        unet = make_unet(self.module.unet.config.in_channels)
        unet.load_state_dict(self.module.unet.state_dict())
        unet.half().save_pretrained(folder / "unet")
        make_scheduler().save_pretrained(folder / "scheduler")
        self.module.export(folder)
