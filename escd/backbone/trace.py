"""The one way to read or swap activations of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class Trace:
    """While open, keeps the outputs of the named submodules of `module`; `trace[name]` is the last one.

    `edit(output, name)`, when given, returns what takes the output's place. Opening raises KeyError for a
    name that `module` does not have; closing raises RuntimeError for a named submodule that was never called.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str] | str,
        edit: Callable[[Any, str], Any] | None = None,
    ) -> None:
        self.module = module
        self.names = [names] if isinstance(names, str) else list(names)
        self.edit = edit
        self._outputs: dict[str, Any] = {}
        self._hooks: list = []

    def __getitem__(self, name: str) -> Any:
        return self._outputs[name]

    def __enter__(self) -> Trace:
        submodules = dict(self.module.named_modules())
        for name in self.names:
            if name not in submodules:
                raise KeyError(f"{type(self.module).__name__} has no submodule {name!r}")
        self._outputs.clear()
        self._hooks = [submodules[name].register_forward_hook(self._keeper(name)) for name in self.names]
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        unmet = [name for name in self.names if name not in self._outputs]
        if unmet and kind is None:
            raise RuntimeError(f"traced but never called: {', '.join(unmet)}")

    def _keeper(self, name: str) -> Callable:
        def keep(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
            if self.edit is not None:
                output = self.edit(output, name)
            self._outputs[name] = output
            return output

        return keep
