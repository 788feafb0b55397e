"""What `escd generate` writes into a picture: how it was drawn, so that it can be drawn again."""

from __future__ import annotations

import json
import typing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from . import __version__
from .method.guidance import CUSTOMIZED, UNCONDITIONAL, Start
from .reading import json_of
from .records import sha256

CHUNK = "escd"  # the keyword of the PNG's text chunk


def _versions() -> dict[str, str]:
    return {"escd": __version__, "torch": str(torch.__version__), "diffusers": diffusers.__version__}


@dataclass(frozen=True)
class Drawn:
    """How a picture was drawn."""

    prompt: str
    negative_prompt: str | None
    seed: int
    # The batch it was drawn in: the other pictures of a batch decide the last bits.
    first_seed: int
    images: int
    steps: int
    guidance_scale: float
    guidance_from: Start
    shape_strength: float
    appearance_strength: float
    # Files of the customizations, as they were named (of an absolute path the name alone), and their sha256.
    shape: str | None
    shape_sha256: str | None
    appearance: str | None
    appearance_sha256: str | None
    backbone: str
    backbone_identity: str
    versions: dict = field(default_factory=_versions)

    def save(self, picture: Image.Image, path: Path) -> None:
        """Write the picture as a PNG that says how it was drawn."""
        about = PngInfo()
        about.add_text(CHUNK, json.dumps(asdict(self)))
        picture.save(path, format="PNG", pnginfo=about)

    @classmethod
    def read(cls, path: Path) -> Drawn:
        """How a PNG says it was drawn; ValueError when it does not, or not rightly."""
        try:
            with Image.open(path) as picture:
                picture.load()
                text = getattr(picture, "text", {}).get(CHUNK)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{path} is too large a picture to be read: {error}") from error
        if text is None:
            raise ValueError(f"{path} does not say how it was drawn: it is no PNG as escd generate writes it")
        about = json_of(text, f"what {path} says of how it was drawn")
        if isinstance(about, dict):
            about.setdefault("guidance_from", CUSTOMIZED)  # an image of an earlier version
        kinds = typing.get_type_hints(cls) | {"guidance_from": str}
        if not isinstance(about, dict) or about.keys() != kinds.keys():
            raise ValueError(f"{path} says how it was drawn in other terms than this version: {text[:80]}")
        for name, value in about.items():
            if not isinstance(value, kinds[name]):
                raise ValueError(f"{path} says it was drawn with {name} {value!r}")
        if about["guidance_from"] not in UNCONDITIONAL:
            raise ValueError(f"{path} says it was drawn with guidance_from {about['guidance_from']!r}")
        drawn = cls(**about)
        if drawn.seed not in range(drawn.first_seed, drawn.first_seed + drawn.images):
            raise ValueError(f"{path} says it was drawn with a seed that its batch has not: {text[:80]}")
        for name in ("shape", "appearance"):
            if (about[name] is None) != (about[f"{name}_sha256"] is None):
                raise ValueError(f"{path} says half of which {name} it was drawn with")
        return drawn


def named(path: str | Path) -> str:
    """A path as a picture may name it: one of this machine's folders is nobody else's business."""
    return Path(path).name if Path(path).is_absolute() else Path(path).as_posix()


def find(name: str, digest: str, folders: tuple[Path, ...]) -> Path | None:
    """The file of that name and sha256 in one of the folders; None where there is none."""
    candidates = (folder / each for folder in folders for each in (name, Path(name).name))
    return next((path for path in candidates if path.is_file() and sha256(path) == digest), None)
