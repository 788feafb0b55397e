"""Reading an image file: upright, in sRGB, with 8 bits per channel and its transparency.

Pillow reads the bytes. This module adds EXIF rotation, ICC profiles, grey values of more than 8 bits, and an
error that names a format that Pillow does not read.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

MAX_PIXELS = 100_000_000
MIN_SIDE = 8

_DRAWING = "a drawing has no pixels of its own: export it as PNG, at least 512 px wide"
REMEDIES = {
    "HEIC": "save it as PNG or JPEG; or `pip install pillow-heif` and call "
    "pillow_heif.register_heif_opener() first",
    "AVIF": "save it as PNG or JPEG; Pillow reads AVIF from release 11.3 on",
    "JPEG XL": "save it as PNG or JPEG",
    "EPS": f"Pillow would start Ghostscript on it, and {_DRAWING}",
    "PDF": _DRAWING,
    "SVG": _DRAWING,
}
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def open_picture(source: str | Path | Image.Image) -> Image.Image:
    """An upright image in 8-bit sRGB: RGBA if any pixel is transparent, else RGB.

    Raises FileNotFoundError, TypeError for another kind of source, and ValueError, with the file's name, for
    an unsupported format, damaged data, and a size outside MIN_SIDE px to MAX_PIXELS.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "the image")
    if not isinstance(source, (str, Path)):
        raise TypeError(f"an image is a path, a PIL image or a tensor, not {type(source).__name__}")
    with open(source, "rb") as file, warnings.catch_warnings():
        # Pillow warns from 89 megapixels on and refuses from 179 on; the limit here lies between.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        head = file.read(512)
        file.seek(0)
        try:
            picture = Image.open(file)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{source} is larger than {MAX_PIXELS // 10**6} megapixels") from error
        except MemoryError:
            raise
        except Exception as error:  # the file is open: Pillow cannot read its content
            if kind := _format(head):
                raise ValueError(_not_read(str(source), kind)) from error
            raise ValueError(f"{source} is not an image, or its beginning is damaged") from error
        return _upright(picture, str(source))


def _format(head: bytes) -> str | None:
    """The name of a format that Pillow may not read, from a file's first bytes."""
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIC" if any(brand in brands for brand in _HEIF_BRANDS) else None
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "EPS"
    if head.startswith(b"%PDF"):
        return "PDF"
    return "SVG" if b"<svg" in head.lower() else None


def _not_read(name: str, kind: str) -> str:
    return f"{name} is of the format {kind}, which is not read here: {REMEDIES[kind]}"


def _upright(picture: Image.Image, name: str) -> Image.Image:
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{name} is larger than {MAX_PIXELS // 10**6} megapixels")
    if min(picture.size) < MIN_SIDE:
        raise ValueError(
            f"{name} is {picture.width} x {picture.height} px; at least {MIN_SIDE} px are needed"
        )
    if picture.format == "EPS" and getattr(picture, "tile", None):  # its pixels are not rendered yet
        raise ValueError(_not_read(name, "EPS"))
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind on damaged data
        raise ValueError(f"{name} is damaged or cut short: {error}") from error
    return _in_srgb(picture, name)


def _in_srgb(picture: Image.Image, name: str) -> Image.Image:
    """A loaded image in 8-bit sRGB: RGBA if any pixel is transparent, else RGB."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bits(picture, name)
    if picture.mode in ("La", "RGBa"):  # multiplied by their alpha
        picture = picture.convert(picture.mode.upper())
    kind, alpha = picture.mode, None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    if kind == "LAB":
        colours = ImageCms.profileToProfile(
            picture, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    elif profile:
        colours = _converted(picture, kind, profile, name)
    else:
        colours = picture.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        colours.putalpha(alpha)
    return colours


def _converted(picture: Image.Image, kind: str, profile: bytes, name: str) -> Image.Image:
    """`picture`, without its alpha, from its ICC profile to sRGB; `kind` is its original mode."""
    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile))
        if kind != "CMYK":
            grey = kind in ("1", "L", "LA") and own.profile.xcolor_space == "GRAY"
            picture = picture.convert("L" if grey else "RGB")
        return ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:  # a broken profile, or one of another colour space
        warnings.warn(
            f"the colour profile of {name} cannot be used ({error}): its colours are taken as sRGB",
            stacklevel=2,
        )
        return picture.convert("RGB")


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """A grey image of more than 8 bits as L or LA, scaled: Pillow's own conversion clips."""
    values = np.asarray(picture, dtype=np.float64)
    full = 1.0 if picture.mode == "F" else 65535.0
    if not ((values >= 0) & (values <= full)).all():  # false for NaN too
        raise ValueError(f"{name} is a grey image of more than 8 bits, which must lie in 0..{full:g}")
    if picture.mode != "F" and values.max() <= 255:
        full = 255.0  # a wide file of 8-bit values, as numerical programs write it
    eight = Image.fromarray(np.round(values * (255 / full)).astype(np.uint8))
    if (transparent := picture.info.get("transparency")) is not None:
        eight.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return eight
