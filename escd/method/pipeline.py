"""Prompts to images, with customized shape and appearance at chosen strengths."""

from __future__ import annotations

import copy
import json
import logging
import math
import threading
from collections.abc import Callable, Iterable, KeysView, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral, Real
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn

from ..backbone import prompts as reading
from ..backbone.folder import load_scheduler, write_backbone
from ..backbone.image_tower import ImageTower
from ..backbone.layers import encode_layers, layered, layers_of
from ..backbone.model import Backbone
from ..backbone.skeleton import own
from ..files import together
from ..loading import load_backbone
from .customization import Customization, customized, load_customizations, require_fit
from .sampling import OF_XL, Call, Calls, Group, denoise, of_call

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MOST = 16_384  # px a side, images of a prompt, steps: more is a slip, and would end with the memory


def _from_zero_on(value: object) -> bool:
    """Whether a value is a real number from 0 on that is finite as a float."""
    try:
        return isinstance(value, Real) and 0 <= float(value) < math.inf
    except OverflowError:  # a whole number of more than 300 digits
        return False


# A scheduler counts its steps: it is set and copied by one call at a time.
_SCHEDULING = threading.Lock()
# Where weights move between a GPU and the CPU, they can only be in one place: such calls take turns.
_OFFLOADED = threading.RLock()


class ESCDPipeline(
    DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin
):
    """Text to image on a backbone with customizations: `*m` in a prompt is the shape, `*a` the appearance.

    A customization's strength s sets its pseudo-word's embedding to e + s (v - e) and its part's weights to
    W0 + s dW, in both branches of guidance; s = 0 is the untouched backbone, s > 1 extrapolates. Its weights
    are in force only for prompts in which its pseudo-word stands.

    The backbone is never changed. The pipeline's `unet`, `vae`, `text_encoder` and `image_tower` are modules
    of its own that share the backbone's tensors until they are moved or converted, its tokenizer is a copy;
    what is done to them (LoRA, textual inversion, FreeU, tiling) stays in this pipeline. Calls may run at the
    same time, in threads or in each other's callbacks: each gives the bits it gives alone.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")
    _lora_loadable_modules = ("unet", "text_encoder")

    # What diffusers' callbacks read and set: of the call they were called by, else of the last one.
    num_timesteps = of_call("num_timesteps", "Steps of the call.")
    guidance_scale = _guidance_scale = of_call("guidance_scale", "How far guidance goes; off up to 1.")
    guidance_rescale = of_call("guidance_rescale", "Share of guidance that is scaled back (Lin et al. 2023).")
    clip_skip = of_call("clip_skip", "Last layers of the text encoder that are left out.")
    interrupt = _interrupt = property(
        lambda self: self._calls.current().interrupt,
        lambda self, value: self._calls.interrupt(value),
        doc="Set to True in a callback, it ends the call; from another thread, all calls that run.",
    )

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1

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
        self._calls = Calls()
        self._brought = {name: own(m) for name, m in backbone.components.items() if isinstance(m, nn.Module)}
        scheduler = type(backbone.scheduler).from_config(backbone.scheduler.config)
        tokenizer = reading.copy_of(backbone.tokenizer)
        absent = {name: None for name, m in backbone.components.items() if m is None}
        self.register_modules(**self._brought, **absent, tokenizer=tokenizer, scheduler=scheduler)

    @classmethod
    def _get_signature_keys(cls, obj: object) -> tuple[KeysView[str], KeysView[str]]:
        # diffusers reads a pipeline's modules off the arguments of __init__; here a backbone brings them all.
        # Keys of a dict are in order, as its newer releases want them, and equal to a set, as the older do.
        modules = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "image_tower")
        return dict.fromkeys(modules).keys(), {}.keys()

    def enable_model_cpu_offload(self, *args: object, **kwargs: object) -> None:
        """Keep each network on the CPU until it is needed. The backbone itself stays where it was loaded."""
        if self.backbone.device.type != "cpu":
            logger.warning(
                "the backbone keeps its memory on %s: load it on the CPU to offload all of it (device='cpu')",
                self.backbone.device,
            )
        super().enable_model_cpu_offload(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *_: object, **__: object) -> None:
        """Refused: it keeps the weights where a customization cannot reach them."""
        raise NotImplementedError(
            "a customization needs the UNet's weights whole; use enable_model_cpu_offload"
        )

    enable_group_offload = enable_sequential_cpu_offload

    # Not every release of diffusers has these four on its pipelines.

    def enable_vae_slicing(self) -> None:
        """Decode the images of a batch one by one, for less memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode large images tile by tile, for less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    def load_textual_inversion(self, *args: object, **kwargs: object) -> None:
        """Load words in diffusers' form beside the customizations, as `StableDiffusionPipeline` does.

        Raises ValueError for a word that is a loaded customization's pseudo-word.
        """
        before = set(self.tokenizer.get_added_vocab())
        _unshare(self.text_encoder.get_input_embeddings())
        super().load_textual_inversion(*args, **kwargs)
        new = set(self.tokenizer.get_added_vocab()) - before
        if clash := sorted(new & set(self.customizations)):
            self.unload_textual_inversion(sorted(new))
            raise ValueError(f"{clash[0]!r} is a customization's pseudo-word: give another token=")

    def fuse_lora(self, *args: object, **kwargs: object) -> None:
        """Add loaded LoRAs to the weights, as `StableDiffusionPipeline` does; these are no longer shared."""
        for module in (self.unet, self.text_encoder):
            _unshare(module)
        super().fuse_lora(*args, **kwargs)

    # ---- storing

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the backbone in diffusers layout and the customizations beside it, in `folder`.

        In the backbone's precision, without what `load_lora_weights` and `load_textual_inversion` brought.
        """
        with together(folder) as scratch:
            self._write(scratch)

    def _write(self, folder: Path) -> None:
        stored = copy.copy(self.backbone)
        stored.scheduler = self.scheduler
        for name, brought in self._brought.items():
            if getattr(self, name) is not brought:  # it was exchanged
                setattr(stored, name, getattr(self, name))
        write_backbone(stored, folder)
        beside = folder / "customizations"
        beside.mkdir()
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
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        image_tower: ImageTower | str | Path | None = None,
    ) -> ESCDPipeline:
        """A pipeline from what `save_pretrained` wrote, or from any backbone `load_backbone` knows.

        torch_dtype: diffusers' name for `dtype`; or the dtype of each component, "default" that of the rest.
        """
        if isinstance(torch_dtype, Mapping):
            each = dict(torch_dtype)
            rest = each.pop("default", dtype)
            if unknown := each.keys() - cls._get_signature_keys(cls)[0]:
                raise ValueError(f"torch_dtype names no component {min(unknown)!r} of a pipeline")
            pipe = cls.from_pretrained(folder, device=device, dtype=rest, image_tower=image_tower)
            for name, wanted in each.items():
                pipe.components[name].to(wanted)
            return pipe
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise ValueError(f"dtype= and torch_dtype= are the same thing, not {dtype} and {torch_dtype}")
        dtype = torch_dtype if dtype is None else dtype
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
        prompt: str | list[str] | None = None,
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
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        guidance_rescale: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Images of `prompt`, `num_images_per_prompt` of each, prompt by prompt, in `.images`.

        `strengths` maps the names of further attributes to their strengths (default 1). `height` and `width`
        are in pixels, by default the backbone's. `latents` (B, C, h, w) takes the place of drawn noise.
        Guidance is at work above a scale of 1; `guidance_rescale` scales that share of it back to the
        deviation it has without guidance (Lin et al. 2023). `clip_skip` leaves out so many of the text
        encoder's last layers. `output_type`: "pil", "np", "pt" or "latent".

        `prompt_embeds` and `negative_prompt_embeds` (B, L, D), of any length L, take the place of prompts:
        `encode_prompt` makes them, and what is longer than the text encoder reads, or weighted, is put
        together from several. Which pseudo-words they hold cannot be seen: all loaded customizations are in
        force at their strengths.

        Prompts with different pseudo-words need different weights, so a batch that mixes them runs in groups,
        and `callback_on_step_end(pipe, step, t, tensors)` is called in each, step by step; setting
        `pipe.interrupt` there ends the call after that step, and the images are as far as they are.

        Raises ValueError or TypeError, before any work, for input it cannot use, and FloatingPointError for
        images that are not finite.
        """
        given = {"negative_prompt_embeds": negative_prompt_embeds, "prompt_embeds": prompt_embeds}
        texts = self._texts(prompt, negative_prompt, given)
        strength_of = self._strengths(shape_strength, appearance_strength, strengths)
        height = self.backbone.image_size if height is None else height
        width = self.backbone.image_size if width is None else width
        self._check(height, width, num_inference_steps, guidance_scale, num_images_per_prompt, output_type)
        guidance_scale = float(guidance_scale)
        self._check_text(clip_skip, guidance_rescale)
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        known = (*self._callback_tensor_inputs, *OF_XL)
        if unknown := set(callback_on_step_end_tensor_inputs) - set(known):
            raise ValueError(f"unknown tensors {sorted(unknown)}; known: {self._callback_tensor_inputs}")

        texts = {k: [x for x in each for _ in range(num_images_per_prompt)] for k, each in texts.items()}
        device = self._execution_device
        scale = self.backbone.vae_scale
        count = len(texts["prompt_embeds"])
        shape = (count, self.unet.config.in_channels, height // scale, width // scale)
        x_T = self._noise(shape, generator, latents, device)  # (B, C, h, w)
        pseudo_words = self._pseudo_words(strength_of)

        call = Call(guidance_scale, guidance_rescale, clip_skip)
        self._calls.running.append(call)
        with _OFFLOADED if getattr(self, "_all_hooks", None) else nullcontext():
            try:
                groups, made = [], {}
                for tokens, rows in self._rows_of(texts["prompt_embeds"], strength_of).items():
                    names = list(texts) if guidance_scale > 1 else ["prompt_embeds"]
                    asked = {name: [texts[name][i] for i in rows] for name in names}
                    scheduler = self._scheduler(num_inference_steps, device)
                    group = Group(
                        rows=rows,
                        unet=self._unet([(self.customizations[t], strength_of[t]) for t in tokens], made),
                        scheduler=scheduler,
                        x_t=x_T[rows] * scheduler.init_noise_sigma,
                        embeds=self._embeds(asked, pseudo_words, clip_skip, device),
                        generator=[generator[i] for i in rows] if isinstance(generator, list) else generator,
                        guidance_scale=guidance_scale,
                    )
                    groups.append(group)
                del made
                call.num_timesteps = len(groups[0].scheduler.timesteps)
                with self.progress_bar(total=len(groups) * num_inference_steps) as progress:
                    denoise(
                        groups, self, call, callback_on_step_end, callback_on_step_end_tensor_inputs, progress
                    )
                done = torch.empty_like(x_T)
                for group in groups:
                    done[group.rows] = group.x_t.to(done.dtype)
                images = self._images(done, output_type, strength_of, guidance_scale)
            finally:
                self._calls.running.remove(call)
                self._calls.last = call
                self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        clip_skip: int | None = None,
        shape_strength: float = 1.0,
        appearance_strength: float = 1.0,
        strengths: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """prompt_embeds and negative_prompt_embeds (B, L, D), as a call makes them of these prompts.

        The second is None without guidance. Embeddings of several prompts, concatenated along L, are those
        of a longer one; e + w (x - e) gives the words of x the weight w, e being those of "".
        """
        texts = self._texts(prompt, negative_prompt, {"negative_prompt_embeds": None, "prompt_embeds": None})
        self._check_text(clip_skip, 0.0)
        if not do_classifier_free_guidance:
            del texts["negative_prompt_embeds"]
        texts = {k: [x for x in each for _ in range(num_images_per_prompt)] for k, each in texts.items()}
        strength_of = self._strengths(shape_strength, appearance_strength, strengths)
        device = self._execution_device if device is None else device
        embeds = self._embeds(texts, self._pseudo_words(strength_of), clip_skip, device)
        return embeds["prompt_embeds"], embeds.get("negative_prompt_embeds")

    def _texts(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        given: dict[str, Tensor | None],
    ) -> dict[str, list[str] | list[Tensor]]:
        """Under the names in `given` a text, or the embedding (L, D) given in its place, for each prompt."""
        for name, text, embeds in (
            ("prompt", prompt, given["prompt_embeds"]),
            ("negative_prompt", negative_prompt, given["negative_prompt_embeds"]),
        ):
            if embeds is None:
                continue
            width = self.unet.config.cross_attention_dim
            if text is not None:
                raise ValueError(f"{name} and {name}_embeds were both given; only one can be used")
            if not isinstance(embeds, Tensor):
                raise TypeError(f"{name}_embeds is a tensor, not {type(embeds).__name__}")
            if embeds.ndim != 3 or embeds.shape[-1] != width or 0 in embeds.shape:
                raise ValueError(f"{name}_embeds are {tuple(embeds.shape)}; (B, L, {width}) are needed")
        prompts = given["prompt_embeds"]
        if prompts is None:
            if not isinstance(prompt, str | list | tuple):
                raise TypeError(f"a prompt is a string, not {type(prompt).__name__}; or give prompt_embeds")
            prompts = self._readable([prompt] if isinstance(prompt, str) else list(prompt))
        if not len(prompts):
            raise ValueError("no prompt was given")
        negatives = given["negative_prompt_embeds"]
        if negatives is None:
            negatives = self._readable(self._negatives(negative_prompt, len(prompts)))
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative_prompt_embeds for {len(prompts)} prompts")
        return {"negative_prompt_embeds": list(negatives), "prompt_embeds": list(prompts)}

    def _readable(self, texts: list[str]) -> list[str]:
        """Checked texts, with words of several vectors (textual inversion) written out."""
        for text in texts:
            reading.check_prompt(self.tokenizer, text, self.customizations)
        with reading.reader(self.tokenizer) as reader:
            texts = [self.maybe_convert_prompt(text, reader) for text in texts]
        for text in texts:
            if cut := reading.cut_off(self.tokenizer, text, self.customizations):
                logger.warning("the text encoder does not read so far; cut off: %r", cut)
        return texts

    def _unet(
        self, changes: list[tuple[Customization, float]], made: dict[tuple, Tensor]
    ) -> diffusers.UNet2DConditionModel:
        """The UNet with its weights changed, which takes a conditioning for each layer where one has it."""
        unet = customized(self.unet, changes, made)
        return layered(unet) if self._layers else unet

    @property
    def _layers(self) -> int:
        """How many layers have a conditioning of their own; 0 where no customization needs it."""
        each = any(c.pseudo_word.ndim == 2 for c in self.customizations.values())
        return len(layers_of(self.unet)) if each else 0

    def _pseudo_words(self, strength_of: Mapping[str, float]) -> dict[str, Tensor]:
        dtype = self.text_encoder.dtype
        return {
            token: c.embedding(self.backbone.word_embedding(c.attribute.word).to(dtype), strength_of[token])
            for token, c in self.customizations.items()
        }

    def _rows_of(
        self, prompts: list[str] | list[Tensor], strength_of: Mapping[str, float]
    ) -> dict[tuple[str, ...], list[int]]:
        """The pseudo-words that change weights -> the rows of the prompts that have just these."""
        changing = [t for t, c in self.customizations.items() if c.delta and strength_of[t] != 0]
        rows: dict[tuple[str, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            standing = reading.starred_words(prompt) if isinstance(prompt, str) else changing
            rows.setdefault(tuple(t for t in changing if t in standing), []).append(i)
        return rows

    def _scheduler(self, steps: int, device: torch.device) -> diffusers.SchedulerMixin:
        """The scheduler, set to so many steps, as a copy that a group can count on."""
        with _SCHEDULING:
            self.scheduler.set_timesteps(steps, device=device)
            return copy.deepcopy(self.scheduler)

    def _embeds(
        self,
        asked: Mapping[str, list[str] | list[Tensor]],
        pseudo_words: Mapping[str, Tensor],
        clip_skip: int | None,
        device: torch.device | str,
    ) -> dict[str, Tensor]:
        """Text conditioning (B, L, D) of texts, or of what was given in their place, all equally long."""

        def encode(texts: list[str]) -> Tensor:
            given = (self.tokenizer, self.text_encoder, texts, pseudo_words)
            if self._layers:
                encoded = encode_layers(*given, self._layers, clip_skip)
            else:
                encoded = reading.encode(*given, clip_skip)
            return encoded.to(device, self.unet.dtype)

        embeds = {
            name: encode(each) if isinstance(each[0], str) else torch.stack(each).to(device, self.unet.dtype)
            for name, each in asked.items()
        }
        longest = max(e.shape[1] for e in embeds.values())
        for name, e in embeds.items():
            if self._layers and (e.shape[1] < longest or longest % self._layers):
                raise ValueError(
                    f"{name} are {e.shape[1]} long; for {self._layers} layers give those of encode_prompt, "
                    "for the prompt and the negative prompt"
                )
            if e.shape[1] < longest:  # the empty prompt follows
                empty = encode([""]).expand(len(e), -1, -1)
                filling = [empty] * -(-(longest - e.shape[1]) // empty.shape[1])
                embeds[name] = torch.cat([e, *filling], 1)[:, :longest]
        return embeds

    def _images(
        self, latents: Tensor, output_type: str, strength_of: Mapping[str, float], guidance_scale: float
    ) -> object:
        """Latents (B, C, h, w) as `output_type`; FloatingPointError where they are not finite."""
        images, finite = latents, bool(latents.isfinite().all())
        if output_type != "latent" and finite:
            images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
            finite = bool(images.isfinite().all())
        if not finite:
            used = {f"strength of {self.customizations[t].attribute.name}": s for t, s in strength_of.items()}
            used["guidance_scale"] = guidance_scale
            raise FloatingPointError(
                "the images are not finite numbers: something is too large. Take smaller values "
                f"({', '.join(f'{name} {value:g}' for name, value in used.items())})"
                + (", or load the backbone in float32" if latents.dtype is not torch.float32 else "")
            )
        if output_type == "latent":
            return latents
        return VaeImageProcessor().postprocess(images.clamp(-1, 1), output_type=output_type)

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: Generator | list[Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, Generator | None) or (one is None and isinstance(generator, list)):
                raise TypeError(
                    "generator is a torch.Generator (torch.Generator().manual_seed(0)), or a list of one for "
                    f"each image, not {type(one).__name__}"
                )
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

    def _check_text(self, clip_skip: int | None, guidance_rescale: float) -> None:
        """Raise ValueError for layers that are not there, and for a share that is none."""
        layers = self.text_encoder.config.num_hidden_layers
        if clip_skip is not None and not (isinstance(clip_skip, Integral) and 0 <= clip_skip < layers):
            raise ValueError(f"clip_skip is a whole number from 0 to {layers - 1}, not {clip_skip!r}")
        if not isinstance(guidance_rescale, Real) or not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is a share between 0 and 1, not {guidance_rescale!r}")


def _unshare(module: nn.Module) -> None:
    """Give a module tensors of its own, for what writes into them."""
    for p in module.parameters():
        p.data = p.data.clone()
