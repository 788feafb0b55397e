"""Stage 1 of pretraining: the autoencoder of `mini`, 64 x 64 px to latents of 16 x 16.

It has 4 latent channels, as Stable Diffusion has, until it is grown (`grow`); `escd.pretrain.trials`
measures more.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchvision.utils import save_image

from ..backbone.trace import Trace
from ..data.world import World
from ..files import together
from . import loop
from .loop import LoopConfig, psnr

LATENT_CHANNELS = 4
MOST_CHANNELS = 48  # values of a 4 x 4 patch
FITTED = 512  # images that the linear start is fitted on
HELD_OUT = 96  # images of each kind that are scored
# Standard deviation of added latent channels, relative to the old ones: sampling decides them later, and they
# take a smaller part of the loss.
NEW_DEVIATION = 0.5
# A decoder that is trained further reads latents with noise of up to these standard deviations on the old and
# on the added channels, in units of the scaled latents: a UNet's samples are off by as much, and their noise
# would show as grain.
DECODER_NOISE = 0.1, 0.3
GROUPS = 8
# Constant beside the data in a normalisation group of the linear start: large against pixels in [-1, 1], so
# that the group's variance, and so the gain, hardly depends on the image.
CONSTANT = 4.0


def make_autoencoder(channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """SD's autoencoder class with two halvings; without the mid block's attention, 30 % of the time here."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        sample_size=64,
        norm_num_groups=GROUPS,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


@torch.no_grad()
def start_linear(vae: AutoencoderKL, images: Tensor) -> None:
    """Initialise the autoencoder as a linear one: latents are whitened principal components of 4 x 4 patches.

    Group normalisation removes an image's mean and contrast before the output layers. From random weights, a
    short training is spent mostly on restoring them: 18 dB after 8 k images, where a linear code has 25 dB.
    Here every residual branch starts at zero and the residual stream carries the pixels: each value as a pair
    (x, -x), because silu(x) - silu(-x) = x, beside constants that fix the variance of the group. The decoder
    starts with each patch's mean colour, which a nearest-neighbour upsampler can show.
    """
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    channels = vae.config.latent_channels
    patches = _carry_pixels(vae, images)  # (M, 48)
    mean = patches.mean(0)
    _, spread, basis = torch.pca_lowrank(patches - mean, channels, niter=8)
    deviation = spread / len(patches) ** 0.5
    _start_code(vae, patches.square().mean(), mean, (basis / deviation).T)
    colour = (basis * deviation).view(3, -1, channels).mean(1)  # (3, channels)
    _start_decoder(vae, mean.view(3, -1).mean(1), colour)


def _read_only(conv: nn.Conv2d, rows: slice, weight: Tensor, row: int = 1, column: int = 1) -> None:
    """Let rows of a convolution read only the first inputs, by `weight`, at one tap."""
    conv.weight[rows] = 0
    conv.bias[rows] = 0
    conv.weight[rows, : weight.shape[1], row, column] = weight


def _carry_pixels(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Make the encoder's two halvings a space-to-depth; returns the 4 x 4 patches of `images` (M, 48)."""
    encoder = vae.encoder
    _read_only(encoder.conv_in, slice(0, 3), torch.eye(3))
    data, maps = 3, encoder.conv_in(images)
    for block in encoder.down_blocks[:2]:
        if (shortcut := block.resnets[0].conv_shortcut) is not None:
            _read_only(shortcut, slice(0, data), torch.eye(data), 0, 0)
            maps = shortcut(maps)
        down = block.downsamplers[0]
        down.conv.weight[: 4 * data] = 0
        down.conv.bias[: 4 * data] = 0
        for tap in range(4):  # the padding is (0, 1, 0, 1): taps 0 and 1 are the patch's own
            channel = torch.arange(data)
            down.conv.weight[channel * 4 + tap, channel, tap // 2, tap % 2] = 1
        maps, data = down(maps), 4 * data
    return maps[:, :data].permute(0, 2, 3, 1).reshape(-1, data)


def _start_code(vae: AutoencoderKL, power: Tensor, mean: Tensor, whiten: Tensor) -> None:
    """Start the encoder's last layers as a linear code.

    power: mean square of the patches' values; mean: of the patches (48,); whiten: (latent channels, 48).
    """
    encoder, (channels, data) = vae.encoder, whiten.shape
    width = encoder.conv_norm_out.num_channels
    size, pairs = width // GROUPS, data // GROUPS
    spreading, bias = torch.zeros(width, data), torch.zeros(width)
    plus = torch.tensor([g * size + 2 * p for g in range(GROUPS) for p in range(pairs)])
    spreading[plus, torch.arange(data)], spreading[plus + 1, torch.arange(data)] = 1, -1
    for g in range(GROUPS):
        rest = torch.arange(g * size + 2 * pairs, (g + 1) * size)
        bias[rest] = CONSTANT * (1 - 2 * (torch.arange(len(rest)) % 2))
    last = encoder.down_blocks[2].resnets[0].conv_shortcut
    _read_only(last, slice(0, width), spreading, 0, 0)
    last.bias.copy_(bias)
    gain = ((2 * pairs * power + (size - 2 * pairs) * CONSTANT**2) / size).sqrt()
    nn.init.zeros_(encoder.conv_out.weight)
    nn.init.zeros_(encoder.conv_out.bias)
    encoder.conv_out.weight[:channels, plus, 1, 1] = whiten * gain
    encoder.conv_out.weight[:channels, plus + 1, 1, 1] = -whiten * gain
    encoder.conv_out.bias[:channels] = -whiten @ mean
    encoder.conv_out.bias[channels:] = -7.0  # log variance
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _read_only(conv, slice(0, conv.out_channels), torch.eye(conv.out_channels), 0, 0)


def _start_decoder(vae: AutoencoderKL, offset: Tensor, colour: Tensor) -> None:
    """Start the decoder with each patch's mean colour: offset (3,) plus colour (3, C) times the latents."""
    decoder = vae.decoder
    size = decoder.conv_norm_out.num_channels // GROUPS  # channels of a group: a pair and two constants
    used = 3 * size
    start = torch.zeros(used, colour.shape[1])
    start[0::size], start[1::size] = colour, -colour
    _read_only(decoder.conv_in, slice(0, used), start)
    decoder.conv_in.bias[0:used:size], decoder.conv_in.bias[1:used:size] = offset, -offset
    decoder.conv_in.bias[2:used:size], decoder.conv_in.bias[3:used:size] = CONSTANT, -CONSTANT
    for block in decoder.up_blocks:
        for module in (block.resnets[0].conv_shortcut, *(u.conv for u in block.upsamplers or ())):
            if module is not None:
                at = module.kernel_size[0] // 2
                _read_only(module, slice(0, used), torch.eye(used), at, at)
    gain = (CONSTANT**2 / 2 + offset.square().mean() / 2 + 0.2) ** 0.5
    decoder.conv_out.weight.mul_(0.1)
    nn.init.zeros_(decoder.conv_out.bias)
    decoder.conv_out.weight[:, :used] = 0
    for c in range(3):
        decoder.conv_out.weight[c, c * size, 1, 1] = gain
        decoder.conv_out.weight[c, c * size + 1, 1, 1] = -gain


@torch.no_grad()
def grow(vae: AutoencoderKL, channels: int, images: Tensor) -> AutoencoderKL:
    """The autoencoder with more latent channels: old ones unchanged, new ones for what those lose.

    The new channels start as the first principal components of the 4 x 4 patches of the reconstruction's
    error on `images` (N, 3, S, S), read from the encoder's last layer by ridge regression; the decoder
    starts without them. Raises ValueError where there are as many channels already.
    """
    old = vae.config.latent_channels
    if not old < channels <= MOST_CHANNELS:
        raise ValueError(f"an autoencoder of {old} latent channels cannot grow to {channels}")
    wide = make_autoencoder(channels)
    own, start = wide.state_dict(), vae.state_dict()
    rows = torch.cat([torch.arange(old), channels + torch.arange(old)])  # means, then log variances
    for name, value in own.items():
        if value.shape == start[name].shape:
            value.copy_(start[name])
            continue
        value.zero_()
        if name.startswith("quant_conv") and value.ndim > 1:
            value[rows[:, None], rows] = start[name]
            new = torch.arange(old, channels)
            value[new, new] = 1
        elif name.startswith(("encoder.conv_out", "quant_conv")):
            value[rows] = start[name]
        elif value.ndim > 1:  # decoder.conv_in, post_quant_conv
            value[: start[name].shape[0], :old] = start[name]
        else:
            value[:old] = start[name]
    new = torch.arange(old, channels)
    own["post_quant_conv.weight"][new, new] = 1
    own["quant_conv.bias"][channels + new] = -7.0  # log variance
    wide.load_state_dict(own)

    parts = [_features_and_error(vae, x) for x in images.split(32)]
    features, error = (torch.cat(part).cpu() for part in zip(*parts, strict=True))  # (M, 128), (M, 48)
    error = error - error.mean(0)
    _, spread, basis = torch.pca_lowrank(error, channels - old, niter=8)
    wanted = error @ basis / (spread / len(error) ** 0.5)
    middle = features.mean(0)
    centred = features - middle
    ridge = 1e-3 * centred.square().mean() * len(centred) * torch.eye(centred.shape[1])
    weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ wanted).T
    wide.encoder.conv_out.weight[old:channels, :, 1, 1] = weight
    wide.encoder.conv_out.bias[old:channels] = -weight @ middle
    return wide


def _features_and_error(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (M, C) of the encoder's last layer, and the error's 4 x 4 patch at each position (M, 48)."""
    with Trace(vae, "encoder.conv_act") as read:
        decoded = vae(images).sample
    error = F.pixel_unshuffle(images - decoded, 4)
    return tuple(x.permute(0, 2, 3, 1).flatten(0, 2) for x in (read["encoder.conv_act"], error))


@torch.no_grad()
def even_out(vae: AutoencoderKL, old: int, images: Tensor, deviation: float) -> None:
    """Give the channels from number `old` on one standard deviation, relative to the old ones.

    They become uncorrelated among themselves and with the old ones on `images` (N, 3, S, S). Only the two
    1 x 1 convolutions around the latents change, inversely: the reconstruction stays the same.
    """
    z = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(32)]).cpu()
    z = z.transpose(0, 1).flatten(1).double()  # (C, M)
    middle = z.mean(1, keepdim=True)
    covariance = (z - middle) @ (z - middle).T / z.shape[1]
    known, cross, rest = covariance[:old, :old], covariance[old:, :old], covariance[old:, old:]
    from_old = torch.linalg.solve(known, cross.T).T  # regression on the old channels
    values, basis = torch.linalg.eigh(rest - from_old @ cross.T)
    scale = deviation * known.diagonal().mean().sqrt() / values.flip(0).sqrt()
    turn = torch.eye(len(z), dtype=torch.double)
    turn[old:, old:] = scale[:, None] * basis.flip(1).T
    turn[old:, :old] = -turn[old:, old:] @ from_old
    shift = -(turn @ middle)[:, 0]
    shift[:old] = 0
    back = torch.linalg.inv(turn)
    channels, quant, post = len(z), vae.quant_conv, vae.post_quant_conv
    # Log variances follow the scale; only further training uses them.
    means = slice(0, channels)
    quant.weight[means] = (turn @ quant.weight[means, :, 0, 0].cpu().double()).float()[:, :, None, None]
    quant.bias[means] = (turn @ quant.bias[means].cpu().double() + shift).float()
    quant.bias[channels + old :] += 2 * scale.log().to(quant.bias)
    weight = post.weight[:, :, 0, 0].cpu().double() @ back
    post.bias.copy_((post.bias.cpu().double() - weight @ shift).float())
    post.weight.copy_(weight.float()[:, :, None, None])


class AutoencoderLoss(nn.Module):
    """Reconstruction error (absolute, squared, of finite differences) plus a small KL term."""

    def __init__(self, channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.vae = make_autoencoder(channels)
        self.noise: Tensor | None = None  # (C, 1, 1); None: the decoder reads the latents as they are

    def noised(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) with noise, in each image of a share of `noise` that is drawn uniformly."""
        if self.noise is None:
            return latents
        share = torch.rand(len(latents), 1, 1, 1, device=latents.device)
        return latents + share * self.noise.to(latents) * torch.randn_like(latents)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # No gradients for a frozen encoder.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vae.quant_conv.weight.requires_grad):
            posterior = self.vae.encode(image).latent_dist
        decoded = self.vae.decode(self.noised(posterior.sample())).sample.float()
        error = decoded - image
        # Finite differences keep thin parts and texture, which the squared error alone blurs.
        edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
        squared = error.square().mean()
        kl = posterior.kl().float().mean() / image[0].numel()
        loss = error.abs().mean() + 4 * squared + 0.5 * edges + 3e-5 * kl + self.perceptual(decoded, image)
        held, logs = self.hold(posterior.mean, image)
        return loss + held, {"mse": squared, "kl": kl, **logs}

    def hold(self, latents: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """A term that keeps latents (N, C, h, w) unchanged, and its logs; zero here."""
        return latents.new_zeros(()), {}

    def perceptual(self, decoded: Tensor, image: Tensor) -> Tensor:
        """A perceptual term between images (N, 3, H, W); zero here (`escd.pretrain.trials` has one)."""
        return decoded.new_zeros(())


class GrowingLoss(AutoencoderLoss):
    """With a term that keeps the old latent channels unchanged: a UNet has learnt them."""

    held = 4.0  # weight of the old channels' squared change, in units of their variance

    def __init__(self, vae: AutoencoderKL, channels: int, images: Tensor) -> None:
        super().__init__(channels)
        self.old = vae.config.latent_channels
        self.vae = grow(vae, channels, images)
        self.__dict__["before"] = vae.requires_grad_(False)  # kept out of this module's state
        self.scale = vae.config.scaling_factor

    def hold(self, latents: Tensor, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            wanted = self.before.encode(image).latent_dist.mean.float()
        moved = ((latents[:, : self.old].float() - wanted) * self.scale).square().mean()
        return self.held * moved, {"moved": moved}


class AutoencoderStage:
    """Trains the autoencoder with this number of latent channels."""

    name = "autoencoder"
    loop = LoopConfig(images=60_000, batch_size=16, learning_rate=8e-4, decay=0.7, weight_decay=0.0)

    def __init__(self, device: torch.device, folder: Path, channels: int = LATENT_CHANNELS) -> None:
        torch.manual_seed(11)
        self.module = AutoencoderLoss(channels)
        self.scaling: float | None = None  # scaling factor of the weights that are trained further
        self.heavy: list[nn.Module] = []
        self.channels = channels
        self.world = World(seed=11, named_shapes=0.25, named_appearances=0.3, varied=True, device=device)
        start_linear(self.module.vae, self.batch(10**6, FITTED).cpu())
        unseen = World(seed=9011, split="heldout", named_shapes=0.4, named_appearances=0.4, device=device)
        held_out = range(HELD_OUT)
        self.fixed = {"world": unseen.batch(held_out).image, "frames": unseen.full_frames(held_out)}
        self.device = device

    def load(self, folder: Path) -> None:
        """Take an exported autoencoder and grow it to this stage's latent channels.

        If it has as many, only its decoder is trained further: the UNet has learnt the encoder's latents.
        The autoencoder before its growth is kept beside the run's state, for a run killed after an export.
        """
        run = loop.RUNS / self.name
        kept = run / "grows"
        begun = (run / "state.pt").exists() and (kept / "vae").is_dir()
        where = (kept if begun else folder) / "vae"
        vae = AutoencoderKL.from_pretrained(where, torch_dtype=torch.float32).to(self.device)
        self.scaling = vae.config.scaling_factor
        growing = vae.config.latent_channels < self.channels
        if growing and not begun:
            with together(kept) as scratch:
                vae.save_pretrained(scratch / "vae")
        elif not begun:
            shutil.rmtree(kept, ignore_errors=True)  # of an earlier run
        if growing:
            self.module = GrowingLoss(vae, self.channels, self.batch(10**6, 768))
            self.module.to(self.device, memory_format=torch.channels_last)  # twice as fast on a CPU
            return
        self.module = AutoencoderLoss(vae.config.latent_channels).to(self.device)
        self.module.vae.load_state_dict(vae.state_dict())
        of_added = torch.arange(vae.config.latent_channels)[:, None, None] >= LATENT_CHANNELS
        self.module.noise = torch.where(of_added, *reversed(DECODER_NOISE)) / self.scaling
        for part in (self.module.vae.encoder, self.module.vae.quant_conv):
            part.requires_grad_(False)

    def batch(self, first: int, count: int) -> Tensor:
        """Images (N, 3, S, S): half objects, half frames full of one material."""
        half = count // 2
        index = torch.arange(first, first + count)
        return torch.cat([self.world.batch(index[:half]).image, self.world.full_frames(index[half:])])

    def _reconstruct(self, image: Tensor) -> Tensor:
        return self.module.vae(image).sample.clamp(-1, 1)

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB on held-out images."""
        return {
            f"psnr_{k}": round(float(psnr(self._reconstruct(x), x).mean()), 3) for k, x in self.fixed.items()
        }

    def grid(self, path: Path) -> None:
        """Rows: held-out images and their reconstructions."""
        rows = [x[:16] for x in self.fixed.values()]
        both = torch.cat([y for x in rows for y in (x, self._reconstruct(x))])
        save_image(both * 0.5 + 0.5, path, nrow=16)

    def export(self, folder: Path) -> None:
        """Write the autoencoder in half precision, with its scaling factor."""
        vae = make_autoencoder(self.module.vae.config.latent_channels).to(self.device)
        vae.load_state_dict(self.module.vae.state_dict())
        if isinstance(self.module, GrowingLoss):
            even_out(vae, self.module.old, self.world.batch(range(10**6, 10**6 + 768)).image, NEW_DEVIATION)
        scaling = self.scaling
        if scaling is None:
            # SD's scaling_factor: it gives the UNet latents of unit variance.
            images = self.world.batch(range(10**6, 10**6 + 256)).image
            scaling = round(float(1 / vae.encode(images).latent_dist.mean.std()), 5)
        vae.register_to_config(scaling_factor=scaling)
        vae.half().save_pretrained(folder / "vae")
