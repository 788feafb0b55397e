"""How far guidance goes where nothing is said: by the pseudo-words in each prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import BOTH

from escd import ESCDPipeline
from escd.evaluation.configs import PARTS, configs
from escd.evaluation.references import load_references
from escd.method import guidance
from escd.method.guidance import LARGE_SCALE, PLAIN_SCALE, default_scale
from escd.paper.sheets import sheet

SHAPE, LOOK, PLAIN = "a *m shape", "a star with *a appearance", "a red star"


@pytest.fixture(autouse=True)
def scales(monkeypatch):
    """Scales that differ, whatever the shipped ones are."""
    monkeypatch.setattr(guidance, "SCALES", {"shape": 3.0, "appearance": 2.0})


def draw(pipe: ESCDPipeline, prompt: str | list[str], **options) -> np.ndarray:
    count = len(prompt) if isinstance(prompt, list) else 1
    noise = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return pipe(prompt, num_inference_steps=3, output_type="np", generator=noise, **options).images


@pytest.mark.parametrize(("prompt", "scale"), [(PLAIN, PLAIN_SCALE), (SHAPE, 3.0), (LOOK, 2.0), (BOTH, 2.0)])
def test_a_prompt_has_the_scale_of_its_pseudo_words(pipe, prompt, scale):
    images = draw(pipe, prompt)
    assert pipe.guidance_scale == scale
    assert np.array_equal(images, draw(pipe, prompt, guidance_scale=scale))
    assert not np.array_equal(images, draw(pipe, prompt, guidance_scale=scale + 1))


def test_a_pseudo_word_at_strength_zero_is_a_plain_word(pipe):
    draw(pipe, BOTH, appearance_strength=0)
    assert pipe.guidance_scale == 3.0
    draw(pipe, BOTH, appearance_strength=0, shape_strength=0)
    assert pipe.guidance_scale == PLAIN_SCALE


def test_in_a_batch_each_prompt_keeps_its_own_scale(pipe):
    prompts = [LOOK, PLAIN, SHAPE]
    together = draw(pipe, prompts)
    for scale, row in ((2.0, 0), (PLAIN_SCALE, 1), (3.0, 2)):
        assert np.allclose(together[row], draw(pipe, prompts, guidance_scale=scale)[row], atol=1e-5)


def test_a_large_backbone_has_diffusers_default():
    class Large:
        large = True

    assert default_scale(["appearance"], Large()) == default_scale((), Large()) == LARGE_SCALE


def test_study_and_figures_use_the_same_scales():
    listed = load_references(which="development")
    of_kind = {getattr(c, "attribute", "both"): c.guidance_scale for c in configs(listed, parts=PARTS)}
    assert of_kind == {"shape": 3.0, "appearance": 2.0, "both": 2.0}
    assert sheet([SHAPE], shape="one").guidance_scale == 3.0
    assert sheet([BOTH], "one", "two").guidance_scale == 2.0
    assert sheet([PLAIN]).guidance_scale == PLAIN_SCALE
