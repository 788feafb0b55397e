"""Reconstruction of held-out images by an autoencoder, beside a linear code of the same rate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..data import world
from ..data.names import SIZE
from .references import LISTS, load_references

PATCH = 8  # px: side of the patches of the linear code


@torch.no_grad()
def autoencoder_scores(vae: AutoencoderKL, images: Tensor, others: Tensor) -> dict[str, float]:
    """PSNR and detail of reconstructions of images (N, 3, 64, 64) in [-1, 1], beside those of a linear code.

    `psnr` is the mean over images, in dB; `detail` is the share of the energy above a quarter of the sampling
    frequency that the reconstructions keep. `pca_psnr` and `pca_detail` are those of a principal component
    analysis of 8 x 8 patches, fitted on `others`, with as many numbers per patch as the latents have. It is
    the best linear code of its patch size.
    """
    halvings = len(vae.config.block_out_channels) - 1
    numbers = vae.config.latent_channels * PATCH**2 // 4**halvings
    decoded = []
    for part in images.split(64):
        latents = vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()
        decoded.append(vae.decode(latents).sample.clamp(-1, 1).float().cpu())
    scores: dict[str, float] = {"images": len(images)}
    for prefix, reconstructions in (("", torch.cat(decoded)), ("pca_", linear_code(images, others, numbers))):
        error = (reconstructions - images).square().flatten(1).mean(1).clamp(min=1e-10)
        scores[f"{prefix}psnr"] = float((10 * torch.log10(4 / error)).mean())
        scores[f"{prefix}detail"] = float(_fine_energy(reconstructions).sum() / _fine_energy(images).sum())
    return scores


def linear_code(images: Tensor, others: Tensor, numbers: int) -> Tensor:
    """Images projected, patch by patch, on the first `numbers` principal components of `others`."""

    def patches(x: Tensor) -> Tensor:
        return F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)  # (N, patches, 3 PATCH**2)

    known = patches(others).flatten(0, 1)
    mean = known.mean(0)
    basis = torch.linalg.eigh(torch.cov((known - mean).T))[1][:, -numbers:]
    coded = (patches(images) - mean) @ basis @ basis.T + mean
    return F.fold(coded.transpose(1, 2), images.shape[-2:], PATCH, stride=PATCH).clamp(-1, 1)


def _fine_energy(images: Tensor) -> Tensor:
    """Energy (N,) above a quarter of the sampling frequency, in any direction."""
    spectrum = torch.fft.fft2(images).abs().square()  # (N, 3, H, W)
    frequency = torch.fft.fftfreq(images.shape[-1])
    fine = (frequency[None].square() + frequency[:, None].square()).sqrt() > 0.25
    return (spectrum * fine).sum((1, 2, 3))


IMAGE_SETS = ("world", "photographs", "tiles")
# Photographs of scikit-image; the linear code is fitted on the others.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
OTHER_PHOTOGRAPHS = ("motorcycle_left.png", "motorcycle_right.png")


@cache
def image_sets() -> dict[str, tuple[Tensor, Tensor]]:
    """Held-out images, and others to fit the linear code on: set -> (N, 3, 64, 64) twice.

    world: renders of held-out families (the code is fitted on training ones). photographs: every 128 px
    window of four photographs, at 64 px (fitted on a fifth scene). tiles: the materials of the evaluation
    list, each at its four quarter turns (fitted on those of the development list).
    """
    held_out, known = world.World(seed=9017, split="heldout"), world.World(seed=9017)
    tiles, others = (
        torch.cat([_turned(m.tile) for m in load_references(which=name).materials]) for name in LISTS
    )
    return {
        "world": (held_out.batch(range(256)).image, known.batch(range(512)).image),
        "photographs": (_windows(PHOTOGRAPHS), _windows(OTHER_PHOTOGRAPHS)),
        "tiles": (tiles * 2 - 1, others * 2 - 1),
    }


def _turned(tile: Tensor) -> Tensor:
    return torch.stack([torch.rot90(tile, turn, (1, 2)) for turn in range(4)])


def _windows(names: Sequence[str], window: int = 128) -> Tensor:
    crops = []
    for name in names:
        picture = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        for top in range(0, picture.height - window + 1, window // 2):
            for left in range(0, picture.width - window + 1, window // 2):
                part = picture.crop((left, top, left + window, top + window))
                pixels = np.array(part.resize((SIZE, SIZE), Image.Resampling.BOX))
                crops.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(crops)
