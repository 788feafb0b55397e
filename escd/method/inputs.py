"""Checks of the arguments of a pipeline's call; each raises ValueError or TypeError before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Generator, Tensor

from .customization import Customization
from .guidance import UNCONDITIONAL
from .sampling import OF_XL

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MOST = 16_384  # px a side, images of a prompt, steps: more is a slip, and would exhaust the memory


def strengths_by_token(
    customizations: Iterable[Customization],
    shape_strength: float,
    appearance_strength: float,
    strengths: Mapping[str, float] | None,
) -> dict[str, float]:
    """The strength of each customization, by its pseudo-word; further attributes have 1 by default."""
    if not isinstance(strengths, Mapping | None):
        raise TypeError(f"strengths maps names of attributes to numbers, and is not {strengths!r}")
    loaded = [customization.attribute for customization in customizations]
    by_name = {"shape": shape_strength, "appearance": appearance_strength}
    further = [attribute.name for attribute in loaded if attribute.name not in by_name]
    for name, s in (strengths or {}).items():
        if name not in further:
            raise ValueError(f"no attribute {name!r}; further ones loaded: {', '.join(further) or 'none'}")
        by_name[name] = s
    for name, s in by_name.items():
        if not is_from_zero_on(s):
            raise ValueError(f"the strength of {name} must be a number from 0 on, not {s!r}")
    return {attribute.token: float(by_name.get(attribute.name, 1.0)) for attribute in loaded}


def negatives_for(negative_prompt: str | list[str] | None, n: int) -> list[str]:
    """One negative prompt for each of `n` prompts."""
    if negative_prompt is None:
        return [""] * n
    if isinstance(negative_prompt, str):
        return [negative_prompt] * n
    if len(negative_prompt) != n:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {n} prompts")
    return list(negative_prompt)


def is_from_zero_on(value: object) -> bool:
    """Whether a value is a real number from 0 on that is finite as a float."""
    try:
        return isinstance(value, Real) and 0 <= float(value) < math.inf
    except OverflowError:  # a whole number of more than 300 digits
        return False


def require_counts(num_inference_steps: int, num_images_per_prompt: int) -> None:
    """Raise ValueError unless both are whole numbers from 1 to MOST."""
    counts = {"num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt}
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        _require_at_most(name, value)


def sides_of(height: int | None, width: int | None, size: int, scale: int) -> tuple[int, int]:
    """Height and width of an image, `size` where None; ValueError unless multiples of `scale` up to MOST."""
    height, width = (size if side is None else side for side in (height, width))
    for name, value in {"height": height, "width": width}.items():
        if not isinstance(value, Integral) or value < scale or value % scale:
            raise ValueError(f"{name} must be a multiple of {scale} px, not {value!r}")
        _require_at_most(name, value)
    return height, width


def _require_at_most(name: str, value: int) -> None:
    if value > MOST:
        raise ValueError(f"{name} must be at most {MOST}, not {value}")


def require_output(guidance_scale: float | None, output_type: str) -> None:
    """Raise ValueError for a guidance scale that is no number from 0 on, or an unknown output type."""
    if guidance_scale is not None and not is_from_zero_on(guidance_scale):
        raise ValueError(f"guidance_scale must be a number from 0 on, not {guidance_scale!r}")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")


def require_text_options(layers: int, clip_skip: int | None, guidance_rescale: float) -> None:
    """Raise ValueError unless clip_skip is below `layers` of the text encoder, and the other in [0, 1]."""
    if clip_skip is not None and not (isinstance(clip_skip, Integral) and 0 <= clip_skip < layers):
        raise ValueError(f"clip_skip is a whole number from 0 to {layers - 1}, not {clip_skip!r}")
    if not isinstance(guidance_rescale, Real) or not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is a share between 0 and 1, not {guidance_rescale!r}")


def require_guidance_from(guidance_from: object) -> None:
    """Raise ValueError unless it is one of `guidance.UNCONDITIONAL`, or None."""
    if guidance_from is None:
        return
    if not isinstance(guidance_from, str) or guidance_from not in UNCONDITIONAL:
        raise ValueError(f"guidance_from is {' or '.join(map(repr, UNCONDITIONAL))}, not {guidance_from!r}")


def tensor_inputs(callback: object, names: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """The names of the tensors that a callback is given; ValueError for unknown ones."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    if unknown := set(names) - {*known, *OF_XL}:
        raise ValueError(f"unknown tensors {sorted(unknown)}; known: {known}")
    return names


def require_embeds(name: str, text: object, embeds: Tensor | None, width: int) -> None:
    """Raise unless `embeds`, where given, is (B, L, width) and takes the place of `text`."""
    if embeds is None:
        return
    if text is not None:
        raise ValueError(f"{name} and {name}_embeds were both given; only one can be used")
    if not isinstance(embeds, Tensor):
        raise TypeError(f"{name}_embeds is a tensor, not {type(embeds).__name__}")
    if embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
        raise ValueError(f"{name}_embeds are {tuple(embeds.shape)}; (B, L, {width}) are needed")


def require_generators(generator: Generator | list[Generator] | None, images: int) -> None:
    """Raise unless there is no generator, one, or a list of one for each image."""
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, Generator | None) or (one is None and isinstance(generator, list)):
            raise TypeError(
                "generator is a torch.Generator (torch.Generator().manual_seed(0)), or a list of one for "
                f"each image, not {type(one).__name__}"
            )
    if isinstance(generator, list) and len(generator) != images:
        raise ValueError(f"{len(generator)} generators for {images} images")
