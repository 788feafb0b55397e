"""Prompts to images, with customized shape and appearance at chosen strengths."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from tqdm import tqdm

from .backbone import Backbone, ImageTower, load_backbone, load_scheduler
from .customization import Customization, customized, load_customizations, require_fit

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MOST = 16_384  # px a side, images of a prompt, steps: more is a slip, and would end with the memory


def _from_zero_on(value: object) -> bool:
    """Whether a value is a real number from 0 on that is finite as a float."""
    try:
        return isinstance(value, Real) and 0 <= float(value) < math.inf
    except OverflowError:  # a whole number of more than 300 digits
        return False


class ESCDPipeline(DiffusionPipeline):
    """Text to image on a backbone with customizations: `*m` in a prompt is the shape, `*a` the appearance.

    A customization's strength s sets its pseudo-word's embedding to e + s (v - e) and its part's weights to
    W0 + s dW, in both branches of guidance; s = 0 is the untouched backbone, s > 1 extrapolates. Its weights
    are in force only for prompts in which its pseudo-word stands. The backbone itself is never changed.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(
        self,
        backbone: Backbone,
        shape: Customization | None = None,
        appearance: Customization | None = None,
        attributes: Iterable[Customization] = (),
    ) -> None:
        """A pipeline on `backbone`; `attributes` are customizations of further attributes.

        Raises ValueError for a customization of another backbone or attribute, or for two with one
        pseudo-word.
        """
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise TypeError(f"the backbone is what escd.load_backbone returns, not {type(backbone).__name__}")
        given = [("shape", shape), ("appearance", appearance), *((None, c) for c in attributes)]
        self.customizations: dict[str, Customization] = {}
        for place, customization in given:
            if customization is None:
                continue
            if not isinstance(customization, Customization):
                raise TypeError(f"a customization is needed, not {type(customization).__name__}")
            attribute = customization.attribute
            if place not in (None, attribute.name):
                raise ValueError(f"{place}= was given a customization of {attribute.name}")
            taken = [c.attribute for c in self.customizations.values()]
            if attribute.token in self.customizations or attribute.name in [a.name for a in taken]:
                raise ValueError(f"two customizations are called {attribute.name} or share {attribute.token}")
            require_fit(customization, backbone)
            self.customizations[attribute.token] = customization
        self.backbone = backbone
        # A scheduler counts its steps: it gets its own, the backbone's is left alone.
        scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
        self.register_modules(**backbone.components | {"scheduler": scheduler})

    @classmethod
    def _get_signature_keys(cls, obj: object) -> tuple[KeysView[str], KeysView[str]]:
        # diffusers reads a pipeline's modules off the arguments of __init__; here a backbone brings them all.
        # Keys of a dict are in order, as its newer releases want them, and equal to a set, as the older do.
        modules = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "image_tower")
        return dict.fromkeys(modules).keys(), {}.keys()

    def to(self, *args: object, **kwargs: object) -> ESCDPipeline:
        """Move the pipeline, and with it the backbone it was made from, as `DiffusionPipeline.to` does."""
        if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
            self.backbone.identity  # noqa: B018  remembered before the weights are rounded
        super().to(*args, **kwargs)
        self.backbone.to(self.device, self.dtype)  # the attribute filters too
        return self

    def enable_sequential_cpu_offload(self, *_: object, **__: object) -> None:
        """Refused: it keeps the weights where a customization cannot reach them."""
        raise NotImplementedError(
            "a customization needs the UNet's weights whole; use enable_model_cpu_offload"
        )

    enable_group_offload = enable_sequential_cpu_offload

    # ---- storing

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the backbone in diffusers layout and the customizations beside it, in `folder`."""
        folder = Path(folder)
        stored = copy.copy(self.backbone)
        stored.scheduler = self.scheduler  # it may have been exchanged
        stored.save_pretrained(folder)
        beside = folder / "customizations"
        beside.mkdir(exist_ok=True)
        for customization in self.customizations.values():
            customization.save(beside / f"{customization.attribute.name}.safetensors")
        names = [customization.attribute.name for customization in self.customizations.values()]
        (beside / "index.json").write_text(json.dumps(names) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        image_tower: ImageTower | str | Path | None = None,
    ) -> ESCDPipeline:
        """A pipeline from what `save_pretrained` wrote, or from any backbone `load_backbone` knows."""
        backbone = load_backbone(folder, device=device, dtype=dtype, image_tower=image_tower)
        beside = Path(folder) / "customizations"
        if not (beside / "index.json").is_file():
            return cls(backbone)
        loaded = load_customizations(beside, backbone)
        pipe = cls(backbone, loaded.pop("shape", None), loaded.pop("appearance", None), loaded.values())
        pipe.scheduler = load_scheduler(folder)
        return pipe

    # ---- generating

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 4.0,
        shape_strength: float = 1.0,
        appearance_strength: float = 1.0,
        strengths: Mapping[str, float] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[[ESCDPipeline, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images of `prompt`, `num_images_per_prompt` of each, prompt by prompt, in `.images`.

        `strengths` maps the names of further attributes to their strengths (default 1). `height` and `width`
        are in pixels, by default the backbone's. `latents` (B, C, h, w) takes the place of drawn noise.
        Guidance is at work above a scale of 1. Prompts with different pseudo-words need different weights, so
        a batch that mixes them runs in groups, and `callback_on_step_end(pipe, step, t, tensors)` is called
        in each; setting `pipe.interrupt` there ends the call early. `output_type`: "pil", "np", "pt" or
        "latent".

        Raises ValueError or TypeError, before any work, for input it cannot use.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("no prompt was given")
        negatives = self._negatives(negative_prompt, len(prompts))
        strength_of = self._strengths(shape_strength, appearance_strength, strengths)
        height = self.backbone.image_size if height is None else height
        width = self.backbone.image_size if width is None else width
        self._check(height, width, num_inference_steps, guidance_scale, num_images_per_prompt, output_type)
        guidance_scale = float(guidance_scale)
        for text in (*prompts, *negatives):
            self.backbone.check_prompt(text, self.customizations)
            if cut := self.backbone.cut_off(text):
                logger.warning("the text encoder does not read so far; cut off: %r", cut)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"unknown tensors {sorted(unknown)}; known: {self._callback_tensor_inputs}")

        prompts = [p for p in prompts for _ in range(num_images_per_prompt)]
        negatives = [n for n in negatives for _ in range(num_images_per_prompt)]
        device = self._execution_device
        scale = self.backbone.vae_scale
        shape = (len(prompts), self.unet.config.in_channels, height // scale, width // scale)
        x_T = self._noise(shape, generator, latents, device)  # (B, C, h, w)

        changing = [t for t, c in self.customizations.items() if c.delta and strength_of[t] != 0]
        groups: dict[tuple[str, ...], list[int]] = {}  # pseudo-words that change weights -> their images
        for i, text in enumerate(prompts):
            standing = self.backbone.pseudo_words_in(text)
            groups.setdefault(tuple(t for t in changing if t in standing), []).append(i)

        pseudo_words = {
            token: c.embedding(self.backbone.word_embedding(c.attribute.word), strength_of[token])
            for token, c in self.customizations.items()
        }
        self.interrupt = False
        done = x_T.clone()
        try:
            with self.progress_bar(total=len(groups) * num_inference_steps) as progress:
                for tokens, rows in groups.items():
                    texts = {"negative_prompt_embeds": negatives} if guidance_scale > 1 else {}
                    texts["prompt_embeds"] = prompts
                    embeds = {
                        name: self.backbone.encode_prompt([text[i] for i in rows], pseudo_words).to(device)
                        for name, text in texts.items()
                    }
                    changes = [(self.customizations[t], strength_of[t]) for t in tokens]
                    with customized(self.backbone.unet, changes):
                        done[rows] = self._denoise(
                            x_T[rows],
                            embeds,
                            num_inference_steps,
                            guidance_scale,
                            [generator[i] for i in rows] if isinstance(generator, list) else generator,
                            callback_on_step_end,
                            callback_on_step_end_tensor_inputs,
                            progress,
                        )
                    if self.interrupt:
                        break
            images = done
            if output_type != "latent":
                decoded = self.backbone.decode_latents(done)
                images = VaeImageProcessor().postprocess(decoded, output_type=output_type)
        finally:
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        x_t: Tensor,  # (B, C, h, w), noise
        embeds: dict[
            str, Tensor
        ],  # negative_prompt_embeds, where guidance is at work, and prompt_embeds: (B, L, D)
        steps: int,
        guidance_scale: float,
        generator: Generator | list[Generator] | None,
        callback: Callable | None,
        tensor_inputs: Sequence[str],
        progress: tqdm,
    ) -> Tensor:
        """Latents (B, C, h, w) of images, from noise; all customizations act in one UNet pass a step."""
        self.scheduler.set_timesteps(steps, device=x_t.device)
        x_t = x_t * self.scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        for i, t in enumerate(self.scheduler.timesteps):
            x_in = self.scheduler.scale_model_input(torch.cat([x_t] * len(embeds)), t)
            # the noise, or the velocity: the scheduler knows which
            predicted = self.unet(x_in, t, encoder_hidden_states=torch.cat(list(embeds.values()))).sample
            if len(embeds) == 2:
                unguided, prompted = predicted.chunk(2)
                predicted = unguided + guidance_scale * (prompted - unguided)
            x_t = self.scheduler.step(predicted, t, x_t, **extra).prev_sample
            if callback is not None:
                tensors = {"latents": x_t, **embeds}
                tensors |= callback(self, i, t, {k: tensors[k] for k in tensor_inputs if k in tensors}) or {}
                x_t = tensors["latents"]
                embeds = {name: tensors[name] for name in embeds}
            if (i + 1) % self.scheduler.order == 0:
                progress.update()
            if self.interrupt:
                break
        return x_t

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: Generator | list[Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents are {tuple(latents.shape)}; {shape} are needed")
        return latents.to(device, self.unet.dtype)

    def _negatives(self, negative_prompt: str | list[str] | None, n: int) -> list[str]:
        """One negative prompt for each of `n` prompts."""
        if negative_prompt is None:
            return [""] * n
        if isinstance(negative_prompt, str):
            return [negative_prompt] * n
        if len(negative_prompt) != n:
            raise ValueError(f"{len(negative_prompt)} negative prompts for {n} prompts")
        return list(negative_prompt)

    def _strengths(
        self, shape_strength: float, appearance_strength: float, strengths: Mapping[str, float] | None
    ) -> dict[str, float]:
        """Pseudo-word -> strength, for what is loaded."""
        if not isinstance(strengths, Mapping | None):
            raise TypeError(f"strengths maps names of attributes to numbers, and is not {strengths!r}")
        by_name = {"shape": shape_strength, "appearance": appearance_strength}
        further = [c.attribute.name for c in self.customizations.values() if c.attribute.name not in by_name]
        for name, s in (strengths or {}).items():
            if name not in further:
                raise ValueError(
                    f"no attribute {name!r}; further ones loaded: {', '.join(further) or 'none'}"
                )
            by_name[name] = s
        for name, s in by_name.items():
            if not _from_zero_on(s):
                raise ValueError(f"the strength of {name} must be a number from 0 on, not {s!r}")
        return {token: float(by_name.get(c.attribute.name, 1.0)) for token, c in self.customizations.items()}

    def _check(
        self, height: int, width: int, steps: int, guidance_scale: float, images: int, output_type: str
    ) -> None:
        """Raise ValueError for numbers that make no image."""
        counts = {"num_inference_steps": steps, "num_images_per_prompt": images}
        for name, value in counts.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
        scale = self.backbone.vae_scale
        sides = {"height": height, "width": width}
        for name, value in sides.items():
            if not isinstance(value, Integral) or value < scale or value % scale:
                raise ValueError(f"{name} must be a multiple of {scale} px, not {value!r}")
        for name, value in (counts | sides).items():
            if value > MOST:
                raise ValueError(f"{name} must be at most {MOST}, not {value}")
        if not _from_zero_on(guidance_scale):
            raise ValueError(f"guidance_scale must be a number from 0 on, not {guidance_scale!r}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
