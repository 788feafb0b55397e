"""Customizations for other programs: diffusers, ComfyUI, A1111."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import together
from .customization import Customization
from .delta import LowRank
from .low_rank import factors_of, principal_directions


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
    written or none; those that an earlier export left under the same names are replaced or removed.

    Raises ValueError for a customization learnt with conditioning "cached": its encoder read the attribute's
    plain word, and other programs give one prompt to the whole UNet; likewise for one with an embedding for
    each layer, and for one whose pseudo-word is read at each sampling step. Raises OSError when nothing can
    be written to the folder.
    """
    if (customization.config or {}).get("conditioning") == "cached":
        raise ValueError(
            'this customization was learnt with conditioning "cached", where the encoder never reads the '
            'pseudo-word, which no other program does: learn it with "joint" or "half" to export it'
        )
    if customization.pseudo_word.ndim == 2:
        raise ValueError(
            "this customization has an embedding for each cross-attention layer (P+), and other programs "
            "give one prompt to the whole UNet: learn it with method='textual-inversion' to export it"
        )
    if customization.encoder is not None:
        raise ValueError(
            "this customization's pseudo-word is read from the latents at each sampling step (E4T), which no "
            "LoRA and no embedding can carry: learn it with another method, such as method='dreambooth'"
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
    for file, state in tensors.items():
        if not state:  # a file of an earlier export under this name would be taken for a part of this one
            (folder / file).unlink(missing_ok=True)
    written = [folder / file if state else None for file, state in tensors.items()]
    embedding = folder / f"{stem}-embedding.safetensors"
    return Exported(written[0], written[1], embedding, tuple(left_behind))


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
            if not isinstance(w, LowRank) and w.abs().max() > 0:
                left_behind.append(name)
            continue
        factors = w if isinstance(w, LowRank) else factors_of(w, principal_directions(w.float())[0])
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
