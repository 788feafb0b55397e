"""The two halves of the UNet, run one after the other: F_down is the UNet's own way down."""

from __future__ import annotations

import pytest
import torch

from escd.backbone.halves import down_path, half_of, up_path, with_weights
from escd.backbone.parts import names_of, parameters_of
from escd.backbone.trace import Trace


def test_down_path_is_bit_equal_to_forward(backbone):
    x = torch.randn(2, *backbone.latent_shape)
    t = torch.tensor([3, 700])
    text = backbone.encode_prompt(["", "a star"])
    down = [f"down_blocks.{k}" for k in range(len(backbone.unet.down_blocks))]
    with torch.no_grad(), Trace(backbone.unet, ["conv_in", *down, "mid_block"]) as seen:
        backbone.unet(x, t, text)
    with torch.no_grad():
        maps = down_path(backbone.unet, x, t, text)
    assert torch.equal(maps[0], seen["conv_in"])
    skips = [m for name in down for m in seen[name][1]]
    assert len(skips) == len(maps) - 2
    assert all(torch.equal(a, b) for a, b in zip(skips, maps[1:-1], strict=True))
    assert torch.equal(maps[-1], seen["mid_block"])


@pytest.mark.parametrize("side", [8, 7])
def test_down_then_up_is_bit_equal_to_forward(backbone, side):
    x = torch.randn(2, 4, side, side)
    t, text = torch.tensor([3, 700]), backbone.encode_prompt(["", "a star"])
    with torch.no_grad():
        whole = backbone.unet(x, t, text).sample
        halves = up_path(backbone.unet, down_path(backbone.unet, x, t, text), t, text)
    assert torch.equal(whole, halves)


def test_exchanged_weights_learn_and_the_unet_keeps_its_own(backbone):
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([3, 700])
    text = backbone.encode_prompt(["", "a star"])
    parameters = parameters_of(backbone.unet, "decoder")
    before = {name: p.clone() for name, p in parameters.items()}
    weights = {name: (p + 0.1).requires_grad_() for name, p in parameters.items()}
    with torch.no_grad():
        maps = down_path(backbone.unet, x, t, text)
        untouched = up_path(backbone.unet, maps, t, text)
    out = with_weights(up_path, backbone.unet, weights, maps, t, text)
    assert not torch.equal(out, untouched)
    out.sum().backward()
    assert all(w.grad is not None for w in weights.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in parameters.items())


def test_a_part_is_of_one_half_or_of_none(backbone):
    for part, half in (
        ("encoder", "encoder"),
        ("down.1", "encoder"),
        ("decoder", "decoder"),
        ("up.0/attn2+up.1", "decoder"),
        ("all", None),
        ("mid", None),
        ("down.0+up.0", None),
    ):
        assert half_of(names_of(backbone.unet, part)) == half, part
    assert half_of([]) is None
