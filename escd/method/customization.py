"""The result of tuning, in one safetensors file: a pseudo-word and the change of one part of the UNet.

It is applied at a strength (paper, Eq. 7).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from ..backbone.layers import layers_of
from ..backbone.model import Backbone
from ..backbone.parts import NO_PART, parameters_of
from ..backbone.skeleton import exchanged
from ..files import open_safetensors, whole
from ..reading import json_of
from .attributes import Attribute
from .delta import LowRank
from .e4t import require_encoder

FORMAT = "escd-customization-1"
_ENCODER = "encoder."  # what the names of the encoder's tensors begin with in a file


@dataclass
class Customization:
    """One attribute of one image, learnt on one backbone: a pseudo-word's embedding, and dW of a part."""

    attribute: Attribute
    pseudo_word: Tensor  # (D,), the embedding v, or (K, D), one for each cross-attention layer
    delta: dict[str, Tensor | LowRank]  # parameter name in the UNet -> W - W0
    part: str
    backbone_identity: str
    backbone_name: str
    steps: int
    seed: int
    config: dict = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    # E4T's encoder and the reference's CLS token: it adds to `pseudo_word`, at each sampling step, an offset
    # that it reads from the latents (`escd.method.e4t`).
    encoder: dict[str, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which is the size of the file but for its header."""
        return sum(w.nbytes for w in (self.pseudo_word, *self.delta.values(), *(self.encoder or {}).values()))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The pseudo-word, the changes of the weights and the encoder by the names they have in a file."""
        tensors = {"pseudo_word": self.pseudo_word}
        tensors |= {f"{_ENCODER}{name}": w for name, w in (self.encoder or {}).items()}
        for name, w in self.delta.items():
            if isinstance(w, LowRank):
                tensors |= {f"up.{name}": w.up, f"down.{name}": w.down}
            else:
                tensors[f"delta.{name}"] = w
        return tensors

    def __repr__(self) -> str:
        return (
            f"Customization({self.attribute.name} as {self.attribute.token}, part {self.part}, "
            f"{self.steps} steps, seed {self.seed}, {self.nbytes / 2**20:.1f} MB, "
            f"for {self.backbone_name} {self.backbone_identity})"
        )

    def embedding(self, word_embedding: Tensor, strength: float) -> Tensor:
        """The pseudo-word's embedding e + s (v - e), (D,) or (K, D), at strength s (Eq. 7); at 0 just e."""
        v = self.pseudo_word.to(word_embedding)
        # Eq. 7, right: v = e(w) + s (v_w - e(w))
        return word_embedding + strength * (v - word_embedding)

    def save(self, path: str | Path) -> Path:
        """Write the customization, exactly as it is, to `path`, which is replaced at once or not at all.

        Raises OSError when it cannot be written there.
        """
        path = Path(path)
        about = {name: getattr(self, name) for name in _ABOUT} | {"attribute": asdict(self.attribute)}
        tensors = {name: w.detach().to("cpu").contiguous() for name, w in self.tensors.items()}
        with whole(path) as unfinished:
            save_file(tensors, unfinished, metadata={"format": FORMAT, "about": json.dumps(about)})
        return path


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _word(value: object) -> bool:
    return isinstance(value, str) and value != ""


# What a file says beside its tensors: field -> what it must be, as a test and in words.
_ABOUT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "part": (_word, "a part of the UNet"),
    "backbone_identity": (_word, "a backbone's identity"),
    "backbone_name": (_word, "a backbone's name"),
    "steps": (lambda value: _whole(value) and value >= 0, "a whole number from 0 on"),
    "seed": (_whole, "a whole number"),
    "config": (lambda value: isinstance(value, dict), "a table of settings"),
    "losses": (
        lambda value: isinstance(value, list) and all(_whole(x) or isinstance(x, float) for x in value),
        "a list of numbers",
    ),
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = torch.finfo(torch.float32).max


def load_customization(path: str | Path, backbone: Backbone) -> Customization:
    """Read a customization made for `backbone`.

    Raises FileNotFoundError, and ValueError, which names the file and the field, for a file that is cut short
    or no customization, for one whose fields are missing or not what they must be, and for one that was made
    for another backbone.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no customization at {path}")
    with open_safetensors(path) as stored:
        metadata = stored.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a customization: its format is not {FORMAT}")
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    try:
        if "pseudo_word" not in tensors:
            raise ValueError("pseudo_word is missing")
        encoder = {n: tensors.pop(n) for n in sorted(tensors) if n.startswith(_ENCODER)}
        customization = Customization(
            **_about(metadata),
            pseudo_word=tensors.pop("pseudo_word"),
            delta=_delta(tensors),
            encoder={n.removeprefix(_ENCODER): w for n, w in encoder.items()} or None,
        )
        require_fit(customization, backbone)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return customization


def save_customizations(folder: Path, customizations: Iterable[Customization]) -> None:
    """Write customizations and the list of their attributes' names to a new folder."""
    folder.mkdir()
    names = []
    for customization in customizations:
        names.append(customization.attribute.name)
        customization.save(folder / f"{names[-1]}.safetensors")
    (folder / "index.json").write_text(json.dumps(names) + "\n")


def load_customizations(folder: str | Path, backbone: Backbone) -> dict[str, Customization]:
    """The customizations that `folder/index.json` lists, by the names of their attributes.

    Raises what `load_customization` raises, and ValueError for a list of anything but plain names: a name
    cannot lead out of the folder.
    """
    index = Path(folder) / "index.json"
    names = json_of(index.read_bytes(), str(index))
    plain = isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names)
    if not plain or len(set(names)) < len(names):
        raise ValueError(
            f"{index} lists names of attributes, plain words, each once, and not {_short(names)}"
        )
    loaded = {}
    for name in names:
        file = index.with_name(f"{name}.safetensors")
        loaded[name] = load_customization(file, backbone)
        if loaded[name].attribute.name != name:
            raise ValueError(f"{file} is listed as {name} and holds {loaded[name].attribute.name}")
    return loaded


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    """The fields of a customization that a file's metadata holds, each one checked."""
    about = json_of(metadata.get("about", ""), "about")
    if not isinstance(about, dict):
        raise ValueError(f"about is not a table of fields, but {_short(about)}")
    optional = {f.name for f in fields(Customization) if f.default_factory is not MISSING}
    for name, (fits, kind) in _ABOUT.items():
        if name not in about and name not in optional:
            raise ValueError(f"{name} is missing")
        if name in about and not fits(about[name]):
            raise ValueError(f"{name} must be {kind}, not {_short(about[name])}")
    if unknown := sorted(set(about) - {*_ABOUT, "attribute"}):
        raise ValueError(f"{_short(unknown[0])} is no field of a customization")
    given, wanted = about.get("attribute"), [f.name for f in fields(Attribute)]
    if isinstance(given, dict):  # a file older than the attribute's own recipe has it in its configuration
        given = {"recipe": about.get("config", {}).get("recipe")} | given
    if not isinstance(given, dict) or set(given) != set(wanted):
        raise ValueError(f"attribute must be a table of {', '.join(wanted)}, not {_short(given)}")
    return about | {"attribute": Attribute(**given)}


def steps_of(path: str | Path) -> int | None:
    """The steps of the customization that a file holds; None for a file that is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with open_safetensors(Path(path)) as stored:
            return int(json.loads((stored.metadata() or {})["about"])["steps"])
    return None


def _delta(tensors: dict[str, Tensor]) -> dict[str, Tensor | LowRank]:
    """The change of each weight from a file's tensors, in the order of their names."""
    forms: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        kind, _, name = key.partition(".")
        if kind not in ("delta", "up", "down"):
            raise ValueError(f"{_short(key)} is no tensor of a customization")
        forms.setdefault(name, {})[kind] = tensors[key]
    delta: dict[str, Tensor | LowRank] = {}
    for name, form in forms.items():
        if set(form) not in ({"delta"}, {"up", "down"}):
            raise ValueError(
                f"the change of {name} is stored as {' and '.join(form)}; it must be either delta, or up and "
                "down, two factors that belong together"
            )
        delta[name] = form["delta"] if "delta" in form else LowRank(**form)
    return delta


def require_fit(customization: Customization, backbone: Backbone) -> None:
    """Raise ValueError when `customization` was not made for `backbone`, or holds what it cannot apply."""
    # Of older files too: they always named the UNet and the text encoder alone.
    if customization.backbone_identity != backbone.identity_without_filters:
        raise ValueError(
            f"this {customization.attribute.name} was customized on the backbone "
            f"{customization.backbone_name} ({customization.backbone_identity}), "
            f"not on {backbone.name} ({backbone.identity_without_filters})"
        )
    attribute, part = customization.attribute, customization.part
    width = backbone.word_embedding(attribute.word).shape
    _require_numbers("pseudo_word", customization.pseudo_word)
    each_layer = torch.Size((len(layers_of(backbone.unet)), *width))
    if customization.pseudo_word.shape not in (width, each_layer):
        raise ValueError(
            f"pseudo_word is {tuple(customization.pseudo_word.shape)}; the words of {backbone.name} are "
            f"{tuple(width)}, and those of each layer {tuple(each_layer)}"
        )
    if customization.encoder is not None:
        for name, w in customization.encoder.items():
            _require_numbers(f"{_ENCODER}{name}", w)
        require_encoder(customization.encoder, backbone)
    parameters_of(backbone.unet, attribute.part)  # an unknown part is refused
    parameters = {} if part == NO_PART else parameters_of(backbone.unet, part)
    for name, w in customization.delta.items():
        if isinstance(w, LowRank):
            _require_factors(name, w)
        else:
            _require_numbers(f"delta.{name}", w)
        if name not in parameters or parameters[name].shape != w.shape:
            raise ValueError(f"the customization changes {name} {tuple(w.shape)}, which {part} has not")


def _require_numbers(name: str, w: Tensor) -> float:
    """The largest number of a tensor without its sign; ValueError unless all are finite floating point."""
    if w.dtype not in _DTYPES:
        raise ValueError(f"{name} must be in floating point of at least 16 bits, not {w.dtype}")
    largest = max(map(abs, (float(x) for x in w.float().aminmax()))) if w.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{name} holds numbers that are not finite")
    return largest


def _require_factors(name: str, w: LowRank) -> None:
    """Raise ValueError unless the two factors of a weight's change can be multiplied, to finite numbers."""
    if w.up.ndim != 2 or w.down.ndim < 2 or not 0 < w.up.shape[1] == len(w.down):
        raise ValueError(
            f"the two factors of the change of {name} do not belong together: {tuple(w.up.shape)} and "
            f"{tuple(w.down.shape)}"
        )
    largest = _require_numbers(f"up.{name}", w.up) * _require_numbers(f"down.{name}", w.down)
    if largest * len(w.down) > _LARGEST:
        raise ValueError(
            f"the two factors of the change of {name} may multiply to numbers that are not finite"
        )


def customized(
    unet: UNet2DConditionModel,
    changes: Iterable[tuple[Customization, float]],
    cache: dict[tuple, Tensor] | None = None,
) -> UNet2DConditionModel:
    """A UNet with weights W0 + sum of s dW over `changes`, pairs (customization, s) (paper, Eq. 7).

    `unet` itself does not change; both share the weights that no change touches. `cache` keeps the changed
    weights, for further calls with the same UNet and some of the same changes. A weight wrapped by an adapter
    (LoRA) keeps its old name here. Raises ValueError for a weight that the UNet does not have.
    """
    cache = {} if cache is None else cache
    changing: dict[str, list[tuple[Customization, float]]] = {}
    for customization, strength in changes:
        if strength != 0:
            for name in customization.delta:
                changing.setdefault(name, []).append((customization, strength))
    parameters = {name.replace(".base_layer.", "."): (name, p) for name, p in unet.named_parameters()}
    if missing := [name for name in changing if name not in parameters]:
        raise ValueError(f"the UNet has no {missing[0]}, which a customization changes")
    weights = {}
    for name, steps in changing.items():
        own_name, w0 = parameters[name]
        key = (name, *((id(customization), strength) for customization, strength in steps))
        if key not in cache:
            # Eq. 7, left: W = W_0 + s Delta W
            total = reduce(add, (strength * c.delta[name].float() for c, strength in steps))
            cache[key] = (w0.detach().float() + total.to(w0.device)).to(w0.dtype)
        weights[own_name] = cache[key]
    return exchanged(unet, weights)
