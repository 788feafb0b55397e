"""What one tuning step costs, side by side with the alternatives: `python benchmarks/tuning_cost.py`.

Each method runs in a process of its own, which gives its peak memory, and the methods take turns, round after
round, so that a slow minute of the machine meets all of them. All tune the same UNet (random weights: cost
does not depend on them) with the same optimiser, data type, batch and resolution. Ratios are to tuning the
whole UNet, as DreamBooth does; the floor is the ratio of the floating-point operations. `--records FOLDER`
keeps what was measured there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from escd import records
from escd.backbone.halves import down_path, recomputed, with_weights
from escd.backbone.layers import layered, layers_of
from escd.backbone.parts import parameters_of
from escd.method.cost import relative
from escd.method.step import NoisedViews, predicted

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # UNet2DConditionModel's other defaults are Stable Diffusion's
SMALL = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
}
SIZES = {"sd15": SD15, "small": SMALL}


@dataclass(frozen=True)
class Method:
    """What learns: a part of the UNet (None: nothing of it), a pseudo-word.

    prior: whether as many class images join the batch. layered: whether each cross-attention layer has its
    own conditioning. reads: whether the latents are read first, by a pass of the way down with gradients.
    """

    part: str | None
    word: bool
    conditioning: str = "joint"
    lora: int = 0
    prior: bool = False
    layered: bool = False
    reads: bool = False


METHODS = {
    "whole UNet (DreamBooth)": Method("all", word=False),
    "keys and values (Custom Diffusion)": Method("all/kv", word=True),
    "LoRA, rank 16 (peft)": Method(None, word=False, lora=16),
    "pseudo-word (Textual Inversion)": Method(None, word=True),
    "shape": Method("encoder", word=True),
    "appearance": Method("decoder", word=True),
    "appearance, frozen encoder without gradients": Method("decoder", word=True, conditioning="half"),
    "appearance, encoder outputs kept": Method("decoder", word=True, conditioning="cached"),
    "whole UNet, with class images (DreamBooth)": Method("all", word=False, prior=True),
    "keys and values, with class images (Custom Diffusion)": Method("all/kv", word=True, prior=True),
    "pseudo-word of each layer (P+)": Method(None, word=True, layered=True),
    "whole UNet, latents read first (E4T)": Method("all", word=True, reads=True),
}
WHOLE = next(iter(METHODS))


@dataclass(frozen=True)
class TuningCostConfig:
    """A comparison: every method tunes the UNet of this size so many steps in each round."""

    methods: tuple[str, ...]
    size: str = "sd15"
    pixels: int = 256
    batch: int = 1
    threads: int | None = None
    rounds: int = 2
    steps: int = 2
    dtype: str = "float32"
    checkpointing: bool = False


def prepare(
    method: Method, config: TuningCostConfig, device: torch.device
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A function that gives one step's loss, and what learns."""
    size, dtype = SIZES[config.size], getattr(torch, config.dtype)
    batch = config.batch * (2 if method.prior else 1)
    with torch.device(device):
        unet = nn.Module.to(UNet2DConditionModel(**size), dtype).requires_grad_(False)
        side = config.pixels // 8
        x_t = torch.randn(batch, 4, side, side, dtype=dtype)
        target = torch.randn_like(x_t)
        layers = len(layers_of(unet)) if method.layered else 1
        text = torch.randn(batch, 77 * layers, size["cross_attention_dim"], dtype=dtype)
        t = torch.full((batch,), 500)
        inside = torch.ones(batch, 1, 1, 1, dtype=dtype)
    if config.checkpointing:
        unet.enable_gradient_checkpointing(recomputed)
    learning: list[Tensor] = []
    weights: dict[str, Tensor] = {}
    if method.lora:
        from peft import LoraConfig

        attention = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=method.lora, lora_alpha=method.lora, target_modules=attention))
        learning += [p for p in unet.parameters() if p.requires_grad]
    if method.part is not None:
        chosen = parameters_of(unet, method.part)
        # the network's own tensors learn: a copy would be memory that diffusers' scripts do not need
        weights = {name: p.requires_grad_() for name, p in chosen.items()}
        learning += weights.values()
    if method.word:
        text = text.requires_grad_()
        learning.append(text)
    noised = NoisedViews(x_t, t, target, inside, [""] * batch)
    if method.conditioning == "cached":
        with torch.no_grad():
            noised.maps = down_path(unet, x_t, t, text)

    network = layered(unet) if method.layered else unet

    def loss() -> Tensor:
        read = text
        if method.reads:
            maps = with_weights(down_path, unet, weights, x_t, t, text)
            read = text + torch.stack([m.mean() for m in maps]).mean()
        return (predicted(network, weights, noised, read, method.conditioning) - target).square().mean()

    return loss, learning


def flops(method: Method, config: TuningCostConfig) -> int:
    """Floating-point operations of one forward and backward pass, counted without computing them."""
    loss, _ = prepare(method, config, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def measure(name: str, config: TuningCostConfig, device: torch.device) -> dict[str, float]:
    """Seconds a step without and with the optimiser, and the peak memory of this process or of its GPU."""
    if config.threads:
        torch.set_num_threads(config.threads)
    loss, learning = prepare(METHODS[name], config, device)
    # In one pass over each weight: the other implementations fill and free several more tensors of its size.
    optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    gradients, steps = [], []
    for k in range(config.steps + 1):
        start = wait()
        loss().backward()
        between = wait()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if k:  # the first step allocates
            gradients.append(between - start)
            steps.append(wait() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "gradients": statistics.median(gradients),
        "step": statistics.median(steps),
        "peak": peak / 2**30,
    }


def compare(config: TuningCostConfig, device: torch.device) -> dict[str, Any]:
    """Of each method what `measure` gives in each round, "flops" of a step, and what it is for."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in config.methods}
    for number in range(config.rounds):
        for name in config.methods:
            print(f"round {number + 1} of {config.rounds}: {name}", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--device", str(device), "--child", name]
            done = subprocess.run(
                [*command, json.dumps(asdict(config))], check=True, stdout=subprocess.PIPE, text=True
            )
            rounds[name].append(json.loads(done.stdout))
    return {"rounds": rounds, "flops": {name: flops(METHODS[name], config) for name in config.methods}}


def table(rounds: dict[str, list[dict[str, float]]], operations: dict[str, int]) -> str:
    """One row a method: medians over the rounds, and their ratios to tuning the whole UNet."""
    head = f"{'':46}{'s a step':>10}{'ratio':>7}{'no optimiser':>14}{'ratio':>7}{'GB':>7}{'ratio':>7}"
    head += f"{'FLOPs':>8}"
    lines = [head]
    for name, ratio in relative(rounds, to=WHOLE).items():
        row = {key: statistics.median(one[key] for one in rounds[name]) for key in ratio}
        lines.append(
            f"{name:46}{row['step']:>10.3f}{ratio['step']:>7.2f}{row['gradients']:>14.3f}{ratio['gradients']:>7.2f}"
            f"{row['peak']:>7.2f}{ratio['peak']:>7.2f}{operations[name] / operations[WHOLE]:>8.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every method in turn and print the table."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="sd15", help="of the UNet")
    parser.add_argument("--pixels", type=int, default=512 if cuda else 256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10 if cuda else 2, help="timed steps a method and round")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing, for all methods"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="those whose name begins so; default: all"
    )
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="keep what is measured there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.child:
        name, given = arguments.child
        print(json.dumps(measure(name, TuningCostConfig(**json.loads(given)), device)))
        return
    wanted = tuple(arguments.methods or [""])
    config = TuningCostConfig(
        methods=tuple(name for name in METHODS if name == WHOLE or name.startswith(wanted)),
        **{
            name: getattr(arguments, name)
            for name in TuningCostConfig.__dataclass_fields__
            if name != "methods"
        },
    )
    found = records.measured(
        config, lambda config: compare(config, device), device=device, folder=arguments.records
    )
    where = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    print(f"{where}, torch {torch.__version__}; {config.rounds} rounds of {config.steps} steps")
    kind = ", gradient checkpointing" if config.checkpointing else ""
    print(f"{config.size}, {config.pixels} px, batch {config.batch}, {config.dtype}{kind}")
    print(table(found["rounds"], found["flops"]))


if __name__ == "__main__":
    main()
