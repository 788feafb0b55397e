"""Images a second of the world's renderer by batch size and threads: `python benchmarks/world.py`."""

from __future__ import annotations

import argparse
import time

import torch

from escd.data.world import World


def images_per_second(batch: int, threads: int, seconds: float) -> float:
    """Pictures of `World(seed=0)` rendered a second in batches of `batch`, after one batch to warm up."""
    torch.set_num_threads(threads)
    world, first = World(seed=0), batch
    world.batch(range(batch))
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        world.batch(range(first, first + batch))
        first += batch
    return (first - batch) / (time.perf_counter() - start)


def main() -> None:
    """Print a table: one row a batch size, one column a number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each is measured")
    arguments = parser.parse_args()
    print(f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}: images/s")
    print("batch" + "".join(f"{threads:>9} thr" for threads in arguments.threads))
    for batch in arguments.batches:
        rates = [images_per_second(batch, threads, arguments.seconds) for threads in arguments.threads]
        print(f"{batch:>5}" + "".join(f"{rate:>13.0f}" for rate in rates))


if __name__ == "__main__":
    main()
