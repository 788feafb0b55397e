"""A counter-based random number generator: each number is a hash of seed, sample and name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def signed(value: int) -> int:
    """An integer modulo 2**64 as int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 has only an arithmetic shift; the mask makes it logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    # The finaliser of splitmix64 (Steele et al. 2014), in wrapping int64.
    x = (x ^ _shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


@lru_cache(maxsize=4096)
def key_of(text: str) -> int:
    """A 64-bit hash of a name."""
    value = 0xCBF29CE484222325  # FNV-1a: stable over processes, unlike hash()
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & ((1 << 64) - 1)
    return signed(value)


class CounterRNG:
    """Uniform numbers as a function of (seed, index, name): the same in any batch and on any worker."""

    def __init__(self, seed: int, index: Tensor) -> None:
        self.seed = seed
        self.index = index.to(torch.int64)
        self._base = _mix(
            self.index * signed(0x9E3779B97F4A7C15) + signed(key_of("world") + seed * 0x2545F4914F6CDD1D)
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor) -> CounterRNG:
        return CounterRNG(self.seed, self.index[rows])

    def uniform(self, name: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(N, *shape) float32 in [low, high)."""
        count = math.prod(shape)
        counter = torch.arange(count, device=self.index.device, dtype=torch.int64) * signed(
            0xD1342543DE82EF95
        )
        bits = _mix((self._base ^ key_of(name))[:, None] + counter[None])
        unit = _shift(bits, 40).to(torch.float32) * 2.0**-24
        return (low + (high - low) * unit).view(len(self), *shape)

    def integer(self, name: str, low: int, high: int) -> Tensor:
        """(N,) int64 in [low, high)."""
        return (low + self.uniform(name) * (high - low)).floor().to(torch.int64).clamp(max=high - 1)

    def choose(self, name: str, weights: Sequence[float]) -> Tensor:
        """(N,) int64: an index drawn with these weights."""
        edges = torch.tensor(weights, dtype=torch.float64).cumsum(0).to(self.index.device)
        return torch.searchsorted((edges / edges[-1])[:-1].to(torch.float32), self.uniform(name), right=True)
