"""ESCDiffusion: customise the shape or the appearance of one image in text-to-image generation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .waiting import wait_briefly

wait_briefly()  # before anything here imports torch

from .backbone import parts
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
