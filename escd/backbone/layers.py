"""A conditioning for each cross-attention layer (P+, Voynov et al. 2023).

The UNet gets the conditionings of its K layers joined along the tokens, (B, K L, D), and each layer reads its
own L of them. So batches, guidance and gradient checkpointing stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .parts import names_of
from .prompts import encode
from .skeleton import pre_hooked

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizerFast


def layers_of(unet: nn.Module) -> list[str]:
    """Paths of the cross-attention layers, in the network's own order."""
    return [path for path, _ in unet.named_modules() if path.endswith(".attn2")]


def coarse_layers(unet: UNet2DConditionModel) -> list[int]:
    """Indices of the layers on latents of the two lowest widths: 16 and 8 of SD, 8 and 4 of `mini`."""
    halvings = sum(block.downsamplers is not None for block in unet.down_blocks)
    lowest = unet.config.sample_size >> halvings
    names = names_of(unet, f"res.{lowest}/attn2+res.{2 * lowest}/attn2")
    return [k for k, path in enumerate(layers_of(unet)) if any(name.startswith(f"{path}.") for name in names)]


def layered(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """`unet` as it takes a conditioning (B, K L, D) for its K cross-attention layers; it is left alone.

    Of a compiled UNet (`torch.compile`) the eager one is taken, because a compiled one ignores new hooks.
    """
    unet = getattr(unet, "_orig_mod", unet)
    paths = layers_of(unet)
    return pre_hooked(unet, {path: _reads(k, len(paths)) for k, path in enumerate(paths)})


def _reads(k: int, count: int) -> Callable[[nn.Module, tuple, dict], tuple]:
    """A pre-hook that leaves a layer the k-th of `count` conditionings."""

    def read(_module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
        text = named["encoder_hidden_states"]
        return inputs, named | {"encoder_hidden_states": text.chunk(count, 1)[k]}

    return read


def is_layered(pseudo_words: Mapping[str, Tensor]) -> bool:
    """Whether one of the embeddings has a row for each layer."""
    return any(v.ndim == 2 for v in pseudo_words.values())


def _count(pseudo_words: Mapping[str, Tensor]) -> int:
    return next(len(v) for v in pseudo_words.values() if v.ndim == 2)


def require_layers(embeds: Mapping[str, Tensor], pseudo_words: Mapping[str, Tensor], length: int) -> None:
    """Raise ValueError for embeds (B, N, D) unless N is K L: K layers, prompts of L = `length` tokens."""
    if not is_layered(pseudo_words):
        return
    count = _count(pseudo_words)
    if {e.shape[1] for e in embeds.values()} != {count * length}:
        raise ValueError(
            f"a pseudo-word has an embedding for each of {count} layers: as prompt_embeds and "
            "negative_prompt_embeds give both that this pipeline's encode_prompt returns"
        )


def encode_layers(
    tokenizer: CLIPTokenizerFast,
    text_encoder: CLIPTextModel,
    prompts: Iterable[str] | str,
    pseudo_words: Mapping[str, Tensor],
    clip_skip: int | None = None,
    of_prompts: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Text conditioning (B, K L, D) of `prompts` for K layers, joined along the tokens.

    A pseudo-word's embedding is (K, D), a row for each layer, or (D,), the same for all; where none has rows,
    it is the plain (B, L, D). of_prompts: in place of some of them an embedding (B, D), a row for each
    prompt. Raises what `prompts.encode` raises.
    """
    of_prompts = dict(of_prompts or {})
    if not is_layered(pseudo_words):
        words = {**pseudo_words, **of_prompts}
        return encode(tokenizer, text_encoder, prompts, words, clip_skip)
    count = _count(pseudo_words)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    each = [
        {token: v[k] if v.ndim == 2 else v for token, v in pseudo_words.items()} | of_prompts
        for k in range(count)
    ]
    return torch.cat([encode(tokenizer, text_encoder, prompts, words, clip_skip) for words in each], 1)
