"""Stage 2, multi-modal embedding fusion: ``embeds_ref`` and a sub-attribute word to a pseudo-word (paper,
Eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .encoder import GRIDS, extract_features, feature_widths

if TYPE_CHECKING:
    from ..backbone.model import Backbone
    from .attributes import Attribute

# How far from its word a pseudo-word may lie, in lengths of the word's embedding.
REACH = 4.0


class AttributeFilter(ModelMixin, ConfigMixin):
    """The shape filter and the appearance filter are two of these: one architecture, two sets of weights.

    cls_width, down_width: lengths of the two parts of embeds_ref; word_width: length of a word embedding;
    hidden: width of the hidden layers; grids: what F_down is averaged over (`pooled`); cell_width: what is
    kept of the channels of one cell, by the same layer in each. ``forward(embeds_ref, word_embedding)`` gives
    the pseudo-word's embedding. A new filter gives the word's own embedding, because its last layer starts at
    zero: customization can start from it anywhere. The offset is shorter than `reach` times the word's
    embedding: unbounded, a filter ends thousands of lengths away, where the text encoder's normalisation
    leaves nothing but a direction, tuning moves nothing and a strength of one per cent is all of it.
    """

    @register_to_config
    def __init__(
        self,
        cls_width: int,
        down_width: int,
        word_width: int,
        hidden: int = 160,
        grids: tuple[int, ...] = GRIDS,
        cell_width: int = 128,
        reach: float = REACH,
    ) -> None:
        super().__init__()
        # Features differ widely in level and in spread: `standardise` sets these.
        self.register_buffer("mean", torch.zeros(cls_width + down_width))
        self.register_buffer("deviation", torch.ones(cls_width + down_width))
        self.project_cls = nn.Linear(cls_width, hidden)
        cells = sum(grid * grid for grid in grids)
        self.project_down = nn.Sequential(
            nn.Unflatten(1, (cells, down_width // cells)),
            nn.Linear(down_width // cells, cell_width),
            nn.LeakyReLU(),
            nn.Flatten(),
            nn.Linear(cells * cell_width, hidden),
        )
        self.project_word = nn.Sequential(nn.LayerNorm(word_width), nn.Linear(word_width, hidden))
        self.fuse = nn.Sequential(
            nn.Linear(3 * hidden, 2 * hidden),
            nn.LeakyReLU(),
            nn.Linear(2 * hidden, 2 * hidden),
            nn.LeakyReLU(),
            nn.Linear(2 * hidden, word_width),
        )
        nn.init.zeros_(self.fuse[-1].weight)
        nn.init.zeros_(self.fuse[-1].bias)

    @classmethod
    def for_backbone(
        cls, backbone: Backbone, hidden: int = 160, grids: tuple[int, ...] = GRIDS
    ) -> AttributeFilter:
        """A new filter of the widths this backbone needs."""
        cls_width, down_width = feature_widths(backbone, grids)
        return cls(cls_width, down_width, backbone.text_encoder.config.hidden_size, hidden, grids)

    @torch.no_grad()
    def standardise(self, embeds_ref: Tensor) -> None:
        """Take the mean and the deviation of each feature from embeds_ref (N, W) of many images.

        Most of a pooled feature is the same for every image; normalised as a whole, embeds_ref hardly shows
        what an image has of its own.
        """
        self.mean.copy_(embeds_ref.mean(0))
        self.deviation.copy_(embeds_ref.std(0).clamp(min=1e-3))

    def forward(self, embeds_ref: Tensor, word_embedding: Tensor) -> Tensor:
        """Pseudo-word embeddings (B, D) from embeds_ref (B, W) and the word's embedding e (D,): Eq. 5."""
        if embeds_ref.shape[-1] != self.config.cls_width + self.config.down_width:
            raise ValueError(
                f"embeds_ref is {embeds_ref.shape[-1]} wide; this filter reads "
                f"{self.config.cls_width} + {self.config.down_width}"
            )
        # An image unlike any of those goes as far out as the unlikeliest of them, and no farther.
        features = ((embeds_ref.to(self.dtype) - self.mean) / self.deviation).clamp(-4, 4)  # (B, W)
        cls, down = features.split([self.config.cls_width, self.config.down_width], -1)
        word = word_embedding.to(self.dtype).expand(len(embeds_ref), -1)  # (B, D)
        merged = torch.cat(
            [self.project_cls(cls), self.project_down(down), self.project_word(word)], -1
        )  # (B, 3H)
        offset = self.fuse(merged)
        # Shorter than 1. Scaled by its width it is slow to come near that, where no more would be learnt.
        offset = offset / (1 + offset.square().mean(-1, keepdim=True)).sqrt() / offset.shape[-1] ** 0.5
        # Eq. 5: v_w = e(w) + g_w(embeds_ref, e(w)), with |g_w| < reach |e(w)|
        return word + self.config.reach * word.norm(dim=-1, keepdim=True) * offset


@torch.no_grad()
def pseudo_word(backbone: Backbone, images: Tensor, attribute: Attribute, *, seed: int = 0) -> Tensor:
    """Initial embeddings (B, D) of the attribute's pseudo-word for reference images (B, 3, H, W) in [-1, 1].

    A backbone that ships no filter for the attribute gives the word's own embedding, as an untrained filter
    would. Raises ValueError when the attribute's word is not a single token.
    """
    word = backbone.word_embedding(attribute.word)
    attribute_filter = backbone.filters.get(attribute.name)
    if attribute_filter is None:
        return word.expand(len(images), -1)
    embeds_ref = extract_features(backbone, images, seed=seed, grids=tuple(attribute_filter.config.grids))
    return attribute_filter(embeds_ref, word)
