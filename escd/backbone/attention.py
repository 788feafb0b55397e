"""PyTorch's plain attention kernel, which is the fast one backwards on a CPU, for one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class MathAttention(TorchFunctionMode):
    """While open, attention runs by PyTorch's plain kernel, in this thread alone.

    `torch.nn.attention.sdpa_kernel` chooses a kernel for all threads, and would change what others compute.
    """

    _here = threading.local()

    @classmethod
    def is_open(cls) -> bool:
        """Whether it is open in this thread."""
        return getattr(cls._here, "depth", 0) > 0

    def __enter__(self) -> MathAttention:
        self._here.depth = getattr(self._here, "depth", 0) + 1
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        self._here.depth -= 1
        super().__exit__(*raised)

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return _plain_attention(*args, **kwargs)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by its plain kernel, in autocast's dtype where that is on."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    with torch.autocast(kind, enabled=False):
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
