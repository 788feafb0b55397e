"""What sampling takes: forward passes of the UNet a step, and class images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_customization
from torch.utils.flop_counter import FlopCounterMode

from escd.backbone.halves import down_path
from escd.method import sampling
from escd.method.baselines import METHODS
from escd.method.method_cost import prior_operations, sampling_operations, sampling_passes


def test_a_step_of_ours_is_one_pass_and_reading_the_latents_is_more(backbone, monkeypatch):
    learnt = make_customization(backbone, "appearance")
    assert sampling_passes(backbone, learnt) == 1.0
    plain = sampling_operations(backbone)
    step = sampling.Group.step

    def reads_first(self, t, *given):
        if "prompt_embeds" in self.embeds:
            down_path(self.unet, self.x_t, t.expand(len(self.x_t)), self.embeds["prompt_embeds"])
        step(self, t, *given)

    monkeypatch.setattr(sampling.Group, "step", reads_first)
    # half of a pass of one image, where guidance takes two
    assert 1.1 < sampling_operations(backbone) / plain < 1.4


def test_class_images_are_as_many_steps_as_are_drawn(backbone):
    config = METHODS["dreambooth"].config("shape", backbone)
    count = replace(config, prior_images=3)
    assert prior_operations(backbone, count) == 3 * 25 * sampling_operations(backbone)
    assert prior_operations(backbone, METHODS["p-plus"].config("shape", backbone)) == 0


def test_an_unguided_step_is_half_of_it(backbone):
    assert sampling_operations(backbone) == pytest.approx(2 * _one_pass(backbone), rel=1e-6)


def _one_pass(backbone):
    x_t, t = torch.zeros(1, *backbone.latent_shape), torch.tensor([1])
    text = backbone.encode_prompt("a shape")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.unet(x_t, t, encoder_hidden_states=text)
    return counter.get_total_flops()
