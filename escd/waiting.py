"""How PyTorch's threads wait for work, so that two programs on the same cores do not hold each other up.

Between two pieces of work a thread of OpenMP spins, for some milliseconds, before it sleeps. A program that
has the cores to itself gains a little by it. Where several share them, the threads of one spin on the cores
that the work of the other waits for, and both become many times slower (`benchmarks/busy.py`). With a short
spin they do not.

OpenMP reads this from the environment, once, when torch is imported. `import escd` sets it if it comes first:
so do the command lines, and `make` for the rest. A program that imports torch before escd sets it itself, as
in `GOMP_SPINCOUNT=1000 python program.py`. What the environment has already stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# Turns of a thread's waiting loop in GNU's OpenMP, which PyTorch has on Linux: some tens of microseconds; its
# own default is 300,000. LLVM's, on a Mac, and Intel's count in milliseconds.
SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set in the environment how threads wait, unless it is set there or torch has read it already."""
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in environment:
        return
    for name, value in SPIN.items():
        environment.setdefault(name, value)
