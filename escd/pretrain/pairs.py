"""Pictures in fours, two shapes in two appearances, and what a pseudo-word must tell of each."""

from __future__ import annotations

import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.captions import captions_of
from ..data.names import COLOURS, PATTERNS, SHAPES
from ..data.world import Batch, World
from ..evaluation.measure import canonical

PORTION = 128  # pictures that a worker paints for a GPU at a time
# Pictures are painted by fours, two shapes in two appearances: each has a partner that shares only its shape
# (its number in the four with the second bit turned) and one that shares only its appearance (the first).
QUARTET, SAME_SHAPE, SAME_APPEARANCE = 4, 2, 1
# A pseudo-word must also tell what it stands for, through one linear layer that is thrown away, of so many
# references a step: the filter so learns what to say before the UNet has learnt to read it. That of a shape
# tells the outline, on a grid of OUTLINE cells each way; that of an appearance the colours, in SHADES levels
# of red, green and blue, and how much changes from pixel to pixel, in four directions at ROUGH resolutions.
PROBED, OUTLINE, SHADES, ROUGH = 192, 24, 5, 3
MATERIAL = SHADES**3 + 4 * ROUGH


class Pictures(Dataset):
    """The world's pictures from number `first` on, PORTION by PORTION: images, masks and captions.

    Of `several` processes, that of number `rank` has every several-th portion; `taken` of these are left out.
    """

    def __init__(self, world: World, first: int, rank: int = 0, several: int = 1, taken: int = 0) -> None:
        self.world, self.first, self.rank, self.several, self.taken = world, first, rank, several, taken

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, list[tuple[list[str], ...]]]:
        first = self.first + ((self.taken + k) * self.several + self.rank) * PORTION
        b = quartets(self.world, first + torch.arange(PORTION))
        return b.image, b.mask, pair_captions(b)


def quartets(world: World, index: Tensor) -> Batch:
    """The pictures with these numbers, by fours: two shapes in two appearances, all else each its own."""
    four, k = (
        index[::QUARTET].repeat_interleave(QUARTET),
        torch.arange(len(index), device=index.device) % QUARTET,
    )
    return world.batch(index, shape=four + (k & SAME_APPEARANCE), appearance=four + (k & SAME_SHAPE))


def outlines(masks: Tensor) -> Tensor:
    """Silhouettes (N, 1, S, S) centred and at one size, as a grid of coverage (N, OUTLINE**2)."""
    return F.adaptive_avg_pool2d(canonical(masks[:, 0])[:, None], OUTLINE).flatten(1)


def materials(images: Tensor, masks: Tensor) -> Tensor:
    """What of an appearance is to be told, (N, MATERIAL), of images (N, 3, S, S) in [-1, 1] inside masks.

    The square root of a histogram of colours, each pixel shared out among its nearest levels; and the log of
    the mean change of lightness from one pixel to the next, at half the resolution, and so on; each scaled to
    vary about as much as the cells of an outline.
    """
    # the outermost pixels are mixed with the background
    inside = -F.max_pool2d(-(masks > 0.98).float(), 3, 1, 1)
    inside = torch.where(inside.sum((1, 2, 3), keepdim=True) > 0, inside, masks)
    levels = torch.linspace(-1, 1, SHADES, device=images.device)
    near = (1 - (images[..., None] - levels).abs() * (SHADES - 1) / 2).clamp(min=0)  # (N, 3, S, S, SHADES)
    red, green, blue = near.flatten(2, 3).unbind(1)
    counts = torch.einsum("np,npi,npj,npk->nijk", inside.flatten(1), red, green, blue).flatten(1)
    told = [2 * (counts / counts.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()]
    light = images.mean(1, keepdim=True)
    for scale in range(ROUGH):
        if scale:
            light, inside = F.avg_pool2d(light, 2), -F.max_pool2d(-inside, 2)
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            change = (light - light.roll((-down, -right), (2, 3))).abs()
            both = inside * inside.roll((-down, -right), (2, 3))
            mean = (change * both).sum((1, 2, 3)) / both.sum((1, 2, 3)).clamp(min=1)
            told.append(0.4 * (mean + 0.02).log()[:, None])
    return torch.cat(told, 1)


def pair_captions(b: Batch) -> list[tuple[list[str], ...]]:
    """Four lists of captions for each picture: plain, with "*m", with "*a", with both."""
    every = []
    for shape, look, ground, plain in zip(
        b.shape_family, b.appearance_family, b.background_family, b.captions, strict=True
    ):
        named = look if look in PATTERNS else None
        colours = [w for w in plain[0].split() if w in COLOURS] if named else []
        word = shape if shape in SHAPES else "shape"
        every.append((
            plain,
            captions_of("*m", named, colours, ground, "shape"),
            [c for c in captions_of(word, "*a", [], ground, "shape") if "*a" in c],
            [c for c in captions_of("*m", "*a", [], ground, "shape") if "*a" in c],
        ))  # fmt: skip
    return every
