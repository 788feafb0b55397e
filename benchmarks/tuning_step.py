"""What tuning `mini` on a CPU gains by its working copy of the UNet: `python benchmarks/tuning_step.py`.

One step's prediction and gradients, by the UNet itself under autocast and by `escd.method.step.working_copy`,
in turns on the same draws, so that a slow minute of the machine meets both.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import escd
from escd.backbone.parts import parameters_of
from escd.method.step import NoisedViews, fast_arithmetic, predicted, working_copy


def seconds(network: nn.Module, weights: dict[str, Tensor], batch: NoisedViews, text: Tensor) -> float:
    """Time of one prediction for the draws and its gradients by the weights."""
    start = time.perf_counter()
    with fast_arithmetic(text.device):
        predicted(network, weights, batch, text, "joint").float().square().mean().backward()
    return time.perf_counter() - start


def main() -> None:
    """Print the medians and their ratio for both halves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backbone = escd.load_backbone("mini")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.batch, *backbone.latent_shape, generator=generator)
    t = torch.randint(0, 1000, (arguments.batch,), generator=generator)
    prompts = ["a star shape"] * arguments.batch
    batch = NoisedViews(x_t=x, t=t, target=x, mask=torch.ones_like(x[:, :1]), prompts=prompts)
    text = backbone.encode_prompt(prompts)
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {arguments.threads} threads"
    )
    for half in ("encoder", "decoder"):
        trained = parameters_of(backbone.unet, half)
        weights = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
        networks = {"the UNet": backbone.unet, "working copy": working_copy(backbone.unet, trained)}
        for network in networks.values():  # to warm up
            seconds(network, weights, batch, text)
        taken: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(arguments.rounds):
            for name, network in networks.items():
                taken[name].append(seconds(network, weights, batch, text))
        own, copied = (1000 * statistics.median(times) for times in taken.values())
        print(f"{half}: {own:.0f} ms by the UNet, {copied:.0f} ms by its working copy, {copied / own:.2f}")


if __name__ == "__main__":
    main()
