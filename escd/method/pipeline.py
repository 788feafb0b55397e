"""Images of prompts, with customized shape and appearance at chosen strengths (paper, Eq. 7)."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from torch import Generator, Tensor, nn

from ..backbone.folder import load_scheduler, write_backbone
from ..backbone.image_tower import ImageTower
from ..backbone.layers import encode_layers, is_layered, layered, require_layers
from ..backbone.model import Backbone
from ..backbone.prompts import check_prompt, copy_of, cut_off, reader
from ..backbone.skeleton import own
from ..files import together
from ..loading import load_backbone
from .adapters import Adapters
from .customization import (
    Customization,
    customized,
    load_customizations,
    require_fit,
    save_customizations,
)
from .e4t import latent_reader, require_encodable
from .guidance import BACKBONE, Guidance, Start, guidance_of
from .inputs import (
    negatives_for,
    require_counts,
    require_embeds,
    require_generators,
    require_guidance_from,
    require_output,
    require_text_options,
    sides_of,
    strengths_by_token,
    tensor_inputs,
)
from .memory import MemorySaving
from .sampling import (
    Call,
    Calls,
    Group,
    decoded,
    denoise,
    initial_noise,
    of_call,
    padded,
    rows_by_tokens,
)

logger = logging.getLogger(__name__)

# A scheduler counts its steps: it is set and copied by one call at a time.
_SCHEDULING = threading.Lock()
# Where weights move between a GPU and the CPU, they can only be in one place: such calls take turns.
_OFFLOADED = threading.RLock()


class ESCDPipeline(
    MemorySaving,
    DiffusionPipeline,
    StableDiffusionMixin,
    Adapters,
):
    """Text to image on a backbone with customizations: `*m` in a prompt is the shape, `*a` the appearance.

    A customization's strength s sets its pseudo-word's embedding to e + s (v - e) and its part's weights to
    W0 + s dW (paper, Eq. 7); s = 0 is the untouched backbone, s > 1 extrapolates. Its weights are used only
    for prompts that contain its pseudo-word, and where `guidance_from` is "customized" in both branches of
    guidance.

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
    guidance_from = property(lambda self: self._calls.current().guidance_from, doc="Of the call; see there.")
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
        tokenizer = copy_of(backbone.tokenizer)
        absent = {name: None for name, m in backbone.components.items() if m is None}
        self.register_modules(**self._brought, **absent, tokenizer=tokenizer, scheduler=scheduler)

    @classmethod
    def _get_signature_keys(cls, obj: object) -> tuple[KeysView[str], KeysView[str]]:
        # diffusers reads a pipeline's modules off the arguments of __init__; here a backbone brings them all.
        # Keys of a dict are in order, as its newer releases want them, and equal to a set, as the older do.
        modules = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "image_tower")
        return dict.fromkeys(modules).keys(), {}.keys()

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
        save_customizations(folder / "customizations", self.customizations.values())

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
        guidance_scale: float | None = None,
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
        guidance_from: Start | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Images of `prompt`, `num_images_per_prompt` of each, prompt by prompt, in `.images`.

        `strengths` maps the names of further attributes to their strengths (default 1). `height` and `width`
        are in pixels, by default the backbone's. `latents` (B, C, h, w) takes the place of drawn noise.
        Guidance is at work above a scale of 1. Its branch without the prompt is predicted by the "customized"
        UNet or by the "backbone", the pipeline's `unet` as it is (Phunyaphibarn et al. 2025). None for either
        is each prompt's default (`default_guidance`). `guidance_rescale` scales that share of guidance back
        to the deviation it has without (Lin et al. 2023). `clip_skip` leaves out so many last layers of the
        text encoder. `output_type`: "pil", "np", "pt" or "latent".

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
        strength_of = strengths_by_token(
            self.customizations.values(), shape_strength, appearance_strength, strengths
        )
        scale = self.backbone.vae_scale
        height, width = sides_of(height, width, self.backbone.image_size, scale)
        require_counts(num_inference_steps, num_images_per_prompt)
        require_output(guidance_scale, output_type)
        require_text_options(self.text_encoder.config.num_hidden_layers, clip_skip, guidance_rescale)
        require_guidance_from(guidance_from)
        names = callback_on_step_end_tensor_inputs
        names = tensor_inputs(callback_on_step_end, names, self._callback_tensor_inputs)
        texts = {k: [x for x in each for _ in range(num_images_per_prompt)] for k, each in texts.items()}
        prompts = texts["prompt_embeds"]
        shape = (len(prompts), self.unet.config.in_channels, height // scale, width // scale)
        require_generators(generator, len(prompts))
        x_T = initial_noise(shape, generator, latents, self._execution_device, self.unet.dtype)
        active = {t: c.attribute for t, c in self.customizations.items() if strength_of[t] != 0}
        guidances = guidance_of(prompts, active, guidance_scale, guidance_from, self.backbone)
        call = Call.of(guidances, guidance_rescale, clip_skip)
        with self._running(call):
            groups = self._groups(texts, strength_of, x_T, generator, num_inference_steps, call, guidances)
            call.num_timesteps = len(groups[0].scheduler.timesteps)
            with self.progress_bar(total=len(groups) * num_inference_steps) as progress:
                denoise(groups, self, call, callback_on_step_end, names, progress)
            x_0 = torch.empty_like(x_T)
            for group in groups:
                x_0[group.rows] = group.x_t.to(x_0.dtype)
            used = {f"strength of {self.customizations[t].attribute.name}": s for t, s in strength_of.items()}
            images = decoded(self.vae, x_0, output_type, used | {"guidance_scale": call.guidance_scale})
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @contextmanager
    def _running(self, call: Call) -> Iterator[None]:
        """While open, `call` runs; where weights move between devices, such calls take turns."""
        self._calls.running.append(call)
        with _OFFLOADED if getattr(self, "_all_hooks", None) else nullcontext():
            try:
                yield
            finally:
                self._calls.running.remove(call)
                self._calls.last = call
                self.maybe_free_model_hooks()

    def _groups(
        self,
        texts: Mapping[str, list[str] | list[Tensor]],
        strength_of: Mapping[str, float],
        x_T: Tensor,
        generator: Generator | list[Generator] | None,
        steps: int,
        call: Call,
        guidances: Sequence[Guidance],
    ) -> list[Group]:
        """The rows of a batch in groups that need the same weights of the UNet and the same guidance."""
        device, pseudo_words = self._execution_device, self._pseudo_words(strength_of)
        names = list(texts) if call.guidance_scale > 1 else ["prompt_embeds"]
        groups: list[Group] = []
        weights: dict[tuple, Tensor] = {}

        def embeds(texts: Mapping, of_prompts: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
            return self._embeds(texts, pseudo_words, call.clip_skip, device, of_prompts)

        together = rows_by_tokens(texts["prompt_embeds"], self.customizations, strength_of, guidances)
        for (tokens, guidance), rows in together.items():
            changes = [(self.customizations[token], strength_of[token]) for token in tokens]
            asked = {name: [texts[name][i] for i in rows] for name in names}
            unets = [customized(self.unet, changes, weights)]
            if changes and guidance.guidance_from == BACKBONE:
                unets.append(self.unet)
            if is_layered(pseudo_words):
                unets = [layered(unet) for unet in unets]
            scheduler = self._scheduler(steps, device)
            group = Group(
                rows=rows,
                unet=unets[0],
                unconditional_unet=unets[-1],
                scheduler=scheduler,
                x_t=x_T[rows] * scheduler.init_noise_sigma,
                embeds=embeds(asked),
                generator=[generator[i] for i in rows] if isinstance(generator, list) else generator,
                **asdict(guidance),
                reader=latent_reader(asked, self.customizations, pseudo_words, strength_of, embeds),
            )
            groups.append(group)
        return groups

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
        require_text_options(self.text_encoder.config.num_hidden_layers, clip_skip, 0.0)
        if not do_classifier_free_guidance:
            del texts["negative_prompt_embeds"]
        texts = {k: [x for x in each for _ in range(num_images_per_prompt)] for k, each in texts.items()}
        strength_of = strengths_by_token(
            self.customizations.values(), shape_strength, appearance_strength, strengths
        )
        require_encodable(texts, self.customizations, strength_of)
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
        width = self.unet.config.cross_attention_dim
        require_embeds("prompt", prompt, given["prompt_embeds"], width)
        require_embeds("negative_prompt", negative_prompt, given["negative_prompt_embeds"], width)
        prompts = given["prompt_embeds"]
        if prompts is None:
            if not isinstance(prompt, str | list | tuple):
                raise TypeError(f"a prompt is a string, not {type(prompt).__name__}; or give prompt_embeds")
            prompts = self._readable([prompt] if isinstance(prompt, str) else list(prompt))
        if not len(prompts):
            raise ValueError("no prompt was given")
        negatives = given["negative_prompt_embeds"]
        if negatives is None:
            negatives = self._readable(negatives_for(negative_prompt, len(prompts)))
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative_prompt_embeds for {len(prompts)} prompts")
        return {"negative_prompt_embeds": list(negatives), "prompt_embeds": list(prompts)}

    def _readable(self, texts: list[str]) -> list[str]:
        """Checked prompts, with words of several vectors (textual inversion) written out."""
        for text in texts:
            check_prompt(self.tokenizer, text, self.customizations)
        with reader(self.tokenizer) as tokenizer:
            texts = [self.maybe_convert_prompt(text, tokenizer) for text in texts]
        for text in texts:
            if cut := cut_off(self.tokenizer, text, self.customizations):
                logger.warning("the text encoder does not read so far; cut off: %r", cut)
        return texts

    def _pseudo_words(self, strength_of: Mapping[str, float]) -> dict[str, Tensor]:
        dtype = self.text_encoder.dtype
        return {
            token: c.embedding(self.backbone.word_embedding(c.attribute.word).to(dtype), strength_of[token])
            for token, c in self.customizations.items()
        }

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
        of_prompts: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Text conditioning (B, L, D) of texts, or of embeddings given in their place, all equally long."""

        def conditioning(texts: list[str], each: Mapping[str, Tensor] | None = of_prompts) -> Tensor:
            encoders = (self.tokenizer, self.text_encoder)
            encoded = encode_layers(*encoders, texts, pseudo_words, clip_skip, each)
            return encoded.to(device, self.unet.dtype)

        embeds = {
            name: conditioning(each)
            if isinstance(each[0], str)
            else torch.stack(each).to(device, self.unet.dtype)
            for name, each in asked.items()
        }
        require_layers(embeds, pseudo_words, self.tokenizer.model_max_length)
        return padded(embeds, lambda: conditioning([""], None))
