"""Stage 3 of pretraining: the UNet of `mini`, under the frozen text tower (Eq. 2)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torchvision.utils import save_image
from transformers import CLIPTokenizer

from ..backbone import target_of
from ..world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, World, draw_caption
from .loop import LoopConfig
from .towers import WIDTH, load_text_tower, read_captions

CAPTION_DROPOUT = 0.1
# Encoding a picture costs a fifth of a training step on the CPU; each latent is used about this many times,
# with new noise, a new timestep and a new caption.
REUSE = {"cpu": 4, "cuda": 1, "mps": 2}
BANK = 24_576
# Share of the pictures whose shape, and whose appearance, has a name: only these teach the prompt's words.
# The rest keeps the UNet able to draw what has no name, which is what a person brings. Twelve outlines are
# soon known by name; the patterns come last.
NAMED_SHAPES, NAMED_APPEARANCES = 0.45, 0.75
# Of the log of noise over signal at which the UNet trains.
NOISE_MEAN, NOISE_SPREAD = -0.4, 1.2


def make_unet() -> UNet2DConditionModel:
    """SD 1.5's class scaled down: three resolutions (16, 8, 4), cross-attention in every block."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def make_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule, brought to pure noise at its end, for a UNet that predicts the velocity.

    On 16 x 16 latents SD's last step still shows a picture's mean colour through the noise. A UNet trained so
    reads the background off the starting noise instead of off the prompt: a first one did, and obeyed 7 % of
    the prompts' backgrounds. Without that remainder (Lin et al. 2024, "Common diffusion noise schedules and
    sample steps are flawed") only the prompt tells, and only a UNet that predicts the velocity (Salimans and
    Ho 2022) has something to predict there.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    )


def draw_noise_levels(scheduler: DDIMScheduler, count: int) -> Tensor:
    """Time steps (count,) whose log of noise over signal is normal, spread evenly over one batch.

    SD's schedule, drawn uniformly, spends half of its steps below a signal-to-noise ratio of 0.3, where there
    is little left to learn at 16 x 16 latents, and outlines stay blurred; a normal distribution of the level
    (Karras et al. 2022) with the velocity's plain error serves them better (README). One step in ten stays
    uniform, so that pure noise is met too.
    """
    alpha = scheduler.alphas_cumprod.double()
    level = ((1 - alpha) / alpha.clamp(min=1e-9)).log() / 2
    share = (torch.arange(count) + torch.rand(1)) / count
    normal = NOISE_MEAN + NOISE_SPREAD * torch.special.ndtri(share.double().clamp(1e-4, 1 - 1e-4))
    drawn = torch.searchsorted(level, normal).clamp(max=len(level) - 1)
    uniform = torch.randint(0, len(level), (count,))
    t = torch.where(torch.rand(count) < 0.1, uniform, drawn)
    return t[torch.randperm(count)]


def denoising_error(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: DDIMScheduler, x_0: Tensor, t: Tensor
) -> Tensor:
    """The squared error (B,) of a UNet at time steps t (B,) of latents x_0 (B, C, h, w) (Eq. 2)."""
    noise = torch.randn_like(x_0)
    predicted = predict(scheduler.add_noise(x_0, noise, t), t).float()
    return (predicted - target_of(scheduler, x_0, noise, t)).square().mean((1, 2, 3))


class DiffusionLoss(nn.Module):
    """Eq. 2 over pictures and captions."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = make_unet()
        self.scheduler = make_scheduler()

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x_0, text = batch
        t = draw_noise_levels(self.scheduler, len(x_0)).to(x_0.device)
        error = denoising_error(lambda x_t, t: self.unet(x_t, t, text).sample, self.scheduler, x_0, t)
        return error.mean(), {}


class UNetStage:
    name = "unet"
    loop = LoopConfig(
        images=420_000, batch_size=64, learning_rate=8e-4, warmup=0.015, decay=0.8, ema_decay=0.999
    )

    def __init__(self, device: torch.device, folder: Path) -> None:
        vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text = load_text_tower(folder, device)
        torch.manual_seed(13)
        self.module = DiffusionLoss()
        self.heavy = [self.module.unet]
        self.world = World(
            seed=13, named_shapes=NAMED_SHAPES, named_appearances=NAMED_APPEARANCES, device=device
        )
        self.device = device
        self.reuse = REUSE[device.type]
        self.latents: list[Tensor] = []
        self.captions: list[list[str]] = []
        self.generator = torch.Generator().manual_seed(13)
        unseen = World(seed=9013, device=device)
        b = unseen.batch(range(512))
        self.fixed = (self._encode(b.image), [c[0] for c in b.captions])

    def _encode(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            latents = self.vae.encode(images).latent_dist.mode()
        return latents.float() * self.vae.config.scaling_factor

    def load(self, folder: Path) -> None:
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.module.unet.load_state_dict(unet.state_dict())

    def _text(self, captions: list[str]) -> Tensor:
        return read_captions(self.tokenizer, self.text, captions)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        fresh = count if len(self.latents) < 4 * count else max(1, count // self.reuse)
        index = torch.arange(first, first + fresh)
        b = self.world.batch(index)
        self.latents += list(self._encode(b.image))
        self.captions += b.captions
        self.latents, self.captions = self.latents[-BANK:], self.captions[-BANK:]
        new = list(range(len(self.latents) - fresh, len(self.latents)))
        old = torch.randint(0, len(self.latents), (count - fresh,), generator=self.generator).tolist()
        u = torch.rand(count, 2, generator=self.generator).tolist()
        captions = [
            "" if drop < CAPTION_DROPOUT else draw_caption(self.captions[k], pick)
            for k, (drop, pick) in zip(new + old, u, strict=True)
        ]
        return torch.stack([self.latents[k] for k in new + old]), self._text(captions)

    def evaluate(self) -> dict[str, float]:
        """The mean squared error on fixed pictures, noise and timesteps: comparable along the run."""
        x_0, captions = self.fixed
        scheduler = self.module.scheduler
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
        t = torch.linspace(0, 999, len(x_0)).round().long().to(x_0.device)
        x_t, target = scheduler.add_noise(x_0, noise, t), target_of(scheduler, x_0, noise, t)
        # forward: a compiled UNet would be compiled again for this batch
        error = [
            F.mse_loss(
                self.module.unet.forward(x_t[k], t[k], self._text([captions[i] for i in k.tolist()])).sample,
                target[k],
            ).item()
            for k in torch.arange(len(x_0)).split(64)
        ]
        noisy = error[len(error) // 2 :]
        return {"mse": round(sum(error) / len(error), 5), "mse_noisy": round(sum(noisy) / len(noisy), 5)}

    def sample(
        self, prompts: list[str], *, steps: int = 25, guidance_scale: float = 4.0, seed: int = 0
    ) -> Tensor:
        """Images (N, 3, 64, 64) in [-1, 1]: plain DDIM with classifier-free guidance."""
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        x = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(
            self.device
        )
        text = self._text(prompts + [""] * len(prompts))
        for t in scheduler.timesteps:
            conditional, unconditional = self.module.unet.forward(torch.cat([x, x]), t, text).sample.chunk(2)
            x = scheduler.step(
                unconditional + guidance_scale * (conditional - unconditional), t, x
            ).prev_sample
        return self.vae.decode(x / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def grid(self, path: Path) -> None:
        prompts = [
            f"a {SHAPES[k % 12]} shape with {PATTERNS[k % 6]} {COLOURS[k % 8]}"
            f"{'' if k % 6 == 0 else ' and ' + COLOURS[(k + 3) % 8]} appearance "
            f"on a {BACKGROUNDS[k // 12 % 4]} background"
            for k in range(48)
        ]
        save_image(self.sample(prompts) * 0.5 + 0.5, path, nrow=12)

    def export(self, folder: Path) -> None:
        unet = make_unet()
        unet.load_state_dict(self.module.unet.state_dict())
        unet.half().save_pretrained(folder / "unet")
        make_scheduler().save_pretrained(folder / "scheduler")
