"""The UNet's two halves as two functions: the way down, with the mid block, and the way up.

One after the other they compute what `unet.forward` computes, to the bit. Apart, a half that is not tuned can
run without gradients, and what the encoder makes of a noised picture can be kept and used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .attention import MathAttention

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def down_path(unet: UNet2DConditionModel, x_t: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
    """Feature maps of conv_in, of every layer of the down blocks and of the mid block, each (B, C, h, w).

    x_t: noised latents (B, C, h, w); t: (B,) timesteps; text: (B, L, D). Bit-equal to what ``unet.forward``
    computes on its way down.
    """
    emb = _time(unet, t, x_t.dtype)
    h = unet.conv_in(x_t)
    maps = [h]
    for block in unet.down_blocks:
        if getattr(block, "has_cross_attention", False):
            h, new = block(hidden_states=h, temb=emb, encoder_hidden_states=text)
        else:
            h, new = block(hidden_states=h, temb=emb)
        maps += new
    if getattr(unet.mid_block, "has_cross_attention", False):
        h = unet.mid_block(h, emb, encoder_hidden_states=text)
    else:
        h = unet.mid_block(h, emb)
    return [*maps, h]


def up_path(unet: UNet2DConditionModel, maps: Sequence[Tensor], t: Tensor, text: Tensor) -> Tensor:
    """The UNet's prediction (B, C, h, w) from the maps of `down_path`; bit-equal to ``unet.forward``."""
    *skips, h = maps
    emb = _time(unet, t, h.dtype)
    # As the UNet itself does: sizes are handed on only where halving and doubling would not meet again.
    uneven = any(side % 2**unet.num_upsamplers for side in maps[0].shape[-2:])
    for block in unet.up_blocks:
        count = len(block.resnets)
        skips, taken = skips[:-count], tuple(skips[-count:])
        size = {"upsample_size": skips[-1].shape[2:] if uneven and skips else None}
        if getattr(block, "has_cross_attention", False):
            size["encoder_hidden_states"] = text
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=taken, **size)
    if unet.conv_norm_out is not None:
        h = unet.conv_act(unet.conv_norm_out(h))
    return unet.conv_out(h)


def _time(unet: UNet2DConditionModel, t: Tensor, dtype: torch.dtype) -> Tensor:
    return unet.time_embedding(unet.time_proj(t).to(dtype))  # (B, E)


class _Path(nn.Module):
    """A way through the UNet as a module, so that `functional_call` can exchange its weights."""

    def __init__(self, unet: UNet2DConditionModel, path: Callable) -> None:
        super().__init__()
        self.unet, self.path = unet, path

    def forward(self, *inputs: object) -> object:
        return self.path(self.unet, *inputs)


def with_weights(
    path: Callable, unet: UNet2DConditionModel, weights: Mapping[str, Tensor], *inputs: object
) -> Tensor | list[Tensor]:
    """`down_path` or `up_path` of `unet` with some of its weights exchanged, by their names in the UNet."""
    named = {f"unet.{name}": w for name, w in weights.items()}
    return functional_call(_Path(unet, path), named, inputs)


def recomputed(module: nn.Module, *inputs: object) -> object:
    """`module(*inputs)`, whose inner results are not kept but computed again on the way back.

    For `unet.enable_gradient_checkpointing`. Where `functional_call` has exchanged the weights, the second
    time sees the exchanged ones too: by then it has put the module's own back, and diffusers' default would
    differentiate those. The second time also takes the first one's attention kernel: PyTorch closes
    `MathAttention` while it goes back.
    """
    weights = dict(module.named_parameters())
    again = MathAttention if MathAttention.is_open() else nullcontext
    return checkpoint(
        functional_call, module, weights, inputs,
        use_reentrant=False, context_fn=lambda: (nullcontext(), again()),
    )  # fmt: skip


def half_of(names: Sequence[str]) -> str | None:
    """ "encoder" or "decoder" when all these parameters are of that half (the mid block is of neither)."""
    places = {name.split(".")[0] for name in names}
    if places and places <= {"conv_in", "down_blocks"}:
        return "encoder"
    if places and places <= {"up_blocks", "conv_norm_out", "conv_out"}:
        return "decoder"
    return None
