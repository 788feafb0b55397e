"""The study's customizations, kept on disk so that none is tuned twice.

A kept customization is two files: the customization, named by a key over everything that decides its values,
and a JSON file with its date, commit, steps, seconds and sha256 (`About`).
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
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import frozen, records
from ..backbone.model import Backbone
from ..data.images import Source
from ..files import write_text
from ..method.config import TuningConfig
from ..method.customization import Customization, load_customization
from ..method.snapshots import Snapshot
from ..method.tuning import customize
from .references import Reference

# The source of this module, and of all that it imports from this package, is part of the key.
METHOD = customize.__module__


@dataclass(frozen=True)
class About:
    """When, how and from which commit a customization was learnt, and its sha256."""

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

    def as_dict(self) -> dict[str, str | int | float | bool | None]:
        """Its entry in `Record.learnt`."""
        return {**asdict(self.about), "kept": self.kept}


def learn(
    folder: Path, attribute: str, reference: Reference, config: TuningConfig, backbone: Backbone, weights: str
) -> Learnt:
    """The customization that `folder` keeps; where there is none, it is learnt now and kept there.

    weights: the backbone's `weights_sha256`. After an interrupt, which reaches the caller, nothing is kept.
    """
    key = key_of(attribute, reference, config, backbone, weights)
    path = _path(folder, attribute, key)
    about = _about(path)
    if about is not None:
        stored = load_customization(path, backbone)
        if stored.steps == about.steps == config.steps and sha256_of(stored) == about.sha256:
            return Learnt(stored, about, kept=True)
        tqdm.write(
            f"{path.name} has {stored.steps} steps and is to have {config.steps}, or was changed since: "
            "it is learnt again"
        )
    learnt = learn_now(reference.image, attribute, config, backbone)
    _write(path, learnt)
    return learnt


def knows(
    folder: Path, attribute: str, reference: Reference, config: TuningConfig, backbone: Backbone, weights: str
) -> bool:
    """Whether `folder` keeps what `learn` would learn."""
    key = key_of(attribute, reference, config, backbone, weights)
    return _about(_path(folder, attribute, key)) is not None


def keep(
    folder: Path, reference: Reference, snapshot: Snapshot, config: TuningConfig, backbone: Backbone,
    weights: str, prior_seconds: float = 0.0,
) -> About:  # fmt: skip
    """Keep a snapshot as what `learn` with `config` learns, unless `folder` has that already.

    `config` has the snapshot's number of steps. Its seconds count the class images.
    """
    made = snapshot.customization
    key = key_of(made.attribute.name, reference, config, backbone, weights)
    path = _path(folder, made.attribute.name, key)
    seconds = round(snapshot.seconds + prior_seconds, 3)
    about = About(records.now(), records.commit(), made.steps, seconds, sha256_of(made))
    if _about(path) is None:
        _write(path, Learnt(made, about, kept=False))
    return about


def _path(folder: Path, attribute: str, key: str) -> Path:
    return folder / f"{attribute}-{key[:16]}.safetensors"


def _write(path: Path, learnt: Learnt) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    learnt.customization.save(path)
    write_text(path.with_suffix(".json"), json.dumps(asdict(learnt.about), indent=1) + "\n")


def learn_now(
    image: Source,
    attribute: str,
    config: TuningConfig,
    backbone: Backbone,
    mask: Source | None = None,
    progress: bool = False,
) -> Learnt:
    """A customization learnt now. An interrupt reaches the caller: a record needs all of the steps."""
    start = time.perf_counter()
    learnt = customize(
        image, attribute, backbone,
        mask=mask, config=config, progress=progress, keep_interrupted=False,
    )  # fmt: skip
    seconds = round(time.perf_counter() - start, 3)
    about = About(records.now(), records.commit(), learnt.steps, seconds, sha256_of(learnt))
    return Learnt(learnt, about, kept=False)


def _about(path: Path) -> About | None:
    """The JSON file of a kept customization; None where one of the two files is missing."""
    text = path.with_suffix(".json")
    return About(**json.loads(text.read_text(encoding="utf-8"))) if path.exists() and text.exists() else None


def key_of(
    attribute: str, reference: Reference, config: TuningConfig, backbone: Backbone, weights: str
) -> str:
    """sha256 over all that decides a customization: inputs, backbone, config, code, platform."""
    made_from = {
        "attribute": attribute,
        "inputs": reference.inputs,
        "image": records.sha256(reference.image),
        "tuning": frozen.as_json(config),
        "weights": weights,
        "code": code_sha256(),
        "platform": records.platform_of(backbone.device),
    }
    made_from |= e4t_inputs(config, backbone)
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def sha256_of(customization: Customization) -> str:
    """sha256 of what affects images: attribute, part, pseudo-word and the changes of the weights."""
    digest = hashlib.sha256(json.dumps([asdict(customization.attribute), customization.part]).encode())
    _update(digest, customization.tensors)
    return digest.hexdigest()


def weights_sha256(backbone: Backbone) -> str:
    """sha256 of a backbone's networks (filters included, E4T's left out), tokenizer and scheduler."""
    # "model" is the vocabulary and the merges; it leaves out pseudo-words that were added later.
    tokenizer = json.loads(backbone.tokenizer.backend_tokenizer.to_str())["model"]
    parts = {name: part for name, part in backbone.modules.items() if name != "e4t"}
    return networks_sha256(parts | {"scheduler": backbone.scheduler}, json.dumps(tokenizer, sort_keys=True))


def e4t_inputs(config: TuningConfig, backbone: Backbone) -> dict[str, str]:
    """sha256 of what E4T pretrained on a backbone, which only E4T's tunings start from; else empty."""
    needed = config.needs_e4t and backbone.e4t is not None
    return {"E4T": networks_sha256({"e4t": backbone.e4t})} if needed else {}


def networks_sha256(parts: Mapping[str, Any], beginning: str = "") -> str:
    """sha256 over `beginning`, and over the configs and tensors of networks (and a scheduler) by name."""
    digest = hashlib.sha256(beginning.encode())
    for name, part in sorted(parts.items()):
        # The config holds values that are not weights, such as the autoencoder's scaling factor.
        config = dict(part.config) if isinstance(part.config, Mapping) else {}
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps([name, settings], sort_keys=True, default=str).encode())
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
    """sha256 of the source of a module and of all modules of its package that it imports, also indirectly."""
    digest = hashlib.sha256()
    for name, path in sorted(sources(module).items()):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def sources(module: str) -> dict[str, Path]:
    """The source files of a module and of all that it imports from its package, by module name.

    The package's own `__init__.py`, which only re-exports names, is left out.
    """
    paths: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in paths:
            spec = importlib.util.find_spec(name)
            paths[name] = Path(spec.origin)
            parent = name.rpartition(".")[0]
            package = name if spec.submodule_search_locations is not None else parent
            waiting += _imported(paths[name].read_text(encoding="utf-8"), package)
            waiting += [parent] if "." in parent else []
    return paths


def _imported(source: str, package: str) -> Iterator[str]:
    """Names of the modules that a source file of `package` imports from the outermost package."""
    root = package.partition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # An imported name can be a module: `from . import records`.
            named = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in named if name.startswith(f"{root}.") and _is_module(name))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a name in a module that is not a package
        return False
