"""Stage 3, attribute-aware finetuning: the one tuning loop (paper, Eq. 6).

ESCDiffusion and every baseline are configurations of it: a part of the UNet (none for textual inversion,
"all" for DreamBooth, "all/attn2" for what Custom Diffusion tunes) and a pseudo-word, learnt from one image.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from scipy import ndimage
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from .attention import MathAttention
from .backbone import Backbone, draw_noise_levels, loss_weight, target_of
from .customization import RECIPES, Attribute, Customization, LowRank, resolve_attribute
from .fusion import pseudo_word
from .halves import down_path, half_of, recomputed, up_path, with_weights
from .images import Source, open_image_and_mask
from .measure import foreground_mask
from .parts import NO_PART, half_named, names_of, parameters_of
from .world import FULL_FORMS, PATTERNS, World, captions_of

# The prompts a reference is shown under name neither its background nor its other attribute: what they
# named, the pseudo-word would be tied to ("{}" is the pseudo-word).
PROMPTS = {
    "shape": ("a {} shape", "a {} shape with appearance appearance", "an object in the shape of {}"),
    "appearance": (
        "a shape shape with {} appearance",
        "a shape with the appearance of {}",
        "an object with {} appearance",
    ),
}

# What changes the matrices and kernels of a part. Muon learns more in as many steps (notebook 3).
# "adamw8bit" is AdamW with its two averages in a byte each (Dettmers et al. 2022), for want of memory.
OPTIMIZERS = ("muon", "adamw", "adamw8bit")
OPTIMIZER = "muon"
SETTLING = {"muon": 0.6, "adamw": 0.2, "adamw8bit": 0.2}  # share of the steps in which the rate falls to zero
# Learning rate and steps for each half of the UNet. The halves differ in size and depth, so one rate for both
# would compare rates, not halves.
RATES = {
    "muon": {
        "shape": {"encoder": 1.2e-2, "decoder": 3e-3, "all": 3e-3},
        "appearance": {"encoder": 1e-3, "decoder": 1e-3, "all": 1e-3},
    },
    "adamw": {
        "shape": {"encoder": 1e-3, "decoder": 5e-4, "all": 5e-4},
        "appearance": {"encoder": 3e-4, "decoder": 3e-4, "all": 2e-4},
    },
}
RATES["adamw8bit"] = RATES["adamw"]
STEPS = {"shape": 160, "appearance": 40}
# Noised views a step. Half the steps of twice the views learn a shape as well, in less time
# (`escd/pretrain/README.md`): a step of Muon's costs the same for any number of views.
BATCH_SIZES = {"shape": 16, "appearance": 8}
# Share of the views in which the other attribute is changed. From the reference as it is, a shape learns some
# of its appearance too.
AUGMENTATION = {"shape": 1.0, "appearance": 0.75}
# The pseudo-word's rate. An outline needs the weights more than the word.
WORD_RATES = {"shape": 1e-4, "appearance": 1e-3}
# How many differently augmented views of the reference there are, and the share of the draws under the empty
# prompt. With more of the first a shape is learnt better; with the second the rest of a prompt is obeyed more
# (trials on an earlier training of `mini`, with AdamW).
VIEWS = {"shape": 192, "appearance": 64}
DROPOUT = {"shape": 0.15, "appearance": 0.0}
# Around which logarithm of noise over signal a shape is learnt: where outlines are settled. Timesteps drawn
# uniformly lie higher, and learn less in as many steps (`escd/pretrain/README.md`). None: uniform timesteps.
NOISE_LEVELS = {"shape": 0.4, "appearance": None}
# Factors of a change start with one of the two at zero, and move the weights less for the same step.
LOW_RANK_RATE = 5.0
LEAST_CROP = 0.8  # of the side of a varied view
# A backbone of Stable Diffusion's size: what DreamBooth, LoRA and textual inversion are commonly run with
# there. None of it was measured by this project. Muon is left out for its arithmetic: some 0.4e12 operations
# for each kernel of 1280 x 11520.
LARGE_RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 1e-5,
    "word_learning_rate": 5e-4,
    "batch_size": 1,
    # The source's recipe: repainted views are drawings of a world that such a backbone does not live in.
    "augmentation": 0.0,
    "varied": True,
}
LARGE_STEPS = {"shape": 400, "appearance": 250}
LARGE_RANK_RATE = 1e-4

LESS_MEMORY = (
    "close what else uses it, load the backbone in half precision (dtype=torch.float16), learn the change at "
    'a rank (rank=16, or --rank 16), lower TuningConfig.batch_size, or take optimizer="adamw8bit", or for an '
    'appearance conditioning="half"'
)

# Who reads the pseudo-word while it is learnt, and where its gradient comes from.
CONDITIONING = ("joint", "half", "cached")


@dataclass(frozen=True)
class TuningConfig:
    """One tuning run; the defaults of an attribute come from `TuningConfig.of`."""

    # Which attribute, by name, and which of the two recipes it follows: "shape" changes what the reference is
    # made of while it learns, "appearance" changes its outline.
    attribute: str
    recipe: str
    # The part of the UNet that learns (`escd.parts`), or "none" for the pseudo-word alone.
    part: str
    # Optimiser steps of `batch_size` noised views of the one image.
    steps: int
    learning_rate: float
    # Of the pseudo-word.
    word_learning_rate: float = 1e-3
    # Of the part's biases and norms, and never more than `learning_rate`; None: the same.
    bias_learning_rate: float | None = None
    # What changes the part's matrices and kernels: "muon" (Jordan et al. 2024), "adamw" or "adamw8bit". AdamW
    # changes all the rest either way.
    optimizer: str = "adamw"
    batch_size: int = 8
    # How many differently augmented views of the reference are encoded, once, before the first step.
    views: int = 64
    # Share of the views in which the other attribute is changed (`views_of`).
    augmentation: float = 0.75
    # Share of the draws under the empty prompt, from which guidance starts.
    dropout: float = 0.0
    # "joint": both halves read the pseudo-word and its gradient comes from both, as in plain tuning. "half":
    # both read it, its gradient comes from the half that is tuned alone, and a frozen encoder runs without
    # gradients. "cached": the encoder reads the attribute's word instead, and what it makes of `draws` noised
    # views is computed once; for parts of the decoder.
    conditioning: str = "joint"
    draws: int = 128
    # None: timesteps are uniform, and a velocity's error weighted (`loss_weight`). A number: the logarithm of
    # noise over signal is normal around it (`draw_noise_levels`), and the error is plain.
    noise_level: float | None = None
    # None: the part's weights learn. A number: what learns is the change of each matrix and kernel as two
    # factors of this rank (LoRA, Hu et al. 2021); biases and norms stay, so that all of it can be exported.
    rank: int | None = None
    # Whether the views that keep a material show it at its own scale (`tiled`), or also enlarged and bent
    # (`reshaped`), which blurs it.
    true_scale: bool = False
    seed: int = 0
    # Whether the views of the reference as it is are mirrored and cropped, and while a shape is learnt
    # recoloured, each its own way.
    varied: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"a recipe is {' or '.join(map(repr, RECIPES))}, not {self.recipe!r}")
        for name in ("steps", "batch_size", "views", "draws", "seed", "rank"):
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is a whole number, not {value!r}")
        if not -(2**63) <= self.seed < 2**64:  # what torch's generators take
            raise ValueError("a seed has at most 64 bits")
        if self.steps < 0:
            raise ValueError(
                f"steps must not be negative, not {self.steps} (0 gives the attribute filter's pseudo-word)"
            )
        if self.batch_size < 1 or self.views < 1 or self.draws < 1:
            raise ValueError("batch_size, views and draws must be at least 1")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"a rank is a whole number from 1 on, not {self.rank}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}")
        if self.optimizer == "muon" and self.rank is not None:
            raise ValueError("Muon is for whole matrices; the factors of a rank learn with optimizer='adamw'")
        if self.conditioning not in CONDITIONING:
            raise ValueError(f"conditioning is {' or '.join(CONDITIONING)}, not {self.conditioning!r}")
        for name in ("learning_rate", "word_learning_rate", "bias_learning_rate"):
            value = getattr(self, name)
            if name == "bias_learning_rate" and value is None:
                continue
            if not (isinstance(value, int | float) and 0 < value <= sys.float_info.max):  # false for NaN too
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        level = self.noise_level
        if level is not None and not (isinstance(level, int | float) and abs(level) <= sys.float_info.max):
            raise ValueError(f"noise_level is None or a finite number, not {level!r}")
        for name in ("true_scale", "varied"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, not {getattr(self, name)!r}")
        for name in ("augmentation", "dropout"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"{name} is a share between 0 and 1, not {value!r}")

    @classmethod
    def of(
        cls,
        attribute: Attribute | str,
        part: str | None = None,
        backbone: Backbone | None = None,
        **changes: object,
    ) -> TuningConfig:
        """The configuration for an attribute, with `changes` of its fields.

        None is a value of `noise_level`, `bias_learning_rate` and `rank`; another field keeps its default at
        None. The attribute's recipe decides how it is learnt, the half that `part` lies in at which rate. A
        `backbone` of Stable Diffusion's size has other defaults (`LARGE_RECIPE`) than `mini`. Raises
        ValueError for an attribute without a recipe, for bad numbers, and for a part the backbone has not.
        """
        attribute = resolve_attribute(attribute)
        may_be_none = {field.name for field in fields(cls) if field.default is None}
        given = {k: v for k, v in changes.items() if v is not None or k in may_be_none}
        recipe = given.get("recipe", attribute.recipe)
        if recipe not in RECIPES:
            raise ValueError(
                f"how is {attribute.name!r} learnt? Its part {attribute.part!r} does not say: pass "
                f"recipe={' or recipe='.join(map(repr, RECIPES))}, to the attribute or here"
            )
        part = attribute.part if part is None else part
        half = _rated_as(part, backbone)
        ranked = given.get("rank") is not None
        optimizer = given.get("optimizer", "adamw" if ranked else OPTIMIZER)
        rate = RATES[optimizer][recipe][half] if optimizer in OPTIMIZERS else 1.0  # refused by its check
        defaults = {
            "attribute": attribute.name,
            "recipe": recipe,
            "part": part,
            "steps": STEPS[recipe],
            "learning_rate": rate * (LOW_RANK_RATE if ranked else 1.0),
            "word_learning_rate": WORD_RATES[recipe],
            # AdamW changes them either way.
            "bias_learning_rate": RATES["adamw"][recipe][half] if optimizer == "muon" else None,
            "optimizer": optimizer,
            "batch_size": BATCH_SIZES[recipe],
            "views": VIEWS[recipe],
            "augmentation": AUGMENTATION[recipe],
            "dropout": DROPOUT[recipe],
            "noise_level": NOISE_LEVELS[recipe],
        }
        if backbone is not None and backbone.large:
            defaults |= LARGE_RECIPE | {"steps": LARGE_STEPS[recipe]}
            defaults |= {"bias_learning_rate": None, "noise_level": None}
            if ranked:
                defaults["learning_rate"] = LARGE_RANK_RATE
            if recipe == "appearance" and half == "decoder":
                # A fifth of the time for the same scores on `mini` (notebook 3, benchmarks/tuning_cost.py).
                defaults["conditioning"] = "half"
        return cls(**defaults | given)


def _rated_as(part: str, backbone: Backbone | None) -> str:
    """The half whose rates a part learns at: that of its parameters, or of its name without a backbone."""
    if backbone is None or part == NO_PART:
        return half_named(part) or "all"
    return half_of(names_of(backbone.unet, part)) or "all"


def recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] with their colours mixed, turned and rescaled, each its own way."""
    n = len(images)
    mix, _ = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator))
    scale = torch.empty(n, 3, 1, 1).uniform_(0.6, 1.4, generator=generator)
    shift = torch.empty(n, 3, 1, 1).uniform_(-0.3, 0.3, generator=generator)
    mixed = torch.einsum("nij,njhw->nihw", mix.to(images), images)
    return (mixed * scale.to(images) + shift.to(images)).clamp(-1, 1)


def reshaped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, H, W), each turned, mirrored, stretched, enlarged and bent."""
    n, h, w = len(images), *images.shape[-2:]
    u = torch.rand(n, 6, generator=generator)
    angle, zoom = (u[:, 0] - 0.5) * 1.0, 0.45 + 0.6 * u[:, 1]  # zoom < 1 enlarges
    stretch = torch.exp((u[:, 2] - 0.5) * 0.5)
    mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * stretch * mirror, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom * mirror, angle.cos() * zoom / stretch
    theta[:, :, 2] = (u[:, 4:6] - 0.5) * (1 - zoom).clamp(min=0.2)[:, None]
    bend = F.interpolate(
        (torch.rand(n, 2, 4, 4, generator=generator) - 0.5) * 0.35,
        size=(h, w),
        mode="bicubic",
        align_corners=True,
    )
    grid = F.affine_grid(theta, [n, 3, h, w], align_corners=False) + bend.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid.to(images), padding_mode="reflection", align_corners=False)


def tiled(image: Tensor, inside: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Frames (N, 3, H, W) full of the material of an image (3, H, W), pixel by pixel as it is there.

    The largest rectangle within the silhouette `inside` (1, H, W) is repeated, mirrored at its edges, from a
    random offset on. Nothing is interpolated: a material's finest detail is its texture.
    """
    h, w = image.shape[-2:]
    top, left, high, wide = _largest_rectangle(inside[0].cpu().numpy() > 0.5)
    offset = torch.rand(count, 2, generator=generator)

    def mirrored(length: int, size: int, share: Tensor) -> Tensor:
        """Indices (N, length) that run to and fro over `size` pixels."""
        at = (torch.arange(length) + (share * 2 * size).long()[:, None]) % (2 * size)
        return torch.where(at < size, at, 2 * size - 1 - at)

    y, x = top + mirrored(h, high, offset[:, 0]), left + mirrored(w, wide, offset[:, 1])
    return image[:, y[:, :, None], x[:, None, :]].transpose(0, 1)


def _largest_rectangle(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the rectangle within a mask (H, W) with the largest shorter side.

    Of those the largest. The outermost pixels of the mask are mixed with the background, and left out where
    enough is left.
    """
    inner = ndimage.binary_erosion(mask)
    inner = inner if inner.sum() > 0.25 * mask.sum() else mask
    high, wide = inner.shape
    total = np.zeros((high + 1, wide + 1), int)
    total[1:, 1:] = inner.cumsum(0).cumsum(1)

    def places(h: int, w: int) -> np.ndarray:
        """Where a rectangle of this size lies within."""
        held = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
        return np.argwhere(held == h * w)

    side = max(k for k in range(1, min(high, wide) + 1) if len(places(k, k)))
    best = (side, side)
    for grown in range(side + 1, max(high, wide) + 1):
        sizes = [size for size in ((grown, side), (side, grown)) if size[0] <= high and size[1] <= wide]
        fits = [size for size in sizes if len(places(*size))]
        if not fits:
            break
        best = fits[0]
    found = places(*best)
    top, left = found[len(found) // 2]
    return int(top), int(left), *best


def varied(images: Tensor, weights: Tensor, recipe: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Views (N, 3, H, W) and their weights (N, 1, H, W), each mirrored and cropped; for a shape recoloured.

    A crop is a square of at least `LEAST_CROP` of the side, brought back to the side.
    """
    n = len(images)
    u = torch.rand(n, 4, generator=generator)
    zoom = LEAST_CROP + (1 - LEAST_CROP) * u[:, 0]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(u[:, 1] < 0.5, -zoom, zoom), zoom
    theta[:, :, 2] = (2 * u[:, 2:] - 1) * (1 - zoom)[:, None]
    both = torch.cat([images, weights], 1)
    grid = F.affine_grid(theta, list(both.shape), align_corners=False).to(both)
    both = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images, weights = both[:, :-1], both[:, -1:]
    return (recoloured(images, generator) if recipe == "shape" else images), weights


def repainted(
    image: Tensor, inside: Tensor, recipe: str, count: int, seed: int, true_scale: bool = False
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Images (N, 3, H, W) that keep one attribute of a reference (3, H, W), and prompts that say the rest.

    For a shape, the silhouette `inside` (1, H, W) is filled with the named patterns and colours of the world
    and set on its backgrounds; for an appearance, the world's named shapes are filled with what the reference
    holds inside its silhouette, turned, stretched and bent, or at its own scale (`tiled`). "{}" in a prompt
    is the pseudo-word. What a prompt says the pseudo-word need not, so that it is left with its own
    attribute: the cross-image supervision of the attribute filters, made from the one image there is.
    """
    world, index = World(seed, named_shapes=1.0, named_appearances=1.0), torch.arange(count)
    size = image.shape[-2:]

    def scaled(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", antialias=True).to(image)

    ground, _, grounds = world.backgrounds(index)
    if recipe == "shape":
        texture, pattern, _, colours, _ = world.textures(index)
        # Coverage at the edge is lost with a mask that was found: a pixel's softness stands for it.
        cover = F.avg_pool2d(F.pad(inside.expand(count, -1, -1, -1), (1,) * 4, mode="replicate"), 3, 1)
        painted = scaled(texture) * 2 - 1
        said = [("{}", PATTERNS[k], c) for k, c in zip(pattern.tolist(), colours, strict=True)]
    else:
        mask, names = world.masks(index)
        cover = scaled(mask)
        generator = torch.Generator().manual_seed(seed)
        if true_scale:
            painted = tiled(image, inside, count, generator)
        else:
            painted = reshaped(_filled(image, inside).expand(count, -1, -1, -1), generator)
        said = [(name, "{}", []) for name in names]
    images = painted * cover + (scaled(ground) * 2 - 1) * (1 - cover)
    return images.clamp(-1, 1), [
        tuple(captions_of(shape, look, words, ground, "shape")[:FULL_FORMS])
        for (shape, look, words), ground in zip(said, grounds, strict=True)
    ]


def _filled(image: Tensor, inside: Tensor) -> Tensor:
    """The image (3, H, W) with its silhouette's nearest pixel wherever `inside` (1, H, W) is not."""
    mask = inside[0].cpu().numpy() > 0.5
    inner = ndimage.binary_erosion(mask)  # the outermost pixels are mixed with the background
    inner = inner if inner.sum() > 0.25 * mask.sum() else mask
    y, x = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    return image[:, torch.from_numpy(y).long(), torch.from_numpy(x).long()]


def views_of(
    image: Tensor, mask: Tensor | None, config: TuningConfig
) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """Views (V, 3, H, W) of a reference (3, H, W), the weight (V, 1, H, W) of their loss, and their prompts.

    A share `config.augmentation` of the views has the other attribute changed, the rest is the reference as
    it is, under prompts that name neither its background nor its other attribute. Where the silhouette is
    known, from `mask` (1, H, W) or because the object stands on a plain background, the changed views are
    `repainted`, and their prompts say with what. Where it is not, the whole frame is the reference: an
    appearance is repainted from all of it, and while a shape is learnt only the colours change. With
    `config.varied` the reference as it is comes mirrored, cropped and, for a shape, recoloured (`varied`).
    """
    generator = torch.Generator().manual_seed(config.seed)
    count = config.views
    images = image.expand(count, -1, -1, -1)
    weights = (torch.ones_like(image[:1]) if mask is None else mask.to(image)).expand(count, -1, -1, -1)
    chosen = torch.rand(count, generator=generator) < config.augmentation
    changed = chosen.to(image.device)[:, None, None, None]
    prompts = [PROMPTS[config.recipe]] * count
    if config.varied:
        images, weights = varied(images, weights, config.recipe, generator)
    if not chosen.any():
        return images, weights, prompts
    if mask is None:
        found, failed = foreground_mask(image[None])
        inside = torch.ones_like(image[:1]) if failed[0] else found.float().view_as(image[:1])
        known = not failed[0] or config.recipe == "appearance"
    else:
        inside, known = (mask > 0.5).float().view_as(image[:1]), True
    if not known:
        return torch.where(changed, recoloured(images, generator), images), weights, prompts
    others, said = repainted(
        image, inside.to(image), config.recipe, count, config.seed, config.true_scale
    )
    prompts = [new if use else old for new, old, use in zip(said, prompts, chosen.tolist(), strict=True)]
    return torch.where(changed, others, images), torch.where(changed, 1.0, weights), prompts


def _warn_without_silhouette(picture: Tensor, recipe: str) -> None:
    """Warn where a picture (3, H, W) has no silhouette that can be found: its whole frame is learnt."""
    if foreground_mask(picture[None])[1][0]:
        warnings.warn(
            "no silhouette was found in the picture: its background is not plain, or nothing stands off it. "
            f"The whole frame is learnt as the {recipe}. Where only a part of it is meant, pass mask= "
            "(--mask), white on the subject, or a picture with the subject cut out on transparency",
            stacklevel=3,
        )


@torch.inference_mode(False)
@torch.enable_grad()
def customize(
    image: Source,
    attribute: Attribute | str,
    backbone: Backbone,
    *,
    steps: int | None = None,
    seed: int | None = None,
    learning_rate: float | None = None,
    part: str | None = None,
    rank: int | None = None,
    mask: Source | None = None,
    callback: Callable[[int, float], bool | None] | None = None,
    progress: bool = True,
    checkpointing: bool | None = None,
    config: TuningConfig | None = None,
    keep_interrupted: bool = True,
) -> Customization:
    """Learn one attribute of one image: a pseudo-word, and the change of one part of the UNet (paper, Eq. 6).

    image: a path, a PIL image, or a tensor (3, H, W) in [-1, 1]; the whole frame is the reference, padded
    to a square as `escd.images` says, unless `mask` (white on the subject) or the image's own
    transparency confines the loss; without them, a picture in which no silhouette is found gives a
    warning. attribute: "shape", "appearance", or an `Attribute` of your own. None takes the attribute's
    default for steps, learning_rate and part, and 0 for the seed. steps: 0 gives the attribute filter's
    pseudo-word, untuned. part: what learns, by default the attribute's own half; "none" tunes the pseudo-
    word alone. rank: learn the change at this rank, for a small file that can be exported whole; None
    learns it in full. callback(step, loss) is called after each step and ends the tuning early by
    returning True. Ctrl-C ends it too, and what was learnt until then is returned; with
    keep_interrupted=False the interrupt goes on to the caller, as it must where the result counts as one
    of all its steps. checkpointing: compute the UNet's inner results again on the way back instead of
    keeping them (Chen et al. 2016): the same result for a fraction of the memory and about a third more
    time; None does so where a GPU's memory would not do otherwise (`escd.cost`). config: all of these
    numbers at once, from `TuningConfig.of`. The backbone itself is not changed.

    Raises ValueError or TypeError for an unknown attribute or part, for bad numbers and for a number that
    contradicts `config`, ImportError for "adamw8bit" without bitsandbytes, and what `open_image` raises.
    """
    attribute = resolve_attribute(attribute)
    numbers = {"steps": steps, "seed": seed, "learning_rate": learning_rate, "rank": rank}
    if config is None:
        config = TuningConfig.of(attribute, part, backbone, **numbers)
    else:
        _require_agreement(config, attribute, numbers | {"part": part})
    trained = {} if config.part == NO_PART else parameters_of(backbone.unet, config.part)
    halves = _HALVES[config.conditioning]
    if halves and half_of(list(trained)) not in halves:
        raise ValueError(
            f"conditioning {config.conditioning!r} is for a part of the {' or the '.join(halves)} alone, "
            f"not for {config.part!r}"
        )
    backbone.word_embedding(attribute.word)  # an unusable word is refused before the work
    picture, inside = open_image_and_mask(image, backbone.image_size, mask)
    if inside is None and config.steps:
        _warn_without_silhouette(picture, config.recipe)
    v = (
        pseudo_word(backbone, picture[None].to(backbone.device), attribute, seed=config.seed)[0]
        .float()
        .clone()
        .requires_grad_()
    )
    change = _Change(trained) if config.rank is None else _Factors(trained, config.rank, config.seed)
    losses: list[float] = []
    if config.steps:
        if checkpointing is None:
            from .cost import needs_checkpointing  # which knows what tuning is

            checkpointing = needs_checkpointing(backbone, config)
        network = working_copy(backbone.unet, change.before, checkpointing)
        try:
            _tune(
                backbone, network, attribute, config, picture, inside, v, change, losses, callback, progress,
                keep_interrupted,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the GPU's memory is full: {LESS_MEMORY}") from error
    delta = change.delta() if losses else {}
    return Customization(
        attribute=attribute,
        pseudo_word=v.detach().cpu(),
        delta=delta,
        part=config.part,
        backbone_identity=backbone.identity_without_filters,
        backbone_name=backbone.name,
        steps=len(losses),
        seed=config.seed,
        config=asdict(config),
        losses=losses,
    )


def _require_agreement(config: TuningConfig, attribute: Attribute, said: dict[str, object]) -> None:
    """Raise ValueError where a call says one thing and the configuration beside it another."""
    if config.attribute != attribute.name:
        raise ValueError(f"the configuration is for {config.attribute!r}, not for {attribute.name!r}")
    for name, value in said.items():
        if value is not None and value != getattr(config, name):
            raise ValueError(
                f"{name}={value!r} contradicts the configuration, which says {getattr(config, name)!r}: "
                f"say it there, dataclasses.replace(config, {name}={value!r})"
            )


class _Change:
    """What learns of a part of the UNet: its weights, in float32, a kernel as a matrix of its filters."""

    def __init__(self, trained: dict[str, nn.Parameter]) -> None:
        self.before = trained
        self.learning = {
            name: (p.flatten(1) if p.ndim > 1 else p).detach().float().clone().requires_grad_()
            for name, p in trained.items()
        }

    def parameters(self) -> list[Tensor]:
        return list(self.learning.values())

    def weights(self) -> dict[str, Tensor]:
        """The part's weights as they are now, by name."""
        return {name: w.view_as(self.before[name]) for name, w in self.learning.items()}

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor | LowRank]:
        """What was learnt, as a customization holds it."""
        return {n: (w - self.before[n].float()).half().cpu() for n, w in self.weights().items()}


class _Factors(_Change):
    """The change of each matrix and kernel as two factors; biases and norms stay as they are."""

    def __init__(self, trained: dict[str, nn.Parameter], rank: int, seed: int) -> None:
        self.before = {name: p for name, p in trained.items() if p.ndim > 1}
        self.learning = {}
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.before.items():
            small = min(rank, p.shape[0], p[0].numel())
            bound = p[0].numel() ** -0.5  # as peft's LoRA starts
            down = torch.empty(small, *p.shape[1:]).uniform_(-bound, bound, generator=generator)
            self.learning[name] = (
                torch.zeros(p.shape[0], small, device=p.device).requires_grad_(),
                down.to(p.device).requires_grad_(),
            )

    def parameters(self) -> list[Tensor]:
        return [factor for pair in self.learning.values() for factor in pair]

    def weights(self) -> dict[str, Tensor]:
        return {n: self.before[n].float() + LowRank(*pair).float() for n, pair in self.learning.items()}

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor | LowRank]:
        return {n: LowRank(*(f.half().cpu() for f in pair)) for n, pair in self.learning.items()}


def _optimizers(
    v: Tensor, change: _Change, config: TuningConfig, fused: bool = False
) -> list[torch.optim.Optimizer]:
    """What changes the pseudo-word, and the part's matrices and its biases and norms, each at its rate.

    fused: AdamW's arithmetic in one go over each weight, which large ones need (`benchmarks/tuning_cost.py`).
    """
    matrices = [w for w in change.parameters() if w.ndim > 1]
    vectors = [w for w in change.parameters() if w.ndim < 2]
    muon = config.optimizer == "muon" and matrices
    slower = min(config.bias_learning_rate or config.learning_rate, config.learning_rate)
    groups = [
        {"params": [v], "lr": config.word_learning_rate},
        {"params": vectors, "lr": slower},
        {"params": [] if muon else matrices, "lr": config.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    if config.optimizer == "adamw8bit":
        optimizers = [_eight_bit()(groups, **settings)]
    else:
        optimizers = [torch.optim.AdamW(groups, **settings, fused=fused or None)]
    if muon:
        # Steps as long as AdamW's, so that one rate fits both.
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                momentum=0.9,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def _eight_bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            'optimizer "adamw8bit" is the package bitsandbytes\', which is not installed here: '
            'pip install bitsandbytes; "adamw" needs none'
        ) from error
    return AdamW8bit


def _tune(
    backbone: Backbone,
    network: UNet2DConditionModel,
    attribute: Attribute,
    config: TuningConfig,
    picture: Tensor,
    inside: Tensor | None,
    v: Tensor,
    change: _Change,
    losses: list[float],
    callback: Callable[[int, float], bool | None] | None,
    progress: bool,
    keep_interrupted: bool,
) -> None:
    """Change `v` and `change` in place and append to `losses`, step by step."""
    device, unet = backbone.device, backbone.unet
    scheduler = copy.copy(backbone.scheduler)  # which moves its tables to where they are needed
    views, masks, said = views_of(picture, inside, config)
    # An autoencoder of Stable Diffusion's size needs more memory for 16 pictures than a step of tuning.
    few = 1 if backbone.large else 16
    latents = torch.cat([backbone.encode_images(x) for x in views.split(few)]).float()  # (V, 4, h, w)
    masks = F.interpolate(masks, size=latents.shape[-2:], mode="area").to(device)  # (V, 1, h, w)
    del views
    prompts = [readable(backbone, attribute.token, each, PROMPTS[config.recipe]) for each in said]
    optimizers = _optimizers(v, change, config, fused=backbone.large)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    # Gradients too small for float16 are scaled up on their way back; elsewhere this does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=runs_in(device, unet.dtype) is torch.float16)
    # All draws come from one generator on the CPU: the same seed is the same run on every device.
    generator = torch.Generator().manual_seed(config.seed)
    timesteps = scheduler.config.num_train_timesteps

    def draw(count: int) -> Draws:
        pick = torch.randint(0, len(latents), (count,), generator=generator)
        if config.noise_level is None:
            t = torch.randint(0, timesteps, (count,), generator=generator).to(device)
        else:
            t = draw_noise_levels(scheduler, count, config.noise_level, generator).to(device)
        x_0 = latents[pick.to(device)]
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        u = torch.rand(count, generator=generator).tolist()
        said = [prompts[k][int(share * len(prompts[k]))] for k, share in zip(pick.tolist(), u, strict=True)]
        if config.dropout and change.parameters():  # the weights learn from it, the pseudo-word does not
            dropped = (torch.rand(count, generator=generator) < config.dropout).tolist()
            said = ["" if drop else prompt for prompt, drop in zip(said, dropped, strict=True)]
        return Draws(
            x_t=scheduler.add_noise(x_0, noise, t).to(unet.dtype),
            t=t,
            target=target_of(scheduler, x_0, noise, t),
            inside=masks[pick.to(device)],
            prompts=said,
        )

    bar = tqdm(
        range(config.steps), desc=f"{attribute.name} ({config.part})", unit="step", disable=not progress
    )
    try:
        with fast_arithmetic(device, unet.dtype):
            kept = None
            if config.conditioning == "cached":
                kept = read_ahead(draw(config.draws), backbone, attribute, config.batch_size)
            for step in bar:
                # The last steps settle: a constant rate leaves one image's noise in the weights.
                left = min(1.0, (config.steps - step) / (SETTLING[config.optimizer] * config.steps))
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * min(left, (step + 1) / 10)
                seen = draw(config.batch_size) if kept is None else kept.some(config.batch_size, generator)
                text = backbone.encode_prompt(seen.prompts, {attribute.token: v}).to(unet.dtype)
                out = predicted(network, change.weights(), seen, text, config.conditioning)
                weight = seen.inside
                if config.noise_level is None:
                    weight = weight * loss_weight(scheduler, seen.t)[:, None, None, None]
                loss = ((out.float() - seen.target).square() * weight).mean() / seen.inside.mean()
                scaler.scale(loss).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                scaler.update()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss is {losses[-1]} at step {step + 1}; "
                        f"lower the learning rate ({config.learning_rate})"
                    )
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}", refresh=False)
                if callback is not None and callback(step + 1, losses[-1]):
                    break
    except KeyboardInterrupt:
        if not keep_interrupted:
            raise
        warnings.warn(
            f"interrupted after {len(losses)} of {config.steps} steps; what was learnt until here is kept",
            stacklevel=3,
        )
    finally:
        bar.close()


# Which half the part must be of; none: any part.
_HALVES = {"joint": (), "half": ("encoder", "decoder"), "cached": ("decoder",)}


@dataclass
class Draws:
    """Noised views (N, C, h, w), and what the UNet is to make of them; maps: what its encoder already has."""

    x_t: Tensor
    t: Tensor
    target: Tensor
    inside: Tensor
    prompts: list[str]
    maps: list[Tensor] | None = None

    def some(self, count: int, generator: torch.Generator) -> Draws:
        """A random choice of `count` of them."""
        rows = torch.randint(0, len(self.t), (count,), generator=generator)
        return self.at(rows)

    def at(self, rows: Tensor) -> Draws:
        there = rows.to(self.t.device)
        return Draws(
            self.x_t[there],
            self.t[there],
            self.target[there],
            self.inside[there],
            [self.prompts[k] for k in rows.tolist()],
            None if self.maps is None else [m[there] for m in self.maps],
        )


@torch.no_grad()
def read_ahead(draws: Draws, backbone: Backbone, attribute: Attribute, batch_size: int) -> Draws:
    """The draws with what the untouched encoder makes of them under the attribute's plain word."""
    kept: list[Tensor] = []
    for rows in torch.arange(len(draws.t)).split(batch_size):
        part = draws.at(rows)
        words = [prompt.replace(attribute.token, attribute.word) for prompt in part.prompts]
        text = backbone.encode_prompt(words).to(backbone.unet.dtype)
        maps = down_path(backbone.unet, part.x_t, part.t, text)
        kept = kept or [m.new_empty(len(draws.t), *m.shape[1:]) for m in maps]
        for whole, m in zip(kept, maps, strict=True):
            whole[rows.to(whole.device)] = m
    return replace(draws, maps=kept)


def predicted(
    unet: nn.Module, weights: dict[str, Tensor], seen: Draws, text: Tensor, conditioning: str
) -> Tensor:
    """The UNet's prediction for the draws; only `weights` and `text` carry gradients (Eq. 6)."""
    if conditioning == "joint":
        inputs = (seen.x_t, seen.t)
        return functional_call(unet, weights, inputs, {"encoder_hidden_states": text}).sample
    if half_of(list(weights)) == "encoder":
        maps = with_weights(down_path, unet, weights, seen.x_t, seen.t, text)
        return up_path(unet, maps, seen.t, text.detach())
    maps = seen.maps
    if maps is None:
        with torch.no_grad():
            maps = down_path(unet, seen.x_t, seen.t, text)
    return with_weights(up_path, unet, weights, maps, seen.t, text)


def readable(backbone: Backbone, token: str, said: Sequence[str], plain: Sequence[str]) -> list[str]:
    """Prompts with the pseudo-word put in, but for those the text encoder would cut; `plain` if all are."""
    written = [prompt.format(token) for prompt in said]
    read = [prompt for prompt in written if not backbone.cut_off(prompt, [token])]
    return read or [prompt.format(token) for prompt in plain]


def runs_in(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype | None:
    """What a backbone of this dtype is tuned in: a half precision as it is, so that nothing is rounded anew.

    Another in bfloat16 where the processor has it, float16 on older GPUs, else None: as it is.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return dtype
    if device.type == "cuda":
        # Before Ampere (a T4) bfloat16 is only emulated.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    has = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has else None


def working_copy(
    unet: UNet2DConditionModel, trained: Collection[str], checkpointing: bool = False
) -> UNet2DConditionModel:
    """The UNet as tuning runs it: the same function and the same weights, in less time or less memory.

    With `checkpointing` what it computes inside is computed again on the way back instead of kept. On a CPU
    (`benchmarks/tuning_step.py`) its frozen weights are in the dtype of `runs_in`, once and for all: autocast
    would round every weight again in every step. The `trained` ones, which are exchanged anyway, are the
    UNet's own. And its attention leaves out what PyTorch's does for rows that are masked all over.
    """
    on_cpu = unet.device.type == "cpu"
    dtype = (runs_in(unet.device, unet.dtype) if on_cpu else None) or unet.dtype
    same = {
        id(p): p if name in trained or p.dtype is dtype else nn.Parameter(p.detach().to(dtype), False)
        for name, p in unet.named_parameters()
    }
    network = copy.deepcopy(unet, same)
    if checkpointing:
        network.enable_gradient_checkpointing(recomputed)
    else:  # a UNet that came with it on would differentiate its own weights
        network.disable_gradient_checkpointing()
    if not on_cpu:
        return network
    plain = network.attn_processors.items()
    network.set_attn_processor({n: AttnProcessor() if type(p) is AttnProcessor2_0 else p for n, p in plain})
    return network


@contextmanager
def fast_arithmetic(device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Arithmetic in what `runs_in` says, and on a CPU the attention kernel that is fast backwards."""
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(MathAttention())
        if (runs := runs_in(device, dtype)) is not None:
            # Autocast would otherwise keep the first step's rounded copies of the weights that learn.
            stack.enter_context(torch.autocast(device.type, runs, cache_enabled=False))
        yield
