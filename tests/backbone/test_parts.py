"""Names of parts of a UNet."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from escd.backbone import parts


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def test_halves_are_disjoint_and_leave_only_the_time_embedding(unet):
    encoder, mid, decoder = (set(parts.names_of(unet, p)) for p in ("encoder", "mid", "decoder"))
    assert not (encoder & mid or encoder & decoder or mid & decoder)
    rest = set(parts.names_of(unet, "all")) - encoder - mid - decoder
    assert rest and all(name.startswith("time_embedding.") for name in rest)
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"} <= encoder
    assert {"conv_out.bias", "conv_norm_out.weight", "up_blocks.2.resnets.0.conv1.weight"} <= decoder
    assert set(parts.names_of(unet, "all")) == {name for name, _ in unet.named_parameters()}


def test_sizes_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    count = {
        p: sum(w.numel() for w in parts.parameters_of(unet, p).values())
        for p in ("encoder", "mid", "decoder", "all")
    }
    millions = {p: round(n / 1e6, 1) for p, n in count.items()}
    assert millions == {"encoder": 249.6, "mid": 97.0, "decoder": 510.8, "all": 859.5}
    with pytest.raises(ValueError, match="names no parameter"):
        parts.names_of(unet, "down.3/attn2")  # SD's innermost down block has no attention


def test_resolution_is_the_one_each_convolution_reads(unet):
    """Every convolution belongs to the width of its input, as seen in a forward pass."""
    width_of = {}
    hooks = [
        module.register_forward_hook(lambda _m, x, _y, name=name: width_of.update({name: x[0].shape[-1]}))
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    unet(torch.randn(1, 4, 8, 8), 10, torch.randn(1, 3, 8))
    for hook in hooks:
        hook.remove()
    assert len(width_of) > 20
    for name, width in width_of.items():
        # An upsampler's convolution sees the enlarged map; what the upsampler reads is half as wide.
        reads = width // 2 if ".upsamplers." in name else width
        assert f"{name}.weight" in parts.names_of(unet, f"res.{reads}"), name
    shares = [set(parts.names_of(unet, f"res.{n}")) for n in (8, 4, 2)]
    assert sum(map(len, shares)) == len(set.union(*shares))
    assert set.union(*shares) == set(parts.names_of(unet, "encoder+mid+decoder"))


def test_kinds_and_unions(unet):
    cross = parts.names_of(unet, "up.2/attn2")
    assert cross and all(name.startswith("up_blocks.2.") and ".attn2." in name for name in cross)
    self_attention = parts.names_of(unet, "encoder/attn1")
    assert self_attention and all(".attn1." in name for name in self_attention)
    assert all(".resnets." in name for name in parts.names_of(unet, "encoder/resnets"))
    assert all("samplers" in name for name in parts.names_of(unet, "all/samplers"))
    assert any(".ff." in name for name in parts.names_of(unet, "mid/attentions"))
    assert all(".ff." in name for name in parts.names_of(unet, "mid/ff"))
    union = parts.names_of(unet, "mid + up.2/attn2+mid/attn1")
    assert set(union) == set(parts.names_of(unet, "mid")) | set(cross)
    assert len(union) == len(set(union))
    assert union == [name for name, _ in unet.named_parameters() if name in set(union)]


def test_parameters_are_the_networks_own(unet):
    named = dict(unet.named_parameters())
    assert all(p is named[name] for name, p in parts.parameters_of(unet, "decoder").items())


@pytest.mark.parametrize(
    "part",
    [
        "",
        "encode",
        "down.9",
        "res.7",
        "encoder/",
        "encoder/attn3",
        "encoder+",
        "/attn1",
        "Encoder",
        "down.0.1",
    ],
)
def test_unknown_parts_are_refused_with_the_grammar(unet, part):
    with pytest.raises(
        ValueError, match=r"unknown part.*places: all, encoder.*down\.2.*res\.2.*kinds: attn1"
    ):
        parts.names_of(unet, part)


def test_a_part_is_a_string(unet):
    with pytest.raises(TypeError, match="string, not by NoneType"):
        parts.names_of(unet, None)
