"""E4T's encoder and weight offsets for a frozen backbone: `python -m escd.pretrain e4t` (Gal et al. 2023).

E4T is a global method: the pseudo-word stands for the whole picture, and the picture that the encoder reads
is the one that is denoised. For `mini` the pictures are the world's; for another backbone, a folder's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..backbone.diffusion import loss_weight, noised, squared_error
from ..backbone.model import Backbone
from ..data.images import open_image
from ..data.world import World
from ..loading import load_backbone, read_backbone
from ..method.attributes import ATTRIBUTES
from ..method.baselines import METHODS, templates_for
from ..method.e4t import E4T, latent_features, squared_length
from ..method.step import autocast_dtype
from .filters import HELD_OUT, images_to_learn_from, save_untuned
from .loop import LoopConfig
from .unet import NAMED_APPEARANCES, NAMED_SHAPES

SEED, UNSEEN = 16, 9016  # of the world's images, and of those that are held out
STANDARD = 256  # images that the mean and deviation of each feature come from
SCORED = 128  # held-out images
PENALTY = METHODS["e4t"].settings["offset_penalty"]


@dataclass
class Captioned:
    """A batch: latents x_0 (N, C, h, w), CLS tokens (N, W), prompts, and the words (N, D) to start from."""

    x_0: Tensor
    cls: Tensor
    prompts: list[str]
    words: Tensor


class E4TLoss(nn.Module):
    """Eq. 2 with the pseudo-word that the encoder reads from the noised latent, and its offset's penalty."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.e4t = backbone.e4t = E4T.for_backbone(backbone)
        # Frozen; kept out of this module's state.
        self.__dict__["backbone"] = backbone
        self.__dict__["empty"] = backbone.encode_prompt([""]).to(backbone.unet.dtype)

    def noised(self, pictures: Captioned) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents, time steps and targets of a batch, drawn anew."""
        scheduler = self.backbone.scheduler
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(pictures.x_0),))
        t, noise = t.to(pictures.x_0.device), torch.randn_like(pictures.x_0)
        x_t, target = noised(scheduler, pictures.x_0, noise, t)
        return x_t.to(self.backbone.unet.dtype), t, target

    def features(self, x_t: Tensor, t: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return latent_features(self.backbone.unet, weights, x_t, t, self.empty)

    def forward(self, pictures: Captioned) -> tuple[Tensor, dict[str, Tensor]]:
        x_t, t, target = self.noised(pictures)
        weights = self.e4t.offset(dict(self.backbone.unet.named_parameters()))
        offset = self.e4t.encoder(pictures.cls, self.features(x_t, t, weights))
        error = self.error(pictures, x_t, t, target, weights, pictures.words + offset)
        length = squared_length(offset)
        return error + PENALTY * length, {"error": error, "squared length": length}

    def error(
        self,
        pictures: Captioned,
        x_t: Tensor,
        t: Tensor,
        target: Tensor,
        weights: dict[str, Tensor],
        v: Tensor,
    ) -> Tensor:
        """Weighted squared error, a scalar, with pseudo-words v (N, D) and `weights` for the UNet's own."""
        tokens = {attribute.token: v for attribute in ATTRIBUTES.values()}
        text = self.backbone.encode_prompt(pictures.prompts, tokens).to(self.backbone.unet.dtype)
        prediction = functional_call(self.backbone.unet, weights, (x_t, t, text)).sample
        error = squared_error(prediction, target).mean((1, 2, 3))
        return (error * loss_weight(self.backbone.scheduler, t)).mean()


class E4TStage:
    """Trains them on the backbone in `folder` and the world's images, or on another backbone and `data`."""

    name = "e4t"
    loop = LoopConfig(images=64_000, batch_size=16, learning_rate=5e-4, decay=0.5, ema_decay=0.999)

    def __init__(self, device: torch.device, backbone: str | Path, data: Path | None = None) -> None:
        torch.manual_seed(SEED)
        if data is None:
            self.backbone = read_backbone(backbone).to(device)
        else:
            dtype = autocast_dtype(device) if device.type == "cuda" else None
            self.backbone = load_backbone(backbone, device=device, dtype=dtype)
            # One state for each backbone.
            self.name = f"{self.name}-{self.backbone.identity_without_filters}"
        self.device, self.heavy = device, []
        self.pictures, unseen, count = _sources(self.backbone, data)
        self.module = E4TLoss(self.backbone).to(device)
        self.prompts = {
            name: templates_for(attribute.recipe, self.backbone) for name, attribute in ATTRIBUTES.items()
        }
        self.held_out = unseen(range(min(count, SCORED)))
        self.fixed = [self._batch(images, 0) for images in self.held_out.split(self.loop.batch_size)]
        self._standardise()

    def _standardise(self) -> None:
        """Take the mean and deviation of the encoder's features from the first images."""
        cls, features = [], []
        for rows in torch.arange(STANDARD).split(self.loop.batch_size):
            pictures = self.batch(int(rows[0]), len(rows))
            with torch.no_grad():
                x_t, t, _ = self.module.noised(pictures)
                features.append(self.module.features(x_t, t, {}))
            cls.append(pictures.cls)
        self.module.e4t.encoder.standardise(torch.cat(cls), torch.cat(features))

    def load(self, folder: Path) -> None:
        """Take an encoder and offsets that `export` wrote."""
        trained = E4T.from_pretrained(folder / "e4t", torch_dtype=torch.float32)
        self.module.e4t.load_state_dict(trained.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Which backbone the state belongs to."""
        return {"backbone": self.backbone.identity_without_filters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError for the state of a training on another backbone."""
        if state != self.state_dict():
            raise ValueError(
                f"this unfinished training is on the backbone {state['backbone']}, not on "
                f"{self.backbone.identity_without_filters}: move its state away, or set ESCD_RUNS to another "
                "folder"
            )

    @torch.no_grad()
    def _batch(self, images: Tensor, first: int) -> Captioned:
        """The images (N, 3, S, S), from number `first` on, under prompts of both attributes by turns."""
        names = list(ATTRIBUTES)
        turns = [names[k % len(names)] for k in range(first, first + len(images))]
        prompts = []
        for k, name in enumerate(turns, first):
            usable = self.prompts[name]
            prompts.append(usable[k // len(names) % len(usable)].format(ATTRIBUTES[name].token))
        words = {name: self.backbone.word_embedding(ATTRIBUTES[name].word).float() for name in names}
        return Captioned(
            x_0=self.backbone.encode_images(images).float(),
            cls=self.backbone.image_tower(images).float(),
            prompts=prompts,
            words=torch.stack([words[name] for name in turns]),
        )

    def batch(self, first: int, count: int) -> Captioned:
        """Training images first ... first + count - 1."""
        return self._batch(self.pictures(range(first, first + count)), first)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Error on held-out images, and with the plain words and the untouched UNet instead.

        Both with the same noise: what was learnt helps when the first is lower.
        """
        scores: dict[str, list[float]] = {"e4t": [], "plain word": []}
        for k, pictures in enumerate(self.fixed):
            with torch.random.fork_rng():
                torch.manual_seed(k)
                scores["e4t"].append(float(self.module(pictures)[1]["error"]))
                torch.manual_seed(k)
                plain = self.module.error(pictures, *self.module.noised(pictures), {}, pictures.words)
                scores["plain word"].append(float(plain))
        return {name: round(sum(errors) / len(errors), 5) for name, errors in scores.items()}

    def grid(self, path: Path) -> None:
        """Rows: held-out images; images under each attribute's first prompt, at zero tuning steps."""
        prompts = {name: prompts[0] for name, prompts in self.prompts.items()}
        save_untuned(path, self.backbone, self.held_out[:4], prompts, method="e4t")

    def export(self, folder: Path) -> None:
        """Write encoder and offsets, in half precision, to folder/e4t."""
        learnt = self.module.e4t
        # ModelMixin.half() would change what is being trained.
        copy = E4T(**{k: v for k, v in learnt.config.items() if not k.startswith("_")})
        copy.load_state_dict(learnt.state_dict())
        copy.half().save_pretrained(folder / "e4t")


Images = Callable[[Sequence[int]], Tensor]  # numbers to images (N, 3, S, S) in [-1, 1]


def _sources(backbone: Backbone, data: Path | None) -> tuple[Images, Images, int]:
    """The images to learn from, those that are held out, and how many of these there are."""
    if data is None:
        shares = {"named_shapes": NAMED_SHAPES, "named_appearances": NAMED_APPEARANCES, "varied": True}
        shares |= {"size": backbone.image_size, "device": backbone.device}
        worlds = [World(seed, **shares) for seed in (SEED, UNSEEN)]
        return *(lambda rows, world=world: world.batch(rows).image for world in worlds), SCORED
    files = images_to_learn_from(data)
    kept = max(1, round(HELD_OUT * len(files)))

    def of(these: list[Path]) -> Images:
        return lambda rows: torch.stack([
            open_image(these[k % len(these)], backbone.image_size).to(backbone.device) for k in rows
        ])  # fmt: skip

    return of(files[kept:]), of(files[:kept]), kept
