"""The pretrained model that ESCDiffusion customizes: a latent diffusion model and an image tower."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizerFast

from . import prompts as reading
from .devices import as_device, as_dtype
from .image_tower import ImageTower, open_clip_tower

LARGE = 100_000_000  # parameters of a UNet that is tuned otherwise than `mini`, and slowly on a CPU


class Backbone:
    """A latent diffusion model (vae, text encoder, UNet, scheduler), an image tower and attribute filters.

    `filters` maps an attribute's name to its pretrained `AttributeFilter`; it may be empty. `image_tower`
    None is the published tower in `OPENCLIP`, fetched from the hub when it is first read: only filters and
    E4T do. `e4t`: what E4T pretrained on this backbone (`escd.method.e4t`), if anything.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizerFast,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        image_tower: ImageTower | None,
        filters: Mapping[str, nn.Module] | None = None,
        name: str = "unnamed",
        e4t: nn.Module | None = None,
    ) -> None:
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = scheduler
        self._image_tower = image_tower
        self.filters = dict(filters or {})
        self.e4t = e4t
        self.name = name

    def __repr__(self) -> str:
        return (
            f"Backbone({self.name!r}, {self.image_size} px, {self.device}, {str(self.dtype).split('.')[1]})"
        )

    @property
    def image_tower(self) -> ImageTower:
        """The visual encoder of Eq. 4. Raises OSError where it has to be fetched and cannot be."""
        if self._image_tower is None:
            tower = nn.Module.to(open_clip_tower(None, self.dtype), self.device)
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
        """Every network of the backbone by name, the filters as "filters/<attribute>", E4T's as "e4t"."""
        networks = {name: m for name, m in self.components.items() if isinstance(m, nn.Module)}
        networks |= {f"filters/{name}": f for name, f in self.filters.items()}
        return networks if self.e4t is None else networks | {"e4t": self.e4t}

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
        return _digest_of({"unet": self.unet.state_dict(), "text": prefixed(self.text_encoder)})

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
        """Text conditioning tau(c) (B, L, D) of `prompts`, with pseudo-words (`prompts.encode`)."""
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

    def cut_off(self, prompt: str, tokens: Iterable[str] = ()) -> str:
        """What of `prompt` lies beyond the tokens the text encoder reads; `tokens`: its pseudo-words."""
        return reading.cut_off(self.tokenizer, prompt, tokens)

    def token_ids(self, prompts: list[str], tokens: Collection[str] = ()) -> Tensor:
        """Token ids (B, L), padded and cut to the text encoder's length; `tokens`: its pseudo-words."""
        return reading.token_ids(self.tokenizer, prompts, tokens)


def _digest_of(networks: Mapping[str, Mapping[str, Tensor]], before: str = "") -> str:
    """Twelve hex digits of weights by network and name, in half precision."""
    digest = hashlib.sha256(before.encode())
    for network, weights in networks.items():
        for name in sorted(weights):
            w = weights[name].detach().to("cpu", torch.float16).contiguous()
            digest.update(f"{network}.{name}{tuple(w.shape)}".encode())
            digest.update(w.numpy().data)
    return digest.hexdigest()[:12]


def prefixed(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """The text encoder's weights under the names of transformers 4, with `text_model.` in front."""
    weights = {
        "text_model." + name.removeprefix("text_model."): w.detach().contiguous()
        for name, w in text_encoder.state_dict().items()
    }
    weights.pop("text_model.embeddings.position_ids", None)  # a counter, stored by early releases only
    return weights
