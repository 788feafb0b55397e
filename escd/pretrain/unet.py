"""Stage 4 of pretraining: the UNet of `mini` and the attribute filters, with frozen towers (Eq. 2).

Captions name twelve outlines and six patterns. A UNet trained on captions alone cannot use a pseudo-word for
a thirteenth. So part of every batch is cross-image pairs: a filter reads a reference that shares only its
shape (or only its appearance) with the image to be denoised, the pseudo-word stands in the caption, and UNet
and filters learn from the same error, as E4T's encoder and weight offsets do (Gal et al. 2023).
"""

from __future__ import annotations

import json
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

from ..backbone.diffusion import noised, squared_error
from ..backbone.image_tower import ImageTower
from ..backbone.model import Backbone
from ..data.captions import draw_caption
from ..data.names import BACKGROUNDS, COLOURS, PATTERNS, SHAPES
from ..data.world import World
from ..method.attributes import ATTRIBUTES
from ..method.encoder import extract_features
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
from .wrong_channels import WrongChannels

PROMPT_DROPOUT = 0.1
# Keys of the training record and of the stage's state.
OLD_CHANNELS, TEACHER = "old_channels", "teacher"
# How often each latent is used, with new noise, timestep and caption: on a CPU, encoding an image costs a
# fifth of a training step.
REUSE = {"cpu": 4, "cuda": 4, "mps": 2}
# Images kept for reuse, and rendered before the first step; multiples of QUARTET.
BANK, BEGUN = 8_192, 512
# Held-out images that the error is measured on (pseudo-words: half as many), and steps of a sampled image.
HELD_OUT, SAMPLER_STEPS = 512, 15
RINGS = ("latents", "outlines", "materials", "features")  # ring buffers with a row for each of these images
# Shares of images whose shape, and whose appearance, has a name: these teach the prompt's words, the others
# teach the UNet to draw what has no name, as a person's reference. Patterns take longer than outlines.
NAMED_SHAPES, NAMED_APPEARANCES = 0.3, 0.65
# Shares of a batch whose caption holds "*m", "*a", and both; the rest has plain captions.
WITH_SHAPE, WITH_APPEARANCE, WITH_BOTH = 0.3125, 0.1875, 0.125


class UNetStage:
    """Trains the UNet beside the autoencoder, text tower and image tower in `folder`, and its filters.

    teacher: weights before the UNet grew, for further training (`load`, `escd.pretrain.wrong_channels`).
    """

    name = "unet"
    loop = LoopConfig(
        images=420_000, batch_size=64, learning_rate=8e-4, warmup=0.015, decay=0.8, ema_decay=0.999
    )

    # `partners`: where in its quartet the reference for "*m" and for "*a" lies, relative to the image.
    shares = (WITH_SHAPE, WITH_APPEARANCE, WITH_BOTH)
    partners = (SAME_SHAPE, SAME_APPEARANCE)

    def __init__(self, device: torch.device, folder: Path, teacher: Path | None = None) -> None:
        self.device = device
        self.teacher = teacher
        torch.manual_seed(13)
        channels = AutoencoderKL.load_config(folder / "vae")["latent_channels"]
        self.module = DiffusionLoss(lambda unet: self._frozen(folder, unet), channels)
        self.backbone = self.module.backbone
        # Compiling gains nothing where a CUDA graph is used.
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
        # The ring buffers, filled by `_paint`.
        self.latents = torch.empty(BANK, *self.backbone.latent_shape, device=device)
        self.outlines = torch.empty(BANK, OUTLINE**2, device=device)
        self.materials = torch.empty(BANK, MATERIAL, device=device)
        self.features = torch.empty(0)
        self.captions: list[tuple[list[str], ...]] = [()] * BANK
        self.painted = self.steps = 0
        self.unseen = World(seed=9013, device=device)
        b = self.unseen.batch(range(HELD_OUT))
        self.fixed = (self._encode(b.image), [c[0] for c in b.captions])

    def _frozen(self, folder: Path, unet: UNet2DConditionModel) -> Backbone:
        """A backbone with the UNet in training; its other networks are frozen."""
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
        """Take an exported UNet and its filters; the UNet grows to the autoencoder's latent channels.

        Its own channels are the old ones; those of a grown UNet are in the record beside it (`facts`).
        Raises ValueError for a teacher that does not fit.
        """
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        old, channels = unet.config.in_channels, self.module.unet.config.in_channels
        if old < channels:
            unet = grow_unet(unet, channels)
        else:
            record = json.loads((folder / "training.json").read_text())[self.name]
            old = record.get(OLD_CHANNELS, old)
        self.module.unet.load_state_dict(unet.state_dict())
        self.module.set_old_channels(old)
        if self.teacher:
            self.module.set_wrong_channels(WrongChannels(self.teacher, self.device))
        self.module.load(folder)

    def muon_parameters(self) -> list[torch.nn.Parameter]:
        """The UNet's parameters without its first and last convolution."""
        outer = ("conv_in.", "conv_out.")
        return [p for name, p in self.module.unet.named_parameters() if not name.startswith(outer)]

    def facts(self) -> dict[str, Any]:
        """Of a grown UNet: the number of latent channels that were not added, and its teacher's sha256."""
        old, teacher = self.module.old_channels, self._teacher_sha256()
        facts: dict[str, Any] = {OLD_CHANNELS: old} if old < self.module.unet.config.in_channels else {}
        return facts | ({TEACHER: teacher} if teacher else {})

    def _teacher_sha256(self) -> str | None:
        return self.module.wrong_channels.sha256 if self.module.wrong_channels else None

    def state_dict(self) -> dict[str, Any]:
        """The ring buffers, their captions, the counts of rendered images and the random generator."""
        filled = min(self.painted, BANK)
        rings = {name: getattr(self, name)[:filled].clone() for name in RINGS}
        counts = {name: getattr(self, name) for name in ("painted", "steps", "first", "taken")}
        return {
            **rings, **counts, "captions": self.captions[:filled], "generator": self.generator.get_state(),
            OLD_CHANNELS: self.module.old_channels,
            TEACHER: self._teacher_sha256(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; ValueError where it has another teacher than this stage."""
        if state.get(TEACHER) != self._teacher_sha256():
            raise ValueError("this run was begun with another teacher, or with none: name the same --teacher")
        self.module.set_old_channels(state[OLD_CHANNELS])
        for name in ("painted", "steps", "first", "taken"):
            setattr(self, name, state[name])
        filled, width = state["features"].shape[0], state["features"].shape[1:]
        if filled:
            self.features = torch.empty(BANK, *width, dtype=torch.half, device=self.device)
        for name in RINGS:
            getattr(self, name)[:filled] = state[name].to(self.device)
        self.captions[:filled] = state["captions"]
        self.generator.set_state(state["generator"])
        self.portions = None  # workers restart after `taken` portions

    def _pictures(self, first: int, count: int) -> tuple[Tensor, Tensor, list[tuple[list[str], ...]]]:
        """New images (N, 3, S, S), their masks (N, 1, S, S) and captions.

        On a CPU: numbers `first` ... `first` + `count` - 1. For a GPU, workers render portions in advance,
        from the training's first image on, and `count` is rounded up to whole portions.
        """
        if not self.workers:
            b = quartets(self.world, torch.arange(first, first + count))
            return b.image.to(self.device), b.mask.to(self.device), pair_captions(b)
        if self.portions is None:
            pictures = Pictures(self.world, self.first, *rank_and_count(), self.taken)
            # The loader draws a seed for its workers: not from the generator that training draws from.
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
        """Put new images into the ring buffers, over the oldest ones; returns how many."""
        image, mask, captions = self._pictures(first, count)
        x_0 = self._encode(image)
        features = self._features(image, x_0, first)
        if not len(self.features):
            self.features = torch.empty(BANK, features.shape[1], dtype=torch.half, device=self.device)
            for learnt in self.module.filters.values():
                if (learnt.deviation == 1).all():  # not standardised yet
                    learnt.standardise(features)
        rows = (self.painted + torch.arange(len(image))) % BANK
        self.latents[rows], self.features[rows] = x_0, features.half()
        self.outlines[rows], self.materials[rows] = outlines(mask), materials(image, mask)
        for row, of_image in zip(rows.tolist(), captions, strict=True):
            self.captions[row] = of_image
        self.painted += len(image)
        return len(image)

    def batch(self, first: int, count: int) -> Step:
        """A batch from the ring buffers: some new images, the others drawn at random."""
        fresh = max(QUARTET, count // self.reuse // QUARTET * QUARTET)
        if self.workers:  # a GPU encodes a large batch as fast as a small one
            fresh, self.steps = 0 if self.steps % self.reuse else count, self.steps + 1
        if not self.painted:
            self.first = first - rank_and_count()[0] * count  # that of process 0
            fresh = BEGUN  # also gives the filters the mean and deviation of each feature
        if fresh:
            fresh = self._paint(first, fresh)
        new = (self.painted - fresh + torch.arange(min(fresh, count))) % BANK
        old = torch.randint(0, min(self.painted, BANK), (count - len(new),), generator=self.generator)
        rows = torch.cat([new, old])[torch.randperm(count, generator=self.generator)]
        return self._step(rows, torch.rand(count, 2, generator=self.generator).tolist())

    def _step(self, rows: Tensor, u: list[list[float]]) -> Step:
        """The batch of these rows of the ring buffers; u: random numbers (N, 2) for dropout and captions."""
        count = len(rows)
        shape, appearance, both = (max(1, round(count * share)) for share in self.shares)
        plain = count - shape - appearance - both
        kinds = [0] * plain + [1] * shape + [2] * appearance + [3] * both
        prompts = [
            "" if not kind and drop < PROMPT_DROPOUT else draw_caption(self.captions[row][kind], pick)
            for row, kind, (drop, pick) in zip(rows.tolist(), kinds, u, strict=True)
        ]
        m = torch.cat([rows[plain : plain + shape], rows[count - both :]])
        a = rows[plain + shape :]
        probed = torch.randint(0, min(self.painted, BANK), (PROBED,), generator=self.generator)
        return Step(
            x_0=self.latents[rows],
            prompts=prompts,
            shape=shape,
            appearance=appearance,
            both=both,
            shape_ref=self.features[m ^ self.partners[0]].float(),
            appearance_ref=self.features[a ^ self.partners[1]].float(),
            probe_ref=self.features[probed].float(),
            outline=self.outlines[probed],
            material=self.materials[probed],
        )

    def evaluate(self) -> dict[str, float]:
        """Mean squared error on fixed images, noise and timesteps.

        `mse`, `mse_noisy`: plain captions, over all timesteps and over the noisier half; `shape`,
        `appearance`: captions with the pseudo-word of another image. All over the old latent channels; the
        keys that end in `_added` are over the added ones.
        """
        old, (x_0, captions) = self.module.old_channels, self.fixed
        errors = self._errors(x_0, self.backbone.encode_prompt(captions))
        error, added = errors[:, :old].mean(1), errors[:, old:]
        noisy = error[len(error) // 2 :]
        scores = {"mse": float(error.mean()), "mse_noisy": float(noisy.mean())}
        if added.numel():
            scores["mse_added"] = float(added.mean())
        b = quartets(self.unseen, torch.arange(1 << 20, (1 << 20) + HELD_OUT // 2, device=self.device))
        x_0 = self._encode(b.image)
        read = self._features(b.image, x_0, 0)
        rows, by_image = torch.arange(len(x_0)), pair_captions(b)
        for kind, (name, turned) in enumerate((("shape", SAME_SHAPE), ("appearance", SAME_APPEARANCE)), 1):
            attribute = ATTRIBUTES[name]
            v = self.module.filters[name](read[rows ^ turned], self.backbone.word_embedding(attribute.word))
            prompts = [captions[kind][0] for captions in by_image]
            errors = self._errors(x_0, self.backbone.encode_prompt(prompts, {attribute.token: v.float()}))
            scores[name] = float(errors[:, :old].mean())
            if added.numel():
                scores[f"{name}_added"] = float(errors[:, old:].mean())
        return {name: round(score, 5) for name, score in scores.items()}

    def _errors(self, x_0: Tensor, text: Tensor) -> Tensor:
        """Squared error (N, C) with fixed noise, at timesteps spread evenly over the schedule."""
        scheduler = self.module.scheduler
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
        t = torch.linspace(0, 999, len(x_0)).round().long().to(x_0.device)
        x_t, target = noised(scheduler, x_0, noise, t)
        # `forward` is not compiled: this batch size would compile a compiled UNet again
        predicted = [
            self.module.unet.forward(x_t[k], t[k], text[k]).sample for k in torch.arange(len(x_0)).split(64)
        ]
        return squared_error(torch.cat(predicted), target).mean((2, 3))

    def sample(self, text: Tensor) -> Tensor:
        """Images (N, 3, 64, 64) in [-1, 1] for text (N, L, D), from DDIM with guidance 4 and seed 0.

        Without `ESCDPipeline`, whose batch size would compile a compiled UNet again.
        """
        scheduler = make_scheduler()
        scheduler.set_timesteps(SAMPLER_STEPS)
        noise = torch.Generator().manual_seed(0)
        x = torch.randn(len(text), *self.backbone.latent_shape, generator=noise).to(self.device)
        text = torch.cat([text, self.backbone.encode_prompt([""]).expand(len(text), -1, -1)])
        for t in scheduler.timesteps:
            conditional, unconditional = self.module.unet.forward(torch.cat([x, x]), t, text).sample.chunk(2)
            x = scheduler.step(unconditional + 4.0 * (conditional - unconditional), t, x).prev_sample
        return self.backbone.decode_latents(x)

    def grid(self, path: Path) -> None:
        """Rows: named prompts; references; their shapes and their appearances at zero tuning steps."""
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
        """Write UNet and filters in half precision, and the scheduler."""
        unet = make_unet(self.module.unet.config.in_channels)
        unet.load_state_dict(self.module.unet.state_dict())
        unet.half().save_pretrained(folder / "unet")
        make_scheduler().save_pretrained(folder / "scheduler")
        self.module.export(folder)
