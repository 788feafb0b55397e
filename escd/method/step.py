"""One tuning step: a batch of noised views, the prediction for it, and the precision it runs in."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.func import functional_call

from ..backbone.attention import MathAttention
from ..backbone.halves import down_path, half_of, recomputed, up_path, with_weights
from ..backbone.model import Backbone
from .attributes import Attribute

# Which half the part must be of; none: any part.
HALVES = {"joint": (), "half": ("encoder", "decoder"), "cached": ("decoder",)}


@dataclass
class NoisedViews:
    """A batch of noised views: latents x_t and targets (N, C, h, w), timesteps t (N,), masks (N, 1, h, w).

    maps: the outputs of the UNet's encoder, where they are computed ahead (`read_ahead`).
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    mask: Tensor
    prompts: list[str]
    maps: list[Tensor] | None = None

    def some(self, count: int, generator: torch.Generator) -> NoisedViews:
        """A random choice of `count` of them."""
        rows = torch.randint(0, len(self.t), (count,), generator=generator)
        return self.at(rows)

    def joined(self, other: NoisedViews) -> NoisedViews:
        """These and the `other` ones in one batch; neither may have its maps."""
        names = ("x_t", "t", "target", "mask")
        tensors = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in names}
        return NoisedViews(**tensors, prompts=[*self.prompts, *other.prompts])

    def at(self, rows: Tensor) -> NoisedViews:
        there = rows.to(self.t.device)
        return NoisedViews(
            self.x_t[there],
            self.t[there],
            self.target[there],
            self.mask[there],
            [self.prompts[k] for k in rows.tolist()],
            None if self.maps is None else [m[there] for m in self.maps],
        )


@torch.no_grad()
def read_ahead(draws: NoisedViews, backbone: Backbone, attribute: Attribute, batch_size: int) -> NoisedViews:
    """The draws with the untouched encoder's outputs under the attribute's plain word."""
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
    unet: nn.Module, weights: dict[str, Tensor], batch: NoisedViews, text: Tensor, conditioning: str
) -> Tensor:
    """The UNet's prediction (N, C, h, w) for a batch, with `weights` in place of its own (Eq. 6).

    Only `weights` and `text` (N, L, D) carry gradients. conditioning: see `TuningConfig`.
    """
    if conditioning == "joint":
        inputs = (batch.x_t, batch.t)
        return functional_call(unet, weights, inputs, {"encoder_hidden_states": text}).sample
    if half_of(list(weights)) == "encoder":
        maps = with_weights(down_path, unet, weights, batch.x_t, batch.t, text)
        return up_path(unet, maps, batch.t, text.detach())
    maps = batch.maps
    if maps is None:
        with torch.no_grad():
            maps = down_path(unet, batch.x_t, batch.t, text)
    return with_weights(up_path, unet, weights, maps, batch.t, text)


def autocast_dtype(device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype | None:
    """Autocast dtype for tuning a model of this dtype.

    The model's own if it is half precision, else bfloat16 where it is native, float16 on older GPUs, else
    None (no autocast).
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

    With `checkpointing` its activations are recomputed in the backward pass instead of kept. On a CPU
    (`benchmarks/tuning_step.py`) its frozen weights are converted once to `autocast_dtype`: autocast would
    round every weight again in every step. The `trained` ones, which each step replaces, are the UNet's own.
    Its attention there is the plain one, which does not handle rows that are masked completely.
    """
    on_cpu = unet.device.type == "cpu"
    dtype = (autocast_dtype(unet.device, unet.dtype) if on_cpu else None) or unet.dtype
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
    """Autocast to `autocast_dtype`, and on a CPU the attention kernel whose backward pass is fast."""
    with ExitStack() as stack:
        if device.type == "cpu":
            stack.enter_context(MathAttention())
        if (runs := autocast_dtype(device, dtype)) is not None:
            # Autocast would otherwise keep the first step's rounded copies of the weights that learn.
            stack.enter_context(torch.autocast(device.type, runs, cache_enabled=False))
        yield
