"""Stage 3, attribute-aware finetuning: the one tuning loop (paper, Eq. 6).

ESCDiffusion and every baseline are configurations of it: a part of the UNet (none for textual inversion,
"all" for DreamBooth, "all/attn2" for what Custom Diffusion tunes) and a pseudo-word, learnt from one image.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm.auto import tqdm

from ..backbone.diffusion import draw_noise_levels, loss_weight, target_of
from ..backbone.halves import half_of
from ..backbone.model import Backbone
from ..backbone.parts import NO_PART, parameters_of
from ..data.images import Source, open_image_and_mask
from .attributes import Attribute, resolve_attribute
from .config import LESS_MEMORY, TuningConfig
from .customization import Customization
from .delta import Change, Factors
from .fusion import pseudo_word
from .optimizers import SETTLING, optimizers_for
from .step import HALVES, NoisedViews, autocast_dtype, fast_arithmetic, predicted, read_ahead, working_copy
from .views import PROMPTS, readable, views_of, warn_without_silhouette


@torch.inference_mode(False)
@torch.enable_grad()
def customize(
    image: Source,
    attribute: Attribute | str,
    backbone: Backbone,
    *,
    steps: int | None = None,
    seed: int | None = None,
    learning_rate: float | None = None,
    part: str | None = None,
    rank: int | None = None,
    mask: Source | None = None,
    callback: Callable[[int, float], bool | None] | None = None,
    progress: bool = True,
    checkpointing: bool | None = None,
    config: TuningConfig | None = None,
    keep_interrupted: bool = True,
) -> Customization:
    """Learn one attribute of one image: a pseudo-word, and the change of one part of the UNet (paper, Eq. 6).

    image: a path, a PIL image, or a tensor (3, H, W) in [-1, 1]; the whole frame is the reference, padded
    to a square as `escd.data.images` says, unless `mask` (white on the subject) or the image's own
    transparency confines the loss; without them, a picture in which no silhouette is found gives a
    warning. attribute: "shape", "appearance", or an `Attribute` of your own. None takes the attribute's
    default for steps, learning_rate and part, and 0 for the seed. steps: 0 gives the attribute filter's
    pseudo-word, untuned. part: what learns, by default the attribute's own half; "none" tunes the pseudo-
    word alone. rank: learn the change at this rank, for a small file that can be exported whole; None
    learns it in full. callback(step, loss) is called after each step and ends the tuning early by
    returning True. Ctrl-C ends it too, and what was learnt until then is returned; with
    keep_interrupted=False the interrupt goes on to the caller, as it must where the result counts as one
    of all its steps. checkpointing: compute the UNet's inner results again on the way back instead of
    keeping them (Chen et al. 2016): the same result for a fraction of the memory and about a third more
    time; None does so where a GPU's memory would not do otherwise (`escd.method.cost`). config: all of these
    numbers at once, from `TuningConfig.of`. The backbone itself is not changed.

    Raises ValueError or TypeError for an unknown attribute or part, for bad numbers and for a number that
    contradicts `config`, ImportError for "adamw8bit" without bitsandbytes, and what `open_image` raises.
    """
    attribute = resolve_attribute(attribute)
    numbers = {"steps": steps, "seed": seed, "learning_rate": learning_rate, "rank": rank}
    if config is None:
        config = TuningConfig.of(attribute, part, backbone, **numbers)
    else:
        _require_agreement(config, attribute, numbers | {"part": part})
    trained = {} if config.part == NO_PART else parameters_of(backbone.unet, config.part)
    halves = HALVES[config.conditioning]
    if halves and half_of(list(trained)) not in halves:
        raise ValueError(
            f"conditioning {config.conditioning!r} is for a part of the {' or the '.join(halves)} alone, "
            f"not for {config.part!r}"
        )
    backbone.word_embedding(attribute.word)  # an unusable word is refused before the work
    picture, inside = open_image_and_mask(image, backbone.image_size, mask)
    if inside is None and config.steps:
        warn_without_silhouette(picture, config.recipe)
    v = (
        pseudo_word(backbone, picture[None].to(backbone.device), attribute, seed=config.seed)[0]
        .float()
        .clone()
        .requires_grad_()
    )
    change = Change(trained) if config.rank is None else Factors(trained, config.rank, config.seed)
    losses: list[float] = []
    if config.steps:
        if checkpointing is None:
            from .cost import needs_checkpointing  # which knows what tuning is

            checkpointing = needs_checkpointing(backbone, config)
        network = working_copy(backbone.unet, change.before, checkpointing)
        try:
            _tune(
                backbone, network, attribute, config, picture, inside, v, change, losses, callback, progress,
                keep_interrupted,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the GPU's memory is full: {LESS_MEMORY}") from error
    delta = change.delta() if losses else {}
    return Customization(
        attribute=attribute,
        pseudo_word=v.detach().cpu(),
        delta=delta,
        part=config.part,
        backbone_identity=backbone.identity_without_filters,
        backbone_name=backbone.name,
        steps=len(losses),
        seed=config.seed,
        config=asdict(config),
        losses=losses,
    )


def _require_agreement(config: TuningConfig, attribute: Attribute, said: dict[str, object]) -> None:
    """Raise ValueError where a call says one thing and the configuration beside it another."""
    if config.attribute != attribute.name:
        raise ValueError(f"the configuration is for {config.attribute!r}, not for {attribute.name!r}")
    for name, value in said.items():
        if value is not None and value != getattr(config, name):
            raise ValueError(
                f"{name}={value!r} contradicts the configuration, which says {getattr(config, name)!r}: "
                f"say it there, dataclasses.replace(config, {name}={value!r})"
            )


def _tune(
    backbone: Backbone,
    network: UNet2DConditionModel,
    attribute: Attribute,
    config: TuningConfig,
    picture: Tensor,
    inside: Tensor | None,
    v: Tensor,
    change: Change,
    losses: list[float],
    callback: Callable[[int, float], bool | None] | None,
    progress: bool,
    keep_interrupted: bool,
) -> None:
    """Change `v` and `change` in place and append to `losses`, step by step."""
    device, unet = backbone.device, backbone.unet
    scheduler = copy.copy(backbone.scheduler)  # which moves its tables to where they are needed
    views, masks, said = views_of(picture, inside, config)
    # An autoencoder of Stable Diffusion's size needs more memory for 16 pictures than a step of tuning.
    few = 1 if backbone.large else 16
    latents = torch.cat([backbone.encode_images(x) for x in views.split(few)]).float()  # (V, 4, h, w)
    masks = F.interpolate(masks, size=latents.shape[-2:], mode="area").to(device)  # (V, 1, h, w)
    del views
    prompts = [readable(backbone, attribute.token, each, PROMPTS[config.recipe]) for each in said]
    optimizers = optimizers_for(v, change, config, fused=backbone.large)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    # Gradients too small for float16 are scaled up on their way back; elsewhere this does nothing.
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype(device, unet.dtype) is torch.float16)
    # All draws come from one generator on the CPU: the same seed is the same run on every device.
    generator = torch.Generator().manual_seed(config.seed)
    timesteps = scheduler.config.num_train_timesteps

    def draw(count: int) -> NoisedViews:
        pick = torch.randint(0, len(latents), (count,), generator=generator)
        if config.noise_level is None:
            t = torch.randint(0, timesteps, (count,), generator=generator).to(device)
        else:
            t = draw_noise_levels(scheduler, count, config.noise_level, generator).to(device)
        x_0 = latents[pick.to(device)]
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        u = torch.rand(count, generator=generator).tolist()
        said = [prompts[k][int(share * len(prompts[k]))] for k, share in zip(pick.tolist(), u, strict=True)]
        if config.dropout and change.parameters():  # the weights learn from it, the pseudo-word does not
            dropped = (torch.rand(count, generator=generator) < config.dropout).tolist()
            said = ["" if drop else prompt for prompt, drop in zip(said, dropped, strict=True)]
        return NoisedViews(
            x_t=scheduler.add_noise(x_0, noise, t).to(unet.dtype),
            t=t,
            target=target_of(scheduler, x_0, noise, t),
            inside=masks[pick.to(device)],
            prompts=said,
        )

    bar = tqdm(
        range(config.steps), desc=f"{attribute.name} ({config.part})", unit="step", disable=not progress
    )
    try:
        with fast_arithmetic(device, unet.dtype):
            kept = None
            if config.conditioning == "cached":
                kept = read_ahead(draw(config.draws), backbone, attribute, config.batch_size)
            for step in bar:
                # The last steps settle: a constant rate leaves one image's noise in the weights.
                left = min(1.0, (config.steps - step) / (SETTLING[config.optimizer] * config.steps))
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * min(left, (step + 1) / 10)
                seen = draw(config.batch_size) if kept is None else kept.some(config.batch_size, generator)
                text = backbone.encode_prompt(seen.prompts, {attribute.token: v}).to(unet.dtype)
                out = predicted(network, change.weights(), seen, text, config.conditioning)
                weight = seen.inside
                if config.noise_level is None:
                    weight = weight * loss_weight(scheduler, seen.t)[:, None, None, None]
                loss = ((out.float() - seen.target).square() * weight).mean() / seen.inside.mean()
                scaler.scale(loss).backward()
                for optimizer in optimizers:
                    scaler.step(optimizer)
                    optimizer.zero_grad(set_to_none=True)
                scaler.update()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"the loss is {losses[-1]} at step {step + 1}; "
                        f"lower the learning rate ({config.learning_rate})"
                    )
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}", refresh=False)
                if callback is not None and callback(step + 1, losses[-1]):
                    break
    except KeyboardInterrupt:
        if not keep_interrupted:
            raise
        warnings.warn(
            f"interrupted after {len(losses)} of {config.steps} steps; what was learnt until here is kept",
            stacklevel=3,
        )
    finally:
        bar.close()
