"""The loss of stage 4: Eq. 2 over prompts, some of which hold the pseudo-words of Eq. 5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from ..backbone.diffusion import draw_noise_levels, target_of
from ..backbone.model import Backbone
from ..method.attributes import ATTRIBUTES
from ..method.fusion import AttributeFilter
from .autoencoder import LATENT_CHANNELS
from .networks import make_scheduler, make_unet
from .pairs import MATERIAL, OUTLINE
from .towers import WIDTH

# Of the log of noise over signal at which the UNet trains: its mean.
NOISE_MEAN = -0.4
# Under "*m" the mean is higher by this: the outline is settled where there is much noise.
NOISIER = 0.8
# For a UNet whose latent channels grew: the new ones are faint, and settle where there is less noise.
GROWN_NOISE_MEAN, GROWN_NOISIER = -0.6, 0.9
# Weight in the loss of each channel that was added; an old one has 1. What a prompt asks for lies in the old.
NEW_WEIGHT = 0.4


def denoising_error(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDIMScheduler, x_0: Tensor, t: Tensor
) -> Tensor:
    """The squared error (B,) of a UNet at time steps t (B,) of latents x_0 (B, C, h, w) (Eq. 2)."""
    noise = torch.randn_like(x_0)
    predicted = predict(scheduler.add_noise(x_0, noise, t), t).float()
    return (predicted - target_of(scheduler, x_0, noise, t)).square().mean((1, 2, 3))


@dataclass
class Step:
    """One step: latents (N, C, h, w) and prompts, of which the last read pseudo-words.

    In this order: `shape` rows "*m", `appearance` rows "*a", `both` rows the two.

    shape_from, appearance_from: embeds_ref (rows that hold the token, W) of the references. told_from,
    outline, material: embeds_ref (PROBED, W) of more references, and what is to be told of them, (PROBED,
    OUTLINE**2) and (PROBED, MATERIAL).
    """

    x_0: Tensor
    prompts: list[str]
    shape: int
    appearance: int
    both: int
    shape_from: Tensor
    appearance_from: Tensor
    told_from: Tensor
    outline: Tensor
    material: Tensor

    @property
    def plain(self) -> int:
        """Rows without a pseudo-word: the first."""
        return len(self.prompts) - self.shape - self.appearance - self.both


class FiltersInTraining(nn.Module):
    """New filters for a backbone, and the layers through which their pseudo-words must tell what they saw."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.filters = nn.ModuleDict({name: AttributeFilter.for_backbone(backbone) for name in ATTRIBUTES})
        backbone.filters = dict(self.filters)
        told, width = {"shape": OUTLINE**2, "appearance": MATERIAL}, backbone.text_encoder.config.hidden_size
        self.tell = nn.ModuleDict({name: nn.Linear(width, length) for name, length in told.items()})
        self.__dict__["backbone"] = backbone  # frozen, and no part of this module's state

    def told(self, name: str, embeds_ref: Tensor, truth: Tensor) -> Tensor:
        """How badly pseudo-words tell the truth (N, K) of the references' attribute: a mean square."""
        word = self.backbone.word_embedding(ATTRIBUTES[name].word).float()
        v = self.filters[name](embeds_ref, word)
        return F.mse_loss(self.tell[name]((v - word) / word.norm()).float(), truth)

    def load(self, folder: Path) -> None:
        """Take the filters that `export` wrote."""
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
    """Eq. 2 over pictures and captions, some of which hold the pseudo-words of Eq. 5."""

    telling = 1.0  # weight of what the pseudo-words must tell

    def __init__(
        self, backbone: Callable[[UNet2DConditionModel], Backbone], latents: int = LATENT_CHANNELS
    ) -> None:
        unet = make_unet(latents)
        super().__init__(backbone(unet))
        self.unet, self.scheduler = unet, make_scheduler()
        self.means = (NOISE_MEAN, NOISIER)
        self.old = latents  # channels that were not added
        self.__dict__["weights"] = torch.ones(latents)
        self.__dict__["captured"] = {}  # graphs, and no part of this module's state

    def grown(self, old: int) -> None:
        """The latent channels from number `old` on were added: they weigh less, at lower noise."""
        self.means, self.old = (GROWN_NOISE_MEAN, GROWN_NOISIER), old
        self.weights[old:] = NEW_WEIGHT
        self.weights /= self.weights.mean()

    def forward(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        # a number of rows to each mean
        mean, noisier = self.means
        means = ((step.plain, 0.0), (step.shape, noisier), (step.appearance, 0.0), (step.both, noisier))
        t = torch.cat([draw_noise_levels(self.scheduler, n, mean + more) for n, more in means])
        t, noise = t.to(step.x_0.device), torch.randn_like(step.x_0)
        target = target_of(self.scheduler, step.x_0, noise, t)
        given = (
            self.scheduler.add_noise(step.x_0, noise, t), t, target, self.ids(step), step.shape_from,
            step.appearance_from, step.told_from, step.outline, step.material,
        )  # fmt: skip
        kinds = (step.plain, step.shape, step.appearance, step.both)
        errors, outline, material = self._errors(kinds, given)  # of each channel
        known = errors[:, : self.old].mean(1)
        names = ("plain", "shape", "appearance", "both")
        logs = {name: part.mean() for name, part in zip(names, known.split(kinds), strict=True) if len(part)}
        if self.old < errors.shape[1]:
            logs["added"] = errors[:, self.old :].mean()
        told = {"outline": outline, "material": material}
        error = (errors * self.weights.to(errors)).mean()
        return error + self.telling * sum(told.values()), logs | told

    def _errors(self, kinds: tuple[int, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`Errors`: on one GPU captured once as a graph, and replayed.

        So small a network's step is some thousands of kernels, each sooner done than started.
        """
        if not (given[0].is_cuda and self.training and torch.is_grad_enabled()) or rank_and_count()[1] > 1:
            return Errors(self, kinds)(*given)
        key = (kinds, tuple(x.shape for x in given))
        if key not in self.captured:
            dtype = torch.get_autocast_dtype("cuda")
            with torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False):
                self.captured[key] = torch.cuda.make_graphed_callables(
                    Errors(self, kinds), tuple(x.clone() for x in given), allow_unused_input=True
                )
        return self.captured[key](*given)

    def ids(self, step: Step) -> Tensor:
        """Token ids (N, L) of a step's prompts."""
        tokens = [attribute.token for attribute in ATTRIBUTES.values()]
        return self.backbone.token_ids(step.prompts, tokens).to(step.x_0.device)

    def read(
        self, ids: Tensor, kinds: tuple[int, ...], shape_from: Tensor, appearance_from: Tensor
    ) -> Tensor:
        """Text conditioning (N, L, D) of a step's prompts, by their token ids (N, L).

        kinds: how many are plain, under "*m", under "*a" and under both.
        """
        plain, shape, appearance, _ = kinds
        backbone = self.backbone
        words = {name: backbone.word_embedding(a.word) for name, a in ATTRIBUTES.items()}
        m = self.filters["shape"](shape_from, words["shape"]).float()
        a = self.filters["appearance"](appearance_from, words["appearance"]).float()
        pseudo_words = {
            "*m": torch.cat([m[:shape], m.new_zeros(appearance, WIDTH), m[shape:]]),
            "*a": torch.cat([a.new_zeros(shape, WIDTH), a]),
        }
        text = [backbone.encode_ids(ids[plain:], pseudo_words)]
        if plain:
            with torch.no_grad():
                text.insert(0, backbone.encode_ids(ids[:plain]))
        return torch.cat(text).float()


class Errors(nn.Module):
    """What of a step's loss is tensors alone: what a GPU can replay.

    Takes noised latents (N, C, h, w), timesteps (N,), targets (N, C, h, w), token ids (N, L), and embeds_ref
    and truths as in `Step`; gives the squared errors (N, C) of each channel, and how badly outlines and
    materials are told.
    """

    def __init__(self, loss: DiffusionLoss, kinds: tuple[int, ...]) -> None:
        super().__init__()
        self.unet, self.filters, self.tell = loss.unet, loss.filters, loss.tell
        self.__dict__["loss"] = loss  # its parameters are those above
        self.kinds = kinds

    def forward(
        self, x_t: Tensor, t: Tensor, target: Tensor, ids: Tensor, shape_from: Tensor,
        appearance_from: Tensor, told_from: Tensor, outline: Tensor, material: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        text = self.loss.read(ids, self.kinds, shape_from, appearance_from)
        error = (self.unet(x_t, t, text).sample.float() - target).square().mean((2, 3))
        told = self.loss.told
        return error, told("shape", told_from, outline), told("appearance", told_from, material)


def rank_and_count() -> tuple[int, int]:
    """Which of how many processes this is."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
