"""A customization at a low rank: smaller, and exportable (paper, Eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .customization import Customization
from .delta import LowRank


def low_rank(
    customization: Customization,
    rank: int | None = None,
    *,
    error: float | None = None,
    only_exportable: bool = False,
) -> Customization:
    """The customization with the change of each weight at a rank of at most `rank` (paper, Eq. 8).

    Give either `rank`, or `error`: the smallest rank is then taken at which all weights together are off by
    at most this share of their change (relative Frobenius norm). A weight that its factors would not make
    smaller is kept as it is; so are biases and norms, which have no rank, unless `only_exportable` leaves
    out what `export` cannot carry. A weight of shape (out, in, k, k) counts as a matrix (out, in k k).
    Raises ValueError unless exactly one of `rank` (from 1 on) and `error` (above 0, below 1) is given.
    """
    if (rank is None) == (error is None):
        raise ValueError("give either a rank or an error")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"a rank is a whole number from 1 on, not {rank!r}")
    if error is not None and not 0 < error < 1:
        raise ValueError(f"an error is a share between 0 and 1, not {error!r}")
    matrices = {name: w for name, w in customization.delta.items() if len(w.shape) > 1}
    bases = {name: principal_directions(w.float()) for name, w in matrices.items()}
    if rank is None:
        rank = _rank_at([energy for _, energy in bases.values()], error)
    delta: dict[str, Tensor | LowRank] = {}
    for name, w in customization.delta.items():
        if name in matrices:
            factors = factors_of(w, bases[name][0], rank)
            smaller = factors.nbytes < w.nbytes
            delta[name] = factors if smaller or only_exportable else w
        elif not only_exportable:
            delta[name] = w
    return replace(customization, delta=delta)


def megabytes_at(weights: Mapping[str, Tensor], rank: int) -> float:
    """Megabytes, in half precision, of a change of these weights as `low_rank` keeps it at this rank."""
    numbers = (w.numel() if w.ndim < 2 else min(factor_numbers(w, rank), w.numel()) for w in weights.values())
    return sum(numbers) * 2 / 1e6


def factor_numbers(w: Tensor, rank: int) -> int:
    """How many numbers the two factors of a weight's change have at a rank."""
    wide = w[0].numel()
    return min(rank, w.shape[0], wide) * (w.shape[0] + wide)


def relative_error(approximate: Customization, exact: Customization) -> float:
    """How far the change of the weights is off, as a share of it (relative Frobenius norm, all weights)."""
    off = total = 0.0
    for name, w in exact.delta.items():
        kept = approximate.delta.get(name)
        dense = w.float()
        difference = dense if kept is None else dense - kept.float()
        off += float(difference.double().square().sum())
        total += float(dense.double().square().sum())
    return (off / total) ** 0.5 if total else 0.0


def matrix_of(w: Tensor | LowRank) -> Tensor:
    return w.float().flatten(1)


def principal_directions(w: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (m, m) of the shorter side of a weight, strongest first, and its energies (m,).

    From the Gram matrix: exact to single precision, and far faster than a singular value decomposition of a
    wide matrix.
    """
    matrix = w.flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    energy, basis = torch.linalg.eigh(matrix @ matrix.T)
    return basis.flip(1).float(), energy.flip(0).clamp(min=0)


def factors_of(w: Tensor | LowRank, basis: Tensor, rank: int | None = None) -> LowRank:
    """A weight's change as two factors, BA (paper, Eq. 8): its projection on the basis's first directions.

    basis: from `principal_directions`. Each pair of a column of B and a row of A has equal norms.
    """
    # Eq. 8: Delta W = B A, with B (m, r) `up` and A (r, n) `down`
    matrix, kept = matrix_of(w), basis[:, :rank]
    up, down = (kept, kept.T @ matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix @ kept, kept.T)
    # Half precision has little below 1e-5, where the entries of one factor alone would lie.
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-12)).sqrt().clamp(min=1e-12)
    shape = (len(balance), *w.shape[1:])
    return LowRank((up * balance).half(), (down / balance[:, None]).view(shape).half())


def _rank_at(energies: list[Tensor], error: float) -> int:
    """The smallest rank, the same for all weights, that leaves at most error ** 2 of their energy out."""
    longest = max((len(e) for e in energies), default=1)
    total = sum(float(e.sum()) for e in energies)
    for rank in range(1, longest):
        if sum(float(e[rank:].sum()) for e in energies) <= error**2 * total:
            return rank
    return longest
