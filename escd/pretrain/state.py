"""The state of a training: everything its next step depends on, in one file.

Accelerate's `load_state` goes on in silence where the random numbers could not be restored, and its
`save_state` keeps registered objects of the main process only, while each process has a bank of pictures of
its own. So the state is gathered here.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import whole

LAYOUT = 2  # of the file; the first one had neither random numbers nor the stage's own state


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random numbers of Python, NumPy and PyTorch stand in this process."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  what libraries draw from
    found = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        found["device"] = torch.mps.get_rng_state()
    return found


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the random numbers where `random_state` found them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["device"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["device"])


def read_state(path: Path, processes: int) -> dict[str, Any]:
    """The state that `write_state` wrote, empty where there is no file.

    Raises ValueError for a file of the layout before, and for a training of another number of processes.
    """
    if not path.exists():
        return {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    remedy = "move it away to begin anew, or set ESCD_RUNS to another folder"
    if state.get("layout") != LAYOUT:
        raise ValueError(
            f"{path} was written by another version of escd, whose trainings cannot be gone on with to the "
            f"bit: {remedy}"
        )
    if len(state["processes"]) != processes:
        raise ValueError(
            f"{path} is of a training on {len(state['processes'])} processes, not on {processes}: start as "
            f"many, {remedy}"
        )
    return state


def write_state(state: dict[str, Any], path: Path) -> None:
    """Replace the file by this state, whole or not at all: until it is complete the former one stays."""
    with whole(path) as unfinished:
        torch.save({"layout": LAYOUT, **state}, unfinished)
