"""Optimisers of the pseudo-word and the part's weights: AdamW, AdamW in 8 bits, and Muon for matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TuningConfig
from .delta import Change

# Share of the steps, at the end, in which the learning rate decays to zero. A constant rate leaves noise of
# the one image in the weights.
DECAY = {"muon": 0.6, "adamw": 0.2, "adamw8bit": 0.2}
WARM_UP = 10  # steps in which the learning rate rises


def optimizers_for(
    v: Tensor, change: Change, config: TuningConfig, fused: bool = False
) -> list[torch.optim.Optimizer]:
    """Optimisers for the pseudo-word, the part's matrices, and its biases and norms, each at its own rate.

    fused: AdamW computes each weight's update in one kernel, which large weights need
    (`benchmarks/tuning_cost.py`). Raises ImportError for "adamw8bit" without bitsandbytes.
    """
    matrices = [w for w in change.parameters() if w.ndim > 1]
    vectors = [w for w in change.parameters() if w.ndim < 2]
    muon = config.optimizer == "muon" and matrices
    slower = min(config.bias_learning_rate or config.learning_rate, config.learning_rate)
    groups = [
        {"params": [v] if v.requires_grad else [], "lr": config.word_learning_rate},
        {"params": vectors, "lr": slower},
        {"params": [] if muon else matrices, "lr": config.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "adamw8bit":
        optimizers.append(_eight_bit()(groups, **settings))
    elif groups:  # none where Muon has all that learns
        optimizers.append(torch.optim.AdamW(groups, **settings, fused=fused or None))
    if muon:
        # Steps as long as AdamW's, so that one rate fits both.
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.learning_rate,
                momentum=0.9,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


class Updates:
    """Applies one loss after the other: backward pass, learning rates by the schedule, optimiser steps."""

    def __init__(
        self, optimizers: list[torch.optim.Optimizer], config: TuningConfig, device: str, scaled: bool
    ) -> None:
        self.optimizers, self.config = optimizers, config
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.rates = [group["lr"] for group in self.groups]
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)

    def apply(self, loss: Tensor, step: int) -> None:
        """Update everything that learns by the gradient of `loss`; `step` counts from 0."""
        steps, share = self.config.steps, DECAY[self.config.optimizer]
        factor = min(min(1.0, (steps - step) / (share * steps)), (step + 1) / WARM_UP)
        factor = 1.0 if self.config.constant_rate else factor
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()


def _eight_bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            'optimizer "adamw8bit" is the package bitsandbytes\', which is not installed here: '
            'pip install bitsandbytes; "adamw" needs none'
        ) from error
    return AdamW8bit
