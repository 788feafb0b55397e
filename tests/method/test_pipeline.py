"""Prompts to images, with customizations at strengths."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import BOTH, assert_untouched, from_diffusers, make_backbone, make_customization, snapshot
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from escd import Attribute, ESCDPipeline

WORDS = "a shape shape with appearance appearance on a gray background"
PLAIN = "a striped red and white star on a beige background"


@pytest.fixture
def bare(backbone) -> ESCDPipeline:
    pipe = ESCDPipeline(backbone)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=BOTH, *, seed=0, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "output_type": "np"} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images


# ---- what strengths promise


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_images(pipe):
    assert np.array_equal(draw(pipe), draw(pipe))
    assert not np.allclose(draw(pipe), draw(pipe, seed=1))


def test_without_pseudo_words_it_is_the_untouched_backbone_to_the_bit(pipe, bare):
    for prompt in (PLAIN, [PLAIN, WORDS], ""):
        assert np.array_equal(draw(pipe, prompt), draw(bare, prompt))


def test_strength_zero_is_the_untouched_backbone_with_the_words_to_the_bit(pipe, bare):
    none = {"shape_strength": 0, "appearance_strength": 0.0}
    assert np.array_equal(draw(pipe, BOTH, **none), draw(bare, WORDS))
    assert not np.allclose(draw(pipe, BOTH), draw(bare, WORDS))


def test_images_equal_those_of_plain_diffusers(bare, backbone):
    modules = {name: m for name, m in backbone.components.items() if name != "image_tower"}
    plain = StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    for options in (
        {"guidance_scale": 4.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.5, "negative_prompt": "a blue circle", "height": 24, "width": 8},
    ):
        np.testing.assert_allclose(draw(bare, PLAIN, **options), draw(plain, PLAIN, **options), atol=1e-6)


def test_a_half_is_active_only_if_its_token_stands_in_the_prompt(pipe, backbone, shape):
    alone = ESCDPipeline(backbone, shape=shape)
    alone.set_progress_bar_config(disable=True)
    prompt = "a *m shape on a gray background"
    assert np.array_equal(draw(pipe, prompt), draw(alone, prompt))
    assert np.array_equal(draw(pipe, prompt), draw(pipe, prompt, appearance_strength=9.0))
    assert not np.allclose(draw(pipe, prompt), draw(pipe, prompt, shape_strength=0.5))


def test_weights_are_those_of_the_backbone_where_no_token_stands(pipe, backbone):
    before = snapshot(backbone.unet)
    untouched = []
    pipe.unet.register_forward_pre_hook(
        lambda unet, _: untouched.append(
            all(p.data_ptr() == before[name][0] for name, p in unet.named_parameters())
        )
    )
    draw(pipe, PLAIN)
    draw(pipe, BOTH, shape_strength=0, appearance_strength=0)
    assert untouched == [True] * 6
    draw(pipe, BOTH, guidance_from="customized")
    assert untouched[6:] == [False] * 3


def test_the_unet_runs_once_a_step_with_both_halves_and_both_branches_of_guidance(
    pipe, backbone, shape, appearance
):
    before = snapshot(backbone.unet)
    seen = []

    def look(unet, inputs):
        weights = dict(unet.named_parameters())
        for customization, s in ((shape, 0.5), (appearance, 2.0)):
            name = next(iter(customization.delta))
            assert torch.equal(weights[name], before[name][2] + s * customization.delta[name])
        seen.append(len(inputs[0]))

    pipe.unet.register_forward_pre_hook(look)
    draw(pipe, BOTH, shape_strength=0.5, appearance_strength=2.0, guidance_from="customized")
    assert seen == [2, 2, 2]  # three steps, each with the negative and the positive prompt in one batch


def test_images_follow_the_definition_of_strength(pipe, bare, backbone, shape, appearance):
    """The same images, from a backbone whose weights and words were changed by hand."""
    s = {"shape": 0.5, "appearance": 1.5}
    by_hand = make_backbone_like(backbone)
    for c in (shape, appearance):
        parameters = dict(by_hand.unet.named_parameters())
        for name, dw in c.delta.items():
            parameters[name].data += s[c.attribute.name] * dw
        table = by_hand.text_encoder.get_input_embeddings().weight.data
        row = by_hand.tokenizer.convert_tokens_to_ids(c.attribute.word + "</w>")
        table[row] += s[c.attribute.name] * (c.pseudo_word - table[row])
    by_hand = ESCDPipeline(by_hand)
    by_hand.set_progress_bar_config(disable=True)
    prompt, words = "a *m on a *a background", "a shape on a appearance background"
    strengths = {f"{name}_strength": value for name, value in s.items()}
    images = draw(pipe, prompt, guidance_scale=4.0, guidance_from="customized", **strengths)
    np.testing.assert_allclose(images, draw(by_hand, words, guidance_scale=4.0), atol=1e-5)


def make_backbone_like(backbone):
    import copy

    return copy.deepcopy(backbone)


# ---- the caller's backbone


def test_the_backbone_is_never_changed(pipe, backbone):
    before = snapshot(backbone.unet)
    scheduler = backbone.scheduler
    timesteps = scheduler.timesteps.clone()

    def dies(_pipe, step, _t, _tensors):
        assert_untouched(backbone.unet, before)  # not for a moment
        if step == 1:
            raise KeyboardInterrupt

    draw(pipe)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=dies)
    assert_untouched(backbone.unet, before)
    assert backbone.scheduler is scheduler and torch.equal(scheduler.timesteps, timesteps)
    assert np.array_equal(draw(pipe), draw(pipe))


# ---- batches


def test_a_mixed_batch_is_each_prompt_by_itself(pipe):
    prompts = [BOTH, PLAIN, "a *m shape", BOTH]
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    mixed = draw(pipe, prompts, latents=noise, num_images_per_prompt=2)
    assert mixed.shape == (8, 16, 16, 3)
    for i, prompt in enumerate(prompts):
        alone = draw(pipe, prompt, latents=noise[2 * i : 2 * i + 2], num_images_per_prompt=2)
        np.testing.assert_allclose(mixed[2 * i : 2 * i + 2], alone, atol=1e-5)


def test_generators_one_for_each_image(pipe):
    seeds = [5, 6, 7]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    together = pipe(
        BOTH, num_images_per_prompt=3, generator=generators, num_inference_steps=3, output_type="np"
    ).images
    for seed, image in zip(seeds, together, strict=True):
        np.testing.assert_allclose(image, draw(pipe, BOTH, seed=seed)[0], atol=1e-5)


def test_a_negative_prompt_for_each_prompt(pipe):
    a = draw(pipe, [PLAIN, PLAIN], negative_prompt=["a blue circle", ""], latents=torch.ones(2, 4, 8, 8))
    b = draw(pipe, [PLAIN, PLAIN], negative_prompt="a blue circle", latents=torch.ones(2, 4, 8, 8))
    assert np.array_equal(a[0], b[0]) and not np.allclose(a[1], b[1])


def test_pseudo_words_in_a_negative_prompt_do_not_change_weights(pipe, bare, backbone):
    before, seen = snapshot(backbone.unet), []
    pipe.unet.register_forward_pre_hook(lambda unet, _: seen.append(assert_untouched(unet, before)))
    images = draw(pipe, PLAIN, negative_prompt="a *m")
    assert len(seen) == 3
    assert not np.allclose(images, draw(bare, PLAIN, negative_prompt="a shape"))


# ---- further attributes


def test_further_attributes(backbone, shape, appearance):
    texture = make_customization(backbone, Attribute("texture", "texture", "*t", "up.2"), seed=9)
    pipe = ESCDPipeline(backbone, shape=shape, appearance=appearance, attributes=[texture])
    pipe.set_progress_bar_config(disable=True)
    prompt = "a *m shape with *t texture"
    half = draw(pipe, prompt, strengths={"texture": 0.5})
    assert not np.allclose(half, draw(pipe, prompt))
    word = draw(pipe, prompt, strengths={"texture": 0})
    assert np.array_equal(word, draw(pipe, "a *m shape with texture texture"))


# ---- the rest of a pipeline


def test_output_types(pipe):
    images = draw(pipe, output_type="pil")
    assert isinstance(images[0], Image.Image) and images[0].size == (16, 16)
    as_pt, as_np = draw(pipe, output_type="pt"), draw(pipe)
    assert as_pt.shape == (1, 3, 16, 16) and as_np.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(as_pt.permute(0, 2, 3, 1).numpy(), as_np)
    latents = draw(pipe, output_type="latent")
    assert latents.shape == (1, 4, 8, 8)
    (images,) = pipe(BOTH, num_inference_steps=1, return_dict=False)
    assert len(images) == 1


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(pipe, caplog):
    images = draw(pipe, "a red star on a blue circle " * 2 + "and a green heart")
    assert np.array_equal(images, draw(pipe, "a red star on a blue circle " * 2))
    assert "cut off: 'and a green heart'" in caplog.text


def test_height_and_width(pipe):
    assert draw(pipe, height=24, width=32).shape == (1, 24, 32, 3)


def test_callbacks_see_and_change_each_step(pipe):
    seen = []

    def keep(p, step, t, tensors):
        assert p is pipe and set(tensors) == {"latents", "negative_prompt_embeds"}
        seen.append((step, int(t)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = draw(
        pipe,
        output_type="latent",
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "negative_prompt_embeds"],
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert [t for _, t in seen] == pipe.scheduler.timesteps.tolist()
    assert not latents.any()


def test_interrupting(pipe):
    steps = []

    def stop(p, step, _t, _tensors):
        steps.append(step)
        p.interrupt = step == 1

    assert draw(pipe, callback_on_step_end=stop, num_inference_steps=9).shape == (1, 16, 16, 3)
    assert steps == [0, 1]
    steps.clear()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"latents": noise, "num_inference_steps": 9, "output_type": "latent"}
    halted = draw(pipe, [BOTH, PLAIN], callback_on_step_end=stop, **options)
    assert steps == [0, 0, 1, 1]  # step by step in both groups: none of them is start noise
    for i, prompt in enumerate([BOTH, PLAIN]):
        alone = draw(pipe, prompt, callback_on_step_end=stop, **options | {"latents": noise[i : i + 1]})
        torch.testing.assert_close(halted[i : i + 1], alone, rtol=0, atol=1e-5)


def test_the_progress_bar_counts_all_steps(backbone, shape, capsys):
    pipe = ESCDPipeline(backbone, shape=shape)
    pipe.set_progress_bar_config(desc="drawing", ascii=True)
    draw(pipe, [PLAIN, "a *m shape"])
    assert "6/6" in capsys.readouterr().err


@from_diffusers
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers(pipe, kind):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    assert np.array_equal(draw(pipe), draw(pipe))
    assert not np.allclose(draw(pipe), draw(pipe, shape_strength=0))


def test_components(pipe, backbone):
    assert set(pipe.components) == {"vae", "text_encoder", "tokenizer", "unet", "scheduler", "image_tower"}
    modules = {k: m for k, m in pipe.components.items() if k not in ("image_tower",)}
    StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    for name in ("unet", "vae", "text_encoder", "image_tower"):
        mine, theirs = getattr(pipe, name), getattr(backbone, name)
        assert mine is not theirs
        tensors = zip(mine.parameters(), theirs.parameters(), strict=True)
        assert all(p is not q and p.data_ptr() == q.data_ptr() for p, q in tensors)


def test_to_moves_the_pipeline_and_leaves_the_backbone(pipe, backbone):
    assert pipe.to("cpu") is pipe and pipe.device == torch.device("cpu")
    images, before = draw(pipe), snapshot(backbone.unet)
    pipe.to(torch.float64)
    assert pipe.dtype == torch.float64
    assert {m.dtype for m in backbone.modules.values()} == {torch.float32}
    np.testing.assert_allclose(draw(pipe, latents=torch.ones(1, 4, 8, 8)).std(), images.std(), rtol=0.5)
    pipe.to(device="cpu", dtype=torch.float32)
    assert np.array_equal(draw(pipe), images)
    assert_untouched(backbone.unet, before)


def test_moving_leaves_mixed_dtypes_alone(pipe):
    pipe.vae.to(torch.float64)
    pipe.to("cpu")
    assert (pipe.vae.dtype, pipe.unet.dtype, pipe.text_encoder.dtype) == (torch.float64, *[torch.float32] * 2)
    assert draw(pipe).shape == (1, 16, 16, 3)


def test_cpu_offload(pipe, backbone):
    images, before = draw(pipe), snapshot(backbone.unet)
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks work on any device
    assert all(hasattr(m, "_hf_hook") for m in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.image_tower))
    assert np.array_equal(draw(pipe), images)
    assert np.array_equal(draw(pipe), images)
    for name, p in backbone.unet.named_parameters():
        assert torch.equal(p, before[name][2])
    assert backbone.encode_images(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 8, 8)
    pipe.remove_all_hooks()
    assert np.array_equal(draw(pipe), images)


def test_other_ways_of_offloading_are_refused(pipe):
    for offload in (pipe.enable_sequential_cpu_offload, pipe.enable_group_offload):
        with pytest.raises(NotImplementedError, match="use enable_model_cpu_offload"):
            offload(device="cpu")


@from_diffusers
def test_saving_and_loading_gives_the_same_images(backbone, shape, appearance, tmp_path):
    texture = make_customization(backbone, Attribute("texture", "texture", "*t", "up.2"), seed=9)
    pipe = ESCDPipeline(backbone, shape=shape, appearance=appearance, attributes=[texture])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    again = ESCDPipeline.from_pretrained(tmp_path, device="cpu")
    again.set_progress_bar_config(disable=True)
    assert list(again.customizations) == ["*m", "*a", "*t"]
    assert type(again.scheduler) is DPMSolverMultistepScheduler
    for prompt in (BOTH, PLAIN, "a *m shape with *t texture"):
        assert np.array_equal(draw(again, prompt), draw(pipe, prompt))
    assert np.array_equal(
        draw(ESCDPipeline.from_pretrained(tmp_path, device="cpu"), PLAIN),
        draw(StableDiffusionPipeline.from_pretrained(tmp_path), PLAIN, guidance_scale=4.0),
    )


def test_a_folder_without_customizations(tiny_folder, bare, tmp_path):
    again = ESCDPipeline.from_pretrained(tiny_folder, device="cpu")
    assert not again.customizations
    assert np.array_equal(draw(again, PLAIN), draw(bare, PLAIN))


def test_saving_again_leaves_no_old_customization(pipe, bare, tmp_path):
    pipe.save_pretrained(tmp_path)
    bare.save_pretrained(tmp_path)
    assert not ESCDPipeline.from_pretrained(tmp_path, device="cpu").customizations


def test_a_strangers_folder_names_its_own_files_and_a_scheduler(backbone, shape, tmp_path):
    ESCDPipeline(backbone, shape=shape).save_pretrained(tmp_path / "sd")
    shape.save(tmp_path / "outside.safetensors")
    listed, index = tmp_path / "sd/customizations/index.json", tmp_path / "sd/model_index.json"
    kept = listed.read_text()
    for name in ("../../outside", str(tmp_path / "outside")):
        listed.write_text(json.dumps([name]))
        with pytest.raises(ValueError, match=r"index\.json lists names of attributes"):
            ESCDPipeline.from_pretrained(tmp_path / "sd", device="cpu")
    listed.write_text(kept)
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "AutoencoderKL"]})
    )
    with pytest.raises(ValueError, match=r"model_index\.json: scheduler must name"):
        ESCDPipeline.from_pretrained(tmp_path / "sd", device="cpu")


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 on, not 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"shape_strength": -0.1}, r"strength of shape must be a number from 0 on, not -0\.1"),
        ({"appearance_strength": float("nan")}, "strength of appearance"),
        ({"appearance_strength": "1"}, "strength of appearance"),
        ({"strengths": {"texture": 1.0}}, "no attribute 'texture'; further ones loaded: none"),
        ({"strengths": {"shape": 1.0}}, "no attribute 'shape'"),
        ({"height": 15}, "height must be a multiple of 2 px, not 15"),
        ({"width": 2**70}, "width must be at most 16384"),
        ({"num_images_per_prompt": 2**70}, "num_images_per_prompt must be at most 16384"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a number from 0 on"),
        ({"strengths": 3}, "strengths maps names of attributes to numbers, and is not 3"),
        ({"width": 0}, "width must be"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"output_type": "jpg"}, "unknown output_type 'jpg'; known: pil"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, "latents are"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "unknown tensors"),
        ({"prompt": "a *x"}, r"'\*x', but no customization"),
        ({"prompt": "a *man"}, r"'\*man'"),
        ({"prompt": "*m*a"}, "must stand alone"),
        ({"negative_prompt": "a *x"}, r"'\*x', but no customization"),
        ({"prompt": []}, "no prompt"),
    ],
)
def test_bad_input_is_refused_before_any_work(pipe, backbone, options, message):
    hooks = [
        m.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
        for m in (pipe.unet, pipe.text_encoder)
    ]
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"prompt": BOTH} | options)
    for hook in hooks:
        hook.remove()


def test_a_pseudo_word_nobody_loaded(bare):
    with pytest.raises(
        ValueError, match=r"'\*m', but no customization that brings it is loaded \(loaded: none\)"
    ):
        bare("a *m shape")


@pytest.mark.parametrize("prompt", [3, None, [PLAIN, 3]])
def test_prompts_are_strings(pipe, prompt):
    with pytest.raises(TypeError):
        pipe(prompt)


def test_customizations_that_do_not_belong(backbone, shape, appearance, tmp_path):
    with pytest.raises(ValueError, match="shape= was given a customization of appearance"):
        ESCDPipeline(backbone, shape=appearance)
    with pytest.raises(ValueError, match="two customizations are called shape"):
        ESCDPipeline(backbone, shape=shape, attributes=[shape])
    other = make_customization(backbone, Attribute("outline", "shape", "*m", "encoder"))
    with pytest.raises(ValueError, match=r"share \*m"):
        ESCDPipeline(backbone, shape=shape, attributes=[other])
    with pytest.raises(ValueError, match="customized on the backbone tiny"):
        ESCDPipeline(make_backbone(tmp_path, seed=1), shape=shape)
    with pytest.raises(TypeError, match="a customization is needed, not str"):
        ESCDPipeline(backbone, shape="horse.safetensors")
    with pytest.raises(TypeError, match="load_backbone returns, not str"):
        ESCDPipeline("mini")
