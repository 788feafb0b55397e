"""What the study learnt, kept on disk under a key of everything that made it, so that no part is tuned twice.

A kept customization is two files: the customization, and a JSON text that says when, at which commit and in
how many steps and seconds it was learnt, and the sha256 of what it holds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import frozen, records
from ..backbone.model import Backbone
from ..data.images import Source
from ..files import write_text
from ..method.config import TuningConfig
from ..method.customization import Customization, load_customization
from ..method.tuning import customize
from .references import Reference

# The module whose source, with all of this package that it imports, is the method.
METHOD = customize.__module__


@dataclass(frozen=True)
class About:
    """How a customization came about, and what it is."""

    date: str
    commit: str | None
    steps: int
    seconds: float
    sha256: str


@dataclass(frozen=True)
class Learnt:
    """A customization; `kept`: whether an earlier run learnt it."""

    customization: Customization
    about: About
    kept: bool

    def told(self) -> dict[str, str | int | float | bool | None]:
        """What a record says of it."""
        return {**asdict(self.about), "kept": self.kept}


def learn(
    folder: Path, attribute: str, reference: Reference, config: TuningConfig, backbone: Backbone, weights: str
) -> Learnt:
    """The customization that `folder` keeps, or one learnt now and kept there.

    `weights` is the backbone's `weights_sha256`. An interrupt goes on to the caller, and nothing is kept.
    """
    key = key_of(attribute, reference, config, backbone, weights)
    path = folder / f"{attribute}-{key[:16]}.safetensors"
    about = _about(path)
    if about is not None:
        found = load_customization(path, backbone)
        if found.steps == about.steps == config.steps and sha256_of(found) == about.sha256:
            return Learnt(found, about, kept=True)
        tqdm.write(
            f"{path.name} has {found.steps} steps and is to have {config.steps}, or was changed since: "
            "it is learnt again"
        )
    made = learn_now(reference.image, attribute, config, backbone)
    folder.mkdir(parents=True, exist_ok=True)
    made.customization.save(path)
    write_text(path.with_suffix(".json"), json.dumps(asdict(made.about), indent=1) + "\n")
    return made


def learn_now(
    image: Source,
    attribute: str,
    config: TuningConfig,
    backbone: Backbone,
    mask: Source | None = None,
    progress: bool = False,
) -> Learnt:
    """A customization learnt now, in all its steps: for a record, an interrupt must not leave fewer."""
    start = time.perf_counter()
    learnt = customize(
        image, attribute, backbone,
        mask=mask, config=config, progress=progress, keep_interrupted=False,
    )  # fmt: skip
    seconds = round(time.perf_counter() - start, 3)
    about = About(records.now(), records.commit(), learnt.steps, seconds, sha256_of(learnt))
    return Learnt(learnt, about, kept=False)


def _about(path: Path) -> About | None:
    """What the text beside a kept customization says; None where one of the two files is missing."""
    text = path.with_suffix(".json")
    return About(**json.loads(text.read_text(encoding="utf-8"))) if path.exists() and text.exists() else None


def key_of(
    attribute: str, reference: Reference, config: TuningConfig, backbone: Backbone, weights: str
) -> str:
    """sha256 over everything that decides what is learnt: inputs, backbone, config, code and platform."""
    made_from = {
        "attribute": attribute,
        "inputs": reference.inputs,
        "image": records.sha256(reference.image),
        "tuning": frozen.as_json(config),
        "weights": weights,
        "code": code_sha256(),
        "platform": records.platform_of(backbone.device),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def sha256_of(customization: Customization) -> str:
    """sha256 of what changes a picture: the attribute, the part, the pseudo-word and the weights' changes."""
    digest = hashlib.sha256(json.dumps([asdict(customization.attribute), customization.part]).encode())
    _update(digest, customization.tensors)
    return digest.hexdigest()


def weights_sha256(backbone: Backbone) -> str:
    """sha256 of all that a backbone computes with: its networks, filters included, tokenizer, scheduler."""
    # Its model is the vocabulary and the merges, without the pseudo-words added since.
    tokenizer = json.loads(backbone.tokenizer.backend_tokenizer.to_str())["model"]
    digest = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode())
    parts = backbone.modules | {"scheduler": backbone.scheduler}
    for name, part in sorted(parts.items()):
        # diffusers' configurations hold what is no weight, such as the autoencoder's scaling factor.
        config = dict(part.config) if isinstance(part.config, Mapping) else {}
        said = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps([name, said], sort_keys=True, default=str).encode())
        if isinstance(part, nn.Module):
            _update(digest, part.state_dict())
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)


@cache
def code_sha256(module: str = METHOD) -> str:
    """sha256 of the source of a module and of everything in its package that it imports, near or far."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(module).items()):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def sources(module: str) -> dict[str, Path]:
    """The source files of a module and of all that it imports from its package, by the modules' names.

    The package's own `__init__.py`, which only hands names on, is left out.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            spec = importlib.util.find_spec(name)
            found[name] = Path(spec.origin)
            parent = name.rpartition(".")[0]
            inside = name if spec.submodule_search_locations is not None else parent
            waiting += _imported(found[name].read_text(encoding="utf-8"), inside)
            waiting += [parent] if "." in parent else []
    return found


def _imported(source: str, package: str) -> Iterator[str]:
    """Names of the modules that a source inside `package` imports from its outermost package."""
    root = package.partition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # Each name may be a module itself: `from . import records`.
            named = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in named if name.startswith(f"{root}.") and _is_module(name))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a name inside a module that is no package
        return False
