"""ESCDiffusion: customize the shape or the appearance of one image in text-to-image generation."""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING

from .waiting import wait_briefly

wait_briefly()  # before anything here imports torch

if TYPE_CHECKING:
    from . import parts
    from .backbone.image_tower import ImageTower
    from .backbone.model import Backbone
    from .backbone.trace import Trace
    from .data.world import World
    from .loading import load_backbone
    from .method.attributes import ATTRIBUTES, Attribute
    from .method.config import TuningConfig
    from .method.cost import require_memory, tuning_cost
    from .method.customization import Customization, load_customization
    from .method.encoder import extract_features
    from .method.export import export
    from .method.fusion import AttributeFilter, pseudo_word
    from .method.low_rank import low_rank
    from .method.pipeline import ESCDPipeline
    from .method.tuning import customize
    from .sliders import attribute_sliders

__version__ = "0.1.0"
__all__ = [
    "ATTRIBUTES",
    "Attribute",
    "AttributeFilter",
    "Backbone",
    "Customization",
    "ESCDPipeline",
    "ImageTower",
    "Trace",
    "TuningConfig",
    "World",
    "attribute_sliders",
    "customize",
    "export",
    "extract_features",
    "load_backbone",
    "load_customization",
    "low_rank",
    "parts",
    "pseudo_word",
    "require_memory",
    "tuning_cost",
]

# Each is imported on first access: torch takes seconds, and an error on the command line does not need it.
_MODULES = {
    ".backbone.image_tower": ("ImageTower",),
    ".backbone.model": ("Backbone",),
    ".backbone.trace": ("Trace",),
    ".data.world": ("World",),
    ".loading": ("load_backbone",),
    ".method.attributes": ("ATTRIBUTES", "Attribute"),
    ".method.config": ("TuningConfig",),
    ".method.cost": ("require_memory", "tuning_cost"),
    ".method.customization": ("Customization", "load_customization"),
    ".method.encoder": ("extract_features",),
    ".method.export": ("export",),
    ".method.fusion": ("AttributeFilter", "pseudo_word"),
    ".method.low_rank": ("low_rank",),
    ".method.pipeline": ("ESCDPipeline",),
    ".method.tuning": ("customize",),
    ".sliders": ("attribute_sliders",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = (
    "backbone", "data", "evaluation", "loading", "method", "paper", "parts", "pretrain", "records", "sliders",
)  # fmt: skip
# Two threads that import diffusers' modules at the same time can meet one that is half imported.
_IMPORTING = threading.RLock()


def __getattr__(name: str) -> object:
    if name not in _HOME and name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        module = importlib.import_module(_HOME.get(name, f".{name}"), __name__)
    value = getattr(module, name) if name in _HOME else module
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
