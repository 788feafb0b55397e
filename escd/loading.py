"""`load_backbone`: the only way to load a backbone, with its attribute filters attached and checked."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTokenizerFast

from .backbone.devices import as_device, as_dtype, choose_device
from .backbone.folder import load_network, load_text_encoder
from .backbone.hub import MODELS, Model, fetch, is_hub_id
from .backbone.image_tower import ImageTower, open_clip_tower
from .backbone.layout import require_layout
from .backbone.model import Backbone
from .method.attributes import ATTRIBUTES
from .method.config import TuningConfig
from .method.cost import time_in_words, tuning_cost
from .method.e4t import E4T, require_same_layout
from .method.encoder import feature_widths
from .method.fusion import AttributeFilter


def load_backbone(
    name_or_path: str | Path = "mini",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    image_tower: ImageTower | str | Path | None = None,
    filters: str | Path | None = None,
) -> Backbone:
    """Load a backbone: "mini", "sd15", a folder in diffusers layout, or a hub id; frozen, ready to customize.

    `device` None takes cuda, mps or the CPU, whichever is there first; `dtype` None is float32, but float16
    for one of Stable Diffusion's size on a CUDA GPU, where tuning would not fit the common ones otherwise; a
    dtype may be given by its name, as "float16". `image_tower`, `filters`: see `read_backbone`.
    Raises FileNotFoundError for a missing folder or component, OSError when a hub model is neither stored on
    this machine nor to be had, ValueError for a model this method is not for, for a device that is not there
    and for a dtype no backbone runs in, MemoryError where it does not fit on the GPU; warns of the time that
    tuning takes where a large backbone ends up on the CPU unasked.
    """
    where = as_device(device or choose_device())
    dtype = None if dtype is None else as_dtype(dtype)
    name = str(name_or_path)
    model = MODELS.get(name)
    if model is None:
        if Path(name).is_dir():
            model = Model(folder=Path(name))
        elif Path(name).is_file():
            raise ValueError(
                f"{name} is a file, and a backbone is a folder in diffusers layout: "
                f"StableDiffusionPipeline.from_single_file({name!r}).save_pretrained(folder) makes one of a "
                "single checkpoint"
            )
        elif is_hub_id(name):
            model = Model(repository=name)
        else:
            raise FileNotFoundError(
                f"no backbone {name!r}: neither {' nor '.join(MODELS)}, no folder, no hub id (owner/name)"
            )
    folder = model.folder or fetch(model)
    backbone = read_backbone(
        folder,
        dtype=dtype or torch.float32,
        image_tower=image_tower,
        filters=filters,
        name=name if name in MODELS or model.repository else None,
    )
    if dtype is None and where.type == "cuda" and backbone.large:
        dtype = torch.float16
    try:
        backbone.to(where, dtype)
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{backbone.name} does not fit into the memory that is left on {where}: close what else uses it, "
            'load it in half precision (dtype=torch.float16), or leave it on the CPU (device="cpu")'
        ) from error
    if device is None and backbone.device.type == "cpu" and backbone.large:
        _warn_of_the_time(backbone)
    return backbone


def _warn_of_the_time(backbone: Backbone) -> None:
    """Say what tuning an attribute of a large backbone takes without a GPU."""
    times = []
    for name in ATTRIBUTES:
        config = TuningConfig.of(name, backbone=backbone)
        cost = tuning_cost(backbone, config)
        times.append(f"{name} {time_in_words(cost)} ({config.steps} steps)")
    warnings.warn(
        f"{backbone.name} is loaded on the CPU, as no GPU was found. Learning an attribute takes at least: "
        f'{", ".join(times)}. On a machine with a GPU it takes minutes; device="cpu" says that you know',
        stacklevel=3,
    )


@torch.inference_mode(False)
def read_backbone(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    image_tower: ImageTower | str | Path | None = None,
    filters: str | Path | None = None,
    name: str | None = None,
) -> Backbone:
    """Read a backbone from `folder`, in diffusers layout; its networks are frozen and in evaluation mode.

    A folder without `image_tower/` takes `image_tower`: a tower, or the safetensors file of the OpenCLIP
    model in `OPENCLIP`, which is otherwise taken from the hub once a filter reads it. The filters
    are those of the folder `filters`, where `python -m escd.pretrain filters` wrote them, by default
    those of `folder` itself, if it has any; so is what `python -m escd.pretrain e4t` wrote. Raises
    FileNotFoundError for what is missing, ValueError for filters, or an E4T encoder, of another backbone's
    width.
    """
    dtype, folder = as_dtype(dtype), Path(folder)
    require_layout(folder)
    # Rounded at the end, so that it keeps the identity of what was read.
    wanted, dtype = dtype, torch.float32 if dtype is torch.bfloat16 else dtype
    tower = image_tower if isinstance(image_tower, ImageTower) else None
    if image_tower is None and (folder / "image_tower").is_dir():
        tower = load_network(ImageTower, folder / "image_tower", dtype)
    elif image_tower is not None and tower is None:
        tower = open_clip_tower(image_tower, dtype)
    configs = sorted(Path(filters or folder).glob("filters/*/config.json"))
    pretrained = Path(filters or folder) / "e4t"
    has_e4t = (pretrained / "config.json").is_file()
    if filters is not None and not configs and not has_e4t:
        raise FileNotFoundError(
            f"no attribute filters in {filters}: `python -m escd.pretrain filters` writes a folder with "
            "filters/shape and filters/appearance, `python -m escd.pretrain e4t` one with e4t"
        )
    backbone = Backbone(
        vae=load_network(AutoencoderKL, folder / "vae", dtype),
        text_encoder=load_text_encoder(folder / "text_encoder", dtype),
        tokenizer=CLIPTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True),
        unet=load_network(UNet2DConditionModel, folder / "unet", dtype),
        # Latents are not confined to [-1, 1]; a scheduler's file that is silent about it means the same.
        scheduler=DDIMScheduler.from_pretrained(
            folder / "scheduler", local_files_only=True, clip_sample=False
        ),
        image_tower=tower,
        filters={path.parent.name: load_network(AttributeFilter, path.parent, dtype) for path in configs},
        name=name or folder.resolve().name,
        e4t=load_network(E4T, pretrained, dtype) if has_e4t else None,
    )
    if backbone.e4t is not None:
        require_same_layout(backbone.e4t, backbone, pretrained)
    for attribute, trained in backbone.filters.items():
        read = trained.config.cls_width, trained.config.down_width, trained.config.word_width
        there = (
            *feature_widths(backbone, tuple(trained.config.grids)),
            backbone.text_encoder.config.hidden_size,
        )
        if read != there:
            raise ValueError(
                f"the {attribute} filter in {filters or folder} is of another backbone: it reads a CLS "
                f"token, features and a word {', '.join(map(str, read))} wide, and those of "
                f"{backbone.name} are {', '.join(map(str, there))}"
            )
    for module in backbone.modules.values():
        module.eval().requires_grad_(False)
    return backbone.to(dtype=wanted)
