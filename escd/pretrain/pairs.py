"""Images in quartets, two shapes with two appearances each, and the targets of the filters' probes."""

from __future__ import annotations

import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.captions import captions_of
from ..data.names import COLOURS, PATTERNS, SHAPES
from ..data.world import Batch, World
from ..evaluation.measure import canonical

PORTION = 128  # images that a worker renders for a GPU at a time
# Images come in quartets, two shapes with two appearances each. An image's number in its quartet XOR
# SAME_SHAPE is the partner that shares only its shape; XOR SAME_APPEARANCE, only its appearance.
QUARTET, SAME_SHAPE, SAME_APPEARANCE = 4, 2, 1
# Linear probes predict the attribute from the pseudo-words of PROBED references per step. Targets of a shape:
# the outline on an OUTLINE x OUTLINE grid. Targets of an appearance: a colour histogram with SHADES levels
# per channel, and the local contrast in four directions at ROUGH resolutions.
PROBED, OUTLINE, SHADES, ROUGH = 192, 24, 5, 3
MATERIAL = SHADES**3 + 4 * ROUGH


class Pictures(Dataset):
    """The world's images from number `first` on in portions of PORTION: images, masks and captions.

    Process `rank` of `several` gets every several-th portion, without the first `taken`.
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
    """The images with these numbers, in quartets: two shapes with two appearances, else independent."""
    four, k = (
        index[::QUARTET].repeat_interleave(QUARTET),
        torch.arange(len(index), device=index.device) % QUARTET,
    )
    return world.batch(index, shape=four + (k & SAME_APPEARANCE), appearance=four + (k & SAME_SHAPE))


def outlines(masks: Tensor) -> Tensor:
    """Probe targets (N, OUTLINE**2) of masks (N, 1, S, S): coverage of a grid, centred and equal-size."""
    return F.adaptive_avg_pool2d(canonical(masks[:, 0])[:, None], OUTLINE).flatten(1)


def materials(images: Tensor, masks: Tensor) -> Tensor:
    """Probe targets (N, MATERIAL) of appearances: images (N, 3, S, S) in [-1, 1] within masks (N, 1, S, S).

    The square root of a colour histogram with linear interpolation between levels, and the log of the mean
    absolute difference of neighbouring pixels' lightness at ROUGH resolutions; both scaled to vary about as
    much as the cells of an outline.
    """
    # without the outermost pixels, which are blended with the background
    mask = -F.max_pool2d(-(masks > 0.98).float(), 3, 1, 1)
    mask = torch.where(mask.sum((1, 2, 3), keepdim=True) > 0, mask, masks)
    levels = torch.linspace(-1, 1, SHADES, device=images.device)
    near = (1 - (images[..., None] - levels).abs() * (SHADES - 1) / 2).clamp(min=0)  # (N, 3, S, S, SHADES)
    red, green, blue = near.flatten(2, 3).unbind(1)
    counts = torch.einsum("np,npi,npj,npk->nijk", mask.flatten(1), red, green, blue).flatten(1)
    targets = [2 * (counts / counts.sum(1, keepdim=True).clamp(min=1e-6)).sqrt()]
    light = images.mean(1, keepdim=True)
    for scale in range(ROUGH):
        if scale:
            light, mask = F.avg_pool2d(light, 2), -F.max_pool2d(-mask, 2)
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
            change = (light - light.roll((-down, -right), (2, 3))).abs()
            both = mask * mask.roll((-down, -right), (2, 3))
            mean = (change * both).sum((1, 2, 3)) / both.sum((1, 2, 3)).clamp(min=1)
            targets.append(0.4 * (mean + 0.02).log()[:, None])
    return torch.cat(targets, 1)


def pair_captions(b: Batch) -> list[tuple[list[str], ...]]:
    """Four lists of captions for each image: plain, with "*m", with "*a", with both."""
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
