"""The published methods, each as a configuration of the one tuning loop, on a single image.

Rates and steps are the papers' (or their Stable Diffusion code's) on a large backbone. On `mini` they are
this project's for AdamW, because a network of 1/100 of the size needs larger steps.
Common to all: AdamW's averages are at 0.9 and 0.99 without weight decay, as in the rest of this package. A
velocity's error is weighted by `loss_weight`; the papers predict the noise and have no weight. The word of
the attribute stands for the class noun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .. import paths
from ..backbone.model import Backbone
from ..backbone.parts import NO_PART
from ..backbone.prompts import rare_word, word_id
from ..data.captions import with_article
from .attributes import Attribute, resolve_attribute
from .config import RATES, TuningConfig
from .e4t import require_pretrained
from .views import PROMPTS

# Textual Inversion's templates of objects (27) and of styles (19).
_OBJECTS = (
    *(f"a photo of {article} {{}}" for article in ("a", "my", "the", "one")),
    "the photo of a {}",
    *(f"a photo of a {kind} {{}}" for kind in ("clean", "dirty", "nice", "cool", "small")),
    *(f"a photo of the {kind} {{}}" for kind in ("cool", "clean", "nice", "small", "weird", "large")),
    *(f"a {kind} photo of a {{}}" for kind in ("cropped", "close-up", "good")),
    *(f"a {kind} photo of the {{}}" for kind in ("cropped", "dark", "bright", "good", "close-up")),
    "a rendering of a {}",
    "a rendition of the {}",
    "a rendition of a {}",
)
# Two of them stand in the published list twice, and so are drawn twice as often.
_PAINTINGS = (
    "cropped clean dirty dark cool close-up bright cropped good close-up nice small weird large".split()
)
_STYLES = (
    *(f"{each} in the style of {{}}" for each in ("a painting", "the painting", "a picture")),
    *(f"a {kind} in the style of {{}}" for kind in ("rendering", "rendition")),
    *(f"a {kind} painting in the style of {{}}" for kind in _PAINTINGS),
)
TEMPLATES = {"shape": _OBJECTS, "appearance": _STYLES}

# What the papers' references have in common: the image as it is, uniform timesteps, one constant rate.
_PLAIN = {
    "optimizer": "adamw",
    "bias_learning_rate": None,
    "augmentation": 0.0,
    "varied": False,
    "dropout": 0.0,
    "noise_level": None,
    "true_scale": False,
    "conditioning": "joint",
    "constant_rate": True,
}
# Steps of the published methods on `mini` before the grid has chosen.
STEPS_BEFORE_GRID = {"shape": 160, "appearance": 40}
# Rates and steps of `mini` that the grid on development references chose (`escd.evaluation.method_choice`).
# Without the file they are those of `Method._rates`.
RATES_FILE = paths.PACKAGE / "method" / "mini_rates.json"
_FLIPPED = {"flips": True, "views": 2}


@dataclass(frozen=True)
class Method:
    """A published method: what it is called, its paper, what is left out of it here and why."""

    name: str
    paper: str
    leaves_out: str
    part: str | None = None  # None: each attribute's own
    settings: Mapping[str, object] = field(default_factory=dict)
    large: Mapping[str, object] = field(default_factory=dict)  # rates and steps at Stable Diffusion's size
    templates: bool = False  # Textual Inversion's prompts
    before_class: str | None = None  # of "a {} class" and, for prior preservation, "a class"; None: neither

    def config(
        self, attribute: Attribute | str, backbone: Backbone | None = None, part: str | None = None,
        *, before_grid: bool = False, **changes: object,
    ) -> TuningConfig:  # fmt: skip
        """The configuration for an attribute. None leaves a number at the method's.

        before_grid: leave out `chosen_rates`, as the grid that chooses them does.

        Raises ValueError for a part or rank that contradicts the method, for a backbone without the weights
        that the method needs, and what `TuningConfig.of` raises.
        """
        attribute = resolve_attribute(attribute)
        if self.name == "escd":
            return TuningConfig.of(attribute, part, backbone, **changes)
        fixed = {"part": attribute.part if self.part is None else self.part, "rank": None}
        for name, value in {"part": part, "rank": changes.pop("rank", None)}.items():
            if value not in (None, fixed[name]):
                raise ValueError(
                    f"{name}={value!r} contradicts the method {self.name!r}, which has {fixed[name]!r}: "
                    "leave it out, or give method='escd'"
                )
        given = {name: value for name, value in changes.items() if value is not None}
        if fixed["part"] == NO_PART and "learning_rate" in given:  # the pseudo-word's is the only one
            given["word_learning_rate"] = given.pop("learning_rate")
        plain = {} if self.part is None else _PLAIN | self._rates(attribute, backbone)
        settings = plain | dict(self.settings) | self._prompts(attribute, backbone)
        if backbone is not None and backbone.large:
            settings |= self.large
        elif self.part is not None and not before_grid:
            settings |= chosen_rates().get(self.name, {}).get(attribute.recipe or "", {})
        config = TuningConfig.of(attribute, fixed["part"], backbone, **settings | given)
        if backbone is not None:
            require_pretrained(backbone, config)
        return config

    def _rates(self, attribute: Attribute, backbone: Backbone | None) -> dict[str, object]:
        """Learning rate and steps of `mini`."""
        if attribute.recipe is None or (backbone is not None and backbone.large):
            return {}
        return {
            "learning_rate": RATES["adamw"][attribute.recipe]["all"],
            "word_learning_rate": 5e-3,
            "steps": STEPS_BEFORE_GRID[attribute.recipe],
        }

    def _prompts(self, attribute: Attribute, backbone: Backbone | None) -> dict[str, object]:
        """The prompts of the reference, and that of the class images."""
        word = attribute.word
        if self.before_class is not None:
            return {
                "prompts": (f"{self.before_class}a {{}} {word}",),
                "prior_prompt": f"{self.before_class}{with_article(word)}",
            }
        if not self.templates or attribute.recipe is None:
            return {}
        return {"prompts": templates_for(attribute.recipe, backbone)}


def templates_for(recipe: str, backbone: Backbone | None) -> tuple[str, ...]:
    """Textual Inversion's templates that a backbone can read; our own prompts where it can read none."""
    templates = TEMPLATES[recipe]
    return templates if backbone is None else in_vocabulary(backbone, templates) or PROMPTS[recipe]


def chosen_rates() -> dict[str, dict[str, dict[str, float | int]]]:
    """Settings by method and recipe that the grid chose for `mini`; empty where `RATES_FILE` is missing."""
    return json.loads(RATES_FILE.read_text(encoding="utf-8")) if RATES_FILE.exists() else {}


def in_vocabulary(backbone: Backbone, templates: Sequence[str]) -> tuple[str, ...]:
    """The templates whose words are all in the backbone's vocabulary; `mini` has few."""
    words = {word for each in templates for word in _words(each)}
    known = {word for word in words if word_id(backbone.tokenizer, word) is not None}
    return tuple(each for each in templates if known.issuperset(_words(each)))


def _words(template: str) -> list[str]:
    return template.replace("{}", "").replace("-", " ").split()


_ALL = (
    Method("escd", "ESCDiffusion", "nothing"),
    Method(
        "source",
        "ESCDiffusion, the plain recipe",
        "nothing: the reference as it is under fixed prompts, each attribute's own half; steps, rates and "
        "noise levels are ours",
        settings={"augmentation": 0.0},
    ),
    Method(
        "textual-inversion",
        "Gal et al. 2022, An Image is Worth One Word (arXiv 2208.01618)",
        "templates with words that are not in the backbone's vocabulary, which it could not read",
        part=NO_PART,
        settings={"start": "word", "batch_size": 4, **_FLIPPED},
        large={"word_learning_rate": 0.02, "steps": 5000},  # 5e-3 for each image of a batch
        templates=True,
    ),
    Method(
        "dreambooth",
        "Ruiz et al. 2023, DreamBooth (arXiv 2208.12242)",
        "the tuned text encoder of some later code, which the paper does not have; class images stay "
        "latents, because decoding and encoding them adds nothing but error; every word of `mini` has "
        "a meaning, so its rare word names a background",
        part="all",
        settings={"start": "rare", "learn_word": False, "batch_size": 1, "views": 1, "prior_images": 200},
        # The upper end of diffusers' 400 to 800 steps, for prior preservation.
        large={"learning_rate": 5e-6, "steps": 800},
        before_class="",
    ),
    Method(
        "custom-diffusion",
        "Kumari et al. 2023, Multi-Concept Customization (arXiv 2212.04488)",
        "resized references under 'very small' and 'far away', which would teach a size; regularisation "
        "images are generated, as in its own variant, because no image collection is at hand; the rare "
        "word of `mini` is as for DreamBooth",
        part="all/kv",
        settings={"start": "rare", "batch_size": 8, "prior_images": 200, **_FLIPPED},
        large={"learning_rate": 8e-5, "word_learning_rate": 8e-5, "steps": 250},
        before_class="photo of ",
    ),
    Method(
        "p-plus",
        "Voynov et al. 2023, P+: Extended Textual Conditioning (arXiv 2303.09522)",
        "templates with words that are not in the backbone's vocabulary, which it could not read",
        part=NO_PART,
        settings={"start": "word", "per_layer": True, "batch_size": 8, **_FLIPPED},
        large={"word_learning_rate": 5e-3, "steps": 500},
        templates=True,
    ),
    Method(
        "e4t",
        "Gal et al. 2023, Encoder-based Domain Tuning (arXiv 2302.12228)",
        "CLIP's inner layers (its last CLS token is read) and the square layers that mix the rows and "
        "columns of a weight offset, which would be larger than `mini`; one encoder serves both attributes",
        part="all",
        settings={
            "start": "word",
            "learn_word": False,
            "latent_encoder": True,
            "offset_penalty": 0.01,
            "weight_offsets": True,
            "batch_size": 16,
            "views": 1,
            "steps": 15,
        },
        large={"learning_rate": 1.6e-5},
        templates=True,
    ),
)
METHODS = {method.name: method for method in _ALL}


def method_named(name: str) -> Method:
    """The method of that name; for another name, ValueError lists the known ones."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def start_word(backbone: Backbone, attribute: Attribute, config: TuningConfig) -> str:
    """The word whose embedding the pseudo-word starts as, where no filter gives it."""
    return attribute.word if config.start == "word" else rare_word(backbone.tokenizer)
