"""What changes the pseudo-word and the part: AdamW, AdamW in 8 bits, and Muon for matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TuningConfig
from .delta import Change

SETTLING = {"muon": 0.6, "adamw": 0.2, "adamw8bit": 0.2}  # share of the steps in which the rate falls to zero


def optimizers_for(
    v: Tensor, change: Change, config: TuningConfig, fused: bool = False
) -> list[torch.optim.Optimizer]:
    """What changes the pseudo-word, and the part's matrices and its biases and norms, each at its rate.

    fused: AdamW's arithmetic in one go over each weight, which large ones need (`benchmarks/tuning_cost.py`).
    """
    matrices = [w for w in change.parameters() if w.ndim > 1]
    vectors = [w for w in change.parameters() if w.ndim < 2]
    muon = config.optimizer == "muon" and matrices
    slower = min(config.bias_learning_rate or config.learning_rate, config.learning_rate)
    groups = [
        {"params": [v], "lr": config.word_learning_rate},
        {"params": vectors, "lr": slower},
        {"params": [] if muon else matrices, "lr": config.learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    if config.optimizer == "adamw8bit":
        optimizers = [_eight_bit()(groups, **settings)]
    else:
        optimizers = [torch.optim.AdamW(groups, **settings, fused=fused or None)]
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


def _eight_bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(
            'optimizer "adamw8bit" is the package bitsandbytes\', which is not installed here: '
            'pip install bitsandbytes; "adamw" needs none'
        ) from error
    return AdamW8bit
