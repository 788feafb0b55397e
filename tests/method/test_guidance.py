"""How far guidance goes, and where it starts: as it is said, or by the pseudo-words in each prompt."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import BOTH

from escd import ESCDPipeline
from escd.evaluation.configs import PARTS, SamplingConfig, configs
from escd.evaluation.references import load_references
from escd.method import guidance
from escd.method.customization import customized
from escd.method.guidance import LARGE, PLAIN, Guidance, default_guidance
from escd.paper.sheets import SheetConfig, sheet

SHAPE, LOOK, NEITHER = "a *m shape", "a star with *a appearance", "a red star"


OF_SHAPE, OF_LOOK = Guidance(3.0), Guidance(2.0, "backbone")


@pytest.fixture(autouse=True)
def defaults(monkeypatch):
    """Defaults that differ, whatever the shipped ones are."""
    monkeypatch.setattr(guidance, "GUIDANCE", {"shape": OF_SHAPE, "appearance": OF_LOOK})


def draw(pipe: ESCDPipeline, prompt: str | list[str], **options) -> np.ndarray:
    count = len(prompt) if isinstance(prompt, list) else 1
    noise = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(prompt, num_inference_steps=3, output_type="np", generator=noise, **options).images


def used(pipe: ESCDPipeline) -> Guidance:
    """The guidance of the pipeline's last call."""
    return Guidance(pipe.guidance_scale, pipe.guidance_from)


@pytest.mark.parametrize(
    ("prompt", "expected"), [(NEITHER, PLAIN), (SHAPE, OF_SHAPE), (LOOK, OF_LOOK), (BOTH, OF_LOOK)]
)
def test_a_prompt_has_the_guidance_of_its_pseudo_words(pipe, prompt, expected):
    images = draw(pipe, prompt)
    assert used(pipe) == expected
    assert np.array_equal(images, draw(pipe, prompt, **asdict(expected)))
    other = replace(expected, guidance_scale=expected.guidance_scale + 1)
    assert not np.array_equal(images, draw(pipe, prompt, **asdict(other)))


def test_one_of_the_two_can_be_said(pipe):
    draw(pipe, LOOK, guidance_scale=5.0)
    assert used(pipe) == replace(OF_LOOK, guidance_scale=5.0)
    draw(pipe, LOOK, guidance_from="customized")
    assert used(pipe) == Guidance(2.0)


@pytest.mark.parametrize("start", ["customized", "backbone"])
def test_the_branch_without_the_prompt_is_predicted_by_the_unet_that_is_said(pipe, start):
    learnt = pipe.customizations["*a"]
    unet = customized(pipe.unet, [(learnt, 1.0)])
    embeds, negative = pipe.encode_prompt(LOOK)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    x_T = torch.randn(1, *pipe.backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        prompted = unet(x_T, t, encoder_hidden_states=embeds).sample
        unguided = {"customized": unet, "backbone": pipe.unet}[start](
            x_T, t, encoder_hidden_states=negative
        ).sample
    expected = scheduler.step(unguided + 3 * (prompted - unguided), t, x_T).prev_sample
    given = {"latents": x_T, "guidance_scale": 3.0, "guidance_from": start, "num_inference_steps": 1}
    assert torch.allclose(pipe(LOOK, output_type="latent", **given).images, expected, atol=1e-5)


def test_from_the_backbone_guidance_adds_what_was_learnt(pipe):
    """Otherwise the test above could not tell the two."""
    one, other = (draw(pipe, LOOK, guidance_from=start) for start in ("customized", "backbone"))
    assert not np.allclose(one, other, atol=1e-3)


def test_without_customized_weights_it_is_one_unet(pipe):
    one, other = (draw(pipe, NEITHER, guidance_from=start) for start in ("customized", "backbone"))
    assert np.array_equal(one, other)


def test_there_are_two_places_to_start(pipe):
    with pytest.raises(ValueError, match="guidance_from is 'customized' or 'backbone', not 'base'"):
        draw(pipe, LOOK, guidance_from="base")


def test_a_pseudo_word_at_strength_zero_is_a_plain_word(pipe):
    draw(pipe, BOTH, appearance_strength=0)
    assert used(pipe) == OF_SHAPE
    draw(pipe, BOTH, appearance_strength=0, shape_strength=0)
    assert used(pipe) == PLAIN


def test_in_a_batch_each_prompt_keeps_its_own_guidance(pipe):
    prompts = [LOOK, NEITHER, SHAPE]
    together = draw(pipe, prompts)
    for expected, row in ((OF_LOOK, 0), (PLAIN, 1), (OF_SHAPE, 2)):
        assert np.allclose(together[row], draw(pipe, prompts, **asdict(expected))[row], atol=1e-5)


def test_a_large_backbone_has_diffusers_defaults():
    class Large:
        large = True

    assert default_guidance(["appearance"], Large()) == default_guidance((), Large()) == LARGE


def test_study_and_figures_use_the_same_guidance():
    listed = load_references(which="development")
    of_kind = {getattr(c, "attribute", "both"): said(c) for c in configs(listed, parts=PARTS)}
    assert of_kind == {"shape": OF_SHAPE, "appearance": OF_LOOK, "both": OF_LOOK}
    assert said(sheet([SHAPE], shape="one")) == OF_SHAPE
    assert said(sheet([BOTH], "one", "two")) == OF_LOOK
    assert said(sheet([NEITHER])) == PLAIN


def said(config: SamplingConfig | SheetConfig) -> Guidance:
    return Guidance(config.guidance_scale, config.guidance_from)
