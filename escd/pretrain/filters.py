"""Stage 5 of pretraining: the shape filter and the appearance filter, by cross-image supervision.

A reference and a target share one factor only: their shape, or their appearance. The prompt says the rest of
the target ("a *m shape with striped red appearance on a cyan background"), and the filter's pseudo-word
stands for what is shared. Nothing else of the reference helps to draw the target, so `*m` can carry nothing
but shape. The UNet, the towers and the autoencoder are frozen.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from ..backbone import load_backbone, loss_weight
from ..customization import ATTRIBUTES
from ..encoder import extract_features
from ..fusion import AttributeFilter
from ..world import COLOURS, FULL_FORMS, PATTERNS, SHAPES, Batch, World, captions_of
from .loop import LoopConfig
from .unet import denoising_error


class FilterLoss(nn.Module):
    """Eq. 2 on the target, under a prompt whose pseudo-word the filter made from the reference (Eq. 5)."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__()
        backbone = load_backbone(folder, device=device)
        self.filters = nn.ModuleDict({name: AttributeFilter.for_backbone(backbone) for name in ATTRIBUTES})
        self.__dict__["backbone"] = backbone  # frozen, and no part of this module's state

    def forward(self, batch: tuple[Tensor, Tensor, list[str]]) -> tuple[Tensor, dict[str, Tensor]]:
        embeds_ref, x_0, prompts = batch
        backbone, half = self.backbone, len(x_0) // 2
        words = {
            a.token: self.filters[name](embeds_ref, backbone.word_embedding(a.word)).float()
            for name, a in ATTRIBUTES.items()
        }
        text = backbone.encode_prompt(prompts, words)
        # forward: a compiled UNet would be compiled again for an evaluation
        unet = backbone.unet if self.training else backbone.unet.forward
        scheduler = backbone.scheduler
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x_0),), device=x_0.device)
        error = denoising_error(lambda x_t, t: unet(x_t, t, text).sample, scheduler, x_0, t)
        error = error * loss_weight(scheduler, t)
        return error.mean(), {"shape": error[:half].mean(), "appearance": error[half:].mean()}


class FilterStage:
    name = "filters"
    loop = LoopConfig(images=100_000, batch_size=32, learning_rate=1e-3, decay=0.8)

    def __init__(self, device: torch.device, folder: Path) -> None:
        torch.manual_seed(14)
        self.module = FilterLoss(folder, device)
        self.backbone, self.device = self.module.backbone, device
        self.heavy = [self.backbone.unet]
        # Mostly what has no name: a named shape can be told without looking at the reference's outline.
        self.world = World(seed=14, named_shapes=0.25, named_appearances=0.25, device=device)
        self.fixed = [
            self._batch(
                World(seed=9014, named_shapes=0.25, named_appearances=0.25, device=device), 64 * k, 64
            )
            for k in range(4)
        ]
        self._standardise()

    def load(self, folder: Path) -> None:
        for name, learnt in self.module.filters.items():
            learnt.load_state_dict(self.backbone.filters[name].state_dict())
        self._standardise()  # the UNet that they read may have changed since

    def _standardise(self) -> None:
        known = torch.cat([self._batch(self.world, -128 * k, 128)[0] for k in range(1, 5)])
        for learnt in self.module.filters.values():
            learnt.standardise(known)

    def _prompts(self, target: Batch, first: int) -> list[str]:
        half, out = len(target) // 2, []
        for k, (shape, look, ground) in enumerate(
            zip(target.shape_family, target.appearance_family, target.background_family, strict=True)
        ):
            colours = [w for w in target.captions[k][0].split() if w in COLOURS] if look in PATTERNS else []
            if k < half:
                captions = captions_of("*m", look if look in PATTERNS else None, colours, ground, "shape")
            else:
                captions = captions_of(shape if shape in SHAPES else "shape", "*a", [], ground, "shape")
            out.append(captions[(first + k) % FULL_FORMS])
        return out

    def _batch(self, world: World, first: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
        index = torch.arange(first, first + count)
        other, half = index + (1 << 40), count // 2
        target = world.batch(
            other,
            shape=torch.cat([index[:half], other[half:]]),
            appearance=torch.cat([other[:half], index[half:]]),
        )
        reference = world.batch(index).image
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            embeds_ref = extract_features(self.backbone, reference, seed=first)
            x_0 = self.backbone.encode_images(target.image)
        return embeds_ref.float(), x_0.float(), self._prompts(target, first)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor, list[str]]:
        return self._batch(self.world, first, count)

    def evaluate(self) -> dict[str, float]:
        """Loss on fixed pairs and noise, with the filters' pseudo-words."""
        state = torch.get_rng_state()
        torch.manual_seed(0)
        logs = [self.module(b)[1] for b in self.fixed]
        torch.set_rng_state(state)
        return {k: round(float(torch.stack([x[k] for x in logs]).mean()), 5) for k in logs[0]}

    def grid(self, path: Path) -> None:
        _, x_0, _ = self.fixed[0]
        save_image(self.backbone.decode_latents(x_0) * 0.5 + 0.5, path, nrow=16)

    def export(self, folder: Path) -> None:
        for name, learnt in self.module.filters.items():
            copy = AttributeFilter(**{k: v for k, v in learnt.config.items() if not k.startswith("_")})
            copy.load_state_dict(learnt.state_dict())
            copy.half().save_pretrained(folder / "filters" / name)
