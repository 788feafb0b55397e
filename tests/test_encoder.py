"""Stage 1: F_down is the UNet's own way down, and embeds_ref is what the paper's Eqs. 3 and 4 say."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from escd.encoder import down_path, extract_features, feature_widths, pooled
from escd.trace import Trace


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


def test_embeds_ref_is_cls_then_pooled_down_features(backbone):
    images = torch.rand(2, 3, backbone.image_size, backbone.image_size) * 2 - 1
    embeds_ref = extract_features(backbone, images, seed=4)
    cls_width, down_width = feature_widths(backbone)
    assert embeds_ref.shape == (2, cls_width + down_width)
    with torch.no_grad():
        assert torch.allclose(embeds_ref[:, :cls_width], backbone.image_tower(images), atol=1e-6)
    # A reference's features do not depend on its batch, and depend on its picture.
    assert torch.allclose(extract_features(backbone, images[1:], seed=4)[0], embeds_ref[1], atol=1e-5)
    assert not torch.allclose(embeds_ref[0], embeds_ref[1], atol=1e-3)
    assert not torch.equal(extract_features(backbone, images, seed=5), embeds_ref)


def test_pooled_means():
    maps = [torch.arange(16.0).view(1, 1, 4, 4)]
    assert torch.allclose(pooled(maps, (1, 2)), torch.tensor([[7.5, 2.5, 4.5, 10.5, 12.5]]))


def test_global_means_of_sd15_are_10880_wide():
    class Fake:  # widths are read from configurations alone
        class unet:
            config = UNet2DConditionModel.load_config  # replaced below

        class image_tower:
            class config:
                width = 768

    class Config:
        layers_per_block = 2
        block_out_channels = (320, 640, 1280, 1280)

    Fake.unet.config = Config
    assert feature_widths(Fake, (1,)) == (768, 10880)


def test_features_carry_no_gradient_and_leave_the_backbone_alone(backbone):
    before = {n: p.clone() for n, p in backbone.unet.named_parameters()}
    images = torch.zeros(1, 3, backbone.image_size, backbone.image_size)
    assert not extract_features(backbone, images).requires_grad
    assert all(torch.equal(p, before[n]) for n, p in backbone.unet.named_parameters())
    with pytest.raises((RuntimeError, ValueError)):
        extract_features(backbone, torch.zeros(1, 1, 8, 8))
