"""`TuningConfig`: one tuning run, the defaults of each attribute, and what each was set from."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any

from ..backbone.halves import half_of
from ..backbone.model import Backbone
from ..backbone.parts import NO_PART, half_named, names_of
from .attributes import RECIPES, Attribute, resolve_attribute

# What changes the matrices and kernels of a part. Muon learns more in as many steps (notebook 3).
# "adamw8bit" is AdamW with its two averages in a byte each (Dettmers et al. 2022), for want of memory.
OPTIMIZERS = ("muon", "adamw", "adamw8bit")
OPTIMIZER = "muon"
# Learning rate and steps for each half of the UNet, set by hand on development references
# (`docs/notes/2026-11-27-tuning.md`): no record compares the rates of the opposite halves. The halves differ
# in size and depth, so one rate for both would compare rates, not halves.
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
STEPS = {"shape": 160, "appearance": 80}
# Noised views a step. Half the steps of twice the views learn an appearance as well, in less time
# (`python -m escd.evaluation.recipe`): a step of Muon's costs the same for any number of views.
BATCH_SIZES = {"shape": 16, "appearance": 16}
# Share of the views in which the other attribute is changed. From the reference as it is, a shape learns some
# of its appearance too.
AUGMENTATION = {"shape": 1.0, "appearance": 0.75}
# The pseudo-word's rate. An outline needs the weights more than the word.
WORD_RATES = {"shape": 1e-4, "appearance": 1e-3}
# How many differently augmented views of the reference there are. With more of them a shape is learnt better
# (trials on an earlier training of `mini`, with AdamW).
VIEWS = {"shape": 192, "appearance": 64}
# Around which logarithm of noise over signal each is learnt: where outlines are settled
# (`docs/notes/2026-11-27-tuning.md`), and where texture is (`python -m escd.evaluation.recipe`). Timesteps
# drawn uniformly lie higher, and learn less in as many steps. None: uniform timesteps.
NOISE_LEVELS = {"shape": 0.4, "appearance": -1.5}
# Whether the views that keep a material show it at its own scale: enlarged, it is blurred.
TRUE_SCALE = {"shape": False, "appearance": True}
# Factors of a change start with one of the two at zero, and move the weights less for the same step.
LOW_RANK_RATE = 5.0
# A backbone of Stable Diffusion's size: what DreamBooth, LoRA and textual inversion are commonly run with
# there. None of it was measured by this project. Muon is left out for its arithmetic: some 0.4e12 operations
# for each kernel of 1280 x 11520.
LARGE_RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 1e-5,
    "word_learning_rate": 5e-4,
    "batch_size": 1,
    # The plain recipe: repainted views are drawings of a world that such a backbone does not live in.
    "augmentation": 0.0,
    "varied": True,
}
LARGE_STEPS = {"shape": 400, "appearance": 250}
# Share of the draws under the empty prompt: guidance starts from the tuned UNet there (`guidance.LARGE`).
LARGE_DROPOUT = {"shape": 0.15, "appearance": 0.0}
LARGE_RANK_RATE = 1e-4
LESS_MEMORY = (
    "close what else uses it, load the backbone in half precision (dtype=torch.float16), learn the change at "
    'a rank (rank=16, or --rank 16), lower TuningConfig.batch_size, or take optimizer="adamw8bit", or for an '
    'appearance conditioning="half"'
)
# Who reads the pseudo-word while it is learnt, and where its gradient comes from.
CONDITIONING = ("joint", "half", "cached")
# What the pseudo-word starts as: the attribute filter's, the attribute's word, or a rare word.
STARTS = ("filter", "word", "rare")

_SWITCHES = (
    "true_scale", "varied", "learn_word", "per_layer", "flips", "constant_rate", "latent_encoder",
    "weight_offsets",
)  # fmt: skip


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
    # Share of the draws under the empty prompt; of use where guidance starts from the customized UNet.
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
    # ---- What the published methods need (`baselines`)
    # What the pseudo-word starts as: "filter" (Eq. 5), "word", the attribute's own, or "rare" (`rare_word`).
    start: str = "filter"
    # Whether the pseudo-word learns.
    learn_word: bool = True
    # One embedding of the pseudo-word for each cross-attention layer (P+).
    per_layer: bool = False
    # Prompts of the reference as it is, "{}" is the pseudo-word; none: those of the recipe.
    prompts: tuple[str, ...] = ()
    # Whether every second view is mirrored.
    flips: bool = False
    # Constant learning rates, without warm-up and decay.
    constant_rate: bool = False
    # Prior preservation: how many images the untouched backbone draws of `prior_prompt`, and the weight of
    # their loss, which each step adds.
    prior_images: int = 0
    prior_prompt: str = ""
    prior_weight: float = 1.0
    # Whether the backbone's pretrained encoder adds to the pseudo-word what it reads from each noised latent
    # (E4T), and the weight of the squared length of that.
    latent_encoder: bool = False
    offset_penalty: float = 0.0
    # Whether the attention layers' projections have the backbone's pretrained weight offsets (E4T).
    weight_offsets: bool = False

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise ValueError(f"a recipe is {' or '.join(map(repr, RECIPES))}, not {self.recipe!r}")
        for name in ("steps", "batch_size", "views", "draws", "seed", "rank", "prior_images"):
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
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, not {getattr(self, name)!r}")
        for name in ("augmentation", "dropout"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"{name} is a share between 0 and 1, not {value!r}")
        self._check_baselines()
        self._check_e4t()

    def _check_baselines(self) -> None:
        """Raise ValueError or TypeError for what the published methods cannot be."""
        if self.start not in STARTS:
            raise ValueError(f"start is one of {', '.join(STARTS)}, not {self.start!r}")
        if not self.learn_word and self.part == NO_PART and self.steps:
            raise ValueError("nothing learns: the pseudo-word is fixed and the part is 'none'")
        if self.per_layer and not (self.part == NO_PART and self.learn_word):
            raise ValueError(f"embeddings of each layer learn alone: part='none', not {self.part!r}")
        if isinstance(self.prompts, list):  # as a file gives it back
            object.__setattr__(self, "prompts", tuple(self.prompts))
        if not isinstance(self.prompts, tuple) or not all(isinstance(each, str) for each in self.prompts):
            raise TypeError(f"prompts is a tuple of strings, not {self.prompts!r}")
        if lacking := [each for each in self.prompts if each.count("{}") != 1]:
            raise ValueError(f"a prompt has one {{}}, where the pseudo-word stands, unlike {lacking[0]!r}")
        if not isinstance(self.prior_prompt, str):
            raise TypeError(f"prior_prompt is a string, not {self.prior_prompt!r}")
        if self.prior_images < 0 or (self.prior_images > 0) != bool(self.prior_prompt):
            raise ValueError("prior preservation needs a prior_prompt and prior_images from 1 on; 0 is none")
        if self.prior_images and self.conditioning == "cached":
            raise ValueError("prior images are not computed ahead: take conditioning 'joint' or 'half'")
        weight = self.prior_weight
        if not (isinstance(weight, int | float) and 0 <= weight <= sys.float_info.max):
            raise ValueError(f"prior_weight must be a number from 0 on, not {weight!r}")

    @property
    def needs_e4t(self) -> bool:
        """Whether it starts from what E4T pretrained on the backbone."""
        return self.latent_encoder or self.weight_offsets

    def _check_e4t(self) -> None:
        """Raise ValueError for what E4T cannot be."""
        penalty = self.offset_penalty
        if not (isinstance(penalty, int | float) and 0 <= penalty <= sys.float_info.max):
            raise ValueError(f"offset_penalty must be a number from 0 on, not {penalty!r}")
        if penalty and not self.latent_encoder:
            raise ValueError("offset_penalty is for what an encoder reads: it needs latent_encoder=True")
        if not self.needs_e4t:
            return
        whole = self.part == "all" and self.rank is None and self.conditioning == "joint"
        if not whole or self.prior_images:
            raise ValueError(
                "latent_encoder and weight_offsets learn with the whole UNet: part='all', rank=None, "
                "conditioning='joint', no prior images"
            )

    @classmethod
    def of(
        cls,
        attribute: Attribute | str,
        part: str | None = None,
        backbone: Backbone | None = None,
        **changes: Any,
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
        defaults: dict[str, Any] = {
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
            "noise_level": NOISE_LEVELS[recipe],
            "true_scale": TRUE_SCALE[recipe],
        }
        if backbone is not None and backbone.large:
            defaults |= LARGE_RECIPE | {"steps": LARGE_STEPS[recipe], "dropout": LARGE_DROPOUT[recipe]}
            defaults |= {"bias_learning_rate": None, "noise_level": None, "true_scale": False}
            if ranked:
                defaults["learning_rate"] = LARGE_RANK_RATE
            if recipe == "appearance" and half == "decoder":
                # A fifth less time for the same scores on `mini` (notebook 3, benchmarks/tuning_cost.py).
                defaults["conditioning"] = "half"
        return cls(**defaults | given)


def _rated_as(part: str, backbone: Backbone | None) -> str:
    """The half whose rates a part learns at: that of its parameters, or of its name without a backbone."""
    if backbone is None or part == NO_PART:
        return half_named(part) or "all"
    return half_of(names_of(backbone.unet, part)) or "all"
