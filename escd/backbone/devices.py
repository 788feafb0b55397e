"""Where, and in which precision, a backbone runs: names checked before anything is loaded."""

from __future__ import annotations

import torch

DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
}


def as_device(device: torch.device | str) -> torch.device:
    """The device of that name; ValueError, with what there is, for one that this machine has not."""
    kinds = {"cpu": 1}
    if torch.accelerator.is_available():
        kinds[torch.accelerator.current_accelerator().type] = torch.accelerator.device_count()
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):  # torch's answer to what names no device
        wanted = None
    if wanted is None or (wanted.index or 0) >= kinds.get(wanted.type, 0):
        there = [kind if count == 1 else f"{kind}:0 to {kind}:{count - 1}" for kind, count in kinds.items()]
        raise ValueError(f"there is no device {str(device)!r} on this machine, only {', '.join(there)}")
    return wanted


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The dtype of that name, one that a backbone runs in; ValueError, with the known, for another."""
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(f"a backbone's dtype is one of {', '.join(DTYPES)}, not {str(dtype)!r}")
    return known


def choose_device() -> torch.device:
    """The fastest kind of device here: cuda, else mps, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
