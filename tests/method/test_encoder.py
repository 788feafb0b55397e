"""Stage 1: embeds_ref is what the paper's Eqs. 3 and 4 say."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from escd.method.encoder import extract_features, feature_widths, pooled


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
    known = backbone.encode_images(images)
    assert torch.equal(extract_features(backbone, images, seed=4, x_0=known), embeds_ref)


def test_pooled_means():
    maps = [torch.arange(16.0).view(1, 1, 4, 4)]
    assert torch.allclose(pooled(maps, (1, 2)), torch.tensor([[7.5, 2.5, 4.5, 10.5, 12.5]]))
    # Cell by cell, in each the channels of all maps.
    maps += [torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2)]
    assert torch.allclose(pooled(maps, (2,)), torch.tensor([[2.5, 1, 4.5, 2, 10.5, 3, 12.5, 4]]))


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
