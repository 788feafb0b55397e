"""Where a step of `mini`'s UNet's training goes: `python benchmarks/pretraining.py`.

The parts of a step take turns, round by round: rendering images, encoding them, extracting their features,
the UNet's way there and back, the optimiser with the average. The arithmetic reached is that of the UNet's
way there and back, beside what one large matrix product of the same type reaches on as many threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers.training_utils import EMAModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from escd.backbone.hub import MODELS
from escd.pretrain.pairs import quartets
from escd.pretrain.unet import UNetStage

SIDE = 2048  # of the matrices whose product stands for the machine's peak


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Print a row for each part of a step, then the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=UNetStage.loop.batch_size)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="as pretraining does with --compile; minutes")
    parser.add_argument("--float32", action="store_true", help="the UNet without bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    stage = UNetStage(torch.device("cpu"), MODELS["mini"].folder)
    stage.load(MODELS["mini"].folder)
    if arguments.compile:
        stage.module.unet.compile(dynamic=False)
    learning = [p for p in stage.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True)
    average = EMAModel(learning)
    fresh = arguments.batch // stage.reuse
    index = torch.arange(fresh)
    images = quartets(stage.world, index).image
    latents = stage._encode(images)
    step = stage.batch(0, arguments.batch)

    def learn() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not arguments.float32):
            loss, _ = stage.module(step)
        loss.backward()

    def follow() -> None:
        optimizer.step()
        average.step(learning)

    parts: dict[str, Callable[[], object]] = {
        f"rendering {fresh} images": lambda: quartets(stage.world, index),
        "the autoencoder's latents": lambda: stage._encode(images),
        "features for the filters": lambda: stage._features(images, latents, 0),
        "UNet and filters, forward and backward": learn,
        "AdamW and the average": follow,
    }
    dtype = torch.float32 if arguments.float32 else torch.bfloat16
    one, other = (torch.randn(SIDE, SIDE, dtype=dtype) for _ in range(2))
    taken: dict[str, list[float]] = {name: [] for name in (*parts, "peak")}
    with sdpa_kernel([SDPBackend.MATH]):
        with FlopCounterMode(display=False) as counter:
            learn()  # warms up, too
        for _ in range(arguments.rounds):
            for name, part in parts.items():
                taken[name].append(timed(part))
            taken["peak"].append(timed(lambda: one @ other))
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    whole = sum(seconds[name] for name in parts)
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {arguments.threads} threads"
    )
    for name in parts:
        print(f"{name:<40} {1000 * seconds[name]:7.0f} ms {100 * seconds[name] / whole:4.0f} %")
    print(f"{'a step':<40} {1000 * whole:7.0f} ms, {arguments.batch / whole:.0f} images/s")
    reached = counter.get_total_flops() / seconds["UNet and filters, forward and backward"] / 1e9
    peak = 2 * SIDE**3 / seconds["peak"] / 1e9
    print(f"arithmetic: {reached:.0f} of {peak:.0f} GFLOP/s, {100 * reached / peak:.0f} %")


if __name__ == "__main__":
    main()
