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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image
from transformers import CLIPTokenizerFast

from ..backbone import Backbone, ImageTower, draw_noise_levels, target_of
from ..customization import ATTRIBUTES
from ..encoder import extract_features
from ..fusion import AttributeFilter
from ..measure import canonical
from ..world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, Batch, World, captions_of, draw_caption
from .autoencoder import LATENT_CHANNELS
from .loop import LoopConfig
from .towers import WIDTH, load_text_tower

CAPTION_DROPOUT = 0.1
# Encoding a picture costs a fifth of a training step on the CPU; each latent is used about this many times,
# with new noise, a new timestep and a new caption.
REUSE = {"cpu": 4, "cuda": 4, "mps": 2}
BANK, BEGUN = 8_192, 512  # pictures kept for that, and painted before the first step; multiples of QUARTET
RINGS = ("latents", "outlines", "materials", "features")  # what is kept of each of them as a row
PORTION = 128  # pictures that a worker paints for a GPU at a time
# Share of the pictures whose shape, and whose appearance, has a name: only these teach the prompt's words.
# The rest keeps the UNet able to draw what has no name, which is what a person brings. Twelve outlines are
# soon known by name; the patterns come last.
NAMED_SHAPES, NAMED_APPEARANCES = 0.3, 0.65
# Pictures are painted by fours, two shapes in two appearances: each has a partner that shares only its shape
# (its number in the four with the second bit turned) and one that shares only its appearance (the first).
QUARTET, SAME_SHAPE, SAME_APPEARANCE = 4, 2, 1
# Share of a step's pictures under a caption with "*m", with "*a", and with both; the rest has plain captions.
WITH_SHAPE, WITH_APPEARANCE, WITH_BOTH = 0.3125, 0.1875, 0.125
# A pseudo-word must also tell what it stands for, through one linear layer that is thrown away, of so many
# references a step: the filter so learns what to say before the UNet has learnt to read it. That of a shape
# tells the outline, on a grid of OUTLINE cells each way; that of an appearance the colours, in SHADES levels
# of red, green and blue, and how much changes from pixel to pixel, in four directions at ROUGH resolutions.
TOLD, OUTLINE, SHADES, ROUGH = 192, 24, 5, 3
MATERIAL = SHADES**3 + 4 * ROUGH
# Of the log of noise over signal at which the UNet trains: its mean.
NOISE_MEAN = -0.4
# Under "*m" the mean is higher by this: the outline is settled where there is much noise.
NOISIER = 0.8
# For a UNet whose latent channels grew: the new ones are faint, and settle where there is less noise.
GROWN_NOISE_MEAN, GROWN_NOISIER = -0.6, 0.9
# Weight in the loss of each channel that was added; an old one has 1. What a prompt asks for lies in the old.
NEW_WEIGHT = 0.4


def make_unet(latents: int = LATENT_CHANNELS) -> UNet2DConditionModel:
    """SD 1.5's class scaled down: three resolutions (16, 8, 4), cross-attention in every block."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=latents,
        out_channels=latents,
        layers_per_block=1,
        block_out_channels=(64, 128, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


@torch.no_grad()
def grow_unet(unet: UNet2DConditionModel, latents: int) -> UNet2DConditionModel:
    """The UNet with more latent channels, which it neither reads nor predicts yet: the old ones as before.

    Raises ValueError where it has as many already.
    """
    old = unet.config.in_channels
    if not old < latents:
        raise ValueError(f"a UNet of {old} latent channels cannot grow to {latents}")
    wide = make_unet(latents)
    own, start = wide.state_dict(), unet.state_dict()
    own["conv_in.weight"].zero_()[:, :old] = start.pop("conv_in.weight")
    for name in ("conv_out.weight", "conv_out.bias"):
        own[name].zero_()[:old] = start.pop(name)
    wide.load_state_dict(own | start)
    return wide


def make_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule, brought to pure noise at its end, for a UNet that predicts the velocity.

    On 16 x 16 latents SD's last step still shows a picture's mean colour through the noise. A UNet trained so
    reads the background off the starting noise instead of off the prompt: a first one did, and obeyed 7 % of
    the prompts' backgrounds. Without that remainder (Lin et al. 2024, "Common diffusion noise schedules and
    sample steps are flawed") only the prompt tells, and only a UNet that predicts the velocity (Salimans and
    Ho 2022) has something to predict there.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def denoising_error(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDIMScheduler, x_0: Tensor, t: Tensor
) -> Tensor:
    """The squared error (B,) of a UNet at time steps t (B,) of latents x_0 (B, C, h, w) (Eq. 2)."""
    noise = torch.randn_like(x_0)
    predicted = predict(scheduler.add_noise(x_0, noise, t), t).float()
    return (predicted - target_of(scheduler, x_0, noise, t)).square().mean((1, 2, 3))


@dataclass
class Step:
    """One step: latents (N, C, h, w) and prompts, of which the last read pseudo-words.

    In this order: `shape` rows "*m", `appearance` rows "*a", `both` rows the two.

    shape_from, appearance_from: embeds_ref (rows that hold the token, W) of the references. told_from,
    outline, material: embeds_ref (TOLD, W) of more references, and what is to be told of them, (TOLD,
    OUTLINE**2) and (TOLD, MATERIAL).
    """

    x_0: Tensor
    prompts: list[str]
    shape: int
    appearance: int
    both: int
    shape_from: Tensor
    appearance_from: Tensor
    told_from: Tensor
    outline: Tensor
    material: Tensor

    @property
    def plain(self) -> int:
        """Rows without a pseudo-word: the first."""
        return len(self.prompts) - self.shape - self.appearance - self.both


class FiltersInTraining(nn.Module):
    """New filters for a backbone, and the layers through which their pseudo-words must tell what they saw."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.filters = nn.ModuleDict({name: AttributeFilter.for_backbone(backbone) for name in ATTRIBUTES})
        backbone.filters = dict(self.filters)
        told, width = {"shape": OUTLINE**2, "appearance": MATERIAL}, backbone.text_encoder.config.hidden_size
        self.tell = nn.ModuleDict({name: nn.Linear(width, length) for name, length in told.items()})
        self.__dict__["backbone"] = backbone  # frozen, and no part of this module's state

    def told(self, name: str, embeds_ref: Tensor, truth: Tensor) -> Tensor:
        """How badly pseudo-words tell the truth (N, K) of the references' attribute: a mean square."""
        word = self.backbone.word_embedding(ATTRIBUTES[name].word).float()
        v = self.filters[name](embeds_ref, word)
        return F.mse_loss(self.tell[name]((v - word) / word.norm()).float(), truth)

    def load(self, folder: Path) -> None:
        """Take the filters that `export` wrote."""
        for name, learnt in self.filters.items():
            trained = AttributeFilter.from_pretrained(folder / "filters" / name, torch_dtype=torch.float32)
            learnt.load_state_dict(trained.state_dict())

    def export(self, folder: Path) -> None:
        """Write the filters, in half precision, to folder/filters/<attribute>."""
        for name, learnt in self.filters.items():
            # ModelMixin.half() would change the filter being trained.
            copy = AttributeFilter(**{k: v for k, v in learnt.config.items() if not k.startswith("_")})
            copy.load_state_dict(learnt.state_dict())
            copy.half().save_pretrained(folder / "filters" / name)


class DiffusionLoss(FiltersInTraining):
    """Eq. 2 over pictures and captions, some of which hold the pseudo-words of Eq. 5."""

    telling = 1.0  # weight of what the pseudo-words must tell

    def __init__(
        self, backbone: Callable[[UNet2DConditionModel], Backbone], latents: int = LATENT_CHANNELS
    ) -> None:
        unet = make_unet(latents)
        super().__init__(backbone(unet))
        self.unet, self.scheduler = unet, make_scheduler()
        self.means = (NOISE_MEAN, NOISIER)
        self.old = latents  # channels that were not added
        self.__dict__["weights"] = torch.ones(latents)
        self.__dict__["captured"] = {}  # graphs, and no part of this module's state

    def grown(self, old: int) -> None:
        """The latent channels from number `old` on were added: they weigh less, at lower noise."""
        self.means, self.old = (GROWN_NOISE_MEAN, GROWN_NOISIER), old
        self.weights[old:] = NEW_WEIGHT
        self.weights /= self.weights.mean()

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        # a number of rows to each mean
        mean, noisier = self.means
        means = ((step.plain, 0.0), (step.shape, noisier), (step.appearance, 0.0), (step.both, noisier))
        t = torch.cat([draw_noise_levels(self.scheduler, n, mean + more) for n, more in means])
        t, noise = t.to(step.x_0.device), torch.randn_like(step.x_0)
        target = target_of(self.scheduler, step.x_0, noise, t)
        given = (
            self.scheduler.add_noise(step.x_0, noise, t), t, target, self.ids(step), step.shape_from,
            step.appearance_from, step.told_from, step.outline, step.material,
        )  # fmt: skip
        kinds = (step.plain, step.shape, step.appearance, step.both)
        errors, outline, material = self._errors(kinds, given)  # of each channel
        known = errors[:, : self.old].mean(1)
        names = ("plain", "shape", "appearance", "both")
        logs = {name: part.mean() for name, part in zip(names, known.split(kinds), strict=True) if len(part)}
        if self.old < errors.shape[1]:
            logs["added"] = errors[:, self.old :].mean()
        told = {"outline": outline, "material": material}
        error = (errors * self.weights.to(errors)).mean()
        return error + self.telling * sum(told.values()), logs | told

    def _errors(self, kinds: tuple[int, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`Errors`: on one GPU captured once as a graph, and replayed.

        So small a network's step is some thousands of kernels, each sooner done than started.
        """
        if not (given[0].is_cuda and self.training and torch.is_grad_enabled()) or _rank()[1] > 1:
            return Errors(self, kinds)(*given)
        key = (kinds, tuple(x.shape for x in given))
        if key not in self.captured:
            dtype = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False):
                self.captured[key] = torch.cuda.make_graphed_callables(
                    Errors(self, kinds), tuple(x.clone() for x in given), allow_unused_input=True
                )
        return self.captured[key](*given)

    def ids(self, step: Step) -> Tensor:
        """Token ids (N, L) of a step's prompts."""
        tokens = [attribute.token for attribute in ATTRIBUTES.values()]
        return self.backbone.token_ids(step.prompts, tokens).to(step.x_0.device)

    def read(
        self, ids: Tensor, kinds: tuple[int, ...], shape_from: Tensor, appearance_from: Tensor
    ) -> Tensor:
        """Text conditioning (N, L, D) of a step's prompts, by their token ids (N, L).

        kinds: how many are plain, under "*m", under "*a" and under both.
        """
        plain, shape, appearance, _ = kinds
        backbone = self.backbone
        words = {name: backbone.word_embedding(a.word) for name, a in ATTRIBUTES.items()}
        m = self.filters["shape"](shape_from, words["shape"]).float()
        a = self.filters["appearance"](appearance_from, words["appearance"]).float()
        pseudo_words = {
            "*m": torch.cat([m[:shape], m.new_zeros(appearance, WIDTH), m[shape:]]),
            "*a": torch.cat([a.new_zeros(shape, WIDTH), a]),
        }
        text = [backbone.encode_ids(ids[plain:], pseudo_words)]
        if plain:
            with torch.no_grad():
                text.insert(0, backbone.encode_ids(ids[:plain]))
        return torch.cat(text).float()


class Errors(nn.Module):
    """What of a step's loss is tensors alone: what a GPU can replay.

    Takes noised latents (N, C, h, w), timesteps (N,), targets (N, C, h, w), token ids (N, L), and embeds_ref
    and truths as in `Step`; gives the squared errors (N, C) of each channel, and how badly outlines and
    materials are told.
    """

    def __init__(self, loss: DiffusionLoss, kinds: tuple[int, ...]) -> None:
        super().__init__()
        self.unet, self.filters, self.tell = loss.unet, loss.filters, loss.tell
        self.__dict__["loss"] = loss  # its parameters are those above
        self.kinds = kinds

    def forward(
        self, x_t: Tensor, t: Tensor, target: Tensor, ids: Tensor, shape_from: Tensor,
        appearance_from: Tensor, told_from: Tensor, outline: Tensor, material: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        text = self.loss.read(ids, self.kinds, shape_from, appearance_from)
        error = (self.unet(x_t, t, text).sample.float() - target).square().mean((2, 3))
        told = self.loss.told
        return error, told("shape", told_from, outline), told("appearance", told_from, material)


def _rank() -> tuple[int, int]:
    """Which of how many processes this is."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class Pictures(Dataset):
    """The world's pictures from number `first` on, PORTION by PORTION: images, masks and captions.

    Of `several` processes, that of number `rank` has every several-th portion; `taken` of these are left out.
    """

    def __init__(
        self, world: World, first: int, rank: int = 0, several: int = 1, taken: int = 0
    ) -> None:
        self.world, self.first, self.rank, self.several, self.taken = world, first, rank, several, taken

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, list[tuple[list[str], ...]]]:
        first = self.first + ((self.taken + k) * self.several + self.rank) * PORTION
        b = quartets(self.world, first + torch.arange(PORTION))
        return b.image, b.mask, pair_captions(b)


def quartets(world: World, index: Tensor) -> Batch:
    """The pictures with these numbers, by fours: two shapes in two appearances, all else each its own."""
    four, k = (
        index[::QUARTET].repeat_interleave(QUARTET),
        torch.arange(len(index), device=index.device) % QUARTET,
    )
    return world.batch(index, shape=four + (k & SAME_APPEARANCE), appearance=four + (k & SAME_SHAPE))


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
        _, several = _rank()
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
            pictures = Pictures(self.world, self.first, *_rank(), self.taken)
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
            self.first = first - _rank()[0] * count  # that of process 0
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
        told = torch.randint(0, min(self.painted, BANK), (TOLD,), generator=self.generator)
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


def outlines(masks: Tensor) -> Tensor:
    """Silhouettes (N, 1, S, S) centred and at one size, as a grid of coverage (N, OUTLINE**2)."""
    return F.adaptive_avg_pool2d(canonical(masks[:, 0])[:, None], OUTLINE).flatten(1)


def materials(images: Tensor, masks: Tensor) -> Tensor:
    """What of an appearance is to be told, (N, MATERIAL), of images (N, 3, S, S) in [-1, 1] inside masks.

    The square root of a histogram of colours, each pixel shared out among its nearest levels; and the log of
    the mean change of lightness from one pixel to the next, at half the resolution, and so on; each scaled to
    vary about as much as the cells of an outline.
    """
    # the outermost pixels are mixed with the background
    inside = -F.max_pool2d(-(masks > 0.98).float(), 3, 1, 1)
    inside = torch.where(inside.sum((1, 2, 3), keepdim=True) > 0, inside, masks)
    levels = torch.linspace(-1, 1, SHADES, device=images.device)
    near = (1 - (images[..., None] - levels).abs() * (SHADES - 1) / 2).clamp(min=0)  # (N, 3, S, S, SHADES)
    red, green, blue = near.flatten(2, 3).unbind(1)
    counts = torch.einsum("np,npi,npj,npk->nijk", inside.flatten(1), red, green, blue).flatten(1)
    told = [2 * (counts / counts.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()]
    light = images.mean(1, keepdim=True)
    for scale in range(ROUGH):
        if scale:
            light, inside = F.avg_pool2d(light, 2), -F.max_pool2d(-inside, 2)
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            change = (light - light.roll((-down, -right), (2, 3))).abs()
            both = inside * inside.roll((-down, -right), (2, 3))
            mean = (change * both).sum((1, 2, 3)) / both.sum((1, 2, 3)).clamp(min=1)
            told.append(0.4 * (mean + 0.02).log()[:, None])
    return torch.cat(told, 1)


def pair_captions(b: Batch) -> list[tuple[list[str], ...]]:
    """Four lists of captions for each picture: plain, with "*m", with "*a", with both."""
    every = []
    for shape, look, ground, plain in zip(
        b.shape_family, b.appearance_family, b.background_family, b.captions, strict=True
    ):
        named = look if look in PATTERNS else None
        colours = [w for w in plain[0].split() if w in COLOURS] if named else []
        word = shape if shape in SHAPES else "shape"
        every.append((
            plain,
            captions_of("*m", named, colours, ground, "shape"),
            [c for c in captions_of(word, "*a", [], ground, "shape") if "*a" in c],
            [c for c in captions_of("*m", "*a", [], ground, "shape") if "*a" in c],
        ))  # fmt: skip
    return every
