"""The whole method at Stable Diffusion 1.5's size, with random weights: `python benchmarks/sd15_size.py`.

Time and memory do not depend on the weights, so they can be measured where the pretrained ones cannot be had:
a shape and an appearance are customised for a few steps, saved, loaded and drawn. Every stage's seconds and
the most memory the process has had until then are printed; `--records FOLDER` keeps them there.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

import escd
from escd import records
from escd.backbone.hub import MODELS
from escd.backbone.image_tower import ImageTower
from escd.backbone.model import Backbone
from escd.backbone.parts import parameters_of
from escd.evaluation.configs import RANKS
from escd.method.config import TuningConfig
from escd.method.low_rank import megabytes_at

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        # UNet2DConditionModel's other defaults are Stable Diffusion's
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
        "text": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "tower": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12, "embed_dim": 512},
    },
    "small": {
        "unet": {
            "block_out_channels": (32, 64, 64, 64),
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "layers_per_block": 1,
        },
        "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        "text": {
            "vocab_size": 2000,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "tower": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "embed_dim": 32},
    },
}


@dataclass(frozen=True)
class SizeConfig:
    """A backbone of this size with random weights: a few steps of either attribute, and two images."""

    size: str = "sd15"
    dtype: str = "float32"
    pixels: int = 256
    steps: int = 3
    sampler_steps: int = 2
    # Differently augmented views, encoded before the first step; the recipe has more of them.
    views: int = 8
    seed: int = 0


def random_backbone(config: SizeConfig, device: torch.device) -> Backbone:
    """A backbone of that size; its words are `mini`'s, for want of the real vocabulary."""
    torch.manual_seed(config.seed)
    size = SIZES[config.size]
    tokenizer = CLIPTokenizerFast.from_pretrained(MODELS["mini"].folder / "tokenizer")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    backbone = Backbone(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=config.pixels,
            **size["vae"],
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(max_position_embeddings=77, **size["text"], **special)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=config.pixels // 8, **size["unet"]),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        image_tower=ImageTower(**size["tower"]),
        name=f"random {config.size}",
    )
    for module in backbone.modules.values():
        module.eval().requires_grad_(False)
    return backbone.to(device, getattr(torch, config.dtype))


def peak(device: torch.device) -> float:
    """The most memory so far, in GB: of the process, or on a GPU of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def measure(config: SizeConfig, device: torch.device) -> dict[str, Any]:
    """Parameters in millions, each stage's seconds and peak GB, customizations' MB in full and at ranks."""
    measured: dict[str, Any] = {"seconds": {}, "peak_gb": {}, "file_mb": {}}
    start = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal start
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        measured["seconds"][stage] = time.perf_counter() - start
        measured["peak_gb"][stage] = peak(device)
        print(
            f"{stage:<24} {measured['seconds'][stage]:7.1f} s, {measured['peak_gb'][stage]:5.1f} GB",
            flush=True,
        )
        start = time.perf_counter()

    backbone = random_backbone(config, device)
    measured["parameters_m"] = {
        part: sum(p.numel() for p in parameters_of(backbone.unet, part).values()) / 1e6
        for part in ("all", "encoder", "mid", "decoder")
    }
    measured["mb_at_rank"] = {
        part: {str(rank): megabytes_at(parameters_of(backbone.unet, part), rank) for rank in RANKS}
        for part in ("encoder", "decoder")
    }
    done("random weights")
    image = torch.rand(3, config.pixels, config.pixels, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loaded = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("shape", "appearance"):
            tuning = TuningConfig.of(
                name, backbone=backbone, steps=config.steps, views=config.views, seed=config.seed
            )
            learnt = escd.customize(
                image, name, backbone, config=tuning, progress=False, keep_interrupted=False
            )
            done(f"{name}: {config.steps} steps")
            file = Path(folder) / f"{name}.safetensors"
            learnt.save(file)
            del learnt
            measured["file_mb"][name] = file.stat().st_size / 1e6
            loaded[name] = escd.load_customization(file, backbone)
            done(f"{name}: save and load")
    pipe = escd.ESCDPipeline(backbone, **loaded)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        "a *m shape with *a appearance",
        num_inference_steps=config.sampler_steps,
        generator=torch.Generator().manual_seed(config.seed),
    )
    done(f"generate: {config.sampler_steps} steps")
    assert out.images[0].size == (config.pixels, config.pixels)
    return measured


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15")
    parser.add_argument("--pixels", type=int, default=SizeConfig.pixels)
    parser.add_argument("--steps", type=int, default=SizeConfig.steps)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=SizeConfig.dtype)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="keep what is measured there")
    arguments = parser.parse_args()
    config = SizeConfig(arguments.size, pixels=arguments.pixels, steps=arguments.steps, dtype=arguments.dtype)
    device = torch.device(arguments.device)
    measured = records.measured(
        config, lambda config: measure(config, device), device=device, folder=arguments.records
    )
    millions = {part: round(count, 1) for part, count in measured["parameters_m"].items()}
    files = {name: round(size) for name, size in measured["file_mb"].items()}
    print(f"parameters in millions {millions}; files in MB {files}")
    for part, sizes in measured["mb_at_rank"].items():
        print(f"{part} at a rank, MB: " + ", ".join(f"{rank}: {mb:.1f}" for rank, mb in sizes.items()))
    print(f"the most memory: {max(measured['peak_gb'].values()):.1f} GB")


if __name__ == "__main__":
    main()
