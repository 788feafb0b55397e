"""Wrong added channels in the training of a grown UNet: what is replaced, and what is learnt from whom."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from escd.backbone.diffusion import noised
from escd.pretrain import loop
from escd.pretrain import unet as unet_module
from escd.pretrain.autoencoder import make_autoencoder
from escd.pretrain.command import WEIGHTS, main
from escd.pretrain.diffusion_loss import DiffusionLoss, Step
from escd.pretrain.loop import train
from escd.pretrain.networks import make_scheduler, make_unet
from escd.pretrain.pairs import MATERIAL, OUTLINE
from escd.pretrain.unet import UNetStage
from escd.pretrain.wrong_channels import WRONG_SHARE, WrongChannels

OLD, CHANNELS, ROWS, PLAIN = 4, 6, 20, 12
pytestmark = pytest.mark.usefixtures("few_pictures")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    make_unet(OLD).save_pretrained(folder / "unet")
    return folder


class Guesses(nn.Module):
    """A UNet that takes every clean latent to be 3; it keeps the timesteps that it was asked for."""

    def forward(self, x_t, t, text):
        self.asked = t
        signal = make_scheduler().alphas_cumprod[t][:, None, None, None]
        return SimpleNamespace(sample=(signal.sqrt() * x_t - 3.0) / (1 - signal).sqrt())


@pytest.fixture
def replaced(teacher):
    torch.manual_seed(0)
    wrong, scheduler = WrongChannels(teacher, CPU), make_scheduler()
    x_0, noise = torch.randn(2, ROWS, CHANNELS, 16, 16)
    t, text = torch.randint(0, 1000, (ROWS,)), torch.randn(ROWS, 5, 192)
    made = wrong(Guesses(), scheduler, x_0, noise, t, text, PLAIN)
    return SimpleNamespace(
        x_t=made[0], target=made[1], off=made[2], right=noised(scheduler, x_0, noise, t), t=t, text=text,
        teacher=wrong.teacher,
    )  # fmt: skip


def test_only_added_channels_of_a_share_of_the_rows_are_replaced(replaced):
    x_t, _ = replaced.right
    assert replaced.off.sum() == round(ROWS * WRONG_SHARE)
    assert torch.equal(replaced.x_t[:, :OLD], x_t[:, :OLD])
    changed = (replaced.x_t[:, OLD:] != x_t[:, OLD:]).flatten(1).any(1)
    before_the_end = replaced.t < 999  # at the last timestep there is noise alone
    assert torch.equal(changed, replaced.off & before_the_end)


def test_the_teacher_is_asked_under_plain_prompts_and_the_truth_elsewhere(replaced):
    taught = replaced.off & (torch.arange(ROWS) < PLAIN)
    assert 0 < taught.sum() < replaced.off.sum()
    with torch.no_grad():
        said = replaced.teacher(replaced.x_t[taught, :OLD], replaced.t[taught], replaced.text[taught]).sample
    assert torch.allclose(replaced.target[taught, :OLD], said, atol=1e-5)
    assert torch.equal(replaced.target[~taught], replaced.right[1][~taught])


def test_a_guess_is_the_clean_latents_that_the_unet_sees_at_a_higher_timestep(teacher):
    unet, t = Guesses(), torch.tensor([0, 300, 990])
    x_0 = torch.randn(3, CHANNELS, 16, 16)
    guess = WrongChannels(teacher, CPU)._guess(unet, make_scheduler(), x_0, t, torch.randn(3, 5, 192))
    assert torch.allclose(guess, torch.full_like(x_0, 3.0), atol=1e-3)
    assert (unet.asked > t).all() and (unet.asked[:2] - t[:2] < 400).all() and unet.asked[2] == 999


def loss_of(teacher: Path | None) -> tuple[DiffusionLoss, Step]:
    """The loss of a grown UNet on a batch of plain prompts and of some with pseudo-words."""
    torch.manual_seed(2)
    stage = object.__new__(UNetStage)
    stage.device = CPU
    loss = DiffusionLoss(lambda unet: UNetStage._frozen(stage, WEIGHTS, unet), CHANNELS)
    loss.set_old_channels(OLD)
    if teacher:
        loss.set_wrong_channels(WrongChannels(teacher, CPU))
    width = loss.filters["shape"].mean.shape[0]
    prompts = ["a star shape"] * PLAIN + ["a *m shape"] * 4 + ["a star shape with *a appearance"] * 4
    features = torch.randn(4, width)
    step = Step(
        torch.randn(ROWS, CHANNELS, 16, 16), prompts, 4, 4, 0, features, features, features,
        torch.rand(4, OUTLINE**2), torch.rand(4, MATERIAL),
    )  # fmt: skip
    return loss, step


def test_wrong_channels_are_not_learnt_and_everything_else_is(teacher):
    loss, step = loss_of(teacher)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        error, logs = loss(step)
    error.backward()
    assert {"plain", "shape", "appearance", "wrong", "added"} <= logs.keys()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.unet.parameters())
    assert all(p.grad is not None for p in loss.filters["shape"].parameters() if p.requires_grad)

    # The same draws with other targets for wrong channels: the same loss.
    made = loss.wrong_channels

    def meddled(*given):
        x_t, target, off = made(*given)
        target[off, OLD:] += 100.0
        return x_t, target, off

    loss.__dict__["wrong_channels"] = meddled
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(step)[0], error)
    loss.__dict__["wrong_channels"] = made


def test_nothing_is_wrong_while_held_out_images_are_scored(teacher):
    losses = []
    for folder in (teacher, None):
        loss, step = loss_of(folder)
        torch.manual_seed(4)
        with torch.no_grad():
            losses.append(loss(step)[0])
    assert torch.equal(*losses)


def test_a_teacher_has_the_channels_that_the_unet_had_before_it_grew(teacher, tmp_path):
    loss, _ = loss_of(None)
    make_unet(5).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="has 5 latent channels; before the UNet grew it had 4"):
        loss.set_wrong_channels(WrongChannels(tmp_path, CPU))
    loss.set_old_channels(CHANNELS)
    with pytest.raises(ValueError, match="with added latent channels"):
        loss.set_wrong_channels(WrongChannels(teacher, CPU))


def test_a_killed_training_with_a_teacher_goes_on_with_it_alone(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(unet_module, "BEGUN", 32)
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("text_encoder", "tokenizer", "image_tower"):
        (weights / name).symlink_to(WEIGHTS / name)
    make_autoencoder(CHANNELS).save_pretrained(weights / "vae")
    UNetStage(CPU, weights).export(weights)
    before = {"images": 0, "seconds": 1.0, "environment": {}, "scores": [], "old_channels": OLD}
    (weights / "training.json").write_text(json.dumps({"unet": before}))
    given = {"weights": weights, "batch_size": 8, "progress": False, "evaluations": 1, "further": True}
    record = train(lambda device: UNetStage(device, weights, teacher), images=8, **given)
    assert record["old_channels"] == OLD and record["teacher"] == WrongChannels(teacher, CPU).sha256
    assert record["curve"][-1]["wrong"] > 0
    with pytest.raises(ValueError, match="name the same --teacher"):
        train(lambda device: UNetStage(device, weights), images=16, **given)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--teacher", "here"], "--teacher is for the stage unet alone"),
        (["unet", "--teacher", "here"], "with --further"),
        (["unet", "--further", "--teacher", "nowhere"], "nowhere has no unet/config.json"),
    ],
)
def test_the_command_line_says_what_a_teacher_is_for(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err
