"""The visual encoder clip-v of Eq. 4: OpenCLIP's vision transformer, up to its CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, get_model_config
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn

from ..files import open_safetensors
from . import hub


class ImageTower(ModelMixin, ConfigMixin):
    """The visual encoder clip-v of Eq. 4: the vision transformer of open_clip's CLIP, up to its CLS token."""

    @register_to_config
    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        layers: int,
        embed_dim: int,
        head_width: int = 64,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        mean: tuple[float, float, float] = OPENAI_DATASET_MEAN,
        std: tuple[float, float, float] = OPENAI_DATASET_STD,
    ) -> None:
        super().__init__()
        vision = CLIPVisionCfg(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            head_width=head_width,
            mlp_ratio=mlp_ratio,
        )
        # open_clip builds both towers at once: the smallest text tower it takes is built and let go.
        text = CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)
        self.visual = CLIP(embed_dim, vision, text, quick_gelu=quick_gelu).visual
        self.visual.proj = None  # the CLS token is read before the projection into the space shared with text

    @classmethod
    def from_open_clip(cls, clip: CLIP, model_cfg: Mapping | str) -> ImageTower:
        """An image tower with a copy of the visual weights of `clip`, which `model_cfg` describes.

        `model_cfg` is open_clip's own model configuration ("embed_dim", "vision_cfg", ...) or the name of one
        that open_clip knows. Raises ValueError for one this class cannot hold (a ResNet, a timm tower).
        """
        tower = cls(**_tower_config(model_cfg))
        weights = {name: w for name, w in clip.visual.state_dict().items() if name != "proj"}
        tower.visual.load_state_dict(weights)
        return tower.to(next(clip.visual.parameters()).device).eval()

    def forward(self, images: Tensor) -> Tensor:
        """CLS tokens (B, width) of `images` (B, 3, H, W) in [-1, 1], resized to the tower's own size."""
        size = self.config.image_size
        x = images.to(self.device, torch.float32)
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = x.new_tensor([self.config.mean, self.config.std])[:, :, None, None]  # (3, 1, 1) each
        x = (x / 2 + 0.5 - mean) / std  # (B, 3, size, size)
        return self.visual(x.to(self.dtype))  # (B, width)


def _tower_config(model_cfg: Mapping | str) -> dict:
    """ImageTower's arguments from open_clip's model configuration, or from the name of one."""
    described = get_model_config(model_cfg) if isinstance(model_cfg, str) else model_cfg
    if described is None:
        raise ValueError(f"open_clip knows no model {model_cfg!r}")
    vision = dict(described["vision_cfg"])
    known = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
    if foreign := sorted(set(vision) - set(known)):
        raise ValueError(
            f"an image tower is a plain vision transformer; it cannot hold vision_cfg keys {foreign}"
        )
    return {
        **vision,
        "embed_dim": described["embed_dim"],
        "quick_gelu": described.get("quick_gelu", False),
    }


def open_clip_tower(file: str | Path | None, dtype: torch.dtype) -> ImageTower:
    """The image tower of the OpenCLIP model in `OPENCLIP`, from `file` (safetensors) or from the hub."""
    file = hub.open_clip_file(file, "this backbone has no image tower of its own", "pass image_tower=")
    tower = ImageTower(**_tower_config(hub.OPENCLIP.architecture))
    with open_safetensors(file) as stored:
        visual = [name for name in stored.keys() if name.startswith("visual.") and name != "visual.proj"]
        tower.load_state_dict({name: stored.get_tensor(name) for name in visual})
    return nn.Module.to(tower, dtype)
