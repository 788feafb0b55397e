"""What diffusers' users rely on: the cases of diffusers' own `PipelineTesterMixin` and its companions.

Held elsewhere, in test_pipeline.py: save_load_local, inference_batch_consistent and
inference_batch_single_identical (a mixed batch), dict_tuple_outputs_equivalent (output types), to_dtype,
model_cpu_offload_forward_pass and cpu_offload_forward_pass_twice.

Left out, and why:
- components_function: the pipeline is made from a backbone, which brings the components.
- save_load_optional_components: no component is optional.
- serialization_with_variants, loading_with_variants: which variant a folder has is found out.
- sequential_cpu_offload..., group_offloading..., layerwise_casting_inference: refused, or not this pipeline's
  (weights that are elsewhere, or in another form, cannot be customized).
- float16_inference, save_load_float16, to_device, xformers, pipeline_with_accelerator_device_map: these need
  a GPU; precisions are tested on the CPU below.
- save_load_dduf, push_to_hub: a folder is the one format.
- ip_adapter..., pyramid_attention_broadcast..., faster_cache...: adapters of other methods.
- from_pipe...: this pipeline needs a backbone; making another pipeline from its components is tested below.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from conftest import BOTH, assert_untouched, from_diffusers, make_customization, snapshot
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from escd import ESCDPipeline
from escd.backbone.prompts import copy_of
from escd.backbone.skeleton import own

PLAIN = "a red star on a blue circle"


@pytest.fixture
def plain(backbone) -> StableDiffusionPipeline:
    """diffusers' own pipeline of the same modules."""
    networks = {name: own(getattr(backbone, name)) for name in ("unet", "vae", "text_encoder")}
    modules = networks | {"tokenizer": copy_of(backbone.tokenizer), "scheduler": backbone.scheduler}
    plain = StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    plain.set_progress_bar_config(disable=True)
    return plain


@pytest.fixture(autouse=True)
def backbone_stays_as_it_is(backbone):
    parts = [backbone.unet, backbone.text_encoder, backbone.vae]
    before, words = [snapshot(part) for part in parts], len(backbone.tokenizer)
    yield
    for part, was in zip(parts, before, strict=True):
        assert_untouched(part, was)
    assert len(backbone.tokenizer) == words


def draw(pipe, prompt=PLAIN, *, seed=0, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"} | options
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images


def close(a, b, atol=1e-5) -> bool:
    return np.allclose(a, b, atol=atol, rtol=0)


# ---- the signature, callbacks and what they read


def test_pipeline_call_signature(pipe):
    parameters = inspect.signature(pipe.__call__).parameters
    for name in (
        "prompt", "height", "width", "guidance_scale", "negative_prompt", "prompt_embeds", "clip_skip",
        "negative_prompt_embeds", "num_images_per_prompt", "generator", "latents", "output_type",
        "callback_on_step_end", "callback_on_step_end_tensor_inputs", "guidance_rescale", "return_dict",
        "num_inference_steps",
    ):  # fmt: skip
        assert name in parameters
    optional = set(parameters) - {"prompt"}
    assert all(parameters[name].default is not inspect.Parameter.empty for name in optional)


def test_callback_inputs(pipe):
    def all_inputs(p, _i, _t, tensors):
        assert set(tensors) == set(p._callback_tensor_inputs)
        return tensors

    def last_latents_to_zero(p, i, _t, tensors):
        if i == p.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    every = {"callback_on_step_end_tensor_inputs": pipe._callback_tensor_inputs, "output_type": "latent"}
    draw(pipe, BOTH, callback_on_step_end=all_inputs, **every)
    assert not draw(pipe, BOTH, callback_on_step_end=last_latents_to_zero, **every).any()


def test_callback_cfg(pipe):
    def more_guidance(p, _i, _t, tensors):
        p._guidance_scale += 1.0
        return tensors

    images = draw(pipe, callback_on_step_end=more_guidance, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps and pipe.do_classifier_free_guidance
    assert not close(images, draw(pipe, guidance_scale=2.0))
    with pytest.raises(ValueError, match="guidance was turned on by a callback"):
        draw(pipe, callback_on_step_end=more_guidance, guidance_scale=1.0)


@pytest.mark.parametrize("callback", [SDCFGCutoffCallback, SDXLCFGCutoffCallback])
def test_official_callbacks(pipe, plain, callback):
    cutoff = callback(cutoff_step_ratio=None, cutoff_step_index=0)
    wanted = draw(plain, callback_on_step_end=SDCFGCutoffCallback(None, 0))
    assert close(draw(pipe, callback_on_step_end=cutoff), wanted)
    assert close(draw(pipe, callback_on_step_end=MultiPipelineCallbacks([cutoff])), wanted)
    assert pipe.guidance_scale == 0 and pipe.num_timesteps == 3
    # In a batch that mixes pseudo-words every group has guidance up to the cutoff, and its own prompts after.
    prompts, noise = [BOTH, PLAIN, "a green star"], torch.randn(3, 4, 8, 8)
    batch = draw(pipe, prompts, latents=noise, callback_on_step_end=cutoff)
    for i, prompt in enumerate(prompts):
        assert close(batch[i], draw(pipe, prompt, latents=noise[i : i + 1], callback_on_step_end=cutoff)[0])


def test_a_callback_that_loses_rows_is_refused(pipe):
    def lose(_p, _i, _t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"][:1]}

    with pytest.raises(ValueError, match="gave back prompt_embeds of 1 pictures; there are 2"):
        draw(
            pipe, [PLAIN, "a star"], callback_on_step_end=lose,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )  # fmt: skip


def test_interrupt(pipe, plain):
    def stop(p, i, _t, tensors):
        p._interrupt = i == 1
        return tensors

    options = {"num_inference_steps": 5, "callback_on_step_end": stop}
    assert close(draw(pipe, **options), draw(plain, **options))


# ---- guidance, prompts and their embeddings


def test_cfg(pipe, plain):
    for scale in (1.0, 7.5):
        assert close(draw(pipe, guidance_scale=scale), draw(plain, guidance_scale=scale))


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_guidance_rescale(pipe, plain, phi):
    images = draw(pipe, guidance_rescale=phi, guidance_scale=9.0)
    assert close(images, draw(plain, guidance_rescale=phi, guidance_scale=9.0))
    assert np.array_equal(images, draw(pipe, guidance_scale=9.0)) == (phi == 0)
    assert pipe.guidance_rescale == 0.0  # of the last call


@pytest.mark.parametrize("skip", [None, 0, 1])
def test_clip_skip(pipe, backbone, skip):
    encoder = own(backbone.text_encoder)
    inner = getattr(encoder, "text_model", encoder)  # as transformers 4 has it
    states = encoder(backbone.token_ids([PLAIN]), output_hidden_states=True).hidden_states
    wanted = inner.final_layer_norm(states[-(skip or 0) - 1])  # what diffusers makes of it
    assert torch.equal(pipe.encode_prompt(PLAIN, clip_skip=skip)[0], wanted)
    images = draw(pipe, clip_skip=skip)
    assert pipe.clip_skip == skip
    assert np.array_equal(images, draw(pipe)) == (not skip)


@pytest.mark.parametrize("prompt", [PLAIN, BOTH])
def test_encode_prompt_works_in_isolation(pipe, prompt):
    embeds, negative = pipe.encode_prompt(prompt, negative_prompt="a blue circle", shape_strength=0.5)
    strengths = {"shape_strength": 0.5 if prompt == BOTH else 0, "appearance_strength": float(prompt == BOTH)}
    wanted = draw(pipe, prompt, negative_prompt="a blue circle", shape_strength=0.5)
    assert np.array_equal(
        wanted, draw(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative, **strengths)
    )
    mixed = draw(pipe, None, prompt_embeds=embeds, negative_prompt="a blue circle", **strengths)
    assert np.array_equal(wanted, mixed)


def test_prompts_beyond_the_text_encoders_length_through_prompt_embeds(pipe, plain):
    parts = ["a red star on a blue circle", "a green heart with striped background"]
    long = torch.cat([pipe.encode_prompt(part)[0] for part in parts], 1)
    assert long.shape[1] == 2 * pipe.tokenizer.model_max_length
    empty = pipe.encode_prompt("")[0].repeat(1, 2, 1)
    images = draw(pipe, None, prompt_embeds=long, shape_strength=0, appearance_strength=0)
    assert close(images, draw(plain, None, prompt_embeds=long, negative_prompt_embeds=empty))
    assert not close(images, draw(plain, parts[0]))
    uneven = draw(pipe, None, prompt_embeds=long[:, :20], num_images_per_prompt=2)
    assert uneven.shape == (2, 16, 16, 3)


def test_weighted_prompts_through_prompt_embeds(pipe):
    e, empty = pipe.encode_prompt(BOTH)
    weighted = [draw(pipe, None, prompt_embeds=empty + w * (e - empty)) for w in (1.0, 1.5)]
    assert close(weighted[0], draw(pipe, BOTH), atol=1e-4) and not close(*weighted)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 16, 32), "prompt": PLAIN}, ValueError, "both given"),
        ({"negative_prompt_embeds": torch.zeros(1, 16, 32), "negative_prompt": "a"}, ValueError, "both"),
        ({"prompt": None}, TypeError, "a prompt is a string, not NoneType"),
        ({"prompt_embeds": [[1.0]], "prompt": None}, TypeError, "prompt_embeds is a tensor, not list"),
        ({"prompt_embeds": torch.zeros(1, 16, 31), "prompt": None}, ValueError, r"\(B, L, 32\) are needed"),
        ({"prompt_embeds": torch.zeros(16, 32), "prompt": None}, ValueError, r"\(B, L, 32\) are needed"),
        ({"negative_prompt_embeds": torch.zeros(2, 16, 32)}, ValueError, "2 negative_prompt_embeds for 1"),
        ({"clip_skip": 2}, ValueError, "clip_skip is a whole number from 0 to 1, not 2"),
        ({"clip_skip": 0.5}, ValueError, "clip_skip"),
        ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale is a share between 0 and 1, not 1.5"),
        ({"generator": 3}, TypeError, "generator is a torch.Generator .* not int"),
        ({"generator": [3]}, TypeError, "not int"),
        ({"generator": [None]}, TypeError, "not NoneType"),
    ],
)
def test_bad_input(pipe, options, error, message):
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PLAIN} | options)


@pytest.mark.parametrize(
    "options", [{"shape_strength": 1e20}, {"guidance_scale": 1e30}, {"appearance_strength": 1e20}]
)
@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_images_that_are_not_finite_are_an_error(pipe, options, output_type):
    with pytest.raises(FloatingPointError, match=r"not finite.*Take smaller values \(strength of shape"):
        draw(pipe, BOTH, output_type=output_type, **options)


def test_num_images_per_prompt(pipe):
    for prompts in (PLAIN, [BOTH, PLAIN]):
        count = 2 if isinstance(prompts, list) else 1
        assert len(draw(pipe, prompts, num_images_per_prompt=3)) == 3 * count


# ---- switches of the modules, which stay in the pipeline


def test_stable_diffusion_mixin_component(pipe):
    for name in ("enable_vae_slicing", "enable_vae_tiling", "enable_freeu", "fuse_qkv_projections"):
        assert callable(getattr(pipe, name))


def test_vae_slicing(pipe):
    images = draw(pipe, [PLAIN] * 4)
    pipe.enable_vae_slicing()
    assert close(images, draw(pipe, [PLAIN] * 4))


def test_vae_tiling(pipe, backbone):
    images = draw(pipe, height=64, width=48)
    pipe.enable_vae_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 16, 32
    tiled = draw(pipe, height=64, width=48)
    assert pipe.vae.use_tiling and not backbone.vae.use_tiling
    assert close(images, tiled, atol=0.5) and not np.array_equal(images, tiled)


def test_freeu(pipe, backbone):
    other = ESCDPipeline(backbone)
    other.set_progress_bar_config(disable=True)
    images, theirs = draw(pipe, BOTH), draw(other)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not close(images, draw(pipe, BOTH))
    assert np.array_equal(theirs, draw(other))
    pipe.disable_freeu()
    assert np.array_equal(images, draw(pipe, BOTH))


def test_fused_qkv_projections(pipe):
    images = draw(pipe, BOTH)
    pipe.fuse_qkv_projections()
    assert all(type(p).__name__.startswith("Fused") for p in pipe.unet.attn_processors.values())
    assert close(images, draw(pipe, BOTH), atol=1e-2)  # with the customizations' weights, not the backbone's
    pipe.unfuse_qkv_projections()
    assert np.array_equal(images, draw(pipe, BOTH))


def test_attention_slicing_forward_pass(pipe):
    images = draw(pipe, BOTH)
    pipe.enable_attention_slicing(slice_size=1)
    assert close(images, draw(pipe, BOTH), atol=1e-3)


def test_an_instances_own_forward_runs_the_weights_of_the_call(pipe):
    images = draw(pipe, BOTH)
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")
    assert close(images, draw(pipe, BOTH))


@from_diffusers
@pytest.mark.parametrize(
    "kind",
    [DPMSolverMultistepScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler, UniPCMultistepScheduler],
)
def test_karras_schedulers(pipe, plain, kind):
    for each in (pipe, plain):
        each.scheduler = kind.from_config(each.scheduler.config)
    assert close(draw(pipe, num_inference_steps=5), draw(plain, num_inference_steps=5), atol=1e-4)


# ---- adapters beside the customizations


@pytest.fixture
def lora(plain, tmp_path):
    """A LoRA of the UNet's attention, as diffusers writes it."""
    plain.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(plain.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=weights)
    plain.unet.delete_adapters("default")
    return tmp_path


def test_lora_beside_customizations(pipe, plain, backbone, shape, appearance, lora):
    other = ESCDPipeline(backbone, shape=shape, appearance=appearance)
    other.set_progress_bar_config(disable=True)
    before = draw(pipe, BOTH)
    for each in (pipe, plain):
        each.load_lora_weights(lora, adapter_name="style")
    assert close(draw(pipe), draw(plain)) and not close(draw(pipe), draw(other))
    with_lora = draw(pipe, BOTH)
    assert not close(with_lora, before)
    assert not close(with_lora, draw(pipe, BOTH, shape_strength=0))  # the customization is still there
    assert np.array_equal(draw(other, BOTH), before)
    pipe.set_adapters("style", 0.0)
    assert close(draw(pipe, BOTH), before)
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    assert close(draw(pipe, BOTH), with_lora, atol=1e-4)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert close(draw(pipe, BOTH), before, atol=1e-4)


def test_textual_inversion_beside_customizations(pipe, plain, backbone, tmp_path):
    words = {"<cat>": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}
    save_file(words, tmp_path / "cat.safetensors")
    before = draw(pipe, BOTH)
    for each in (pipe, plain):
        each.load_textual_inversion(tmp_path / "cat.safetensors")
    prompt = "a <cat> star"
    assert close(draw(pipe, prompt), draw(plain, prompt))
    assert not close(draw(pipe, prompt), draw(pipe, "a star"))
    assert not close(draw(pipe, "a *m shape and <cat>"), draw(pipe, "a *m shape and"))
    assert np.array_equal(draw(pipe, BOTH), before)
    pipe.unload_textual_inversion()
    assert np.array_equal(draw(pipe, BOTH), before)


def test_a_textual_inversion_of_a_loaded_pseudo_word_is_refused(pipe, tmp_path):
    save_file({"*m": torch.zeros(1, 32)}, tmp_path / "m.safetensors")
    before = draw(pipe, BOTH)
    with pytest.raises(ValueError, match=r"'\*m' is a customization's pseudo-word"):
        pipe.load_textual_inversion(tmp_path / "m.safetensors")
    assert np.array_equal(draw(pipe, BOTH), before)


# ---- precisions and storing


def test_save_load_in_another_precision(pipe, tmp_path):
    pipe.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    again = ESCDPipeline.from_pretrained(tmp_path, device="cpu", torch_dtype=torch.bfloat16)
    again.set_progress_bar_config(disable=True)
    assert again.dtype == torch.bfloat16
    assert np.array_equal(draw(again, BOTH), draw(pipe, BOTH))
    with pytest.raises(ValueError, match="dtype= and torch_dtype="):
        ESCDPipeline.from_pretrained(tmp_path, dtype=torch.float32, torch_dtype=torch.float16)


def test_torch_dtype_dict(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    mixed = ESCDPipeline.from_pretrained(
        tmp_path, device="cpu", torch_dtype={"unet": torch.bfloat16, "default": torch.float32}
    )
    mixed.set_progress_bar_config(disable=True)
    assert (mixed.unet.dtype, mixed.vae.dtype, mixed.text_encoder.dtype) == (
        torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip
    assert draw(mixed, BOTH).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="no component 'unett'"):
        ESCDPipeline.from_pretrained(tmp_path, device="cpu", torch_dtype={"unett": torch.bfloat16})


def test_an_exchanged_module_is_used_and_saved(pipe, backbone, tmp_path):
    images = draw(pipe)
    pipe.vae = own(backbone.vae)
    pipe.vae.decoder.conv_out.bias.data = pipe.vae.decoder.conv_out.bias.data + 0.5
    brighter = draw(pipe)
    assert brighter.mean() > images.mean() + 0.1
    pipe.save_pretrained(tmp_path)
    again = ESCDPipeline.from_pretrained(tmp_path, device="cpu")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(again), brighter)


def test_another_pipeline_from_its_components(pipe):
    modules = {name: module for name, module in pipe.components.items() if name != "image_tower"}
    modules["scheduler"] = DDIMScheduler.from_config(pipe.scheduler.config)
    other = StableDiffusionPipeline(
        **modules, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    assert close(draw(other), draw(pipe))


def test_a_customization_of_one_part_leaves_the_others_weights_shared(backbone):
    pipe = ESCDPipeline(backbone, shape=make_customization(backbone, "shape"))
    pipe.set_progress_bar_config(disable=True)
    own_weights = {name: p.data_ptr() for name, p in backbone.unet.named_parameters()}
    shared = []

    def look(unet, _inputs):
        shared.append({n for n, p in unet.named_parameters() if p.data_ptr() == own_weights[n]})

    pipe.unet.register_forward_pre_hook(look)
    draw(pipe, "a *m shape", guidance_from="customized")
    assert shared[0] == set(own_weights) - set(pipe.customizations["*m"].delta)
