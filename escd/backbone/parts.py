"""The one way to name a part of a UNet.

A part is one term, or several joined by ``+``; a term is a place, or a place and a kind of layer joined by
``/``:

- places: ``all``; the halves ``encoder`` (conv_in, down blocks), ``mid`` and ``decoder`` (up blocks,
  conv_norm_out, conv_out), which are disjoint and leave out only the time embedding; single blocks ``down.I``
  and ``up.I``; ``res.N``: everything that works on latents N pixels wide, on both sides (a sampler belongs to
  the width it reads);
- kinds: ``attn1`` (self-attention), ``attn2`` (cross-attention), ``kv`` (keys and values of cross-attention),
  ``ff``, ``attentions`` (the transformer blocks with their projections), ``resnets``, ``samplers``.

So ``decoder/attn2+mid`` is the decoder's cross-attention and the whole mid block.
"""

from __future__ import annotations

from torch import nn

NO_PART = "none"  # no part: the pseudo-word alone

KINDS = {
    "attn1": ("attn1",),
    "attn2": ("attn2",),
    "kv": ("attn2.to_k", "attn2.to_v"),
    "ff": ("ff",),
    "attentions": ("attentions",),
    "resnets": ("resnets",),
    "samplers": ("downsamplers", "upsamplers"),
}

HALVES = {
    "encoder": ("conv_in", "down_blocks"),
    "mid": ("mid_block",),
    "decoder": ("up_blocks", "conv_norm_out", "conv_out"),
}


def names_of(unet: nn.Module, part: str) -> list[str]:
    """Names of the parameters that `part` names in `unet`, in the network's own order.

    Raises ValueError, listing the grammar and what this UNet has, when `part` is unknown or names nothing.
    """
    terms = _terms(part)
    places = _places(unet)
    every_name = [name for name, _ in unet.named_parameters()]
    chosen: set[str] = set()
    for term in terms:
        place, _, kind = term.partition("/")
        if place not in places or (kind not in KINDS if "/" in term else False):
            raise ValueError(f"unknown part {term!r} of the UNet; {_known(places)}")
        found = [name for name in every_name if _under(name, places[place])]
        if kind:
            found = [name for name in found if any(f".{each}." in f".{name}." for each in KINDS[kind])]
        if not found:
            raise ValueError(f"part {term!r} names no parameter of this UNet; {_known(places)}")
        chosen.update(found)
    return [name for name in every_name if name in chosen]


def parameters_of(unet: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """Name -> parameter of the part of `unet` that `part` names; errors as for `names_of`."""
    parameters = dict(unet.named_parameters())
    return {name: parameters[name] for name in names_of(unet, part)}


def half_named(part: str) -> str | None:
    """ "encoder" or "decoder" when every place in `part` lies in that half, in whatever order; else None.

    For a part whose UNet is not at hand; `halves.half_of` looks at the parameters themselves. The places
    `res.N` lie on both sides.
    """
    blocks = {"down": "encoder", "up": "decoder"}
    places = [term.split("/")[0].split(".")[0] for term in _terms(part)]
    halves = {blocks.get(place, place) for place in places}
    return halves.pop() if halves in ({"encoder"}, {"decoder"}) else None


def _terms(part: str) -> list[str]:
    if not isinstance(part, str):
        raise TypeError(f"a part of the UNet is named by a string, not by {type(part).__name__}")
    return [term.strip() for term in part.split("+")]


def _places(unet: nn.Module) -> dict[str, tuple[str, ...]]:
    """Place name -> the module prefixes it covers, for the blocks this UNet has."""
    places = {"all": ("",), **HALVES}
    width = unet.config.sample_size
    by_width: dict[int, list[str]] = {width: ["conv_in"]}
    for i, block in enumerate(unet.down_blocks):
        places[f"down.{i}"] = (f"down_blocks.{i}",)
        by_width.setdefault(width, []).append(f"down_blocks.{i}")
        if block.downsamplers is not None:
            width //= 2
    by_width.setdefault(width, []).append("mid_block")
    for i, block in enumerate(unet.up_blocks):
        places[f"up.{i}"] = (f"up_blocks.{i}",)
        by_width.setdefault(width, []).append(f"up_blocks.{i}")
        if block.upsamplers is not None:
            width *= 2
    by_width[width] += ["conv_norm_out", "conv_out"]
    return places | {f"res.{n}": tuple(prefixes) for n, prefixes in by_width.items()}


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(prefix == "" or name.startswith(prefix + ".") for prefix in prefixes)


def _known(places: dict[str, tuple[str, ...]]) -> str:
    return (
        f"places: {', '.join(places)}; a place may be narrowed with /kind, kinds: {', '.join(KINDS)}; "
        "terms are joined with +, as in 'decoder/attn2+mid'"
    )
