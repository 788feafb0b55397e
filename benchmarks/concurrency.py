"""What it costs a call to have modules of its own: `python benchmarks/concurrency.py`.

Pictures of `mini` with a shape and an appearance, by the pipeline as it is and by one that writes the changed
weights into its UNet for the time of the call, as a single caller could; in turns, as processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import escd
from escd.method import pipeline
from escd.method.customization import customized

PROMPT = "a *m shape with *a appearance on a gray background"


@contextmanager
def written_in_place(pipe: escd.ESCDPipeline) -> Iterator[None]:
    """While open, a call writes its weights into `pipe.unet` instead of making modules that hold them."""
    parameters = dict(pipe.unet.named_parameters())
    before = {name: p.data for name, p in parameters.items()}

    def write(unet: torch.nn.Module, changes: list, made: dict) -> torch.nn.Module:
        for customization, strength in changes:
            for name, dw in customization.delta.items():
                parameters[name].data = parameters[name].data.float() + strength * dw.float()
        return unet

    pipeline.customized = write
    try:
        yield
    finally:
        pipeline.customized = customized
        for name, p in parameters.items():
            p.data = before[name]


def seconds(pipe: escd.ESCDPipeline, steps: int) -> float:
    """Processor time of one image."""
    start = time.process_time()
    # Written in place there is no other UNet for the branch without the prompt.
    generator = torch.Generator().manual_seed(0)
    pipe(PROMPT, num_inference_steps=steps, guidance_from="customized", generator=generator)
    return time.process_time() - start


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    backbone, world = escd.load_backbone("mini", device="cpu"), escd.World(seed=0)
    learnt = {
        name: escd.customize(world[k].image, name, backbone, steps=1, progress=False)
        for k, name in enumerate(escd.ATTRIBUTES)
    }
    pipe = escd.ESCDPipeline(backbone, **learnt)
    pipe.set_progress_bar_config(disable=True)
    taken: dict[str, list[float]] = {"own": [], "in place": []}
    for round_ in range(arguments.rounds + 1):
        own = seconds(pipe, arguments.steps)
        with written_in_place(pipe):
            in_place = seconds(pipe, arguments.steps)
        if round_:  # the first is to warm up
            taken["own"].append(own)
            taken["in place"].append(in_place)
    own, in_place = (1000 * statistics.median(times) for times in taken.values())
    print(f"{own:.0f} ms with modules of its own, {in_place:.0f} ms written in place, {own / in_place:.3f}")


if __name__ == "__main__":
    main()
