"""Small artefacts: a customization's change of the weights at low rank, and in the forms other programs read.

What one image changed in 250 million weights makes a large file. `low_rank` keeps the strongest directions of
each weight's change; `export` writes them as the LoRA and the textual-inversion embedding that diffusers and
the common web interfaces load, so that a result can leave this project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .customization import Customization, LowRank
from .files import together


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and what to type where it is read."""

    lora: Path | None  # for diffusers
    web_ui: Path | None  # for ComfyUI, A1111 and what descends from them
    embedding: Path
    # What no LoRA of diffusers carries, and `lora` therefore lacks: changes of biases and norms.
    left_behind: tuple[str, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(path for path in (self.lora, self.web_ui, self.embedding) if path is not None)

    @property
    def trigger(self) -> str:
        """The pseudo-word's name in a web interface, which is that of the embedding's file."""
        return self.embedding.stem


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
    bases = {name: _principal(w.float()) for name, w in matrices.items()}
    if rank is None:
        rank = _rank_at([energy for _, energy in bases.values()], error)
    delta: dict[str, Tensor | LowRank] = {}
    for name, w in customization.delta.items():
        if name in matrices:
            factors = _factors(w, bases[name][0], rank)
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


def export(customization: Customization, folder: str | Path, name: str | None = None) -> Exported:
    """Write the customization for other programs: a LoRA in two layouts, and the pseudo-word's embedding.

    The files are named after `name` (such as that of the customization's file) and the attribute, so that
    several exports share a folder. Of a shape named "horse", and with 1 as the strength:

    - diffusers: `load_lora_weights(folder, weight_name="horse-shape-diffusers.safetensors")` and
      `load_textual_inversion(folder + "/horse-shape-embedding.safetensors")`; the word to type is *m.
    - A1111 and its descendants: `horse-shape-lora.safetensors` goes to models/Lora and
      `horse-shape-embedding.safetensors` to embeddings. Type <lora:horse-shape-lora:1>, and
      horse-shape-embedding for *m.
    - ComfyUI: the same files in models/loras and models/embeddings; a LoRA loader, and
      embedding:horse-shape-embedding for *m.

    Diffusers' LoRA has no place for changes of biases and norms: the result lists them as `left_behind`. The
    web interfaces' file has them all. A1111 itself takes the change of a bias only beside that of a weight in
    full, and leaves it out after `low_rank`; ComfyUI and Forge take it either way. In full means as a large
    file, and for diffusers as factors of full rank; use `low_rank` before for small ones. All files are
    written or none.

    Raises ValueError for a customization learnt with conditioning "cached": its encoder read the attribute's
    plain word, and other programs give one prompt to the whole UNet. Raises OSError when nothing can be
    written to the folder.
    """
    if (customization.config or {}).get("conditioning") == "cached":
        raise ValueError(
            'this customization was learnt with conditioning "cached", where the encoder never reads the '
            'pseudo-word, which no other program does: learn it with "joint" or "half" to export it'
        )
    folder, stem = Path(folder), _stem(customization.attribute.name, name)
    lora, left_behind = _for_diffusers(customization.delta)
    tensors = {
        f"{stem}-diffusers.safetensors": lora,
        f"{stem}-lora.safetensors": _for_web_interfaces(customization.delta),
        f"{stem}-embedding.safetensors": {
            customization.attribute.token: customization.pseudo_word.detach().cpu()[None]
        },
    }
    with together(folder) as scratch:
        for file, state in tensors.items():
            if state:
                save_file(state, scratch / file, metadata={"format": "pt"})
    written = [folder / file if state else None for file, state in tensors.items()]
    return Exported(*written, tuple(left_behind))


def _stem(attribute: str, name: str | None) -> str:
    """What the files of an export are called; without spaces and brackets, which a prompt cannot hold."""
    name = re.sub(r"[^\w.-]+", "-", name or "").strip("-")
    if name.endswith(attribute):
        return name
    return f"{name}-{attribute}" if name else attribute


def _for_diffusers(delta: Mapping[str, Tensor | LowRank]) -> tuple[dict[str, Tensor], list[str]]:
    """The LoRA as peft names it, and the changes that are not in it."""
    state: dict[str, Tensor] = {}
    left_behind = []
    for name, w in delta.items():
        if len(w.shape) < 2:
            if w.abs().max() > 0:
                left_behind.append(name)
            continue
        factors = w if isinstance(w, LowRank) else _factors(w, _principal(w.float())[0])
        module = "unet." + name.removesuffix(".weight")
        state[f"{module}.lora_A.weight"] = factors.down.contiguous()
        state[f"{module}.lora_B.weight"] = _up(factors)
    return state, left_behind


def _for_web_interfaces(delta: Mapping[str, Tensor | LowRank]) -> dict[str, Tensor]:
    """Every change as ComfyUI and A1111 name it: factors, or weights in full, and biases, and norms."""
    state: dict[str, Tensor] = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in delta):
        w, bias = delta.get(f"{module}.weight"), delta.get(f"{module}.bias")
        if isinstance(w, LowRank):
            changes = {"lora_up.weight": _up(w), "lora_down.weight": w.down, "diff_b": bias}
            changes["alpha"] = torch.tensor(len(w.down))
        elif w is not None and w.ndim == 1:  # of a norm A1111 wants both
            changes = {"w_norm": w, "b_norm": torch.zeros_like(w) if bias is None else bias}
        else:
            changes = {"diff": w, "diff_b": bias}
        names = ["lora_unet_" + module.replace(".", "_")]
        if module == "conv_norm_out":  # which A1111 knows by Stable Diffusion's own name alone
            names.append("lora_unet_out_0")
        for key, change in changes.items():
            if change is not None:  # in tensors of its own each, as safetensors wants them
                state |= {f"{name}.{key}": change.detach().cpu().contiguous().clone() for name in names}
    return state


def _up(factors: LowRank) -> Tensor:
    """The first factor as a LoRA has it: of a convolution as one of 1 x 1."""
    up = factors.up
    return (up[..., None, None] if factors.down.ndim == 4 else up).contiguous()


def _matrix(w: Tensor | LowRank) -> Tensor:
    return w.float().flatten(1)


def _principal(w: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (m, m) of the shorter side of a weight, strongest first, and its energies (m,).

    From the Gram matrix: exact to single precision, and far faster than a singular value decomposition of a
    wide matrix.
    """
    matrix = w.flatten(1).double()
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    energy, basis = torch.linalg.eigh(matrix @ matrix.T)
    return basis.flip(1).float(), energy.flip(0).clamp(min=0)


def _factors(w: Tensor | LowRank, basis: Tensor, rank: int | None = None) -> LowRank:
    """A weight's projection on the first `rank` directions of its basis, its norm shared by both factors."""
    matrix, kept = _matrix(w), basis[:, :rank]
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
