"""The artefact: a pseudo-word and the change of one part of the UNet, in one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from .backbone import PSEUDO_WORD, Backbone, open_safetensors
from .parts import half_named, parameters_of

FORMAT = "escd-customization-1"
# What changes in the reference while an attribute is learnt: what it is made of, or its outline.
RECIPES = ("shape", "appearance")


@dataclass(frozen=True)
class Attribute:
    """A sub-attribute: its name, the word it starts from, its pseudo-word, the part it tunes, and how.

    recipe: "shape" keeps the reference's outline and changes what it is made of while it learns, "appearance"
    the other way round. None takes "shape" for a part of the encoder and "appearance" for one of the decoder;
    for any other part it stays None, and `TuningConfig.of` asks for one.
    """

    name: str
    word: str
    token: str
    part: str
    recipe: str | None = None

    def __post_init__(self) -> None:
        for key in ("name", "word", "token", "part"):
            value = getattr(self, key)
            if not isinstance(value, str) or not value:
                raise ValueError(f"an attribute's {key} must be a word, not {value!r}")
        if not self.name.isidentifier():
            raise ValueError(f"an attribute's name must be a plain word, not {self.name!r}")
        if not PSEUDO_WORD.fullmatch(self.token) or self.token != self.token.lower():
            raise ValueError(
                f"an attribute's token is an asterisk and a lower-case name, like '*m', not {self.token!r}"
            )
        if self.recipe not in (None, *RECIPES):
            raise ValueError(
                f"an attribute's recipe is {' or '.join(map(repr, RECIPES))}, not {self.recipe!r}"
            )
        if self.recipe is None:
            of_half = {"encoder": "shape", "decoder": "appearance"}
            object.__setattr__(self, "recipe", of_half.get(half_named(self.part)))


# "we fine-tune only the encoder part ... for shape; for appearance, solely the decoder" (Attribute-aware
# finetuning)
ATTRIBUTES = {
    "shape": Attribute("shape", word="shape", token="*m", part="encoder"),
    "appearance": Attribute("appearance", word="appearance", token="*a", part="decoder"),
}


def resolve_attribute(attribute: Attribute | str) -> Attribute:
    """The attribute itself, or the known one of that name; for another name, ValueError lists the known."""
    if isinstance(attribute, Attribute):
        return attribute
    if attribute not in ATTRIBUTES:
        raise ValueError(
            f"unknown attribute {attribute!r}; known: {', '.join(ATTRIBUTES)}; another one is given as "
            'escd.Attribute(name, word="a word of the vocabulary", token="*x", part="decoder")'
        )
    return ATTRIBUTES[attribute]


@dataclass(frozen=True)
class LowRank:
    """A change of a weight as two factors: up (out, r) times down (r, in) or (r, in, k, k)."""

    up: Tensor
    down: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.up.nbytes + self.down.nbytes

    def float(self) -> Tensor:
        """The change itself, (out, in) or (out, in, k, k), in float32."""
        return (self.up.float() @ self.down.float().flatten(1)).view(self.shape)


@dataclass
class Customization:
    """One attribute of one image, learned on one backbone: a pseudo-word's embedding, and dW of a part."""

    attribute: Attribute
    pseudo_word: Tensor  # (D,), the embedding v
    delta: dict[str, Tensor | LowRank]  # parameter name in the UNet -> W - W0
    part: str
    backbone_identity: str
    backbone_name: str
    steps: int
    seed: int
    config: dict = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, which is the size of the file but for its header."""
        return sum(w.nbytes for w in (self.pseudo_word, *self.delta.values()))

    def __repr__(self) -> str:
        return (
            f"Customization({self.attribute.name} as {self.attribute.token}, part {self.part}, "
            f"{self.steps} steps, seed {self.seed}, {self.nbytes / 2**20:.1f} MB, "
            f"for {self.backbone_name} {self.backbone_identity})"
        )

    def embedding(self, word_embedding: Tensor, strength: float) -> Tensor:
        """The pseudo-word's embedding e + s (v - e) (D,) at strength s; at 0 it is e, to the bit."""
        v = self.pseudo_word.to(word_embedding)
        return word_embedding + strength * (v - word_embedding)

    def save(self, path: str | Path) -> Path:
        """Write the customization, exactly as it is, to `path`, which is replaced at once or not at all."""
        path = Path(path)
        about = {name: getattr(self, name) for name in _ABOUT} | {"attribute": asdict(self.attribute)}
        tensors = {"pseudo_word": self.pseudo_word}
        for name, w in self.delta.items():
            if isinstance(w, LowRank):
                tensors |= {f"up.{name}": w.up, f"down.{name}": w.down}
            else:
                tensors[f"delta.{name}"] = w
        tensors = {name: w.detach().to("cpu").contiguous() for name, w in tensors.items()}
        unfinished = path.with_name(path.name + ".part")
        save_file(tensors, unfinished, metadata={"format": FORMAT, "about": json.dumps(about)})
        os.replace(unfinished, path)
        return path


_ABOUT = ("part", "backbone_identity", "backbone_name", "steps", "seed", "config", "losses")


def load_customization(path: str | Path, backbone: Backbone) -> Customization:
    """Read a customization made for `backbone`.

    Raises FileNotFoundError, and ValueError for a file that is cut short or no customization, and for one
    that was made for another backbone.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no customization at {path}")
    with open_safetensors(path) as stored:
        metadata = stored.metadata() or {}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a customization: its format is not {FORMAT}")
    about = json.loads(metadata["about"])
    # A file older than the attribute's own recipe has it in its configuration.
    about["attribute"].setdefault("recipe", about["config"].get("recipe"))
    customization = Customization(
        attribute=Attribute(**about.pop("attribute")),
        pseudo_word=tensors.pop("pseudo_word"),
        delta=_delta(tensors),
        **about,
    )
    require_fit(customization, backbone)
    return customization


def _delta(tensors: dict[str, Tensor]) -> dict[str, Tensor | LowRank]:
    """The change of each weight from a file's tensors, in the order of their names."""
    delta: dict[str, Tensor | LowRank] = {}
    for key in sorted(tensors):
        kind, _, name = key.partition(".")
        if kind == "up":
            up, down = tensors[key], tensors.get(f"down.{name}")
            if down is None or up.ndim != 2 or down.ndim < 2 or up.shape[1] != len(down):
                raise ValueError(f"the two factors of the change of {name} do not belong together")
            delta[name] = LowRank(up, down)
        elif kind == "delta":
            delta[name] = tensors[key]
    return delta


def require_fit(customization: Customization, backbone: Backbone) -> None:
    """Raise ValueError when `customization` was not made for `backbone`."""
    if customization.backbone_identity != backbone.identity:
        raise ValueError(
            f"this {customization.attribute.name} was customized on the backbone "
            f"{customization.backbone_name} ({customization.backbone_identity}), "
            f"not on {backbone.name} ({backbone.identity})"
        )
    if not customization.delta:
        return  # the pseudo-word alone
    parameters = parameters_of(backbone.unet, customization.part)
    for name, w in customization.delta.items():
        if name not in parameters or parameters[name].shape != w.shape:
            raise ValueError(
                f"the customization changes {name} {tuple(w.shape)}, which {customization.part} has not"
            )


@contextmanager
def customized(unet: nn.Module, changes: Iterable[tuple[Customization, float]]) -> Iterator[None]:
    """While open, the weights of `unet` are W0 + sum of s dW over `changes`, pairs (customization, s).

    The original tensors are put aside and put back, whatever happens meanwhile; they are never written to.
    Not for two threads at once.
    """
    total: dict[str, Tensor] = {}
    for customization, strength in changes:
        if strength == 0:
            continue
        for name, dw in customization.delta.items():
            step = strength * dw.float()
            total[name] = total[name] + step if name in total else step
    parameters = {name: p for name, p in unet.named_parameters() if name in total}
    originals = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            w0 = originals[name]
            p.data = (w0.float() + total[name].to(w0.device)).to(w0.dtype)
        yield
    finally:
        for name, p in parameters.items():
            p.data = originals[name].to(p.device)  # offloading may have moved the network since
