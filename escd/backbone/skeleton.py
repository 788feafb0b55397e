"""Networks that share the tensors of another one, and are changed without changing it.

A backbone belongs to whoever loaded it, and several pipelines and threads may use it at once. So nothing is
ever written to its modules: what has to differ for a pipeline, or for one call, is set in modules of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import TypeVar

from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def own(network: Network) -> Network:
    """The same network in modules and parameters of its own; their tensors are those of `network`.

    Moved, converted, or given other submodules, it leaves `network` as it is.
    """
    tensors = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, tensors | {id(b): b.detach() for b in network.buffers()})


def exchanged(network: Network, weights: Mapping[str, Tensor]) -> Network:
    """`network` with some of its weights exchanged, by their names; `network` itself is left alone.

    Only the modules on the way to an exchanged weight are new: all the rest is shared. Raises KeyError for
    a name that `network` does not have.
    """
    twin = _Twin(network)
    for name, w in weights.items():
        path, _, leaf = name.rpartition(".")
        module = twin.at(path)
        if leaf not in module._parameters:
            raise KeyError(f"{type(network).__name__} has no weight {name!r}")
        module._parameters[leaf] = nn.Parameter(w, requires_grad=False)
    for module in twin.modules.values():
        if getattr(module, "fused_projections", False):
            module.fuse_projections()  # made of the weights as they were
    return twin.modules[""]


def hooked(network: Network, path: str, hook: Callable[[nn.Module, tuple, Tensor], Tensor | None]) -> Network:
    """`network` with a forward hook on its submodule at `path`; `network` itself is left alone."""
    twin = _Twin(network)
    module = twin.at(path)
    for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        module.__dict__[hooks] = module.__dict__[hooks].copy()
    module.register_forward_hook(hook)
    return twin.modules[""]


def pre_hooked(network: Network, hooks: Mapping[str, Callable[[nn.Module, tuple, dict], tuple]]) -> Network:
    """`network` with a forward pre-hook, which gets keywords too, on each path; `network` is left alone."""
    twin = _Twin(network)
    for path, hook in hooks.items():
        module = twin.at(path)
        for held in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
            module.__dict__[held] = module.__dict__[held].copy()
        module.register_forward_pre_hook(hook, with_kwargs=True)
    return twin.modules[""]


def replaced(network: Network, path: str, module: nn.Module) -> Network:
    """`network` with another submodule at `path`; `network` itself is left alone."""
    twin = _Twin(network)
    parent, _, leaf = path.rpartition(".")
    twin.at(parent)._modules[leaf] = module
    return twin.modules[""]


class _Twin:
    """A network whose modules are copied, one by one, as they are asked for by path."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = {"": _shallow(network)}

    def at(self, path: str) -> nn.Module:
        if path not in self.modules:
            above, _, leaf = path.rpartition(".")
            parent = self.at(above)
            if leaf not in parent._modules:
                raise KeyError(f"{type(self.modules['']).__name__} has no submodule {path!r}")
            parent._modules[leaf] = self.modules[path] = _shallow(parent._modules[leaf])
        return self.modules[path]


def _shallow(module: nn.Module) -> nn.Module:
    """A module with the same parameters and submodules, which others can take the place of."""
    twin = copy.copy(module)
    for held in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[held] = module.__dict__[held].copy()
    forward = twin.__dict__.pop("forward", None)
    if "_hf_hook" in module.__dict__:
        # accelerate's offloading put a forward in place that runs `module`, not the twin.
        for name in ("_old_forward", "_hf_hook"):
            twin.__dict__.pop(name)
        add_hook_to_module(twin, module._hf_hook)
    elif forward is not None:
        # A compiled one runs `module` too.
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)
        bound = getattr(forward, "__self__", None) is module
        twin.__dict__["forward"] = MethodType(forward.__func__, twin) if bound else forward
    return twin
