"""ESCDiffusion: customise the shape or the appearance of one image in text-to-image generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .waiting import wait_briefly

wait_briefly()  # before anything here imports torch

from . import parts
from .artefacts import export, low_rank
from .backbone import Backbone, ImageTower, load_backbone
from .cost import require_memory, tuning_cost
from .customization import ATTRIBUTES, Attribute, Customization, load_customization
from .encoder import extract_features
from .fusion import AttributeFilter, pseudo_word
from .pipeline import ESCDPipeline
from .trace import Trace
from .tuning import TuningConfig, customize
from .world import World

if TYPE_CHECKING:
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


def __getattr__(name: str) -> object:
    # The widget needs ipywidgets, which a command line does not.
    if name == "attribute_sliders":
        from .sliders import attribute_sliders

        return attribute_sliders
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
