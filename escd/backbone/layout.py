"""The layout of a backbone's folder, which is diffusers': what must be there, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..files import open_safetensors
from ..reading import read_object

VARIANTS = ("", ".fp16", ".bf16")  # of weight files, in the order they are looked for
# The networks a folder must have, and how diffusers and transformers call their weights.
STEMS = {"vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model", "text_encoder": "model"}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")  # endings of weights whose reading runs code


def require_layout(folder: Path) -> None:
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
        raise ValueError(pickled(str(folder), pickles))
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
        raise ValueError(is_xl(str(folder)))
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


def pickled(where: str, pickles: Iterable[str]) -> str:
    return (
        f"{where} holds its weights as pickles ({', '.join(pickles)}), and reading one can run any "
        "code: weights are read from safetensors only. Where you trust the files, load them with "
        "diffusers and write them again: StableDiffusionPipeline.from_pretrained(folder, "
        "use_safetensors=False).save_pretrained(other_folder)"
    )


def is_xl(where: str) -> str:
    return (
        f"{where} is a Stable Diffusion XL model: its UNet reads two text encoders and the picture's "
        "size, which this method's one pseudo-word does not reach. Take a Stable Diffusion 1.x or 2.x "
        "model, or one finetuned from them"
    )
