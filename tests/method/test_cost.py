"""What tuning will take: counted beforehand, and held against what it then takes."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import warm
from torch.utils.flop_counter import FlopCounterMode

import escd
from escd.backbone.halves import down_path
from escd.method.config import TuningConfig
from escd.method.cost import (
    TuningCost,
    cpu_seconds,
    needs_checkpointing,
    require_memory,
    time_in_words,
    tuning_cost,
)
from escd.method.step import NoisedViews, fast_arithmetic, predicted

# Peak memory of a process that tunes mini for two steps, in bytes.
PEAK = """
import ctypes, resource, sys, torch
import escd
from escd.method.config import TuningConfig
torch.set_num_threads(1)
if sys.platform == "linux":  # what is freed is given back at once: else the allocator uses it again, or not
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
backbone = escd.load_backbone("mini", device="cpu")
config = TuningConfig.of("appearance", steps=2, views=2, batch_size=int(sys.argv[1]))
given = {"progress": False, "checkpointing": sys.argv[2] == "True"}
escd.customize(torch.zeros(3, 64, 64), "appearance", backbone, config=config, **given)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
if sys.platform == "linux":  # there it is never less than that of the process that started this one
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) * 1024
print(peak)
"""


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_that_batches_take_is_foretold(checkpointing):
    backbone = escd.load_backbone("mini", device="cpu")
    peaks, costs = [], []
    for batch in (6, 54):
        done = subprocess.run(
            [*warm.python(), "-c", PEAK, str(batch), str(checkpointing)],
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(done.stdout))
        config = TuningConfig.of("appearance", steps=2, batch_size=batch)
        costs.append(tuning_cost(backbone, config, checkpointing=checkpointing))
    assert costs[0].learning == costs[1].learning and costs[0].frozen == costs[1].frozen
    grown = costs[1].activations - costs[0].activations
    assert 6 < grown / costs[0].activations < 8, "in proportion to the batch, but for copies of the weights"
    # on the way back a few gradients come on top, and elsewhere what the allocator does not use again
    low, high = (0.7, 1.2) if sys.platform == "linux" else (0.8, 1.7)
    assert low < (peaks[1] - peaks[0]) / grown < high
    assert costs[1].total < peaks[1], "python and its libraries come on top"


def test_what_learns_is_counted(backbone):
    def learning(*given, **changes):
        return tuning_cost(backbone, TuningConfig.of(*given, **changes)).learning

    shape, whole = learning("shape"), learning("shape", "all")
    assert 0 < shape < whole and learning("shape", "none") == 0
    encoder = escd.parts.parameters_of(backbone.unet, "encoder").values()
    numbers, matrices = (sum(p.numel() for p in encoder if p.ndim > least) for least in (0, 1))
    assert learning("shape", optimizer="adamw") == 16 * numbers
    assert learning("shape", optimizer="muon") == 16 * numbers - 4 * matrices
    assert learning("shape", rank=1) < learning("shape", rank=2)


def test_operations_are_those_of_a_real_step(backbone):
    config = TuningConfig.of("shape", steps=3, batch_size=2)
    weights = {
        name: p.detach().clone().requires_grad_()
        for name, p in escd.parts.parameters_of(backbone.unet, "encoder").items()
    }
    x_t = torch.randn(2, *backbone.latent_shape)
    batch = NoisedViews(x_t, torch.tensor([5, 500]), x_t, torch.ones(2, 1, 1, 1), [""] * 2)
    text = backbone.encode_prompt(["a star"] * 2).detach().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        predicted(backbone.unet, weights, batch, text, "joint").sum().backward()
    assert tuning_cost(backbone, config).operations == pytest.approx(3 * counter.get_total_flops(), rel=0.02)
    joint, half, cached = (
        tuning_cost(backbone, TuningConfig.of("appearance", conditioning=kind)).operations
        for kind in ("joint", "half", "cached")
    )
    assert joint > half > cached > 0


def test_checkpointing_trades_memory_for_arithmetic(backbone):
    config = TuningConfig.of("appearance", batch_size=8)
    plain, less = (tuning_cost(backbone, config, checkpointing=on) for on in (False, True))
    assert less.activations < 0.5 * plain.activations and less.learning == plain.learning
    # one way there more, of three
    assert 1.2 < less.operations / plain.operations < 1.4
    eight = tuning_cost(backbone, TuningConfig.of("appearance", optimizer="adamw8bit"))
    assert eight.learning < tuning_cost(backbone, TuningConfig.of("appearance", optimizer="muon")).learning


@pytest.mark.parametrize(("gigabytes", "wanted"), [(12, True), (48, False)])
def test_a_small_gpu_has_checkpointing_without_being_asked(backbone, monkeypatch, gigabytes, wanted):
    config = TuningConfig.of("appearance")
    monkeypatch.setattr("escd.method.cost.memory_for", lambda device: gigabytes << 30)
    cost = TuningCost(4 << 30, 7 << 30, 1 << 30, 1)
    monkeypatch.setattr("escd.method.cost.tuning_cost", lambda *_, **__: cost)
    assert not needs_checkpointing(backbone, config), "on a CPU"
    gpu = SimpleNamespace(device=torch.device("cuda"), large=True)
    assert needs_checkpointing(gpu, config) is wanted


def test_it_is_said_in_words(backbone):
    cost = tuning_cost(backbone, TuningConfig.of("shape", steps=1))
    assert "backbone" in str(cost) and "activations" in str(cost) and cpu_seconds(cost) > 0
    assert time_in_words(cost).endswith(" s") and time_in_words(TuningCost(1, 1, 1, 10**16)).endswith(" min")


def test_too_little_gpu_memory_says_what_helps(monkeypatch):
    # 5 GB are free, and 3 GB hold the backbone already
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    cost = TuningCost(3 << 30, 3 << 30, 1 << 30, 1)
    require_memory(cost, torch.device("cuda"))
    require_memory(TuningCost(1 << 40, 0, 0, 1), torch.device("cpu"))
    with pytest.raises(MemoryError, match=r"about 9\.00 GB.*Card has 8\.0 GB left.*float16.*--rank.*8bit"):
        require_memory(TuningCost(5 << 30, 3 << 30, 1 << 30, 1), torch.device("cuda"))


def test_what_is_read_ahead_is_counted(backbone):
    few, many = (
        tuning_cost(backbone, TuningConfig.of("appearance", conditioning="cached", draws=draws)).activations
        for draws in (16, 116)
    )
    shape = (1, *backbone.latent_shape)
    text = backbone.encode_prompt(["a star"])
    with fast_arithmetic(backbone.device, backbone.dtype):
        maps = down_path(backbone.unet, torch.randn(shape), torch.tensor([5]), text)
    assert many - few == 100 * sum(m.nbytes for m in maps)
