"""The state of a training: everything its next step depends on, in one file.

Accelerate's `load_state` continues silently where random numbers could not be restored, and its `save_state`
stores registered objects of the main process only, while each process has rendered images of its own. So the
state is gathered here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import whole

LAYOUT = 3  # version of the file


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the random number generators of Python, NumPy and PyTorch in this process."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  what libraries draw from
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["device"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["device"])


def read_state(path: Path, processes: int) -> dict[str, Any]:
    """The state that `write_state` wrote; empty where there is no file.

    Raises ValueError for a file of another layout, and for a training on another number of processes.
    """
    if not path.exists():
        return {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    remedy = "move it away to begin anew, or set ESCD_RUNS to another folder"
    if state.get("layout") != LAYOUT:
        raise ValueError(
            f"{path} was written by another version of escd, so the training cannot be resumed to the bit: "
            f"{remedy}"
        )
    if len(state["processes"]) != processes:
        raise ValueError(
            f"{path} is of a training on {len(state['processes'])} processes, not on {processes}: start as "
            f"many, {remedy}"
        )
    return state


def write_state(state: dict[str, Any], path: Path) -> None:
    """Replace the file atomically by this state."""
    with whole(path) as unfinished:
        torch.save({"layout": LAYOUT, **state}, unfinished)
