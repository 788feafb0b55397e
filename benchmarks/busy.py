"""What two tunings on the same cores take, beside one alone: `python benchmarks/busy.py`.

Each way of waiting (`escd.waiting`) has two processes, which tune a shape of `mini`, one alone and both at
once, in turns with the other ways, so that a slow minute of the machine meets all of them. Seconds are those
of the slower of the two. A machine that does something else besides is no place to measure the seconds; the
ratios say something there too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from escd.waiting import SPIN

BEFORE, AFTER = "as PyTorch comes", "as escd sets it"
# A process that tunes on request. The first import decides how threads wait.
PROCESS = """
import {first}, sys, warnings
import escd
from escd.evaluation.references import load_references
backbone, image = escd.load_backbone("mini", device="cpu"), load_references()[0].image
escd.customize(image, "shape", backbone, steps=1, progress=False)
print("ready", flush=True)
for line in sys.stdin:
    escd.customize(image, "shape", backbone, steps=int(line), progress=False)
    print("done", flush=True)
"""


def start(way: str) -> subprocess.Popen:
    """A process that waits in this way, ready to tune."""
    environment = {k: v for k, v in os.environ.items() if k not in (*SPIN, "OMP_WAIT_POLICY")}
    if way not in (BEFORE, AFTER):
        environment["GOMP_SPINCOUNT"] = way
    code = PROCESS.format(first="escd" if way == AFTER else "torch")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    request(process)
    return process


def request(process: subprocess.Popen) -> None:
    """Wait until the process says something; RuntimeError if it ends instead."""
    if not process.stdout.readline():
        raise RuntimeError(f"a process that tunes ended with {process.wait()}")


def seconds(processes: list[subprocess.Popen], steps: int) -> float:
    """How long it takes until all of the processes, at once, have tuned."""
    begun = time.perf_counter()
    for process in processes:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
    for process in processes:
        request(process)
    return time.perf_counter() - begun


def main() -> None:
    """Print the medians and what they are of the first way's, alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--spin", nargs="*", default=[], metavar="N", help="GOMP_SPINCOUNT of further ways")
    arguments = parser.parse_args()
    processes = {way: [start(way), start(way)] for way in (BEFORE, AFTER, *arguments.spin)}
    taken: dict[tuple[str, int], list[float]] = {}
    try:
        for _ in range(arguments.rounds):
            for way, pair in processes.items():
                for many in (1, 2):
                    taken.setdefault((way, many), []).append(seconds(pair[:many], arguments.steps))
    finally:
        for process in (p for pair in processes.values() for p in pair):
            process.communicate()
    medians = {key: statistics.median(times) for key, times in taken.items()}
    print(f"{arguments.steps} steps, {os.cpu_count()} cores, a load of {os.getloadavg()[0]:.1f}")
    print(f"{'threads wait':20}{'alone':>10}{'two at once':>14}{'alone':>10}{'two at once':>14}")
    for way in processes:
        alone, two = medians[way, 1], medians[way, 2]
        shares = alone / medians[BEFORE, 1], two / alone
        print(f"{way:20}{alone:9.1f}s{two:13.1f}s{shares[0]:9.2f}x{shares[1]:13.2f}x")
    print("the first two of them in seconds; then alone beside the first way, and two at once beside alone")


if __name__ == "__main__":
    main()
