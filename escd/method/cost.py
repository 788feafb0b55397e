"""What tuning will take, told before it begins: memory, and time on a CPU.

Nothing is computed. One step goes through a UNet of PyTorch's fake tensors, which have shapes and no numbers:
what the step would keep for its way back is counted, and so are its floating-point operations.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..backbone.halves import down_path, recomputed
from ..backbone.layers import layered, layers_of
from ..backbone.model import Backbone
from ..backbone.parts import NO_PART, parameters_of
from ..backbone.prompts import encode_ids, table_of
from ..backbone.skeleton import hooked
from .config import LESS_MEMORY, TuningConfig
from .e4t import latent_features, offset_shapes, pretrained_on
from .low_rank import factor_numbers
from .step import NoisedViews, autocast_dtype, fast_arithmetic, predicted

WEIGHT = 4  # bytes of a number that learns; its gradient and its moments take as many each
MOMENTS = {"adamw": 2, "muon": 1, "adamw8bit": 0.5}
# Share of a GPU's memory that what is counted here may take: its driver and PyTorch's libraries want theirs,
# and an allocator cannot use all of the rest.
USABLE = 0.85


@dataclass(frozen=True)
class TuningCost:
    """Bytes that tuning holds at its peak, by what they are for, and the operations of all its steps."""

    frozen: int  # the backbone as it is
    learning: int  # what learns, with its gradients and the optimiser's state
    activations: int  # what one step keeps for its way back
    operations: int  # floating-point operations of all steps

    @property
    def total(self) -> int:
        return self.frozen + self.learning + self.activations

    def __str__(self) -> str:
        parts = (
            f"{name} {value / 2**30:.2f}"
            for name, value in (
                ("backbone", self.frozen),
                ("what learns", self.learning),
                ("activations", self.activations),
            )
        )
        return f"about {self.total / 2**30:.2f} GB ({', '.join(parts)})"


def tuning_cost(backbone: Backbone, config: TuningConfig, *, checkpointing: bool | None = None) -> TuningCost:
    """Memory and arithmetic of `customize` with this configuration on this backbone, where it is.

    checkpointing: as `customize` has it. A prediction: allocators round up, and libraries have workspaces of
    their own.
    """
    if checkpointing is None:
        checkpointing = needs_checkpointing(backbone, config)
    dtype = backbone.unet.dtype
    with FakeTensorMode(), torch.device(backbone.device), fast_arithmetic(backbone.device, dtype):
        unet = _fake(backbone.unet, dtype)
        channels, height, width = backbone.latent_shape
        count = config.batch_size * (2 if config.prior_images else 1)
        x_t = torch.empty(count, channels, height, width, dtype=dtype)
        layers = len(layers_of(unet)) if config.per_layer else 1
        unet = layered(unet) if config.per_layer else unet
        tokens = backbone.tokenizer.model_max_length * layers
        text = torch.empty(count, tokens, unet.config.cross_attention_dim, dtype=dtype)
        batch = NoisedViews(
            x_t,
            torch.zeros(count, dtype=torch.long),
            x_t,
            torch.empty(count, 1, height, width),
            [""] * count,
        )
        trained = {} if config.part == NO_PART else parameters_of(unet, config.part)
        if config.rank is not None:
            trained = {name: p for name, p in trained.items() if p.ndim > 1}
        weights = {name: torch.empty_like(p, dtype=torch.float32) for name, p in trained.items()}
        for w in weights.values():
            w.requires_grad_()
        if config.conditioning == "cached":
            with torch.no_grad():
                batch.maps = down_path(unet, batch.x_t, batch.t, text)
        text.requires_grad_()

        def step() -> Tensor:
            if not config.latent_encoder:
                return predicted(unet, weights, batch, text, config.conditioning)
            # E4T's encoder reads the way down, and the text is computed from what it reads.
            features = latent_features(unet, weights, batch.x_t, batch.t, text[:1])
            return predicted(unet, weights, batch, text + features.mean(), config.conditioning)

        kept = _Kept([*unet.parameters(), *weights.values()])
        if checkpointing:
            unet.enable_gradient_checkpointing(kept.recomputed)
        with saved_tensors_hooks(kept.keep, lambda saved: saved):
            step()
        if checkpointing:
            unet.enable_gradient_checkpointing(recomputed)
        with FlopCounterMode(display=False) as counter:
            step().sum().backward()
    frozen = sum(p.nbytes for module in backbone.modules.values() for p in module.parameters())
    runs = autocast_dtype(backbone.device, dtype)
    if backbone.device.type == "cpu" and runs not in (None, dtype):  # `working_copy`'s own
        frozen += runs.itemsize * sum(p.numel() for name, p in unet.named_parameters() if name not in trained)
    learning = sum(
        int(WEIGHT * (2 + MOMENTS[_changes(p, config)]) * _learns(p, config)) for p in trained.values()
    )
    if config.rank is not None:  # the weights they change are made anew in each step, and differentiated
        learning += sum(2 * WEIGHT * p.numel() for p in trained.values())
    if config.needs_e4t:  # AdamW has what was pretrained too; the weights with an offset are made anew
        learning += WEIGHT * (2 + 2) * sum(p.numel() for p in pretrained_on(backbone).parameters())
        learning += sum(2 * WEIGHT * math.prod(shape) for shape in offset_shapes(unet).values())
    learns_word = config.learn_word or config.latent_encoder
    read = count * layers if learns_word else 0  # prompts whose gradient is kept
    activations = kept.bytes + kept.largest + read * _text_activations(backbone)
    if batch.maps is not None:  # of a batch they are counted
        maps = sum(m.nbytes for m in batch.maps) // config.batch_size
        activations += maps * max(0, config.draws - config.batch_size)
    return TuningCost(frozen, learning, activations, counter.get_total_flops() * config.steps)


def needs_checkpointing(backbone: Backbone, config: TuningConfig) -> bool:
    """Whether a GPU has too little memory to keep all that a step computes inside the UNet."""
    if backbone.device.type != "cuda" or not backbone.large:
        return False
    return tuning_cost(backbone, config, checkpointing=False).total > USABLE * memory_for(backbone.device)


def memory_for(device: torch.device) -> int:
    """Bytes of a GPU's memory that are free or this process's own."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def cpu_seconds(cost: TuningCost, side: int = 1024) -> float:
    """Seconds the operations would take at the speed this CPU multiplies matrices now: a lower bound."""
    a = torch.randn(side, side, dtype=autocast_dtype(torch.device("cpu")) or torch.float32)
    a @ a  # the first product sets the library up
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return cost.operations * (time.perf_counter() - start) / (3 * 2 * side**3)


def time_in_words(cost: TuningCost) -> str:
    """The least time that tuning takes on this CPU, in seconds or minutes."""
    seconds = cpu_seconds(cost)
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def relative(rounds: Mapping[str, Sequence[Mapping[str, float]]], to: str) -> dict[str, dict[str, float]]:
    """Of each method and measure the ratio to method `to`: the median over rounds of measurements.

    Within a round, since what slows a machine for minutes slows both.
    """
    return {
        name: {
            key: statistics.median(a[key] / b[key] for a, b in zip(each, rounds[to], strict=True))
            for key in each[0]
        }
        for name, each in rounds.items()
    }


def require_memory(cost: TuningCost, device: torch.device) -> None:
    """Raise MemoryError, with what to do, where a GPU has less memory left than tuning is to take."""
    if device.type != "cuda":
        return
    there = memory_for(device)
    if cost.total > there:
        raise MemoryError(
            f"tuning takes {cost}, and {torch.cuda.get_device_name(device)} has {there / 2**30:.1f} GB left: "
            f"{LESS_MEMORY}"
        )


class _Kept:
    """Counts the bytes that autograd keeps, each storage once, and none of the network's own."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.bytes = 0
        self.largest = 0  # of what is computed again, which is there for one block at a time
        self.known = {p.untyped_storage()._cdata for p in own}
        self.held: list[Tensor] = []  # a storage that is freed could lend its address to the next

    def keep(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held.append(saved)
            self.bytes += storage.nbytes()
        return saved

    def recomputed(self, module: nn.Module, *inputs: object) -> object:
        """Counts what `halves.recomputed` keeps: a block's inputs, the rest for the time it is needed."""
        for x in inputs:
            if isinstance(x, Tensor):
                self.keep(x)
        inside = _Kept(())
        inside.known = set(self.known)
        with saved_tensors_hooks(inside.keep, lambda saved: saved):
            outputs = module(*inputs)
        self.largest = max(self.largest, inside.bytes)
        return outputs


def _text_activations(backbone: Backbone) -> int:
    """Bytes the text encoder keeps of one prompt for the pseudo-word's gradient."""
    encoder = backbone.text_encoder
    kept = _Kept([*encoder.parameters()])
    learning = hooked(encoder, table_of(encoder), lambda _module, _inputs, rows: rows.requires_grad_())
    ids = backbone.token_ids(["shape"]).to(encoder.device)
    with saved_tensors_hooks(kept.keep, lambda saved: saved):
        encode_ids(learning, ids)
    return kept.bytes


def _fake(unet: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """A frozen UNet of this one's shapes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake weights cannot change their type
    try:
        architecture = {name: value for name, value in unet.config.items() if not name.startswith("_")}
        return UNet2DConditionModel(**architecture).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _changes(p: Tensor, config: TuningConfig) -> str:
    """The optimiser of a parameter: Muon is for matrices; what is none, AdamW changes."""
    if config.optimizer == "muon":
        return "muon" if p.ndim > 1 else "adamw"
    return config.optimizer


def _learns(p: Tensor, config: TuningConfig) -> int:
    """Numbers that learn of a parameter."""
    return p.numel() if config.rank is None else factor_numbers(p, config.rank)
