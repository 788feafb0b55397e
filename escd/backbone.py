"""The pretrained model that ESCDiffusion customizes: a latent diffusion model and an image tower.

`load_backbone` is the only door: "mini" (shipped in the package), "sd15", a folder in diffusers layout, or a
hub id. A backbone's folder is a plain Stable Diffusion folder (`diffusers.StableDiffusionPipeline` loads it)
with two more rooms: `image_tower/` and `filters/<attribute>/`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel, schedulers
from diffusers import __version__ as diffusers_version
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import compute_snr
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
from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, get_model_config
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from . import prompts as reading
from .devices import as_device, as_dtype
from .encoder import feature_widths
from .files import together
from .fusion import AttributeFilter
from .reading import read_object

SNR_CEILING = 5.0
# Deviation of the logarithm of noise over signal at which a UNet learns (`draw_noise_levels`).
NOISE_SPREAD = 1.2
LARGE = 100_000_000  # parameters of a UNet that is tuned otherwise than `mini`, and slowly on a CPU


@dataclass(frozen=True)
class Model:
    """Where a named backbone comes from: a folder, or a hub repository at a pinned revision."""

    folder: Path | None = None
    repository: str | None = None
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
    "mini": Model(folder=Path(__file__).parent / "weights" / "mini"),
    "sd15": Model(
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        revision="451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        variant="fp16",
    ),
}
VARIANTS = ("", ".fp16", ".bf16")  # of weight files, in the order they are looked for
# The networks a folder must have, and how diffusers and transformers call their weights.
STEMS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # endings of weights whose reading runs code
OPENCLIP = TowerWeights(
    architecture="ViT-B-32",
    repository="laion/CLIP-ViT-B-32-laion2B-s34B-b79K",  # open_clip's laion2b_s34b_b79k
    revision="1a25a446712ba5ee05982a381eed697ef9b435cf",
    file="open_clip_model.safetensors",
)


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
    if isinstance(model_cfg, str):
        found = get_model_config(model_cfg)
        if found is None:
            raise ValueError(f"open_clip knows no model {model_cfg!r}")
        model_cfg = found
    vision = dict(model_cfg["vision_cfg"])
    known = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")
    if foreign := sorted(set(vision) - set(known)):
        raise ValueError(
            f"an image tower is a plain vision transformer; it cannot hold vision_cfg keys {foreign}"
        )
    return {
        **vision,
        "embed_dim": model_cfg["embed_dim"],
        "quick_gelu": model_cfg.get("quick_gelu", False),
    }


class Backbone:
    """A latent diffusion model (vae, text encoder, UNet, scheduler), an image tower and attribute filters.

    `filters` maps an attribute's name to its pretrained `AttributeFilter`; it may be empty. `image_tower`
    None is the published tower in `OPENCLIP`, fetched from the hub when it is first read: only filters do.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizerFast,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        image_tower: ImageTower | None,
        filters: Mapping[str, AttributeFilter] | None = None,
        name: str = "unnamed",
    ) -> None:
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = scheduler
        self._image_tower = image_tower
        self.filters = dict(filters or {})
        self.name = name

    def __repr__(self) -> str:
        return (
            f"Backbone({self.name!r}, {self.image_size} px, {self.device}, {str(self.dtype).split('.')[1]})"
        )

    @property
    def image_tower(self) -> ImageTower:
        """The visual encoder of Eq. 4. Raises OSError where it has to be fetched and cannot be."""
        if self._image_tower is None:
            tower = nn.Module.to(_open_clip_tower(None, self.dtype), self.device)
            self._image_tower = tower.eval().requires_grad_(False)
        return self._image_tower

    @image_tower.setter
    def image_tower(self, tower: ImageTower | None) -> None:
        self._image_tower = tower

    @property
    def components(self) -> dict[str, object]:
        """The modules a diffusers pipeline is made of, by name; None for a tower not read yet."""
        return {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "unet": self.unet,
            "scheduler": self.scheduler,
            "image_tower": self._image_tower,
        }

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every network of the backbone by name, the filters as "filters/<attribute>"."""
        networks = {name: m for name, m in self.components.items() if isinstance(m, nn.Module)}
        return networks | {f"filters/{name}": f for name, f in self.filters.items()}

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def vae_scale(self) -> int:
        """Image pixels to a latent pixel."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def image_size(self) -> int:
        """Width and height, in pixels, of the images the UNet was trained on."""
        return self.unet.config.sample_size * self.vae_scale

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents at `image_size`."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    @property
    def large(self) -> bool:
        """Whether the UNet has Stable Diffusion's order of size rather than `mini`'s."""
        return sum(p.numel() for p in self.unet.parameters()) >= LARGE

    @cached_property
    def identity(self) -> str:
        """Twelve hex digits that name the weights of UNet, text encoder and attribute filters.

        They are read once, then remembered. Without filters it is `identity_without_filters`.
        """
        if not self.filters:
            return self.identity_without_filters
        filters = {f"filters/{name}": learnt.state_dict() for name, learnt in self.filters.items()}
        return _digest_of(filters, self.identity_without_filters)

    @cached_property
    def identity_without_filters(self) -> str:
        """Twelve hex digits that name the UNet's and the text encoder's weights; read once, then remembered.

        A customization changes these two alone: whatever filters it was learnt with, it fits every backbone
        that has them.

        The weights are compared in half precision, so that one checkpoint is the same backbone in every
        precision it is stored or run in. Names and shapes stand for the configuration: the libraries' own
        configurations gain keys from one release to the next.
        """
        return _digest_of({"unet": self.unet.state_dict(), "text": _prefixed(self.text_encoder)})

    @torch.inference_mode(False)  # whose tensors could not be tuned with
    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
    ) -> Backbone:
        """Move every network to `device` and `dtype`, in place; returns itself.

        Raises ValueError for a device that is not there and for a dtype no backbone runs in.
        """
        device = None if device is None else as_device(device)
        dtype = None if dtype is None else as_dtype(dtype)
        if dtype is torch.bfloat16:
            self.identity  # noqa: B018  remembered before the rounding that would change it
        for module in self.modules.values():
            nn.Module.to(
                module, device=device, dtype=dtype
            )  # diffusers' own warns where there is nothing to warn of
        return self

    # ---- images and latents

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of `images` (B, 3, H, W) in [-1, 1]: the posterior mean, scaled."""
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        return posterior.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), clamped to [-1, 1], of `latents` (B, C, h, w)."""
        z = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(z).sample.clamp(-1, 1)

    # ---- prompts and pseudo-words

    def encode_prompt(
        self, prompts: Iterable[str] | str, pseudo_words: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Text conditioning tau(c) (B, L, D) of `prompts`, with pseudo-words (`escd.prompts.encode`)."""
        return reading.encode(self.tokenizer, self.text_encoder, prompts, pseudo_words)

    def encode_ids(self, ids: Tensor, pseudo_words: Mapping[str, Tensor] | None = None) -> Tensor:
        """`encode_prompt` of what `token_ids` gave for the same pseudo-words, with nothing checked."""
        return reading.encode_ids(self.text_encoder, ids, list((pseudo_words or {}).values()))

    def word_embedding(self, word: str) -> Tensor:
        """Embedding e(word) (D,) in the text encoder's table.

        Raises ValueError unless the tokenizer knows the word as one token.
        """
        row = reading.word_id(self.tokenizer, word)
        table = self.text_encoder.get_input_embeddings().weight
        if row is None or row >= len(table):
            raise ValueError(
                f"{word!r} is not one token of this backbone's vocabulary, as an attribute's word must be"
            )
        return table[row].detach().clone()

    def pseudo_words_in(self, prompt: str) -> list[str]:
        """Whatever in `prompt` looks like a pseudo-word, with all that is glued to it, in lower case."""
        return reading.starred_words(prompt)

    def check_prompt(self, prompt: str, loaded_tokens: Iterable[str]) -> None:
        """Raise ValueError when a pseudo-word of `prompt` is not loaded, not standing alone, or cut off."""
        reading.check_prompt(self.tokenizer, prompt, loaded_tokens)

    def cut_off(self, prompt: str, tokens: Iterable[str] = ()) -> str:
        """What of `prompt` lies beyond the tokens the text encoder reads; `tokens`: its pseudo-words."""
        return reading.cut_off(self.tokenizer, prompt, tokens)

    def token_ids(self, prompts: list[str], tokens: Collection[str] = ()) -> Tensor:
        """Token ids (B, L), padded and cut to the text encoder's length; `tokens`: its pseudo-words."""
        return reading.token_ids(self.tokenizer, prompts, tokens)

    # ---- storing

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the backbone in diffusers layout, as safetensors, in `dtype` (default: as it is)."""
        with together(folder) as scratch:
            self._write(scratch, dtype)

    def _write(self, folder: Path, dtype: torch.dtype | None) -> None:
        for name, module in self.modules.items():
            stored = module if dtype is None else nn.Module.to(copy.deepcopy(module), "cpu", dtype)
            if name == "text_encoder":
                # transformers 5 writes the names without this prefix, which earlier versions cannot read.
                stored.config.save_pretrained(folder / name)
                save_file(_prefixed(stored), folder / name / "model.safetensors", metadata={"format": "pt"})
            else:
                stored.save_pretrained(folder / name, safe_serialization=True)
        self.scheduler.save_pretrained(folder / "scheduler")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        # transformers 4 looks for the vocabulary and the merges by themselves.
        self.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
        (folder / "model_index.json").write_text(json.dumps(_model_index(self), indent=2) + "\n")

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
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
        those of `folder` itself, if it has any. Raises FileNotFoundError for what is missing, ValueError for
        filters of another backbone's width.
        """
        dtype, folder = as_dtype(dtype), Path(folder)
        _require_layout(folder)
        # Rounded at the end, so that it keeps the identity of what was read.
        wanted, dtype = dtype, torch.float32 if dtype is torch.bfloat16 else dtype
        if image_tower is None and (folder / "image_tower").is_dir():
            image_tower = _load(ImageTower, folder / "image_tower", dtype)
        elif image_tower is not None and not isinstance(image_tower, ImageTower):
            image_tower = _open_clip_tower(image_tower, dtype)
        configs = sorted(Path(filters or folder).glob("filters/*/config.json"))
        if filters is not None and not configs:
            raise FileNotFoundError(
                f"no attribute filters in {filters}: `python -m escd.pretrain filters` writes a folder with "
                "filters/shape and filters/appearance"
            )
        backbone = cls(
            vae=_load(AutoencoderKL, folder / "vae", dtype),
            text_encoder=_load_text_encoder(folder / "text_encoder", dtype),
            tokenizer=CLIPTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True),
            unet=_load(UNet2DConditionModel, folder / "unet", dtype),
            # Latents are not confined to [-1, 1]; a scheduler's file that is silent about it means the same.
            scheduler=DDIMScheduler.from_pretrained(
                folder / "scheduler", local_files_only=True, clip_sample=False
            ),
            image_tower=image_tower,
            filters={path.parent.name: _load(AttributeFilter, path.parent, dtype) for path in configs},
            name=name or folder.resolve().name,
        )
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
    dtype may be given by its name, as "float16". `image_tower`, `filters`: see `Backbone.from_pretrained`.
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
        elif _is_hub_id(name):
            model = Model(repository=name)
        else:
            raise FileNotFoundError(
                f"no backbone {name!r}: neither {' nor '.join(MODELS)}, no folder, no hub id (owner/name)"
            )
    folder = model.folder or _fetch(model)
    backbone = Backbone.from_pretrained(
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


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name  # the hub has names without an owner; here they would hide a slip in one of MODELS


def _warn_of_the_time(backbone: Backbone) -> None:
    """Say what tuning an attribute of a large backbone takes without a GPU."""
    from .cost import time_in_words, tuning_cost  # which knows what a backbone is
    from .customization import ATTRIBUTES
    from .tuning import TuningConfig

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


def target_of(scheduler: DDIMScheduler, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a UNet is to predict at time steps t (B,): the noise (B, C, h, w), or the velocity (Eq. 2)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(x_0, noise, t)
    raise ValueError(f"a UNet that predicts {kind!r} cannot be trained here; known: epsilon, v_prediction")


def loss_weight(scheduler: DDIMScheduler, t: Tensor) -> Tensor:
    """The weight (B,) of the squared error at time steps t (B,): 1 where the noise is predicted (Eq. 2).

    A velocity's error at little noise says nothing of the picture and would drown the rest: it is weighted
    down from the signal-to-noise ratio SNR_CEILING on, a soft form of min-SNR (Hang et al. 2023).
    """
    if scheduler.config.prediction_type == "epsilon":
        return torch.ones(t.shape, device=t.device)
    return SNR_CEILING / (compute_snr(scheduler, t) + SNR_CEILING)


def draw_noise_levels(
    scheduler: DDIMScheduler, count: int, mean: float, generator: torch.Generator | None = None
) -> Tensor:
    """Time steps (count,) whose log of noise over signal is normal around `mean`, spread over one batch.

    SD's schedule, drawn uniformly, spends half of its steps below a signal-to-noise ratio of 0.3, where there
    is little left to learn at 16 x 16 latents, and outlines stay blurred; a normal distribution of the level
    (Karras et al. 2022) with the plain error serves them better. One step in ten stays uniform, so that pure
    noise is met too.
    """
    alpha = scheduler.alphas_cumprod.cpu().double()  # an Apple GPU has no float64
    level = ((1 - alpha) / alpha.clamp(min=1e-9)).log() / 2
    share = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    normal = mean + NOISE_SPREAD * torch.special.ndtri(share.double().clamp(1e-4, 1 - 1e-4))
    drawn = torch.searchsorted(level, normal).clamp(max=len(level) - 1)
    uniform = torch.randint(0, len(level), (count,), generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.1, uniform, drawn)
    return t[torch.randperm(count, generator=generator)]


def choose_device() -> torch.device:
    """The fastest kind of device here: cuda, else mps, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


# ---- reading folders


def _load(kind: type[ModelMixin], folder: Path, dtype: torch.dtype) -> ModelMixin:
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


def _load_text_encoder(folder: Path, dtype: torch.dtype) -> CLIPTextModel:
    """The text encoder from its folder, whichever way its weights are named (see `_prefixed`)."""
    files = [folder / f"model{variant}.safetensors" for variant in VARIANTS]
    weights = load_file(next(file for file in files if file.exists()))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, local_files_only=True)).to(dtype)
    own_prefix = "text_model." if hasattr(text_encoder, "text_model") else ""
    named = {own_prefix + name.removeprefix("text_model."): w for name, w in weights.items()}
    named.pop(own_prefix + "embeddings.position_ids", None)  # a counter, stored by early releases only
    text_encoder.load_state_dict(named)
    return text_encoder


def _require_layout(folder: Path) -> None:
    """Raise when `folder` is not the folder of a backbone, naming what is missing."""
    missing = [
        file
        for file in (
            "vae/config.json",
            "unet/config.json",
            "text_encoder/config.json",
            "tokenizer/tokenizer_config.json",
            "scheduler/scheduler_config.json",
        )
        if not (folder / file).is_file()
    ]
    missing += [
        f"{name}/{stem}.safetensors"
        for name, stem in STEMS.items()
        if not any((folder / name / f"{stem}{variant}.safetensors").is_file() for variant in VARIANTS)
    ]
    pickles = [
        path.relative_to(folder).as_posix()
        for name in STEMS
        for path in sorted((folder / name).glob("*.*"))
        if path.suffix in PICKLES
    ]
    if missing and pickles:
        raise ValueError(_pickled(str(folder), pickles))
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a backbone in diffusers layout: {', '.join(missing)} missing "
            "(weights are read from safetensors only)"
        )
    for file in sorted(folder.glob("*/*.safetensors")):
        with open_safetensors(file):  # a file cut short is told here, in one way for all networks
            pass
    unet, vae, text = (read_object(folder / name / "config.json") for name in ("unet", "vae", "text_encoder"))
    if (folder / "text_encoder_2").is_dir() or unet.get("addition_embed_type") == "text_time":
        raise ValueError(_is_xl(str(folder)))
    read, made = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if read != made:
        raise ValueError(
            f"{folder} does not draw from a prompt alone: its UNet reads {read} channels, and latents have "
            f"{made}. That is a model for inpainting or editing; take the text-to-image one it came from"
        )
    read, written = unet.get("cross_attention_dim", 1280), text.get("hidden_size", 512)  # as they default
    if read != written:
        raise ValueError(
            f"{folder} is not of Stable Diffusion 1.x's kind: its UNet reads text of width {read}, its text "
            f"encoder writes width {written}"
        )


def load_scheduler(folder: str | Path) -> SchedulerMixin:
    """The scheduler that the `model_index.json` of a folder in diffusers layout names.

    Raises ValueError for a name that is none of diffusers' schedulers.
    """
    index = Path(folder) / "model_index.json"
    named = read_object(index).get("scheduler")
    name = named[1] if isinstance(named, list) and len(named) == 2 else None
    kind = getattr(schedulers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"{index}: scheduler must name one of diffusers' schedulers, not {named!r}")
    return kind.from_pretrained(Path(folder) / "scheduler", local_files_only=True)


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[safe_open]:
    """A safetensors file, open for reading; ValueError when it is none, or is cut short."""
    try:
        with safe_open(path, "pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _pickled(where: str, pickles: Iterable[str]) -> str:
    return (
        f"{where} holds its weights as pickles ({', '.join(pickles)}), and reading one can run any "
        "code: weights are read from safetensors only. Where you trust the files, load them with "
        "diffusers and write them again: StableDiffusionPipeline.from_pretrained(folder, "
        "use_safetensors=False).save_pretrained(other_folder)"
    )


def _is_xl(where: str) -> str:
    return (
        f"{where} is a Stable Diffusion XL model: its UNet reads two text encoders and the picture's "
        "size, which this method's one pseudo-word does not reach. Take a Stable Diffusion 1.x or 2.x "
        "model, or one finetuned from them"
    )


def _fetch(model: Model) -> Path:
    """The folder of a hub model, downloaded unless it is stored on this machine.

    What cannot be used is refused before the download, where the hub says what there is.
    """
    listed = _hub_files(model)
    variants = VARIANTS if model.variant is None else (f".{model.variant}",)
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
        raise ValueError(_is_xl(model.repository))
    for variant in variants:
        if all(f"{name}/{stem}{variant}.safetensors" in there for name, stem in STEMS.items()):
            return (variant,)
    pickles = sorted(n for n in there if n.split("/")[0] in STEMS and Path(n).suffix in PICKLES)
    if pickles:
        raise ValueError(_pickled(model.repository, pickles))
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


def _open_clip_tower(file: str | Path | None, dtype: torch.dtype) -> ImageTower:
    """The image tower of the OpenCLIP model in `OPENCLIP`, from `file` (safetensors) or from the hub."""
    file = open_clip_file(file, "this backbone has no image tower of its own", "pass image_tower=")
    tower = ImageTower(**_tower_config(OPENCLIP.architecture))
    with open_safetensors(file) as stored:
        visual = [name for name in stored.keys() if name.startswith("visual.") and name != "visual.proj"]
        tower.load_state_dict({name: stored.get_tensor(name) for name in visual})
    return nn.Module.to(tower, dtype)


def _model_index(backbone: Backbone) -> dict:
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


def _digest_of(networks: Mapping[str, Mapping[str, Tensor]], before: str = "") -> str:
    """Twelve hex digits of weights by network and name, in half precision."""
    digest = hashlib.sha256(before.encode())
    for network, weights in networks.items():
        for name in sorted(weights):
            w = weights[name].detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{network}.{name}{tuple(w.shape)}".encode())
            digest.update(w.numpy().data)
    return digest.hexdigest()[:12]


# ---- the text encoder


def _prefixed(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The text encoder's weights under the names of transformers 4, with `text_model.` in front."""
    weights = {
        "text_model." + name.removeprefix("text_model."): w.detach().contiguous()
        for name, w in text_encoder.state_dict().items()
    }
    weights.pop("text_model.embeddings.position_ids", None)  # a counter, stored by early releases only
    return weights
