"""The change of a part of the UNet that tuning learns: in full, or as two factors (paper, Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """A weight's change as two factors (LoRA): up (out, r) times down (r, in) or (r, in, k, k)."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def float(self) -> Tensor:
        """The change itself, (out, in) or (out, in, k, k), in float32."""
        # Eq. 8: Delta W = B A
        return (self.up.float() @ self.down.float().flatten(1)).view(self.shape)


class Change:
    """The weights of a part while they learn: in float32, a kernel as a matrix with a row for each filter."""

    def __init__(self, trained: dict[str, nn.Parameter]) -> None:
        self.before = trained
        self.learning = {
            name: (p.flatten(1) if p.ndim > 1 else p).detach().float().clone().requires_grad_()
            for name, p in trained.items()
        }

    def parameters(self) -> list[Tensor]:
        return list(self.learning.values())

    def weights(self) -> dict[str, Tensor]:
        """The part's current weights, by name."""
        return {name: w.view_as(self.before[name]) for name, w in self.learning.items()}

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor | LowRank]:
        """The change so far, W - W_0, in half precision on the CPU, as a `Customization` stores it."""
        return {n: (w - self.before[n].float()).half().cpu() for n, w in self.weights().items()}

    def initial_delta(self) -> dict[str, Tensor | LowRank]:
        """The change before the first step: none."""
        return {}


class Factors(Change):
    """The change of each matrix and kernel as two factors; biases and norms stay as they are."""

    def __init__(self, trained: dict[str, nn.Parameter], rank: int, seed: int) -> None:
        self.before = {name: p for name, p in trained.items() if p.ndim > 1}
        self.learning = {}
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.before.items():
            small = min(rank, p.shape[0], p[0].numel())
            bound = p[0].numel() ** -0.5  # as peft's LoRA starts
            down = torch.empty(small, *p.shape[1:]).uniform_(-bound, bound, generator=generator)
            self.learning[name] = (
                torch.zeros(p.shape[0], small, device=p.device).requires_grad_(),
                down.to(p.device).requires_grad_(),
            )

    def parameters(self) -> list[Tensor]:
        return [factor for pair in self.learning.values() for factor in pair]

    def weights(self) -> dict[str, Tensor]:
        return {n: self.before[n].float() + LowRank(*pair).float() for n, pair in self.learning.items()}

    @torch.no_grad()
    def delta(self) -> dict[str, Tensor | LowRank]:
        return {n: LowRank(*(f.half().cpu() for f in pair)) for n, pair in self.learning.items()}
