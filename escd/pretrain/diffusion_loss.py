"""The loss of stage 4: Eq. 2 under prompts, some of which hold the pseudo-words of Eq. 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..backbone.diffusion import draw_noise_levels, noised, squared_error
from ..backbone.model import Backbone
from ..method.attributes import ATTRIBUTES
from ..method.fusion import AttributeFilter
from .autoencoder import LATENT_CHANNELS
from .networks import make_scheduler, make_unet
from .pairs import MATERIAL, OUTLINE
from .towers import WIDTH
from .wrong_channels import WrongChannels

# Mean of the log noise-to-signal ratio in training, and its increase under "*m": the outline is decided at
# high noise.
NOISE_MEAN, NOISIER = -0.4, 0.8
# The same for a grown UNet: added latent channels have a lower variance and are decided at lower noise.
GROWN_NOISE_MEAN, GROWN_NOISIER = -0.6, 0.9
# Loss weight of each added latent channel, where an old one has 1: the old ones hold what a prompt names.
NEW_WEIGHT = 0.4


def denoising_error(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDIMScheduler, x_0: Tensor, t: Tensor
) -> Tensor:
    """Squared error (B,) of a UNet's prediction at timesteps t (B,) of latents x_0 (B, C, h, w) (Eq. 2)."""
    noise = torch.randn_like(x_0)
    x_t, target = noised(scheduler, x_0, noise, t)
    return squared_error(predict(x_t, t), target).mean((1, 2, 3))


@dataclass
class Step:
    """A batch: latents (N, C, h, w) and N prompts, the last of which hold pseudo-words.

    Rows in this order: plain prompts, `shape` prompts with "*m", `appearance` with "*a", `both` with the two.

    shape_ref, appearance_ref: embeds_ref (rows with the token, W) of their references. probe_ref, outline,
    material: embeds_ref (PROBED, W) of further references and the probes' targets for them, (PROBED,
    OUTLINE**2) and (PROBED, MATERIAL).
    """

    x_0: Tensor
    prompts: list[str]
    shape: int
    appearance: int
    both: int
    shape_ref: Tensor
    appearance_ref: Tensor
    probe_ref: Tensor
    outline: Tensor
    material: Tensor

    @property
    def plain(self) -> int:
        """Number of prompts without a pseudo-word."""
        return len(self.prompts) - self.shape - self.appearance - self.both


class FiltersInTraining(nn.Module):
    """Filters for a backbone, and linear probes that predict an attribute from their pseudo-words.

    The probes are used in training only: they teach a filter what to encode before the UNet can read it.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.filters = nn.ModuleDict({name: AttributeFilter.for_backbone(backbone) for name in ATTRIBUTES})
        backbone.filters = dict(self.filters)
        width, sizes = backbone.text_encoder.config.hidden_size, {"shape": OUTLINE**2, "appearance": MATERIAL}
        self.probe = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.__dict__["backbone"] = backbone  # frozen; kept out of this module's state

    def probe_loss(self, name: str, embeds_ref: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of the probe on the pseudo-words of N references; targets: (N, K)."""
        word = self.backbone.word_embedding(ATTRIBUTES[name].word).float()
        v = self.filters[name](embeds_ref, word)
        return F.mse_loss(self.probe[name]((v - word) / word.norm()).float(), targets)

    def load(self, folder: Path) -> None:
        """Load the filters that `export` wrote."""
        for name, learnt in self.filters.items():
            trained = AttributeFilter.from_pretrained(folder / "filters" / name, torch_dtype=torch.float32)
            learnt.load_state_dict(trained.state_dict())

    def export(self, folder: Path) -> None:
        """Write the filters, in half precision, to folder/filters/<attribute>."""
        for name, learnt in self.filters.items():
            # ModelMixin.half() would change the filter being trained.
            copy = AttributeFilter(**{k: v for k, v in learnt.config.items() if not k.startswith("_")})
            copy.load_state_dict(learnt.state_dict())
            copy.half().save_pretrained(folder / "filters" / name)


class DiffusionLoss(FiltersInTraining):
    """Eq. 2 over images and captions, some of which hold the pseudo-words of Eq. 5, plus the probe loss."""

    probe_weight = 1.0

    def __init__(
        self, backbone: Callable[[UNet2DConditionModel], Backbone], channels: int = LATENT_CHANNELS
    ) -> None:
        unet = make_unet(channels)
        super().__init__(backbone(unet))
        self.unet, self.scheduler = unet, make_scheduler()
        self.set_old_channels(channels)
        # Kept out of this module's state: CUDA graphs, and what makes added channels wrong in training.
        self.__dict__["captured"] = {}
        self.__dict__["wrong_channels"] = None

    def set_old_channels(self, old: int) -> None:
        """Treat the latent channels from number `old` on as added: with a lower weight, at lower noise."""
        weights = torch.ones(self.unet.config.in_channels)
        grown = old < len(weights)
        if grown:
            weights[old:] = NEW_WEIGHT
            weights /= weights.mean()
        self.means = (GROWN_NOISE_MEAN, GROWN_NOISIER) if grown else (NOISE_MEAN, NOISIER)
        self.old_channels, self.__dict__["weights"] = old, weights

    def set_wrong_channels(self, wrong: WrongChannels) -> None:
        """Give rows of a training batch wrong added channels; ValueError for a teacher that does not fit."""
        if self.old_channels == self.unet.config.in_channels:
            raise ValueError("a teacher is for a UNet with added latent channels; this one has none")
        if wrong.channels != self.old_channels:
            raise ValueError(
                f"the teacher has {wrong.channels} latent channels; before the UNet grew it had "
                f"{self.old_channels}"
            )
        self.__dict__["wrong_channels"] = wrong

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        # (rows, increase of the mean) for each kind of prompt
        mean, noisier = self.means
        means = ((step.plain, 0.0), (step.shape, noisier), (step.appearance, 0.0), (step.both, noisier))
        t = torch.cat([draw_noise_levels(self.scheduler, n, mean + more) for n, more in means])
        t, noise = t.to(step.x_0.device), torch.randn_like(step.x_0)
        kinds, ids = (step.plain, step.shape, step.appearance, step.both), self.ids(step)
        x_t, target, wrong = self._noised(step, noise, t, ids, kinds)
        given = (
            x_t, t, target, ids, step.shape_ref,
            step.appearance_ref, step.probe_ref, step.outline, step.material,
        )  # fmt: skip
        errors, outline, material = self._errors(kinds, given)  # errors: (N, C)
        known = errors[:, : self.old_channels].mean(1)
        names = ("plain", "shape", "appearance", "both")
        parts = zip(names, known.split(kinds), wrong.split(kinds), strict=True)
        logs = {name: part[~off].mean() for name, part, off in parts if not off.all()}
        if wrong.any():
            logs["wrong"] = known[wrong].mean()
        weights = self.weights.to(errors).expand_as(errors)
        if self.old_channels < errors.shape[1]:
            logs["added"] = errors[~wrong, self.old_channels :].mean()
            added = torch.arange(errors.shape[1], device=errors.device) >= self.old_channels
            weights = weights.masked_fill(wrong[:, None] & added, 0.0)
        probes = {"outline": outline, "material": material}
        error = (errors * weights).mean()
        return error + self.probe_weight * sum(probes.values()), logs | probes

    def _noised(
        self, step: Step, noise: Tensor, t: Tensor, ids: Tensor, kinds: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents, targets (N, C, h, w), and which rows (N,) have wrong added channels."""
        if self.wrong_channels is None or not torch.is_grad_enabled():
            right = torch.zeros(len(t), dtype=torch.bool, device=t.device)
            return *noised(self.scheduler, step.x_0, noise, t), right
        kind = t.device.type
        dtype, on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # Autocast would keep the copies of weights that are made here, which have no gradients.
        with torch.no_grad(), torch.autocast(kind, dtype, on, cache_enabled=False):
            text = self.read(ids, kinds, step.shape_ref, step.appearance_ref)
            return self.wrong_channels(self.unet, self.scheduler, step.x_0, noise, t, text, step.plain)

    def _errors(self, kinds: tuple[int, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`StepErrors`, on a single GPU as a CUDA graph.

        A step of such a small network is thousands of kernels, whose launches would take most of the time.
        """
        if not (given[0].is_cuda and self.training and torch.is_grad_enabled()) or rank_and_count()[1] > 1:
            return StepErrors(self, kinds)(*given)
        key = (kinds, tuple(x.shape for x in given))
        if key not in self.captured:
            dtype = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False):
                self.captured[key] = torch.cuda.make_graphed_callables(
                    StepErrors(self, kinds), tuple(x.clone() for x in given), allow_unused_input=True
                )
        return self.captured[key](*given)

    def ids(self, step: Step) -> Tensor:
        """Token ids (N, L) of a step's prompts."""
        tokens = [attribute.token for attribute in ATTRIBUTES.values()]
        return self.backbone.token_ids(step.prompts, tokens).to(step.x_0.device)

    def read(self, ids: Tensor, kinds: tuple[int, ...], shape_ref: Tensor, appearance_ref: Tensor) -> Tensor:
        """Text conditioning (N, L, D) of a step's prompts, by their token ids (N, L).

        kinds: numbers of prompts that are plain, with "*m", with "*a" and with both.
        """
        plain, shape, appearance, _ = kinds
        backbone = self.backbone
        words = {name: backbone.word_embedding(a.word) for name, a in ATTRIBUTES.items()}
        m = self.filters["shape"](shape_ref, words["shape"]).float()
        a = self.filters["appearance"](appearance_ref, words["appearance"]).float()
        pseudo_words = {
            "*m": torch.cat([m[:shape], m.new_zeros(appearance, WIDTH), m[shape:]]),
            "*a": torch.cat([a.new_zeros(shape, WIDTH), a]),
        }
        text = [backbone.encode_ids(ids[plain:], pseudo_words)]
        if plain:
            with torch.no_grad():
                text.insert(0, backbone.encode_ids(ids[:plain]))
        return torch.cat(text).float()


class StepErrors(nn.Module):
    """The part of a step's loss that takes and returns only tensors, as a CUDA graph needs it.

    Takes noised latents (N, C, h, w), timesteps (N,), targets (N, C, h, w), token ids (N, L), and embeds_ref
    and probe targets as in `Step`; returns the squared error (N, C) of each latent channel and the probe
    losses of outlines and materials.
    """

    def __init__(self, loss: DiffusionLoss, kinds: tuple[int, ...]) -> None:
        super().__init__()
        self.unet, self.filters, self.probe = loss.unet, loss.filters, loss.probe
        self.__dict__["loss"] = loss  # a parent whose parameters are those above
        self.kinds = kinds

    def forward(
        self, x_t: Tensor, t: Tensor, target: Tensor, ids: Tensor, shape_ref: Tensor,
        appearance_ref: Tensor, probe_ref: Tensor, outline: Tensor, material: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        text = self.loss.read(ids, self.kinds, shape_ref, appearance_ref)
        error = squared_error(self.unet(x_t, t, text).sample, target).mean((2, 3))
        probe_loss = self.loss.probe_loss
        return error, probe_loss("shape", probe_ref, outline), probe_loss("appearance", probe_ref, material)


def rank_and_count() -> tuple[int, int]:
    """This process's number and the number of processes."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
