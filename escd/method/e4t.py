"""E4T, Encoder-based Domain Tuning (Gal et al. 2023, arXiv 2302.12228).

An encoder reads the noised latent at each step and gives the pseudo-word; weight offsets scale the attention
layers' projections. Both are pretrained on a backbone (`python -m escd.pretrain e4t`), then tuned on one
image together with the UNet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..backbone.halves import down_path, with_weights
from ..backbone.prompts import starred_words
from .delta import Change, LowRank
from .encoder import down_width, pooled
from .memory import fetched

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ..backbone.model import Backbone
    from .config import TuningConfig

Texts = Mapping[str, Sequence[str | Tensor]]  # prompts, or embeddings in their place, by the argument's name

SCALE = 0.1  # of the encoder's output beside the word's embedding
HIDDEN = 160  # width of the encoder's inner layers for `mini`
LARGE_HIDDEN = 1024  # and for a backbone of Stable Diffusion's size
OFFSET = (".to_q.weight", ".to_k.weight", ".to_v.weight")  # ends of the names of weights with an offset
CLS = "cls"  # name of the reference's CLS token beside an encoder's own tensors


class LatentEncoder(nn.Module):
    """E4T's encoder: an image's CLS token and the UNet's features of a noised latent, to a word's offset.

    A new one gives zero, so that the pseudo-word starts as the word itself.
    """

    def __init__(self, cls_width: int, down_width: int, word_width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(cls_width + down_width))
        self.register_buffer("deviation", torch.ones(cls_width + down_width))
        self.down = nn.Sequential(nn.Linear(down_width, hidden), nn.LeakyReLU(), nn.Linear(hidden, hidden))
        self.merge = nn.Linear(cls_width + hidden, hidden)
        self.final = nn.Linear(hidden, word_width)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LatentEncoder:
        """The encoder with these tensors, which are its `state_dict`; draws no random numbers."""
        down, merge, final = (tensors[f"{name}.weight"] for name in ("down.0", "merge", "final"))
        with torch.device("meta"):
            encoder = cls(merge.shape[1] - len(merge), down.shape[1], len(final), len(merge))
        encoder.load_state_dict(dict(tensors), assign=True)
        return encoder.requires_grad_(False)

    @torch.no_grad()
    def standardise(self, cls: Tensor, f_down: Tensor) -> None:
        """Take the mean and deviation of each feature from those of many images, (N, C) and (N, W)."""
        features = torch.cat([cls, f_down], 1)
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp(min=1e-3))

    def forward(self, cls: Tensor, f_down: Tensor) -> Tensor:
        """Offsets (B, D) of the word's embedding from CLS tokens (B, C) and features (B, W)."""
        features = (torch.cat([cls, f_down], 1) - self.mean) / self.deviation
        cls, f_down = features.split([cls.shape[1], f_down.shape[1]], 1)
        merged = self.merge(torch.cat([cls, self.down(f_down)], 1))
        return SCALE * self.final(nn.functional.leaky_relu(merged)).float()


class WeightOffset(nn.Module):
    """The offset (out, in) of a weight, row times column, each from a constant by a small linear layer.

    It starts at exactly zero.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.ones(1))
        self.row, self.column = nn.Linear(1, rows), nn.Linear(1, columns)
        nn.init.zeros_(self.row.weight)
        nn.init.zeros_(self.row.bias)

    def forward(self) -> Tensor:
        with torch.autocast(self.constant.device.type, enabled=False):
            return self.row(self.constant)[:, None] * self.column(self.constant)


class E4T(ModelMixin, ConfigMixin):
    """What is pretrained: the encoder, and an offset for each query, key and value projection.

    shapes: the shape of each weight with an offset, by its name in the UNet. backbone_identity: that of the
    backbone it was pretrained on.
    """

    @register_to_config
    def __init__(
        self,
        cls_width: int,
        down_width: int,
        word_width: int,
        shapes: dict[str, tuple[int, int]],
        backbone_identity: str,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        self.encoder = LatentEncoder(cls_width, down_width, word_width, hidden)
        self.offsets = nn.ModuleDict({_key(name): WeightOffset(*shape) for name, shape in shapes.items()})

    @classmethod
    def for_backbone(cls, backbone: Backbone, hidden: int | None = None) -> E4T:
        """A new one of the widths this backbone needs; it changes nothing."""
        return cls(
            backbone.image_tower.config.width,
            *_widths(backbone),
            offset_shapes(backbone.unet),
            backbone.identity_without_filters,
            hidden or (LARGE_HIDDEN if backbone.large else HIDDEN),
        )

    def offset(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights among `weights` that have an offset, with it: W (1 + row x column), in float32."""
        names = self.config.shapes
        return {name: weights[name].float() * (1 + self.offsets[_key(name)]()) for name in names}


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name has no dot


def offset_shapes(unet: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes of the weights that have an offset: queries, keys and values of all attention layers."""
    return {name: tuple(p.shape) for name, p in unet.named_parameters() if name.endswith(OFFSET)}


def _widths(backbone: Backbone) -> tuple[int, int]:
    return down_width(backbone.unet), backbone.text_encoder.config.hidden_size


def require_same_layout(e4t: E4T, backbone: Backbone, where: object) -> None:
    """Raise ValueError unless the encoder and the offsets have the shapes that this backbone needs."""
    shapes = {name: tuple(shape) for name, shape in e4t.config.shapes.items()}
    read = (e4t.config.down_width, e4t.config.word_width)
    if read != _widths(backbone) or shapes != offset_shapes(backbone.unet):
        raise ValueError(
            f"the E4T encoder in {where} is of another backbone: it reads features and a word "
            f"{read[0]}, {read[1]} wide and has {len(shapes)} weight offsets, which does not fit "
            f"{backbone.name}: move it away, and train one with `python -m escd.pretrain e4t`"
        )


def require_pretrained(backbone: Backbone, config: TuningConfig) -> None:
    """Raise ValueError where E4T is to be tuned on a backbone without pretrained encoder and offsets."""
    if config.needs_e4t:
        pretrained_on(backbone)


def pretrained_on(backbone: Backbone) -> E4T:
    """What E4T pretrained on this backbone; ValueError, with what to run, where there is nothing."""
    command = (
        "`python -m escd.pretrain e4t` trains them for mini (--weights FOLDER: for another training of it); "
        "for any other backbone `python -m escd.pretrain e4t --backbone NAME --data FOLDER` does, from a "
        "folder of images, and load_backbone(NAME, filters=...) takes them"
    )
    if backbone.e4t is None:
        raise ValueError(
            "method 'e4t' needs an encoder and weight offsets that were pretrained on the backbone, and "
            f"{backbone.name} has none (this package publishes none for other backbones than mini): {command}"
        )
    trained = backbone.e4t.config.backbone_identity
    if trained != backbone.identity_without_filters:
        raise ValueError(
            f"the E4T encoder of {backbone.name} was pretrained on other weights of it ({trained}, and these "
            f"are {backbone.identity_without_filters}): {command}"
        )
    return backbone.e4t


def latent_features(
    unet: UNet2DConditionModel, weights: Mapping[str, Tensor], x_t: Tensor, t: Tensor, empty: Tensor
) -> Tensor:
    """Global means (B, W) of the UNet's way down on latents x_t (B, C, h, w) under the empty prompt.

    weights: what stands in place of the UNet's own; empty: tau("") (1, L, D).
    """
    text = empty.expand(len(x_t), -1, -1)
    maps = with_weights(down_path, unet, weights, x_t, t, text) if weights else down_path(unet, x_t, t, text)
    return pooled(maps, (1,))


def squared_length(offset: Tensor) -> Tensor:
    """The mean squared length, a scalar, of offsets (B, D), which E4T's loss holds down."""
    return offset.square().sum(-1).mean()


class E4TChange(Change):
    """What E4T tunes on one image: the UNet's weights, their offsets, and the encoder."""

    def __init__(
        self, trained: dict[str, nn.Parameter], backbone: Backbone, image: Tensor, config: TuningConfig
    ) -> None:
        """image: the reference (3, H, W), whose CLS token the encoder reads."""
        super().__init__(trained)
        self.e4t = copy.deepcopy(pretrained_on(backbone)).float().requires_grad_(True)
        self.reads, self.offsets = config.latent_encoder, config.weight_offsets
        self.penalty = config.offset_penalty
        with torch.no_grad():
            self.cls = backbone.image_tower(image[None].to(backbone.device)).float()  # (1, C)
            self.empty = backbone.encode_prompt([""]).to(backbone.unet.dtype)

    def parameters(self) -> list[Tensor]:
        read = self.e4t.encoder.parameters() if self.reads else ()
        return [*super().parameters(), *read, *(self.e4t.offsets.parameters() if self.offsets else ())]

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        return weights | self.e4t.offset(weights) if self.offsets else weights

    def initial_delta(self) -> dict[str, Tensor | LowRank]:
        """The pretrained offsets as a change of the weights."""
        names = self.e4t.config.shapes
        return {name: w for name, w in self.delta().items() if name in names} if self.offsets else {}

    def read(
        self, unet: UNet2DConditionModel, weights: Mapping[str, Tensor], x_t: Tensor, t: Tensor, word: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pseudo-words (B, D) of noised latents x_t at time steps t, and the penalty of their offsets."""
        features = latent_features(unet, weights, x_t, t, self.empty)
        offset = self.e4t.encoder(self.cls.expand(len(features), -1), features)
        return word + offset, self.penalty * squared_length(offset)

    def encoder_tensors(self) -> dict[str, Tensor] | None:
        """The encoder in half precision on the CPU, with the reference's CLS token, as stored."""
        if not self.reads:
            return None
        tensors = self.e4t.encoder.state_dict() | {CLS: self.cls[0]}
        return {name: w.detach().half().cpu() for name, w in tensors.items()}


# ---- sampling


@dataclass
class Read:
    """A pseudo-word that is read at each step: its encoder, its reference's CLS token, and its strength."""

    encoder: LatentEncoder
    cls: Tensor  # (1, C)
    word: Tensor  # (D,): what its offset is added to
    strength: float

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], word: Tensor, strength: float) -> Read:
        """From what `E4TChange.encoder_tensors` returned."""
        moved = {name: w.to(word.device, torch.float32) for name, w in tensors.items()}
        token = moved.pop(CLS)
        return cls(LatentEncoder.of(moved), token[None], word, strength)

    def at(self, features: Tensor) -> Tensor:
        """The pseudo-words (B, D) of latents with these features (B, W)."""
        features = features.to(self.word.device)  # which differs from the UNet's where networks are offloaded
        offset = self.encoder(self.cls.expand(len(features), -1), features)
        return self.word + self.strength * offset.to(self.word)


@dataclass
class LatentReader:
    """Reads the pseudo-words of E4T from the current latents, one pass of the way down for all of them."""

    words: Mapping[str, Read]  # by pseudo-word
    empty: Tensor  # tau("")
    encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # text conditioning with these words (B, D)

    @torch.no_grad()
    def __call__(self, unet: UNet2DConditionModel, x_t: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Text conditioning at this step; x_t: the latents as the UNet takes them, t: the time step."""
        # A part of an offloaded UNet does not fetch it by itself.
        features = latent_features(fetched(unet), {}, x_t, t.to(x_t.device).expand(len(x_t)), self.empty)
        return self.encode({token: read.at(features) for token, read in self.words.items()})


class Encoded(Protocol):
    """What is asked of a customization here: the tensors of its encoder, if it has one."""

    @property
    def encoder(self) -> dict[str, Tensor] | None: ...


def latent_reader(
    asked: Texts,
    customizations: Mapping[str, Encoded],
    pseudo_words: Mapping[str, Tensor],
    strength_of: Mapping[str, float],
    embeds: Callable[..., dict[str, Tensor]],
) -> LatentReader | None:
    """What reads the pseudo-words in these texts at each step; None where none of them is read.

    embeds(texts, of_prompts): text conditioning by name, with an embedding for each prompt in place of some
    pseudo-words' own. Raises ValueError where prompts are given as embeddings while such a one is in force.
    """
    reading = _read_in(customizations, strength_of)
    if reading and any(isinstance(prompt, Tensor) for prompt in asked["prompt_embeds"]):
        raise ValueError(_read_anew(next(iter(reading))))
    words = {
        token: Read.of(encoder, pseudo_words[token], strength_of[token])
        for token, encoder in reading.items()
        if _holds(asked, token)
    }
    if not words:
        return None
    return LatentReader(words, embeds({"": [""]})[""], partial(embeds, asked))


def require_encodable(
    texts: Texts, customizations: Mapping[str, Encoded], strength_of: Mapping[str, float]
) -> None:
    """Raise ValueError where one of these texts has a pseudo-word that is read from the latents."""
    for token in _read_in(customizations, strength_of):
        if _holds(texts, token):
            raise ValueError(_read_anew(token))


def _read_in(
    customizations: Mapping[str, Encoded], strength_of: Mapping[str, float]
) -> dict[str, dict[str, Tensor]]:
    """The pseudo-words in force that are read from the latents, and the tensors of their encoders."""
    return {
        token: customization.encoder
        for token, customization in customizations.items()
        if customization.encoder is not None and strength_of[token] != 0
    }


def _holds(texts: Texts, token: str) -> bool:
    """Whether one of the texts, some of which may be embeddings, has the pseudo-word."""
    return any(isinstance(x, str) and token in starred_words(x) for each in texts.values() for x in each)


def _read_anew(token: str) -> str:
    return (
        f"{token} is read from the latents at each sampling step (E4T), so its prompt cannot be encoded "
        "beforehand: give the prompt as text, or take strength 0"
    )


# ---- what a file must hold


def require_encoder(tensors: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Raise ValueError unless the tensors are those of an encoder that reads this backbone's latents."""
    with torch.device("meta"):
        own = [*LatentEncoder(1, 1, 1, 1).state_dict(), CLS]
    if odd := sorted(set(tensors) ^ set(own)):
        raise ValueError(f"encoder.{odd[0]} is {'missing' if odd[0] in own else 'no tensor of an encoder'}")
    cls_width, hidden = tensors[CLS].numel(), tensors["merge.bias"].numel()
    if not (cls_width and hidden):
        raise ValueError("the encoder reads nothing: encoder.cls or encoder.merge.bias is empty")
    with torch.device("meta"):
        wanted = LatentEncoder(cls_width, *_widths(backbone), hidden).state_dict()
    wanted[CLS] = torch.empty(cls_width, device="meta")
    for name, w in wanted.items():
        if tensors[name].shape != w.shape:
            raise ValueError(
                f"encoder.{name} is {tuple(tensors[name].shape)}; on {backbone.name} it must be "
                f"{tuple(w.shape)}"
            )
    if not (tensors["deviation"].float() > 0).all():
        raise ValueError("encoder.deviation must be positive: features are divided by it")
