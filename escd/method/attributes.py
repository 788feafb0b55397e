"""Attributes: the word each starts from, its pseudo-word, the part of the UNet it tunes."""

from __future__ import annotations

from dataclasses import dataclass

from ..backbone.parts import half_named
from ..backbone.prompts import PSEUDO_WORD

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
            object.__setattr__(self, "recipe", of_half.get(half_named(self.part) or ""))


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
