"""Wrong added channels while a grown UNet is trained further, so that it does not lean on its own guesses.

In training, the added latent channels that a UNet reads are as right as the old ones. While it samples they
are its own guesses, and it takes outlines from them that are not there: patterns fray ("exposure bias", Ning
et al. 2023). So in most rows the added channels are wrong, and the old channels are learnt as without them:
from the UNet before it grew, which never saw an added channel, or from the truth.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..backbone.diffusion import noised
from ..records import sha256

# Share of the rows of a batch whose added channels are wrong.
WRONG_SHARE = 0.6
# Half of these are the UNet's guess in one step from a timestep that lies this much higher, with up to this
# share of another image's, for the detail that a guess lacks. The others lie between the right ones and
# another image's.
EARLIER_BY, OF_ANOTHER = (40, 400), 0.6


class WrongChannels:
    """Replaces added channels of a batch, and has the UNet before it grew as teacher.

    folder: the teacher's weights. It reads the same text tower.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        teacher = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
        self.teacher: UNet2DConditionModel = teacher.to(device).eval().requires_grad_(False)
        self.sha256 = sha256(folder / "unet")

    @property
    def channels(self) -> int:
        return int(self.teacher.config.in_channels)

    @torch.no_grad()
    def __call__(
        self, unet: UNet2DConditionModel, scheduler: DDIMScheduler, x_0: Tensor, noise: Tensor, t: Tensor,
        text: Tensor, plain: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Noised latents and targets (N, C, h, w) of a batch, and which rows (N,) have wrong added channels.

        N is at least 2, for there to be another image.

        x_0, noise: clean latents and noise (N, C, h, w). text: conditioning (N, L, D) of prompts of which the
        first `plain` have no pseudo-word: there the teacher gives the old channels' targets, elsewhere the
        truth does. The targets of wrong added channels are meaningless.
        """
        old, count = self.channels, len(x_0)
        x_t, target = noised(scheduler, x_0, noise, t)
        rows = torch.randperm(count)[: round(count * WRONG_SHARE)].to(x_0.device)
        guessed = rows[: len(rows) // 2]
        share = torch.rand(count, 1, 1, 1).to(x_0)
        another = x_0.roll(1 + int(torch.randint(count - 1, ())), 0)[:, old:]
        wrong = x_0.clone()
        wrong[:, old:] = torch.lerp(x_0[:, old:], another, share)
        guess = self._guess(unet, scheduler, x_0[guessed], t[guessed], text[guessed])[:, old:]
        wrong[guessed, old:] = guess + OF_ANOTHER * share[guessed] * another[guessed]
        x_t[rows] = noised(scheduler, wrong[rows], noise[rows], t[rows])[0]
        taught = rows[rows < plain]
        if len(taught):
            taught_by = self.teacher(x_t[taught, :old], t[taught], text[taught]).sample
            target = target.clone()
            target[taught, :old] = taught_by.to(target)
        return x_t, target, torch.zeros(count, dtype=torch.bool, device=x_0.device).index_fill(0, rows, True)

    def _guess(
        self, unet: UNet2DConditionModel, scheduler: DDIMScheduler, x_0: Tensor, t: Tensor, text: Tensor
    ) -> Tensor:
        """The clean latents (N, C, h, w) that the UNet predicts in one step from a higher timestep."""
        last = scheduler.config.num_train_timesteps - 1
        earlier = (t + torch.randint(*EARLIER_BY, (len(t),)).to(t)).clamp(max=last)
        x_t, _ = noised(scheduler, x_0, torch.randn_like(x_0), earlier)
        velocity = unet(x_t, earlier, text).sample.to(x_t)
        # v = a e - s x_0 and x_t = a x_0 + s e give x_0 = a x_t - s v: the velocity's formula again.
        return scheduler.get_velocity(velocity, x_t, earlier)
