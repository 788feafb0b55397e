"""Stage 3, attribute-aware finetuning: the one tuning loop (paper, Eq. 6).

ESCDiffusion and every baseline (`baselines.METHODS`) are configurations of it: a part of the UNet (none for
textual inversion, "all" for DreamBooth, "all/kv" for Custom Diffusion) and a pseudo-word, learnt from one
image.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..backbone.diffusion import loss_weight, squared_error
from ..backbone.halves import half_of
from ..backbone.layers import encode_layers, layered, layers_of
from ..backbone.model import Backbone
from ..backbone.parts import NO_PART, parameters_of
from ..backbone.prompts import encode
from ..data.images import Source
from .attributes import Attribute, resolve_attribute
from .baselines import method_named, start_word
from .batches import Batches, EncodedViews
from .config import LESS_MEMORY, TuningConfig
from .cost import needs_checkpointing
from .customization import Customization
from .delta import Change, Factors, LowRank
from .e4t import E4TChange, require_pretrained
from .fusion import pseudo_word
from .optimizers import Updates, optimizers_for
from .prior import prior_batches
from .reference import Reference
from .snapshots import Snapshots
from .step import HALVES, NoisedViews, autocast_dtype, fast_arithmetic, predicted, read_ahead, working_copy

# Called with the number of steps done and the last loss; True ends the tuning.
Callback = Callable[[int, float], bool | None]


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
    callback: Callback | None = None,
    progress: bool = True,
    checkpointing: bool | None = None,
    config: TuningConfig | None = None,
    method: str | None = None,
    keep_interrupted: bool = True,
    snapshots: Snapshots | None = None,
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
    of all its steps. checkpointing: compute the UNet's inner results again in the backward pass instead of
    keeping them (Chen et al. 2016): the same result for a fraction of the memory and about a third more
    time; None does so where a GPU's memory would not suffice otherwise (`escd.method.cost`). config: all of
    these numbers at once, from `TuningConfig.of`. method: a published one of
    `escd.method.baselines.METHODS`, such as "dreambooth"; None is "escd". snapshots: takes customizations
    after some of the steps. The backbone itself is not changed.

    Raises ValueError or TypeError for an unknown attribute, method or part, for bad numbers and for a number
    that contradicts `config` or `method`, ImportError for "adamw8bit" without bitsandbytes, and what
    `open_image` raises.
    """
    snapshots = Snapshots(()) if snapshots is None else snapshots
    snapshots.begin()
    attribute = resolve_attribute(attribute)
    numbers: dict[str, Any] = {"steps": steps, "seed": seed, "learning_rate": learning_rate, "rank": rank}
    if config is None:
        config = method_named(method or "escd").config(attribute, backbone, part, **numbers)
    else:
        if method is not None:
            raise ValueError("config and method were both given: METHODS[method].config makes a config")
        _require_agreement(config, attribute, numbers | {"part": part})
    require_pretrained(backbone, config)
    snapshots.require(config)
    trained = _trained_parameters(backbone, config)
    backbone.word_embedding(attribute.word)  # an unusable word is refused before the work
    reference = Reference.open(image, backbone.image_size, mask)
    if config.steps:
        reference.warn_without_silhouette(config.recipe)
    if checkpointing is None:
        checkpointing = config.steps > 0 and needs_checkpointing(backbone, config)
    made = partial(_customization, attribute=attribute, backbone=backbone, config=config)
    try:
        learnt = _tune(
            backbone, attribute, reference, config, trained,
            checkpointing=checkpointing, callback=callback, progress=progress,
            keep_interrupted=keep_interrupted, snapshots=snapshots, made=made,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory is full: {LESS_MEMORY}") from error
    return made(learnt)


@dataclass(frozen=True)
class Learnt:
    """The result of the loop: a pseudo-word (D,) or (K, D), the weights' change, losses, E4T's encoder."""

    pseudo_word: Tensor
    delta: dict[str, Tensor | LowRank] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    encoder: dict[str, Tensor] | None = None


def _customization(
    learnt: Learnt, attribute: Attribute, backbone: Backbone, config: TuningConfig
) -> Customization:
    return Customization(
        attribute=attribute,
        pseudo_word=learnt.pseudo_word,
        delta=learnt.delta,
        part=config.part,
        backbone_identity=backbone.identity_without_filters,
        backbone_name=backbone.name,
        steps=len(learnt.losses),
        seed=config.seed,
        config=asdict(config) | {"prompts": list(config.prompts)},  # as a file gives it back
        losses=learnt.losses,
        encoder=learnt.encoder,
    )


def _require_agreement(config: TuningConfig, attribute: Attribute, numbers: dict[str, object]) -> None:
    """Raise ValueError where an argument of `customize` contradicts the configuration."""
    if config.attribute != attribute.name:
        raise ValueError(f"the configuration is for {config.attribute!r}, not for {attribute.name!r}")
    for name, value in numbers.items():
        if value is not None and value != getattr(config, name):
            raise ValueError(
                f"{name}={value!r} contradicts the configuration, which says {getattr(config, name)!r}: "
                f"say it there, dataclasses.replace(config, {name}={value!r})"
            )


def _trained_parameters(backbone: Backbone, config: TuningConfig) -> dict[str, nn.Parameter]:
    """The UNet's parameters that learn, by name; ValueError where `conditioning` does not fit the part."""
    trained = {} if config.part == NO_PART else parameters_of(backbone.unet, config.part)
    halves = HALVES[config.conditioning]
    if halves and half_of(list(trained)) not in halves:
        raise ValueError(
            f"conditioning {config.conditioning!r} is for a part of the {' or the '.join(halves)} alone, "
            f"not for {config.part!r}"
        )
    return trained


def _tune(
    backbone: Backbone,
    attribute: Attribute,
    reference: Reference,
    config: TuningConfig,
    trained: dict[str, nn.Parameter],
    *,
    checkpointing: bool,
    callback: Callback | None,
    progress: bool,
    keep_interrupted: bool,
    snapshots: Snapshots,
    made: Callable[[Learnt], Customization],
) -> Learnt:
    """Minimise the loss of Eq. 6 over the pseudo-word and the change of the `trained` parameters."""
    device, dtype = backbone.device, backbone.unet.dtype
    v = _start(backbone, reference, attribute, config)
    change = _change(trained, backbone, reference, config)
    losses: list[float] = []

    def taken() -> Customization:
        return made(_learnt(v, change, losses))

    snapshots.take(0, taken)
    if not config.steps:
        return _learnt(v, change, losses)
    network = working_copy(backbone.unet, change.before, checkpointing)
    network = layered(network) if config.per_layer else network
    # Prompt dropout is for the weights; the pseudo-word alone does not learn from it.
    prompt_dropout = config.dropout if change.parameters() else 0.0
    views = EncodedViews.of(reference, backbone, attribute, config)
    batches = Batches(views, backbone, config, prompt_dropout)
    # Gradients too small for float16 are scaled up in the backward pass.
    scaled = autocast_dtype(device, dtype) is torch.float16
    updates = Updates(optimizers_for(v, change, config, fused=backbone.large), config, device.type, scaled)
    with snapshots.prior():
        prior = prior_batches(backbone, config, progress)
    description = f"{attribute.name} ({config.part})"
    bar = tqdm(range(config.steps), desc=description, unit="step", disable=not progress)
    try:
        with fast_arithmetic(device, dtype):
            cache = None
            if config.conditioning == "cached":
                cache = read_ahead(batches.draw(config.draws), backbone, attribute, config.batch_size)
            for step in bar:
                if cache is None:
                    batch = batches.draw(config.batch_size)
                else:
                    batch = cache.some(config.batch_size, batches.generator)
                class_batch = None if prior is None else prior.draw(len(batch.t))
                both = batch if class_batch is None else batch.joined(class_batch)
                weights = change.weights()
                text, penalty = _read(backbone, attribute, both, v, change, network, weights)
                prediction = predicted(network, weights, both, text.to(dtype), config.conditioning)
                loss = _loss(prediction, batch, class_batch, batches, config)
                loss = loss if penalty is None else loss + penalty
                updates.apply(loss, step)
                losses.append(loss.item())
                _require_finite(losses, config)
                snapshots.take(step + 1, taken)
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
    return _learnt(v, change, losses)


def _change(
    trained: dict[str, nn.Parameter], backbone: Backbone, reference: Reference, config: TuningConfig
) -> Change:
    """What learns beside the pseudo-word."""
    if config.needs_e4t:
        return E4TChange(trained, backbone, reference.image, config)
    return Change(trained) if config.rank is None else Factors(trained, config.rank, config.seed)


def _read(
    backbone: Backbone,
    attribute: Attribute,
    batch: NoisedViews,
    v: Tensor,
    change: Change,
    network: nn.Module,
    weights: dict[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The text conditioning tau(c; v) of a batch; with E4T's encoder, the penalty of what it read."""
    encoders = (backbone.tokenizer, backbone.text_encoder)
    if not isinstance(change, E4TChange) or not change.reads:
        return encode_layers(*encoders, batch.prompts, {attribute.token: v}), None
    words, penalty = change.read(network, weights, batch.x_t, batch.t, v)
    return encode(*encoders, batch.prompts, {attribute.token: words}), penalty


def _learnt(v: Tensor, change: Change, losses: list[float]) -> Learnt:
    """What the loop has learnt so far; `v` and `losses` are the loop's own."""
    delta = change.delta() if losses else change.initial_delta()
    encoder = change.encoder_tensors() if isinstance(change, E4TChange) else None
    return Learnt(v.detach().cpu(), delta, losses, encoder)


def _start(backbone: Backbone, reference: Reference, attribute: Attribute, config: TuningConfig) -> Tensor:
    """The pseudo-word (D,) before the first step, or (K, D) for K layers; with a gradient where it learns."""
    if config.start == "filter":
        images = reference.image[None].to(backbone.device)
        v = pseudo_word(backbone, images, attribute, seed=config.seed)[0]
    else:
        v = backbone.word_embedding(start_word(backbone, attribute, config))
    if config.per_layer:
        v = v.expand(len(layers_of(backbone.unet)), -1)
    return v.float().clone().requires_grad_(config.learn_word)


def _loss(
    prediction: Tensor,
    batch: NoisedViews,
    class_batch: NoisedViews | None,
    batches: Batches,
    config: TuningConfig,
) -> Tensor:
    """The loss of the reference's views and, with prior preservation, of the class images, which follow."""
    loss = tuning_loss(prediction[: len(batch.t)], batch, _weight(batch, batches, config))
    if class_batch is None:
        return loss
    # L + lambda L_prior (prior preservation, Ruiz et al. 2023)
    weight = config.prior_weight * _weight(class_batch, batches, config)
    return loss + tuning_loss(prediction[len(batch.t) :], class_batch, weight)


def tuning_loss(prediction: Tensor, batch: NoisedViews, weight: Tensor) -> Tensor:
    """The masked squared error (paper, Eq. 6), a scalar; `weight` (B, 1, h, w) is the mask M, weighted."""
    # Eq. 6: L(Delta, v) = E || M * (epsilon - epsilon_{theta + Delta}(x_t, t, tau(c; v))) ||^2
    return (squared_error(prediction, batch.target) * weight).mean() / batch.mask.mean()


def _weight(batch: NoisedViews, batches: Batches, config: TuningConfig) -> Tensor:
    """The mask (B, 1, h, w), times the loss weight of each timestep where timesteps are uniform."""
    if config.noise_level is not None:
        return batch.mask
    return batch.mask * loss_weight(batches.scheduler, batch.t)[:, None, None, None]


def _require_finite(losses: list[float], config: TuningConfig) -> None:
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(
            f"the loss is {losses[-1]} at step {len(losses)}; "
            f"lower the learning rate ({config.learning_rate})"
        )
