"""More latent channels for an autoencoder and a UNet that are trained already, and the varied world."""

import pytest
import torch

from escd.data.names import PIERCED_SHARE, SHAPES, UNNAMED_APPEARANCES, VARIED_APPEARANCES
from escd.data.random import CounterRNG
from escd.data.textures import TEXTURES
from escd.data.world import World
from escd.pretrain.autoencoder import AutoencoderLoss, GrowingLoss, even_out, grow, make_autoencoder
from escd.pretrain.networks import grow_unet, make_unet


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return World(3, varied=True).batch(range(24)).image


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return make_autoencoder(4).eval()


@torch.no_grad()
def test_a_grown_autoencoder_keeps_its_old_channels_and_pictures(small, images):
    wide = grow(small, 10, images).eval()
    old, new = (vae.encode(images).latent_dist for vae in (small, wide))
    assert torch.allclose(new.mean[:, :4], old.mean, atol=1e-5)
    assert torch.allclose(new.logvar[:, :4], old.logvar, atol=1e-5)
    assert torch.allclose(wide.decode(new.mean).sample, small.decode(old.mean).sample, atol=1e-5)


@torch.no_grad()
def test_new_channels_start_with_what_the_old_ones_lose(small, images):
    wide = grow(small, 10, images).eval()
    made = small(images).sample
    lost = torch.nn.functional.pixel_unshuffle(images - made, 4).flatten(2).transpose(1, 2).flatten(0, 1)
    new = wide.encode(images).latent_dist.mean[:, 4:].flatten(2).transpose(1, 2).flatten(0, 1)
    design = torch.cat([new, torch.ones(len(new), 1)], 1)
    left = lost - design @ torch.linalg.lstsq(design, lost).solution
    assert left.square().mean() < 0.6 * (lost - lost.mean(0)).square().mean()


def test_only_more_channels_can_be_grown(small, images):
    with pytest.raises(ValueError, match="cannot grow to 4"):
        grow(small, 4, images)
    with pytest.raises(ValueError, match="cannot grow to 2"):
        grow_unet(make_unet(4), 2)


@torch.no_grad()
def test_channels_are_evened_out_without_changing_a_picture(small, images):
    wide = grow(small, 10, images).eval()
    torch.nn.init.normal_(wide.decoder.conv_in.weight, std=0.05)  # a decoder that reads the new channels
    before, z = wide(images).sample, wide.encode(images).latent_dist.mean
    even_out(wide, 4, images, 0.5)
    assert torch.allclose(wide(images).sample, before, atol=1e-3)
    after = wide.encode(images).latent_dist.mean
    assert torch.allclose(after[:, :4], z[:, :4], atol=1e-5)
    flat = after.transpose(0, 1).flatten(1)
    covariance = torch.cov(flat)
    wanted = 0.25 * covariance.diagonal()[:4].mean()
    assert torch.allclose(covariance[4:, 4:], wanted * torch.eye(6), atol=0.02 * float(wanted))
    assert covariance[4:, :4].abs().max() < 0.02 * wanted.sqrt() * covariance.diagonal()[:4].max().sqrt()


def test_a_decoder_reads_each_image_with_noise_of_its_own_up_to_the_channels_deviation():
    loss, latents = AutoencoderLoss(3), torch.zeros(64, 3, 16, 16)
    assert loss.noised(latents) is latents
    loss.noise = torch.tensor([0.0, 0.1, 1.0])[:, None, None]
    torch.manual_seed(0)
    deviation = loss.noised(latents).std((2, 3))  # (N, C)
    share = deviation[:, 2]
    assert (deviation[:, 0] == 0).all() and torch.allclose(deviation[:, 1], 0.1 * share, atol=0.02)
    assert share.min() < 0.1 and 0.9 < share.max() < 1.1 and 0.4 < share.mean() < 0.6


def test_growing_is_held_to_the_old_channels(small, images):
    loss = GrowingLoss(small, 10, images)
    _, logs = loss(images[:4])
    assert float(logs["moved"].detach()) < 1e-9
    with torch.no_grad():
        loss.vae.encoder.conv_out.bias[0] += 1.0
    total, logs = loss(images[:4])
    assert float(logs["moved"].detach()) > 1e-3
    assert total > loss.held * logs["moved"]


@torch.no_grad()
def test_a_grown_unet_predicts_what_it_predicted():
    torch.manual_seed(0)
    unet = make_unet(4).eval()
    wide = grow_unet(unet, 10).eval()
    x, t, text = torch.randn(2, 10, 16, 16), torch.tensor([10, 700]), torch.randn(2, 5, 192)
    out = wide(x, t, text).sample
    assert torch.allclose(out[:, :4], unet(x[:, :4], t, text).sample, atol=1e-5)
    assert not out[:, 4:].any()


def test_a_varied_world_draws_every_family_and_leaves_the_plain_one_alone():
    plain, varied = World(5, named_appearances=0.0), World(5, named_appearances=0.0, varied=True)
    assert set(varied.batch(range(300)).appearance_family) == {*UNNAMED_APPEARANCES, *VARIED_APPEARANCES}
    assert not set(plain.batch(range(300)).appearance_family) & set(VARIED_APPEARANCES)


@pytest.mark.parametrize("family", VARIED_APPEARANCES)
def test_a_varied_texture_is_in_range_varies_and_does_not_depend_on_its_batch(family):
    texture = TEXTURES[family](CounterRNG(3, torch.arange(6)), 64)
    assert texture.shape == (6, 3, 64, 64)
    assert torch.isfinite(texture).all()
    assert (texture.clamp(0, 1).flatten(1).std(1) > 0.005).sum() >= 5
    alone = TEXTURES[family](CounterRNG(3, torch.tensor([4])), 64)[0]
    assert torch.allclose(alone, texture[4], atol=1e-5)


def test_a_varied_world_cuts_unnamed_outlines_alone_and_leaves_half():
    whole, cut = (World(5, named_shapes=0.3, varied=v).masks(range(200)) for v in (False, True))
    assert whole[1] == cut[1]
    kept = cut[0].sum((1, 2, 3)) / whole[0].sum((1, 2, 3))
    named = torch.tensor([family in SHAPES for family in whole[1]])
    assert (kept[named] == 1).all()
    assert (kept >= 0.5).all() and (cut[0] <= whole[0]).all()
    pierced = (kept[~named] < 0.995).float().mean()
    assert 0.5 * PIERCED_SHARE < pierced <= PIERCED_SHARE + 0.1
