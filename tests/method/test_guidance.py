"""How far guidance goes, and where it starts: as it is said, or by the pseudo-words in each prompt."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BOTH

from escd import ESCDPipeline
from escd.evaluation import recipe
from escd.evaluation.configs import PARTS, SamplingConfig, StudyConfig, configs
from escd.evaluation.references import load_references
from escd.method import guidance
from escd.method.config import TuningConfig
from escd.method.customization import customized
from escd.method.guidance import LARGE_SCALE, PLAIN_SCALE, Guidance, default_guidance
from escd.method.memory import fetched
from escd.paper.sheets import SheetConfig, sheet

SHAPE, LOOK, NEITHER = "a *m shape", "a star with *a appearance", "a red star"


OF_SHAPE, OF_LOOK, PLAIN = Guidance(3.0, "backbone"), Guidance(2.0, "backbone"), Guidance(PLAIN_SCALE)
SCALES = {"backbone": {"shape": 3.0, "appearance": 2.0}, "customized": {"shape": 5.0, "appearance": 6.0}}


@pytest.fixture
def defaults(monkeypatch):
    """Defaults that differ, whatever the shipped ones are."""
    monkeypatch.setattr(guidance, "SCALES", SCALES)


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
def test_a_prompt_has_the_guidance_of_its_pseudo_words(pipe, prompt, expected, defaults):
    images = draw(pipe, prompt)
    assert used(pipe) == expected
    assert np.array_equal(images, draw(pipe, prompt, **asdict(expected)))
    other = replace(expected, guidance_scale=expected.guidance_scale + 1)
    assert not np.array_equal(images, draw(pipe, prompt, **asdict(other)))


def test_one_of_the_two_can_be_said(pipe, defaults):
    draw(pipe, LOOK, guidance_scale=7.0)
    assert used(pipe) == replace(OF_LOOK, guidance_scale=7.0)
    draw(pipe, LOOK, guidance_from="customized")
    assert used(pipe) == Guidance(6.0), "each start has its own scale"
    draw(pipe, BOTH, guidance_from="customized")
    assert used(pipe) == Guidance(5.0), "the smaller one"
    draw(pipe, NEITHER, guidance_from="backbone")
    assert used(pipe) == Guidance(PLAIN_SCALE, "backbone")


@pytest.mark.parametrize("start", ["customized", "backbone"])
def test_the_branch_without_the_prompt_is_predicted_by_the_unet_that_is_said(pipe, start, defaults):
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


def test_the_two_starts_give_other_images(pipe, defaults):
    """Otherwise the test above could not tell them apart."""
    one, other = (draw(pipe, LOOK, guidance_from=start) for start in ("customized", "backbone"))
    assert not np.allclose(one, other, atol=1e-3)


def passes(pipe: ESCDPipeline, prompt: str | list[str], **options) -> list[int]:
    """The sizes of the batches that the UNet reads."""
    sizes: list[int] = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    draw(pipe, prompt, **options)
    hook.remove()
    return sizes


def test_the_untouched_unet_runs_only_where_another_one_does(pipe, defaults):
    given = {"guidance_from": "backbone"}
    assert passes(pipe, LOOK, **given) == [1, 1] * 3
    assert passes(pipe, LOOK, guidance_from="customized") == passes(pipe, NEITHER, **given) == [2] * 3
    assert passes(pipe, LOOK, guidance_scale=1.0, **given) == [1] * 3
    assert passes(pipe, [LOOK, NEITHER], **given) == [1, 1, 2] * 3


def test_a_callback_reads_the_guidance_of_its_own_group(pipe, defaults):
    seen = []

    def look(p, _step, _t, tensors):
        seen.append(used(p))
        return tensors

    draw(pipe, [LOOK, NEITHER], callback_on_step_end=look)
    assert seen == [OF_LOOK, PLAIN] * 3
    with pytest.raises(AttributeError):
        pipe.guidance_from = "customized"


def test_an_offloaded_network_is_fetched_whole(backbone):
    """accelerate's hook looks at the first parameter alone, which the untouched UNet may have moved."""
    unet = copy.deepcopy(backbone.unet)
    unet._hf_hook = SimpleNamespace(pre_forward=lambda _unet: None, execution_device="meta")
    assert {p.device.type for p in fetched(unet).parameters()} == {"meta"}


@pytest.mark.parametrize("attribute", ["shape", "appearance"])
def test_the_defaults_are_those_of_a_trial(attribute):
    how = asdict(default_guidance([attribute]))
    default = StudyConfig(attribute, "one", "customized", TuningConfig.of(attribute), list=recipe.LIST, **how)
    assert default in [trial.config("one") for trial in recipe.trials_of(attribute)]


def test_there_are_two_places_to_start(pipe):
    with pytest.raises(ValueError, match="guidance_from is 'customized' or 'backbone', not 'base'"):
        draw(pipe, LOOK, guidance_from="base")


def test_a_pseudo_word_at_strength_zero_is_a_plain_word(pipe, defaults):
    draw(pipe, BOTH, appearance_strength=0)
    assert used(pipe) == OF_SHAPE
    draw(pipe, BOTH, appearance_strength=0, shape_strength=0)
    assert used(pipe) == PLAIN


def test_in_a_batch_each_prompt_keeps_its_own_guidance(pipe, defaults):
    prompts = [LOOK, NEITHER, SHAPE]
    together = draw(pipe, prompts)
    for expected, row in ((OF_LOOK, 0), (PLAIN, 1), (OF_SHAPE, 2)):
        assert np.allclose(together[row], draw(pipe, prompts, **asdict(expected))[row], atol=1e-5)


def test_a_large_backbone_has_diffusers_defaults():
    class Large:
        large = True

    assert default_guidance(["appearance"], Large()) == default_guidance((), Large()) == Guidance(LARGE_SCALE)


def test_study_and_figures_use_the_same_guidance(defaults):
    listed = load_references(which="development")
    of_kind = {getattr(c, "attribute", "both"): said(c) for c in configs(listed, parts=PARTS)}
    assert of_kind == {"shape": OF_SHAPE, "appearance": OF_LOOK, "both": OF_LOOK}
    assert said(sheet([SHAPE], shape="one")) == OF_SHAPE
    assert said(sheet([BOTH], "one", "two")) == OF_LOOK
    assert said(sheet([NEITHER])) == PLAIN


def said(config: SamplingConfig | SheetConfig) -> Guidance:
    return Guidance(config.guidance_scale, config.guidance_from)
