"""Optimizers of the pretraining loop: AdamW, and Muon for the matrices and kernels inside a network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

OPTIMIZERS = ("adamw", "muon")


class WithMuon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some matrices and kernels, AdamW for all other parameters.

    A kernel (C, D, k, k) is a matrix (C, Dkk) to Muon. One learning rate is for both: Muon's steps are scaled
    to the length of AdamW's.
    """

    def __init__(
        self, muon: Collection[nn.Parameter], adamw: list[dict[str, Any]], lr: float, weight_decay: float
    ) -> None:
        """muon: its parameters; adamw: the parameter groups of AdamW."""
        self.kernels = list(muon)
        # The same memory as matrices; their gradients are set before each step.
        self.matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.kernels]
        self.muon = torch.optim.Muon(
            self.matrices, lr=lr, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = make_adamw(adamw, lr)
        super().__init__([{"params": self.kernels}, *adamw], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of both, at the learning rates of this optimizer's own groups; `closure` is not used."""
        own, *rest = self.param_groups
        self.muon.param_groups[0]["lr"] = own["lr"]
        for group, mine in zip(self.adamw.param_groups, rest, strict=True):
            group["lr"] = mine["lr"]
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])


def make_adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def make_optimizer(
    parameters: list[nn.Parameter], muon: Collection[nn.Parameter], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or `WithMuon` where `muon` has any of two dimensions or more; vectors are always AdamW's.

    Matrices and kernels have weight decay; biases and normalisation have none.
    """
    allowed = {id(p) for p in muon if p.ndim > 1}
    kernels = [p for p in parameters if id(p) in allowed]
    rest = [p for p in parameters if id(p) not in allowed]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return WithMuon(kernels, groups, lr, weight_decay) if kernels else make_adamw(groups, lr)
