"""A backbone's folder: how each network is read from it and written to it, as diffusers does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin, schedulers
from diffusers import __version__ as diffusers_version
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..files import together
from ..reading import read_object
from .layout import VARIANTS
from .model import Backbone, prefixed


def load_network(kind: type[ModelMixin], folder: Path, dtype: torch.dtype) -> ModelMixin:
    """A diffusers model from its folder, from safetensors only: the first of `VARIANTS` that is there."""
    files = {v: folder / f"diffusion_pytorch_model{v}.safetensors" for v in VARIANTS}
    variant = next((v for v, file in files.items() if file.exists()), "")
    return kind.from_pretrained(
        folder,
        torch_dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        variant=variant.removeprefix(".") or None,
    )


def load_text_encoder(folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    """The text encoder from its folder, with either naming of its weights (see `prefixed`)."""
    files = [folder / f"model{variant}.safetensors" for variant in VARIANTS]
    weights = load_file(next(file for file in files if file.exists()))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, local_files_only=True)).to(dtype)
    own_prefix = "text_model." if hasattr(text_encoder, "text_model") else ""
    named = {own_prefix + name.removeprefix("text_model."): w for name, w in weights.items()}
    named.pop(own_prefix + "embeddings.position_ids", None)  # a counter, stored by early releases only
    text_encoder.load_state_dict(named)
    return text_encoder


def save_text_encoder(text_encoder: CLIPTextModel, folder: Path) -> None:
    """Write a text encoder so that every version of transformers reads it.

    transformers 5 would write names without the prefix `text_model.`, which earlier versions cannot read.
    """
    text_encoder.config.save_pretrained(folder)
    save_file(prefixed(text_encoder), folder / "model.safetensors", metadata={"format": "pt"})


def load_scheduler(folder: str | Path) -> SchedulerMixin:
    """The scheduler that the `model_index.json` of a folder in diffusers layout names.

    Raises ValueError for a name that is none of diffusers' schedulers.
    """
    index = Path(folder) / "model_index.json"
    named = read_object(index).get("scheduler")
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    kind: Any = getattr(schedulers, name, None) if isinstance(name, str) else None
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise ValueError(f"{index}: scheduler must name one of diffusers' schedulers, not {named!r}")
    return kind.from_pretrained(Path(folder) / "scheduler", local_files_only=True)


def model_index(backbone: Backbone) -> dict:
    """diffusers' table of contents: that of a StableDiffusionPipeline without safety checker."""
    kinds = {
        name: ["transformers" if name in ("text_encoder", "tokenizer") else "diffusers", type(part).__name__]
        for name, part in backbone.components.items()
        if name != "image_tower"
    }
    absent = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers_version,
        **kinds,
        **absent,
        "requires_safety_checker": False,
    }


def save_backbone(backbone: Backbone, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a backbone in diffusers layout, as safetensors, in `dtype` (default: as it is)."""
    with together(folder) as scratch:
        write_backbone(backbone, scratch, dtype)


def write_backbone(backbone: Backbone, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a backbone's files into a folder that is there, one by one (`save_backbone`: all or none)."""
    for name, module in backbone.modules.items():
        stored = module if dtype is None else nn.Module.to(copy.deepcopy(module), "cpu", dtype)
        if name == "text_encoder":
            save_text_encoder(stored, folder / name)
        else:
            stored.save_pretrained(folder / name, safe_serialization=True)
    backbone.scheduler.save_pretrained(folder / "scheduler")
    backbone.tokenizer.save_pretrained(folder / "tokenizer")
    # transformers 4 looks for the vocabulary and the merges by themselves.
    backbone.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    (folder / "model_index.json").write_text(json.dumps(model_index(backbone), indent=2) + "\n")
