"""The views of one reference that an attribute is learnt from, and their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..backbone.model import Backbone
from ..data.captions import FULL_FORMS, captions_of
from ..data.foreground import inner
from ..data.names import PATTERNS
from ..data.world import World
from .config import TuningConfig
from .reference import Reference

# The prompts a reference is shown under name neither its background nor its other attribute: what they
# named, the pseudo-word would be tied to ("{}" is the pseudo-word).
PROMPTS = {
    "shape": ("a {} shape", "a {} shape with appearance appearance", "an object in the shape of {}"),
    "appearance": (
        "a shape shape with {} appearance",
        "a shape with the appearance of {}",
        "an object with {} appearance",
    ),
}
LEAST_CROP = 0.8  # of the side of a varied view


def recoloured(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] with their colours mixed, turned and rescaled, each its own way."""
    n = len(images)
    mix, _ = torch.linalg.qr(torch.randn(n, 3, 3, generator=generator))
    scale = torch.empty(n, 3, 1, 1).uniform_(0.6, 1.4, generator=generator)
    shift = torch.empty(n, 3, 1, 1).uniform_(-0.3, 0.3, generator=generator)
    mixed = torch.einsum("nij,njhw->nihw", mix.to(images), images)
    return (mixed * scale.to(images) + shift.to(images)).clamp(-1, 1)


def reshaped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, H, W), each turned, mirrored, stretched, enlarged and bent."""
    n, (h, w) = len(images), images.shape[-2:]
    u = torch.rand(n, 6, generator=generator)
    angle, zoom = (u[:, 0] - 0.5) * 1.0, 0.45 + 0.6 * u[:, 1]  # zoom < 1 enlarges
    stretch = torch.exp((u[:, 2] - 0.5) * 0.5)
    mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * stretch * mirror, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom * mirror, angle.cos() * zoom / stretch
    theta[:, :, 2] = (u[:, 4:6] - 0.5) * (1 - zoom).clamp(min=0.2)[:, None]
    bend = F.interpolate(
        (torch.rand(n, 2, 4, 4, generator=generator) - 0.5) * 0.35,
        size=(h, w),
        mode="bicubic",
        align_corners=True,
    )
    grid = F.affine_grid(theta, [n, 3, h, w], align_corners=False) + bend.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid.to(images), padding_mode="reflection", align_corners=False)


def tiled(image: Tensor, inside: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Frames (N, 3, H, W) full of the material of an image (3, H, W), pixel by pixel as it is there.

    The largest rectangle within the silhouette `inside` (1, H, W) is repeated, mirrored at its edges, from a
    random offset on. Nothing is interpolated: a material's finest detail is its texture.
    """
    h, w = image.shape[-2:]
    top, left, high, wide = _largest_rectangle(inside[0].cpu().numpy() > 0.5)
    offset = torch.rand(count, 2, generator=generator)

    def mirrored(length: int, size: int, share: Tensor) -> Tensor:
        """Indices (N, length) that run to and fro over `size` pixels."""
        at = (torch.arange(length) + (share * 2 * size).long()[:, None]) % (2 * size)
        return torch.where(at < size, at, 2 * size - 1 - at)

    y, x = top + mirrored(h, high, offset[:, 0]), left + mirrored(w, wide, offset[:, 1])
    return image[:, y[:, :, None], x[:, None, :]].transpose(0, 1)


def _largest_rectangle(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the rectangle within a mask (H, W) with the largest shorter side.

    Of those the largest. The outermost pixels of the mask are mixed with the background, and left out where
    enough is left.
    """
    high, wide = mask.shape
    total = np.zeros((high + 1, wide + 1), int)
    total[1:, 1:] = inner(mask).cumsum(0).cumsum(1)

    def places(h: int, w: int) -> np.ndarray:
        """Where a rectangle of this size lies within."""
        held = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
        return np.argwhere(held == h * w)

    side = max(k for k in range(1, min(high, wide) + 1) if len(places(k, k)))
    best = (side, side)
    for grown in range(side + 1, max(high, wide) + 1):
        sizes = [size for size in ((grown, side), (side, grown)) if size[0] <= high and size[1] <= wide]
        fits = [size for size in sizes if len(places(*size))]
        if not fits:
            break
        best = fits[0]
    found = places(*best)
    top, left = found[len(found) // 2]
    return int(top), int(left), *best


def varied(images: Tensor, weights: Tensor, recipe: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Views (N, 3, H, W) and their weights (N, 1, H, W), each mirrored and cropped; for a shape recoloured.

    A crop is a square of at least `LEAST_CROP` of the side, brought back to the side.
    """
    n = len(images)
    u = torch.rand(n, 4, generator=generator)
    zoom = LEAST_CROP + (1 - LEAST_CROP) * u[:, 0]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(u[:, 1] < 0.5, -zoom, zoom), zoom
    theta[:, :, 2] = (2 * u[:, 2:] - 1) * (1 - zoom)[:, None]
    both = torch.cat([images, weights], 1)
    grid = F.affine_grid(theta, list(both.shape), align_corners=False).to(both)
    both = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
    images, weights = both[:, :-1], both[:, -1:]
    return (recoloured(images, generator) if recipe == "shape" else images), weights


def repainted(
    image: Tensor, inside: Tensor, recipe: str, count: int, seed: int, true_scale: bool = False
) -> tuple[Tensor, list[tuple[str, ...]]]:
    """Images (N, 3, H, W) that keep one attribute of a reference (3, H, W), and prompts that say the rest.

    For a shape, the silhouette `inside` (1, H, W) is filled with the named patterns and colours of the world
    and set on its backgrounds; for an appearance, the world's named shapes are filled with what the reference
    holds inside its silhouette, turned, stretched and bent, or at its own scale (`tiled`). "{}" in a prompt
    is the pseudo-word. The prompt names everything else, so the pseudo-word only has to carry its own
    attribute: the cross-image supervision of the attribute filters, made from the one image there is.
    """
    world, index = World(seed, named_shapes=1.0, named_appearances=1.0), torch.arange(count)
    size = image.shape[-2:]

    def scaled(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", antialias=True).to(image)

    ground, _, grounds = world.backgrounds(index)
    if recipe == "shape":
        texture, pattern, _, colours, _ = world.textures(index)
        # Coverage at the edge is lost with a mask that was found: a pixel's softness stands for it.
        cover = F.avg_pool2d(F.pad(inside.expand(count, -1, -1, -1), (1,) * 4, mode="replicate"), 3, 1)
        painted = scaled(texture) * 2 - 1
        said = [("{}", PATTERNS[k], c) for k, c in zip(pattern.tolist(), colours, strict=True)]
    else:
        mask, names = world.masks(index)
        cover = scaled(mask)
        generator = torch.Generator().manual_seed(seed)
        if true_scale:
            painted = tiled(image, inside, count, generator)
        else:
            painted = reshaped(_filled(image, inside).expand(count, -1, -1, -1), generator)
        said = [(name, "{}", []) for name in names]
    images = painted * cover + (scaled(ground) * 2 - 1) * (1 - cover)
    return images.clamp(-1, 1), [
        tuple(captions_of(shape, look, words, ground, "shape")[:FULL_FORMS])
        for (shape, look, words), ground in zip(said, grounds, strict=True)
    ]


def _filled(image: Tensor, inside: Tensor) -> Tensor:
    """The image (3, H, W) with its silhouette's nearest pixel wherever `inside` (1, H, W) is not."""
    covered = inner(inside[0].cpu().numpy() > 0.5)
    y, x = ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return image[:, torch.from_numpy(y).long(), torch.from_numpy(x).long()]


def plain_prompts(config: TuningConfig) -> tuple[str, ...]:
    """The prompts of the reference as it is; "{}" is the pseudo-word."""
    return config.prompts or PROMPTS[config.recipe]


def views_of(reference: Reference, config: TuningConfig) -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """Views (V, 3, H, W) of a reference, the masks (V, 1, H, W) of their loss, and their prompts.

    A share `config.augmentation` of the views has the other attribute changed. The rest shows the reference
    as it is, under prompts that name neither its background nor its other attribute; with `config.varied`
    it is mirrored, cropped and, for a shape, recoloured (`varied`). Where the silhouette is known, the
    changed views are `repainted`, and their prompts name the new attribute. Where it is not, the whole frame
    is the reference: an appearance is repainted from all of it, and a shape is recoloured only.
    """
    generator = torch.Generator().manual_seed(config.seed)
    image, mask, count = reference.image, reference.mask, config.views
    images = image.expand(count, -1, -1, -1)
    masks = (reference.whole_frame() if mask is None else mask.to(image)).expand(count, -1, -1, -1)
    chosen = torch.rand(count, generator=generator) < config.augmentation
    changed = chosen.to(image.device)[:, None, None, None]
    prompts: list[tuple[str, ...]] = [plain_prompts(config)] * count
    if config.flips:
        mirrored = (torch.arange(count) % 2 == 1).to(image.device)[:, None, None, None]
        images, masks = (torch.where(mirrored, x.flip(-1), x) for x in (images, masks))
    if config.varied:
        images, masks = varied(images, masks, config.recipe, generator)
    if not chosen.any():
        return images, masks, prompts
    silhouette = reference.silhouette
    if silhouette is None and config.recipe == "shape":
        return torch.where(changed, recoloured(images, generator), images), masks, prompts
    if silhouette is None:
        silhouette = reference.whole_frame()
    others, named = repainted(image, silhouette, config.recipe, count, config.seed, config.true_scale)
    prompts = [new if use else old for new, old, use in zip(named, prompts, chosen.tolist(), strict=True)]
    return torch.where(changed, others, images), torch.where(changed, 1.0, masks), prompts


def readable(backbone: Backbone, token: str, prompts: Sequence[str], plain: Sequence[str]) -> list[str]:
    """Prompts with the pseudo-word put in, except those that would be cut off; `plain` if all are."""
    written = [prompt.replace("{}", token) for prompt in prompts]
    complete = [prompt for prompt in written if not backbone.cut_off(prompt, [token])]
    return complete or [prompt.replace("{}", token) for prompt in plain]
