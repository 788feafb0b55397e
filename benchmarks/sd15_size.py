"""The whole method at Stable Diffusion 1.5's size, with random weights: `python benchmarks/sd15_size.py`.

Time and memory do not depend on the weights, so they can be measured where the pretrained ones cannot be had:
a shape and an appearance are customised for a few steps, saved, loaded and drawn. Every stage's seconds and
the most memory the process has had until then are printed; `--records FOLDER` keeps them there. `--methods`
adds the published methods, each with its own batch and class images: a few steps and one class image are
measured, and multiplied by its numbers of them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
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
from escd.evaluation.method_configs import runnable
from escd.method.baselines import METHODS
from escd.method.config import TuningConfig
from escd.method.cost import tuning_cost
from escd.method.e4t import E4T
from escd.method.low_rank import megabytes_at
from escd.method.method_cost import prior_operations, sampling_passes
from escd.method.snapshots import Snapshots

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
    # Also the published methods.
    methods: bool = False


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
    if config.methods:
        backbone.e4t = E4T.for_backbone(backbone)
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
    if config.methods:
        able, unable = runnable(backbone)
        for name, why in unable.items():
            print(f"{name} is left out: {why}", flush=True)
        measured["methods"] = {
            name: {each: method_at(name, each, image, backbone, config) for each in ("shape", "appearance")}
            for name in able
        }
        done("published methods")
    return measured


def method_at(
    name: str, attribute: str, image: torch.Tensor, backbone: Backbone, config: SizeConfig
) -> dict[str, float]:
    """A method's time, arithmetic and size at its own batch, steps and number of class images."""
    whole = METHODS[name].config(attribute, backbone, seed=config.seed)
    drawn = min(1, whole.prior_images)
    # The first step allocates, so one more is done.
    short = replace(
        whole, steps=config.steps + 1, views=min(config.views, whole.views), prior_images=drawn,
        prior_prompt=whole.prior_prompt if drawn else "",
    )  # fmt: skip
    times: list[float] = []
    snapshots = Snapshots(())
    learnt = escd.customize(
        image, attribute, backbone, config=short, progress=False, keep_interrupted=False, snapshots=snapshots,
        callback=lambda *_: times.append(time.perf_counter()),
    )  # fmt: skip
    step = statistics.median(b - a for a, b in pairwise(times))
    cost, prior = tuning_cost(backbone, whole), snapshots.prior_seconds * whole.prior_images
    took = {
        "steps": whole.steps,
        "batch": whole.batch_size,
        "step_seconds": step,
        "tuning_seconds": step * whole.steps,
        "prior_images": whole.prior_images,
        "prior_seconds": prior if whole.prior_images else 0.0,
        "operations": cost.operations,
        "prior_operations": prior_operations(backbone, whole),
        "memory_gb": cost.total / 2**30,
        "sampling_passes": sampling_passes(backbone, learnt),
        "file_mb": learnt.nbytes / 1e6,
    }
    print(
        f"{name}, {attribute}: {whole.steps} steps of {step:.2f} s, {whole.prior_images} class images in "
        f"{took['prior_seconds']:.0f} s, {took['sampling_passes']:.2f} passes a sampling step, "
        f"{took['file_mb']:.1f} MB",
        flush=True,
    )
    return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15")
    parser.add_argument("--pixels", type=int, default=SizeConfig.pixels)
    parser.add_argument("--steps", type=int, default=SizeConfig.steps)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=SizeConfig.dtype)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", action="store_true", help="also the published methods")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="keep what is measured there")
    arguments = parser.parse_args()
    names = ("pixels", "steps", "dtype", "methods")
    config = SizeConfig(arguments.size, **{name: getattr(arguments, name) for name in names})
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
