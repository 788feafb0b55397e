"""A call of the pipeline: what its callbacks read and set, and the pictures that are denoised together."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor
from tqdm import tqdm

from ..backbone.prompts import starred_words
from .guidance import CUSTOMIZED, PLAIN_SCALE, Guidance, Start
from .memory import fetched

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel

    from .customization import Customization
    from .e4t import LatentReader


# Tensors of Stable Diffusion XL that diffusers' official callbacks cut as they cut the prompts': none here.
OF_XL = ("add_text_embeds", "add_time_ids")


@dataclass(eq=False)
class Call:
    """What diffusers' callbacks read from a pipeline, and set, while it runs; each call has its own."""

    guidance_scale: float = PLAIN_SCALE
    guidance_rescale: float = 0.0
    guidance_from: Start = CUSTOMIZED
    clip_skip: int | None = None
    num_timesteps: int = 0
    interrupt: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def of(cls, guidances: Sequence[Guidance], guidance_rescale: float, clip_skip: int | None) -> Call:
        """A call whose prompts have these guidances; it shows that of the largest scale."""
        shown = max(guidances, key=lambda guidance: guidance.guidance_scale)
        return cls(**asdict(shown), guidance_rescale=guidance_rescale, clip_skip=clip_skip)


class Calls:
    """The calls of one pipeline that are running, and the last that ran.

    In a callback "the call" is the one it was called by, whatever else runs at the same time.
    """

    def __init__(self) -> None:
        self.running: list[Call] = []
        self.last = Call()

    def mine(self) -> list[Call]:
        """This thread's running calls, outermost first: a callback may call its pipeline."""
        return [call for call in self.running if call.thread == threading.get_ident()]

    def current(self) -> Call:
        """This thread's innermost call; on a thread without one the latest there is."""
        return (self.mine() or self.running or [self.last])[-1]

    def interrupt(self, value: bool) -> None:
        """Interrupt the call of this thread; on a thread without one (a stop button) all that run."""
        for call in self.mine()[-1:] or self.running or [self.last]:
            call.interrupt = value


def of_call(name: str, about: str) -> property:
    """A property of a pipeline that is one of its current call."""
    return property(
        lambda pipe: getattr(pipe._calls.current(), name),
        lambda pipe, value: setattr(pipe._calls.current(), name, value),
        doc=about,
    )


def padded(embeds: Mapping[str, Tensor], empty: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Text conditionings (B, L, D) extended to one length by the empty prompt's, (1, L, D)."""
    longest = max(e.shape[1] for e in embeds.values())
    extended = {}
    for name, e in embeds.items():
        if e.shape[1] < longest:
            filling = empty().expand(len(e), -1, -1)
            count = -(-(longest - e.shape[1]) // filling.shape[1])
            e = torch.cat([e, *[filling] * count], 1)[:, :longest]
        extended[name] = e
    return extended


def decoded(vae: AutoencoderKL, latents: Tensor, output_type: str, settings: Mapping[str, float]) -> Any:
    """Latents (B, C, h, w) as `output_type`; FloatingPointError, with the settings, where not finite."""
    images, finite = latents, bool(latents.isfinite().all())
    if output_type != "latent" and finite:
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        finite = bool(images.isfinite().all())
    if not finite:
        raise FloatingPointError(
            "the images are not finite numbers: something is too large. Take smaller values "
            f"({', '.join(f'{name} {value:g}' for name, value in settings.items())})"
            + (", or load the backbone in float32" if latents.dtype is not torch.float32 else "")
        )
    if output_type == "latent":
        return latents
    return VaeImageProcessor().postprocess(images.clamp(-1, 1), output_type=output_type)


def initial_noise(
    shape: tuple[int, ...],
    generator: Generator | list[Generator] | None,
    latents: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Initial noise x_T (B, C, h, w) of this shape: drawn, or the `latents` given in its place."""
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents are {tuple(latents.shape)}; {shape} are needed")
    return latents.to(device, dtype)


def rows_by_tokens(
    prompts: Sequence[str | Tensor],
    customizations: Mapping[str, Customization],
    strength_of: Mapping[str, float],
    guidances: Sequence[Guidance],
) -> dict[tuple[tuple[str, ...], Guidance], list[int]]:
    """The pseudo-words that change weights, and guidance -> the rows of the prompts that have just these."""
    changing = [t for t, c in customizations.items() if c.delta and strength_of[t] != 0]
    rows: dict[tuple[tuple[str, ...], Guidance], list[int]] = {}
    for i, (prompt, guidance) in enumerate(zip(prompts, guidances, strict=True)):
        standing = starred_words(prompt) if isinstance(prompt, str) else changing
        rows.setdefault((tuple(t for t in changing if t in standing), guidance), []).append(i)
    return rows


@dataclass
class Group:
    """Images of a batch that need the same weights and guidance."""

    rows: list[int]  # their places in the batch
    unet: UNet2DConditionModel
    # Predicts the branch of guidance without the prompt.
    unconditional_unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    x_t: Tensor  # (B, C, h, w)
    # prompt_embeds and, where there is guidance, negative_prompt_embeds: (B, L, D)
    embeds: dict[str, Tensor]
    generator: Generator | list[Generator] | None
    guidance_scale: float
    guidance_from: Start
    # Gives `embeds` anew at each step, where a pseudo-word is read from the latents (E4T).
    reader: LatentReader | None = None

    def step(self, t: Tensor, guidance_rescale: float) -> None:
        """Denoise by one step; all customizations act in one pass of the UNet."""
        names = ["prompt_embeds"]
        if self.guidance_scale > 1:
            names.insert(0, "negative_prompt_embeds")
            if names[0] not in self.embeds:
                raise ValueError("guidance was turned on by a callback: begin with a guidance_scale above 1")
        x_in = self.scheduler.scale_model_input(self.x_t, t)
        if self.reader is not None:
            self.embeds = self.reader(self.unet, x_in, t)
        passes = [(self.unet, names)]
        if len(names) == 2 and self.unconditional_unet is not self.unet:
            passes = [(self.unconditional_unet, names[:1]), (self.unet, names[1:])]
        # the noise, or the velocity: the scheduler knows which
        predicted = torch.cat([
            fetched(unet)(
                torch.cat([x_in] * len(read)), t,
                encoder_hidden_states=torch.cat([self.embeds[name] for name in read]),
            ).sample
            for unet, read in passes
        ])  # fmt: skip
        if len(names) == 2:
            unguided, prompted = predicted.chunk(2)
            predicted = unguided + self.guidance_scale * (prompted - unguided)
            if guidance_rescale > 0:
                predicted = rescale_noise_cfg(predicted, prompted, guidance_rescale)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": self.generator} if takes_generator else {}
        self.x_t = self.scheduler.step(predicted, t, self.x_t, **extra).prev_sample

    def show(
        self, callback: Callable, pipe: DiffusionPipeline, i: int, t: Tensor, names: Sequence[str]
    ) -> None:
        """Call `callback` after step i, and take the tensors that it gives back."""
        tensors = dict.fromkeys(OF_XL, self.x_t.new_empty(len(self.x_t), 0))
        tensors |= {"latents": self.x_t, **self.embeds}
        tensors |= callback(pipe, i, t, {name: tensors[name] for name in names if name in tensors}) or {}
        self.x_t = tensors["latents"]
        embeds = {name: _all_rows(tensors[name], old, name) for name, old in self.embeds.items()}
        if self.reader and any(not torch.equal(embeds[name], old) for name, old in self.embeds.items()):
            raise ValueError(
                "a callback changed the embeddings of prompts with a pseudo-word that is read from the "
                "latents at each step (E4T): they are computed anew in the next one"
            )
        self.embeds = embeds


def _all_rows(new: Tensor, old: Tensor, name: str) -> Tensor:
    """What a callback gave back for `old` (B, L, D)."""
    if len(new) == len(old):
        return new
    # diffusers' own callbacks turn guidance off by keeping the last row, as that of the one prompt.
    if torch.equal(new, old[-1:]):
        return old
    raise ValueError(f"a callback gave back {name} of {len(new)} pictures; there are {len(old)}")


def denoise(
    groups: list[Group],
    pipe: DiffusionPipeline,
    call: Call,
    callback: Callable | None,
    names: Sequence[str],
    progress: tqdm,
) -> None:
    """Denoise all groups, step by step, so that an interrupted batch is equally far everywhere."""
    for i, t in enumerate(groups[0].scheduler.timesteps):
        for group in groups:
            group.step(t, call.guidance_rescale)
            if callback is not None:
                call.guidance_scale, call.guidance_from = group.guidance_scale, group.guidance_from
                group.show(callback, pipe, i, t, names)
                group.guidance_scale = call.guidance_scale
            if (i + 1) % group.scheduler.order == 0:
                progress.update()
        if call.interrupt:
            break
