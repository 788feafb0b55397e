"""Customizations taken after chosen steps of one tuning, and the seconds of tuning until each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from .config import TuningConfig
from .customization import Customization


@dataclass(frozen=True)
class Snapshot:
    """A customization after so many steps; `seconds` of tuning until then, without the prior's."""

    customization: Customization
    seconds: float


class Snapshots:
    """What `customize(..., snapshots=...)` fills.

    `taken` has a snapshot for each of `steps` that the run reached, in their order. Seconds begin with
    `customize`; they count neither the copying of snapshots nor the class images' drawing, which is
    `prior_seconds`.
    """

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = frozenset(steps)
        self.taken: list[Snapshot] = []
        self.prior_seconds = 0.0
        self.begin()

    def begin(self) -> None:
        """Start the clock."""
        self._start, self._copying = time.perf_counter(), 0.0

    def require(self, config: TuningConfig) -> None:
        """Raise ValueError unless each snapshot is what a run of that many steps learns.

        A rate that decays over the run makes an early snapshot worse than a run of that length.
        """
        if beyond := [k for k in self.steps if not 0 <= k <= config.steps]:
            raise ValueError(f"a run of {config.steps} steps has no snapshot after {beyond[0]}")
        if not config.constant_rate and (early := sorted(self.steps - {0, config.steps})):
            raise ValueError(
                f"the learning rate follows a schedule over {config.steps} steps, so a snapshot after "
                f"{early[0]} is no run of {early[0]} steps: tune once for each, or set constant_rate=True"
            )

    @contextmanager
    def prior(self) -> Iterator[None]:
        """While open, class images are drawn."""
        start = time.perf_counter()
        yield
        self.prior_seconds = time.perf_counter() - start

    def take(self, steps: int, make: Callable[[], Customization]) -> None:
        """Keep a copy of what was learnt so far if `steps` is one of those wanted."""
        if steps not in self.steps:
            return
        now = time.perf_counter()
        made = copy.deepcopy(make())  # further steps change tensors in place
        made = replace(made, config=made.config | {"steps": steps})
        self.taken.append(Snapshot(made, now - self._start - self._copying - self.prior_seconds))
        self._copying += time.perf_counter() - now
