"""Named backbones and hub repositories: where each comes from, and how it is fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id

from ..paths import WEIGHTS
from .layout import PICKLES, STEMS, VARIANTS, is_xl, pickled


@dataclass(frozen=True)
class Model:
    """Where a named backbone comes from: a folder, or a hub repository at a pinned revision."""

    folder: Path | None = None
    repository: str = ""
    revision: str | None = None
    variant: str | None = None  # of the weight files, as diffusers names it


@dataclass(frozen=True)
class TowerWeights:
    """A published OpenCLIP model whose image tower serves backbones that bring none of their own."""

    architecture: str
    repository: str
    revision: str
    file: str


# The one place that knows model ids and revisions.
MODELS = {
    "mini": Model(folder=WEIGHTS / "mini"),
    "sd15": Model(
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        variant="fp16",
    ),
}
OPENCLIP = TowerWeights(
    architecture="ViT-B-32",
    repository="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",  # open_clip's laion2b_s34b_b79k
    revision="1a25a446712ba5ee05982a381eed697ef9b435cf",
    file="open_clip_model.safetensors",
)


def is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # the hub has names without an owner; here they would hide a slip in one of MODELS


def fetch(model: Model) -> Path:
    """The folder of a hub model, downloaded unless it is stored on this machine.

    What cannot be used is refused before the download, where the hub says what there is.
    """
    listed = _hub_files(model)
    variants: Sequence[str] = VARIANTS if model.variant is None else (f".{model.variant}",)
    if listed is not None:
        variants = _readable_variants(model, listed, variants)
    patterns = ["model_index.json", "tokenizer/*", "scheduler/*", "image_tower/*", "filters/*"]
    patterns += [f"{name}/config.json" for name in STEMS]
    for variant in variants:
        files = [*patterns, *(f"{name}/{stem}{variant}.safetensors" for name, stem in STEMS.items())]
        if listed is not None:
            _require_disk(model, listed, files)
        try:
            return Path(snapshot_download(model.repository, revision=model.revision, allow_patterns=files))
        except LocalEntryNotFoundError as error:
            missing = error
        except HfHubHTTPError as error:
            raise _refused(model.repository, error) from error
    raise OSError(
        f"{model.repository} is no folder, it is not in the Hugging Face cache, and the hub cannot be "
        "reached; connect once to download it, or give the path of a folder in diffusers layout"
    ) from missing


def _refused(repository: str, error: HfHubHTTPError) -> OSError:
    """One line of what the hub says in many."""
    if isinstance(error, GatedRepoError):
        return OSError(
            f"{repository} is given only to those who agree to its terms: agree on its page on the hub, then "
            "log in here with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"no backbone {repository!r}: it is no folder, and the hub has no model of that name, or a "
            "private one (log in with `hf auth login`)"
        )
    return OSError(f"the hub does not give {repository}: {str(error).splitlines()[0]}")


def _hub_files(model: Model) -> dict[str, int] | None:
    """Name -> bytes of a hub model's files; None where the hub does not answer."""
    try:
        info = HfApi().model_info(model.repository, revision=model.revision, files_metadata=True)
    except Exception:  # whatever keeps the hub from answering, the download itself will tell
        return None
    return {file.rfilename: file.size or 0 for file in info.siblings}


def _readable_variants(model: Model, listed: Iterable[str], variants: Sequence[str]) -> Sequence[str]:
    """The first variant of the weights that a hub model has; ValueError for one that cannot be used."""
    there = set(listed)
    if any(name.startswith("text_encoder_2/") for name in there):
        raise ValueError(is_xl(model.repository))
    for variant in variants:
        if all(f"{name}/{stem}{variant}.safetensors" in there for name, stem in STEMS.items()):
            return (variant,)
    pickles = sorted(n for n in there if n.split("/")[0] in STEMS and Path(n).suffix in PICKLES)
    if pickles:
        raise ValueError(pickled(model.repository, pickles))
    return variants  # what is missing is told once the rest is there


def _require_disk(model: Model, listed: Mapping[str, int], files: list[str]) -> None:
    """Raise OSError where what a hub model still has to download does not fit on the disk."""
    cache = Path(HF_HUB_CACHE)
    missing = [
        listed[name]
        for name in filter_repo_objects(listed, allow_patterns=files)
        if not isinstance(try_to_load_from_cache(model.repository, name, revision=model.revision), str)
    ]
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if sum(missing) > free:
        raise OSError(
            f"{model.repository} needs {sum(missing) / 1e9:.1f} GB more in {cache}, where "
            f"{free / 1e9:.1f} GB are free: make room, or set HF_HOME to a folder on another disk"
        )


def open_clip_file(file: str | Path | None, needed: str, remedy: str) -> Path:
    """The weights of the OpenCLIP model in `OPENCLIP`: `file`, or from the hub.

    Raises FileNotFoundError where there is no such file, OSError where the hub cannot be reached, saying what
    it is `needed` for and what would do instead (`remedy`).
    """
    if file is None:
        try:
            file = hf_hub_download(OPENCLIP.repository, OPENCLIP.file, revision=OPENCLIP.revision)
        except LocalEntryNotFoundError as error:
            raise OSError(
                f"{needed}; {OPENCLIP.repository}, which would serve, is not stored on this machine and the "
                f"Hugging Face hub cannot be reached; connect once to download it, or {remedy}"
            ) from error
    if not Path(file).is_file():
        raise FileNotFoundError(f"no image tower at {file}")
    return Path(file)
