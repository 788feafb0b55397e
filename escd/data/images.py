"""Opening an image and its mask as square tensors.

The whole image is kept: it is rotated as its EXIF says and converted to sRGB, a transparent one is put on
white and its alpha is its mask, the longer side is resized to `size` with antialiasing, and the rest of the
square is filled with the median colour of the border. Of an animation the first frame is used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .pictures import MIN_SIDE, open_picture

Source = str | Path | Image.Image | Tensor


def open_image(source: Source, size: int) -> Tensor:
    """`source` as (3, size, size) in [-1, 1]: a path, a PIL image, or a tensor (3, H, W) in [-1, 1].

    Raises FileNotFoundError, and ValueError for a file that is not a complete image, for one larger than 100
    megapixels or smaller than 8 px, and for a tensor that is not an image in [-1, 1].
    """
    return open_image_and_mask(source, size)[0]


def open_image_and_mask(
    source: Source, size: int, mask: Source | None = None
) -> tuple[Tensor, Tensor | None]:
    """`source` as `open_image` gives it, and its mask (1, size, size), 1 on the subject; None without one.

    `mask` is an image of the same size, white on the subject or with the subject cut out on transparency, or
    a tensor (H, W) or (1, H, W) in [0, 1]; by default the image's own transparency serves, where it has one.
    Errors as for `open_image`; ValueError also for a mask of another size than the image's or without a white
    pixel, and for an image that is fully transparent.
    """
    if isinstance(source, Tensor):
        pixels, alpha = _checked_tensor(source), None
        full_size = tuple(pixels.shape[-2:])
        pixels = _fit(pixels, size).clamp(-1, 1)
    else:
        picture = open_picture(source)
        full_size = (picture.height, picture.width)
        if picture.mode == "RGBA" and picture.getextrema()[3][1] == 0:
            raise ValueError(f"{_named(source)} is fully transparent: there is nothing in it to learn")
        picture = _shrink(picture, size)
        alpha = _to_tensor(picture.getchannel("A")) if picture.mode == "RGBA" else None
        if alpha is not None and alpha.min() >= 0.5:
            alpha = None  # slightly transparent everywhere, or rounded corners: not an outline
        pixels = _to_tensor(_on_white(picture)) * 2 - 1
    if mask is not None:
        alpha = _open_mask(mask, full_size, size)
    border = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)  # (3, N)
    image = _pad(pixels, size, border.median(dim=1).values)
    if alpha is None:
        return image, None
    padded = _pad(alpha, size, torch.zeros(1))
    if padded.max() < 0.5:
        most = f"nothing in it is above {float(padded.max()):.2f} at {size} px"
        if mask is None:
            raise ValueError(
                f"{_named(source)} is too transparent for its alpha to be its silhouette ({most}): pass mask="
            )
        raise ValueError(f"the mask is empty: it must be white (1) on the subject, and {most}")
    return image, padded


def image_files(folder: Path, *, deep: bool = False) -> list[Path]:
    """The images of a folder, with `deep` also of its subfolders, in the order of their names."""
    endings = Image.registered_extensions()
    files = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in files if file.suffix.lower() in endings and file.is_file())


def _named(source: Source) -> str:
    return str(source) if isinstance(source, (str, Path)) else "the image"


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _shrink(picture: Image.Image, size: int) -> Image.Image:
    """`picture` with its longer side resized to `size`."""
    scale = size / max(picture.size)
    fitted = tuple(max(1, round(side * scale)) for side in picture.size)
    return picture.resize(fitted, Image.Resampling.BICUBIC)


def _fit(pixels: Tensor, size: int) -> Tensor:
    """`pixels` (C, H, W) with its longer side resized to `size`, as `_shrink` does for pictures."""
    h, w = pixels.shape[-2:]
    scale = size / max(h, w)
    fitted = (max(1, round(h * scale)), max(1, round(w * scale)))
    if fitted == (h, w):
        return pixels
    return F.interpolate(pixels[None], fitted, mode="bicubic", antialias=True)[0]


def _pad(pixels: Tensor, size: int, fill: Tensor) -> Tensor:
    """`pixels` (C, h, w) centred in a (C, size, size) square of colour `fill` (C,)."""
    h, w = pixels.shape[-2:]
    square = fill[:, None, None].repeat(1, size, size)
    top, left = (size - h) // 2, (size - w) // 2
    square[:, top : top + h, left : left + w] = pixels
    return square


def _to_tensor(picture: Image.Image) -> Tensor:
    """(C, H, W) in [0, 1]."""
    values = torch.from_numpy(np.array(picture, dtype=np.float32)) / 255
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def _checked_tensor(pixels: Tensor) -> Tensor:
    if pixels.ndim != 3 or len(pixels) != 3 or not pixels.is_floating_point():
        raise ValueError(
            "an image tensor is (3, H, W) of floating point in [-1, 1], "
            f"not {tuple(pixels.shape)} {pixels.dtype}"
        )
    if min(pixels.shape[-2:]) < MIN_SIDE:
        raise ValueError(f"the image is {tuple(pixels.shape[-2:])} px; at least {MIN_SIDE} px are needed")
    pixels = pixels.detach().to("cpu", torch.float32)
    if not (pixels.abs() <= 1.001).all():  # false for NaN too
        raise ValueError("an image tensor must lie in [-1, 1]")
    return pixels


def _open_mask(mask: Source, full_size: tuple[int, int], size: int) -> Tensor:
    """(1, h, w) in [0, 1], its longer side `size`."""
    if isinstance(mask, Tensor):
        values = mask.detach().to("cpu", torch.float32)
        values = values[None] if values.ndim == 2 else values
        if values.ndim != 3 or len(values) != 1 or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"a mask is (H, W) or (1, H, W) in [0, 1], not {tuple(mask.shape)}")
        mask_size, values = tuple(values.shape[-2:]), _fit(values, size).clamp(0, 1)
    else:
        picture = open_picture(mask)
        picture = picture.getchannel("A") if picture.mode == "RGBA" else picture.convert("L")
        mask_size, values = (picture.height, picture.width), _to_tensor(_shrink(picture, size))
    if mask_size != full_size:
        raise ValueError(
            f"the mask is {mask_size[1]} x {mask_size[0]} px, the image {full_size[1]} x {full_size[0]} px"
        )
    return values
