"""The published methods as configurations of the tuning loop: each one step against the published loss."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import escd
from escd.backbone.layers import coarse_layers, encode_layers, layered, layers_of
from escd.backbone.parts import names_of
from escd.backbone.prompts import rare_word
from escd.commands import main
from escd.method.baselines import METHODS, TEMPLATES
from escd.method.config import TuningConfig
from escd.method.export import export
from escd.method.mixing import mix_layers
from escd.method.prior import prior_batches

RATE = 1e-3


def quick(method, backbone, attribute="shape", **changes):
    """The method's configuration with few class images and one step."""
    config = METHODS[method].config(attribute, backbone, steps=1)
    few = {"prior_images": 4} if config.prior_images else {}
    return replace(config, **few | changes)


def published(backbone, drawn, weights, v, prior_weight=1.0):
    """L + lambda L_prior: the mean squared error of the noise of the reference, and of the class images."""
    total = 0.0
    for k, batch in enumerate(drawn):
        text = backbone.encode_prompt(batch.prompts, {"*m": v})
        given = (batch.x_t, batch.t, text)
        noise = torch.func.functional_call(backbone.unet, weights, given).sample
        total = total + (prior_weight if k else 1.0) * torch.nn.functional.mse_loss(noise, batch.target)
    return total


def learning(backbone, part):
    parameters = dict(backbone.unet.named_parameters())
    return {
        name: parameters[name].detach().clone().requires_grad_() for name in names_of(backbone.unet, part)
    }


def require_same(ours, theirs):
    """The same gradients, in whatever order and form."""
    assert len(ours) == len(theirs)
    ours, theirs = (sorted((g.flatten() for g in each), key=_order) for each in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _order(g):
    return len(g), round(float(g.abs().sum()), 3)


def test_textual_inversion_is_the_published_loss_of_the_word_alone(backbone, one_step):
    config = quick("textual-inversion", backbone)
    drawn, gradients, learnt = one_step(config)
    v = backbone.word_embedding("shape").requires_grad_()
    loss = published(backbone, drawn, {}, v)
    assert len(drawn) == 1 and learnt.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    require_same(gradients, torch.autograd.grad(loss, [v]))
    assert learnt.delta == {}


@pytest.mark.parametrize("prior_weight", [1.0, 0.5])
def test_dreambooth_is_the_published_loss_of_the_whole_unet(backbone, one_step, prior_weight):
    config = quick("dreambooth", backbone, batch_size=2, prior_weight=prior_weight)
    drawn, gradients, learnt = one_step(config)
    assert [set(batch.prompts) for batch in drawn] == [{"a *m shape"}, {"a shape"}]
    weights = learning(backbone, "all")
    rare = backbone.word_embedding(rare_word(backbone.tokenizer))
    loss = published(backbone, drawn, weights, rare, prior_weight)
    assert learnt.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    require_same(gradients, torch.autograd.grad(loss, list(weights.values())))
    assert torch.equal(learnt.pseudo_word, rare) and learnt.delta.keys() == weights.keys()


def test_custom_diffusion_is_the_published_loss_of_keys_values_and_the_word(backbone, one_step):
    drawn, gradients, learnt = one_step(quick("custom-diffusion", backbone))
    weights = learning(backbone, "all/kv")
    assert {name.rsplit(".", 2)[-2] for name in weights} == {"to_k", "to_v"}
    assert all(".attn2." in name for name in weights)
    assert len(weights) == 2 * len(layers_of(backbone.unet))
    v = backbone.word_embedding(rare_word(backbone.tokenizer)).requires_grad_()
    loss = published(backbone, drawn, weights, v)
    assert len(drawn) == 2 and learnt.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    require_same(gradients, torch.autograd.grad(loss, [v, *weights.values()]))
    assert learnt.delta.keys() == weights.keys()


def test_class_images_are_those_of_the_untouched_backbone(backbone):
    config = quick("dreambooth", backbone, seed=5)
    latents = prior_batches(backbone, config, progress=False).views.latents
    pipe = escd.ESCDPipeline(backbone)
    pipe.set_progress_bar_config(disable=True)
    for k in range(4):
        generator = torch.Generator().manual_seed(6 + k)
        alone = pipe(config.prior_prompt, generator=generator, output_type="latent").images
        torch.testing.assert_close(latents[k : k + 1], alone, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents[0], latents[1])
    assert prior_batches(backbone, TuningConfig.of("shape"), progress=False) is None


def test_a_class_image_has_other_noise_than_the_reference(backbone, one_step):
    drawn, _, _ = one_step(quick("dreambooth", backbone, batch_size=2))
    assert not torch.equal(drawn[0].target, drawn[1].target)


# ---- P+


def encoded(backbone, v):
    return encode_layers(backbone.tokenizer, backbone.text_encoder, ["a *m shape", "*m"], {"*m": v})


def test_equal_embeddings_of_the_layers_are_plain_conditioning(backbone):
    v, count = backbone.word_embedding("star"), len(layers_of(backbone.unet))
    x_t, t = torch.randn(2, *backbone.latent_shape), torch.tensor([10, 700])
    plain = backbone.unet(x_t, t, encoded(backbone, v)).sample
    each = layered(backbone.unet)(x_t, t, encoded(backbone, v.expand(count, -1))).sample
    torch.testing.assert_close(each, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(backbone.unet(x_t, t, encoded(backbone, v)).sample, plain)  # it is left alone


def test_each_layer_reads_its_own_embedding(backbone):
    paths = layers_of(backbone.unet)
    v = torch.randn(len(paths), 32)
    seen = {}
    unet = layered(backbone.unet)
    handles = [
        module.to_k.register_forward_hook(lambda _m, inputs, _o, path=path: seen.update({path: inputs[0]}))
        for path, module in unet.named_modules()
        if path in paths
    ]
    unet(torch.randn(2, *backbone.latent_shape), torch.tensor([10, 700]), encoded(backbone, v))
    for handle in handles:
        handle.remove()
    for k, path in enumerate(paths):
        assert torch.allclose(seen[path], encoded(backbone, v[k]), atol=1e-5)


def test_the_gradient_of_each_layer_is_its_own(backbone, one_step):
    drawn, gradients, learnt = one_step(quick("p-plus", backbone))
    paths = layers_of(backbone.unet)
    assert gradients[0].shape == (len(paths), 32) == tuple(learnt.pseudo_word.shape)
    word = backbone.word_embedding("shape")
    (batch,) = drawn
    for k, path in enumerate(paths):
        # Directly: only layer k reads a conditioning that carries a gradient.
        v = word.clone().requires_grad_()
        frozen, own = (backbone.encode_prompt(batch.prompts, {"*m": w}) for w in (word, v))
        layer = backbone.unet.get_submodule(path)
        hook = layer.register_forward_pre_hook(
            lambda _m, inputs, named, own=own: (inputs, named | {"encoder_hidden_states": own}),
            with_kwargs=True,
        )
        noise = backbone.unet(batch.x_t, batch.t, frozen).sample
        hook.remove()
        (direct,) = torch.autograd.grad(torch.nn.functional.mse_loss(noise, batch.target), [v])
        assert direct.abs().max() > 0
        torch.testing.assert_close(gradients[0][k], direct, rtol=1e-3, atol=1e-6)


def test_the_coarse_layers_are_those_of_the_two_lowest_widths(backbone):
    coarse = [layers_of(backbone.unet)[k] for k in coarse_layers(backbone.unet)]
    assert {path.split(".attentions")[0] for path in coarse} == {
        "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1",
    }  # fmt: skip


def test_layers_mix_travel_and_draw(backbone, picture, tmp_path):
    shape, appearance = (
        escd.customize(picture, name, backbone, config=quick("p-plus", backbone, name), progress=False)
        for name in ("shape", "appearance")
    )
    both = mix_layers(shape, appearance, backbone)
    coarse = coarse_layers(backbone.unet)
    fine = [k for k in range(len(both.pseudo_word)) if k not in coarse]
    assert torch.equal(both.pseudo_word[coarse], shape.pseudo_word[coarse]) and fine
    assert torch.equal(both.pseudo_word[fine], appearance.pseudo_word[fine])
    loaded = escd.load_customization(both.save(tmp_path / "both.safetensors"), backbone)
    assert torch.equal(loaded.pseudo_word, both.pseudo_word) and loaded.config == both.config

    def drawn(customization):
        pipe = escd.ESCDPipeline(backbone, customization)
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 2, "output_type": "latent"}
        return pipe("a *m shape", generator=torch.Generator().manual_seed(0), **settings).images

    word = backbone.word_embedding("star")
    plain, equal = (replace(shape, pseudo_word=v) for v in (word, word.expand(len(both.pseudo_word), -1)))
    torch.testing.assert_close(drawn(plain), drawn(equal), rtol=1e-4, atol=1e-4)
    far = replace(both, pseudo_word=both.pseudo_word + torch.randn(both.pseudo_word.shape))
    assert not torch.allclose(drawn(far), drawn(both), atol=1e-3)
    with pytest.raises(ValueError, match="one prompt to the whole UNet"):
        export(shape, tmp_path / "out")
    with pytest.raises(ValueError, match="p-plus"):
        mix_layers(plain, appearance, backbone)
    pipe = escd.ESCDPipeline(backbone, shape)
    embeds, negatives = pipe.encode_prompt("a *m shape")
    pipe(prompt_embeds=embeds, negative_prompt_embeds=negatives, num_inference_steps=1, output_type="latent")
    for wrong in (embeds[:, :-1], torch.cat([embeds, embeds], 1)):  # not each layer's 16 tokens
        with pytest.raises(ValueError, match="encode_prompt"):
            pipe(prompt_embeds=wrong, negative_prompt_embeds=wrong, num_inference_steps=1)


def test_a_compiled_unet_gives_each_layer_its_own(backbone):
    compiled = torch.compile(backbone.unet, backend="eager")
    paths = [path for path, module in layered(compiled).named_modules() if module._forward_pre_hooks]
    assert paths == layers_of(backbone.unet)


# ---- presets and their call


def test_a_configuration_that_a_file_gives_back_makes_the_same_again(backbone, picture):
    learnt = escd.customize(picture, "shape", backbone, method="dreambooth", steps=0)
    again = TuningConfig(**json.loads(json.dumps(learnt.config)))
    assert again == METHODS["dreambooth"].config("shape", backbone, steps=0)


def test_muon_may_have_all_that_learns(backbone, picture):
    config = TuningConfig.of(
        "shape", "all/kv", optimizer="muon", learn_word=False, steps=2, batch_size=2, views=2, rank=None
    )
    learnt = escd.customize(picture, "shape", backbone, config=config, progress=False)
    assert any(change.abs().sum() > 0 for change in learnt.delta.values())


def test_a_method_is_called_by_its_name(backbone, picture):
    config = quick("textual-inversion", backbone)
    named = escd.customize(picture, "shape", backbone, method="textual-inversion", steps=1, progress=False)
    same = escd.customize(picture, "shape", backbone, config=config, progress=False)
    assert torch.equal(named.pseudo_word, same.pseudo_word) and named.config == same.config
    with pytest.raises(ValueError, match="known: escd, source, textual-inversion, dreambooth"):
        escd.customize(picture, "shape", backbone, method="lora")
    with pytest.raises(ValueError, match="part='decoder' contradicts the method 'custom-diffusion'"):
        escd.customize(picture, "shape", backbone, method="custom-diffusion", part="decoder")
    with pytest.raises(ValueError, match="rank=4 contradicts"):
        escd.customize(picture, "shape", backbone, method="dreambooth", rank=4)
    with pytest.raises(ValueError, match="both given"):
        escd.customize(picture, "shape", backbone, method="escd", config=config)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_leaves_out(name):
    method = METHODS[name]
    assert method.name == name and method.paper and method.leaves_out
    assert method.config("shape", learning_rate=RATE, steps=3).steps == 3


def test_our_method_and_the_sources_are_the_configurations_of_the_records():
    assert METHODS["escd"].config("shape", rank=4) == TuningConfig.of("shape", rank=4)
    assert METHODS["source"].config("appearance") == TuningConfig.of("appearance", augmentation=0.0)


def test_a_rate_for_a_word_alone_is_the_words():
    config = METHODS["textual-inversion"].config("shape", learning_rate=RATE)
    assert config.word_learning_rate == RATE


def test_templates_are_the_published_ones_that_can_be_read(backbone):
    assert [len(TEMPLATES[name]) for name in ("shape", "appearance")] == [27, 19]
    assert METHODS["p-plus"].config("shape").prompts == TEMPLATES["shape"]
    mini = METHODS["textual-inversion"].config("shape", escd.load_backbone("mini")).prompts
    assert set(mini) < set(TEMPLATES["shape"]) and "a photo of a {}" in mini
    assert not any("rendition" in prompt for prompt in mini)


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "zero"}, {"learn_word": False, "part": "none"}, {"per_layer": True},
        {"prompts": ("no word",)}, {"prior_images": 3}, {"prior_prompt": "a shape"}, {"prior_weight": -1.0},
        {"prior_images": -1},
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(changes):
    with pytest.raises(ValueError):
        TuningConfig.of("shape", **changes)


def test_the_command_line_has_the_methods(capsys, tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), "white").save(image)
    given = ["customize", str(image), "--attribute", "shape", "--output", str(tmp_path / "x.safetensors")]
    assert main([*given, "--method", "lora"]) == 2
    assert "known: escd, source" in capsys.readouterr().err
    assert main([*given, "--method", "dreambooth", "--part", "encoder"]) == 2
    assert "contradicts the method" in capsys.readouterr().err
