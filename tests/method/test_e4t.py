"""E4T: one step against the published loss, the encoder that reads at each sampling step, and its files."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import escd
from escd.backbone.folder import save_backbone
from escd.backbone.halves import down_path
from escd.backbone.parts import names_of, parameters_of
from escd.commands import main
from escd.method import e4t as module
from escd.method.baselines import METHODS
from escd.method.config import TuningConfig
from escd.method.cost import tuning_cost
from escd.method.e4t import E4T, LatentEncoder, offset_shapes
from escd.method.export import export
from escd.method.low_rank import low_rank

STEPS = 3


def pretrain(backbone, seed=0):
    """Give a backbone an encoder and offsets of random weights, in place of pretrained ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone.e4t = E4T.for_backbone(backbone, hidden=8)
        torch.nn.init.normal_(backbone.e4t.encoder.final.weight, std=20.0)
        for offset in backbone.e4t.offsets.values():
            torch.nn.init.normal_(offset.row.weight, std=3.0)
    backbone.e4t.requires_grad_(False)
    return backbone


@pytest.fixture
def ready(backbone):
    return pretrain(backbone)


@pytest.fixture
def learnt(ready, picture):
    """A shape after two steps."""
    return escd.customize(picture, "shape", ready, method="e4t", steps=2, progress=False)


def pipeline(backbone, *customizations):
    pipe = escd.ESCDPipeline(backbone, attributes=customizations)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt="a *m", **given):
    settings = {"num_inference_steps": STEPS, "output_type": "latent"} | given
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images


# ---- written out


def offset_of(own):
    row = own.row.weight[:, 0] * own.constant + own.row.bias
    column = own.column.weight[:, 0] * own.constant + own.column.bias
    return row[:, None] * column[None]


def with_offsets(weights, offsets):
    projections = [n for n in weights if n.split(".")[-2] in ("to_q", "to_k", "to_v")]
    return weights | {n: weights[n] * (1 + offset_of(offsets[n.replace(".", "/")])) for n in projections}


def features_of(unet, weights, x_t, t, empty):
    """Means of the outputs of conv_in, of each layer of the down blocks and of the mid block."""
    maps = []
    hooks = [
        unet.conv_in.register_forward_hook(lambda _m, _i, out: maps.append(out)),
        unet.mid_block.register_forward_hook(lambda _m, _i, out: maps.append(out)),
        *(b.register_forward_hook(lambda _m, _i, out: maps.extend(out[1])) for b in unet.down_blocks),
    ]
    torch.func.functional_call(unet, weights, (x_t, t, empty.expand(len(x_t), -1, -1)))
    for hook in hooks:
        hook.remove()
    return torch.cat([h.mean((2, 3)) for h in maps], 1)


def read(encoder, cls, features):
    h = F.linear(features, encoder["down.0.weight"], encoder["down.0.bias"])
    h = F.linear(F.leaky_relu(h), encoder["down.2.weight"], encoder["down.2.bias"])
    h = torch.cat([cls.expand(len(h), -1), h], 1)
    h = F.linear(F.leaky_relu(F.linear(h, encoder["merge.weight"], encoder["merge.bias"])),
                 encoder["final.weight"], encoder["final.bias"])  # fmt: skip
    return 0.1 * h


def test_a_step_is_the_published_loss_of_weights_offsets_and_encoder(ready, picture, one_step):
    config = replace(METHODS["e4t"].config("shape", ready, steps=1), batch_size=3)
    (batch,), gradients, learnt = one_step(config)
    assert len(batch.t) == 3
    own = {n: p.detach().clone().requires_grad_() for n, p in parameters_of(ready.unet, "all").items()}
    e4t = copy.deepcopy(ready.e4t).requires_grad_()
    weights = with_offsets(own, e4t.offsets)
    encoder = dict(e4t.encoder.named_parameters())
    features = features_of(ready.unet, weights, batch.x_t, batch.t, ready.encode_prompt([""]))
    offset = read(encoder, ready.image_tower(picture[None]), features)
    text = ready.encode_prompt(batch.prompts, {"*m": ready.word_embedding("shape") + offset})
    noise = torch.func.functional_call(ready.unet, weights, (batch.x_t, batch.t, text)).sample
    # L = E || epsilon - epsilon_theta ||^2 + lambda || offset ||^2
    loss = F.mse_loss(noise, batch.target) + 0.01 * offset.square().sum(1).mean()
    assert learnt.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    every = [*own.values(), *e4t.encoder.parameters(), *e4t.offsets.parameters()]
    every = [p for p in every if p.ndim < 2] + [p for p in every if p.ndim > 1]
    theirs = torch.autograd.grad(loss, every)
    assert len(gradients) == len(theirs)
    for a, b in zip(gradients, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-3, atol=1e-4)


def test_all_that_is_published_learns_at_one_rate_from_one_image():
    config = METHODS["e4t"].config("shape")
    assert (config.steps, config.batch_size, config.views, config.offset_penalty) == (15, 16, 1, 0.01)
    assert config.part == "all" and config.constant_rate and config.bias_learning_rate is None
    assert not config.learn_word and config.latent_encoder and config.weight_offsets


@pytest.mark.parametrize(
    "removed",
    [{"weight_offsets": False}, {"offset_penalty": 0.0}, {"latent_encoder": False, "offset_penalty": 0.0}],
)
def test_each_specific_changes_the_result(ready, picture, learnt, removed):
    config = replace(METHODS["e4t"].config("shape", ready, steps=2), **removed)
    other = escd.customize(picture, "shape", ready, config=config, progress=False)
    assert other.losses[0] != pytest.approx(learnt.losses[0], rel=1e-5)
    assert (other.encoder is None) == (not config.latent_encoder)
    name = next(iter(offset_shapes(ready.unet)))
    assert not torch.equal(other.delta[name], learnt.delta[name])
    pipes = [pipeline(ready, each) for each in (learnt, other)]
    assert not torch.allclose(drawn(pipes[0]), drawn(pipes[1]), atol=1e-3)


# ---- the start


def test_a_new_one_changes_nothing_to_the_bit(backbone, picture):
    backbone.e4t = new = E4T.for_backbone(backbone)
    weights = dict(backbone.unet.named_parameters())
    x_t, t, text = (
        torch.randn(2, *backbone.latent_shape),
        torch.tensor([3, 700]),
        backbone.encode_prompt(["", "a"]),
    )
    with torch.no_grad():
        exact = new.offset(weights)
        untouched = backbone.unet(x_t, t, text).sample
        assert torch.equal(torch.func.functional_call(backbone.unet, exact, (x_t, t, text)).sample, untouched)
        features = module.latent_features(backbone.unet, exact, x_t, t, backbone.encode_prompt([""]))
        assert not new.encoder(backbone.image_tower(picture[None]).expand(2, -1), features).any()
    assert set(exact) == {n for n in names_of(backbone.unet, "all/attn1+all/attn2") if "to_out" not in n}
    start = escd.customize(picture, "shape", backbone, method="e4t", steps=0)
    assert start.steps == 0 and not any(change.any() for change in start.delta.values())
    same = {"guidance_scale": 3.0, "guidance_from": "customized"}
    assert torch.equal(drawn(pipeline(backbone, start), **same), drawn(pipeline(backbone), "a shape", **same))


def test_zero_steps_are_the_pretrained_encoder_and_offsets(ready, picture):
    start = escd.customize(picture, "shape", ready, method="e4t", steps=0)
    offsets = ready.e4t.offset(dict(ready.unet.named_parameters()))
    assert start.delta.keys() == offsets.keys()
    for name, w in offsets.items():
        w0 = ready.unet.get_parameter(name)
        torch.testing.assert_close(start.delta[name].float(), (w - w0).detach(), rtol=1e-2, atol=1e-3)
    assert torch.equal(start.pseudo_word, ready.word_embedding("shape"))
    assert torch.equal(start.encoder["final.weight"], ready.e4t.encoder.final.weight.half())


def test_an_encoder_that_is_read_from_a_file_draws_no_random_numbers(ready):
    state = torch.get_rng_state()
    encoder = LatentEncoder.of(ready.e4t.encoder.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    given = torch.randn(2, len(encoder.mean)).split([32, len(encoder.mean) - 32], 1)
    assert torch.equal(encoder(*given), ready.e4t.encoder(*given))


def test_the_encoder_standardises_what_it_reads():
    encoder, other = (LatentEncoder(3, 5, 4, 6) for _ in range(2))
    torch.nn.init.normal_(encoder.final.weight)
    other.load_state_dict(encoder.state_dict())
    cls, f_down = torch.randn(50, 3) * 9 + 4, torch.randn(50, 5) * 0.1 - 7
    other.standardise(cls, f_down)
    plain = encoder((cls - cls.mean(0)) / cls.std(0), (f_down - f_down.mean(0)) / f_down.std(0))
    torch.testing.assert_close(other(cls, f_down), plain, rtol=1e-4, atol=1e-4)


# ---- sampling


def test_a_sampling_step_written_out(ready, learnt):
    """One step without guidance, at strength 0.5: weights, reading, prompt and prediction."""
    strength = 0.5
    x_T = torch.randn(1, *ready.latent_shape)
    pipe = pipeline(ready, learnt)
    given = {"latents": x_T, "guidance_scale": 1.0, "shape_strength": strength, "num_inference_steps": 1}
    ours = drawn(pipe, **given)
    weights = {n: p + strength * learnt.delta[n].float() for n, p in parameters_of(ready.unet, "all").items()}
    scheduler = copy.deepcopy(ready.scheduler)
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    encoder = {n: w.float() for n, w in learnt.encoder.items()}
    with torch.no_grad():
        features = features_of(ready.unet, weights, x_T, t, ready.encode_prompt([""]))
        offset = read(encoder, encoder["cls"][None], features)
        text = ready.encode_prompt(["a *m"], {"*m": ready.word_embedding("shape") + strength * offset})
        noise = torch.func.functional_call(ready.unet, weights, (x_T, t, text)).sample
    torch.testing.assert_close(ours, scheduler.step(noise, t, x_T).prev_sample, rtol=1e-3, atol=1e-4)


def count_passes(pipe, prompt, **given):
    """Sizes of the batches that the UNet's first layer reads while an image is drawn."""
    sizes = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    drawn(pipe, prompt, **given)
    hook.remove()
    return sizes


def test_the_encoder_reads_at_each_step_and_only_where_it_must(ready, picture, learnt):
    look = escd.customize(picture, "appearance", ready, method="e4t", steps=1, progress=False)
    pipe = pipeline(ready, learnt, look)
    both = {"guidance_from": "customized"}
    assert count_passes(pipe, "a *m", **both) == [1, 2] * STEPS, "one more way down a step, for one branch"
    assert count_passes(pipe, "a *m", guidance_from="backbone") == [1, 1, 1] * STEPS
    assert count_passes(pipe, "a *m", guidance_scale=1.0) == [1, 1] * STEPS
    assert count_passes(pipe, "a *m with *a appearance", **both) == [1, 2] * STEPS, "one for both"
    assert count_passes(pipe, "a shape") == [2] * STEPS
    assert count_passes(pipe, "a *m", shape_strength=0.0) == [2] * STEPS
    assert count_passes(pipe, "a shape", negative_prompt="*a") == [1, 2] * STEPS


def test_another_latent_changes_the_picture(ready, learnt, monkeypatch):
    right, real, first = drawn(pipeline(ready, learnt)), module.latent_features, []
    assert torch.equal(drawn(pipeline(ready, learnt)), right)

    def only_the_first(*given):
        first.append(real(*given))
        return first[0]

    monkeypatch.setattr(module, "latent_features", only_the_first)
    once = drawn(pipeline(ready, learnt))
    assert len(first) == STEPS and not torch.equal(first[0], first[1])
    assert not torch.allclose(once, right, atol=1e-3)
    # After one step, nothing was read twice.
    monkeypatch.setattr(module, "latent_features", real)
    one = drawn(pipeline(ready, learnt), num_inference_steps=1)
    monkeypatch.setattr(module, "latent_features", lambda *given: real(*given).roll(1, -1))
    assert not torch.allclose(drawn(pipeline(ready, learnt), num_inference_steps=1), one, atol=1e-3)


def test_each_image_of_a_batch_reads_its_own_latents(ready, learnt):
    pipe = pipeline(ready, learnt)
    prompts = ["a *m", "a red shape", "a red *m"]
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "negative_prompt": ["", "", "a *m"]}
    together = pipe(prompts, generator=generators, **settings).images
    for k, prompt in enumerate(prompts):
        settings["negative_prompt"] = ["", "", "a *m"][k]
        alone = pipe(prompt, generator=torch.Generator().manual_seed(k), **settings).images
        torch.testing.assert_close(together[k : k + 1], alone, rtol=1e-3, atol=1e-3)


def test_strength_zero_is_the_untouched_backbone_to_the_bit(ready, learnt):
    plain = drawn(pipeline(ready), "a shape")
    pipe = pipeline(ready, learnt)
    assert torch.equal(drawn(pipe, shape_strength=0.0), plain)
    half, whole = (drawn(pipe, shape_strength=s) for s in (0.5, 1.0))
    assert not torch.allclose(half, plain, atol=1e-3) and not torch.allclose(half, whole, atol=1e-3)


def test_it_draws_beside_embeddings_of_each_layer(ready, picture, learnt):
    look = escd.customize(picture, "appearance", ready, method="p-plus", steps=0)
    same = replace(look, pseudo_word=look.pseudo_word[0])
    prompt = "a *m with *a appearance"
    a, b = (drawn(pipeline(ready, learnt, each), prompt) for each in (look, same))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_an_offloaded_pipeline_draws_the_same(ready, learnt):
    pipe = pipeline(ready, learnt)
    image = drawn(pipe)
    pipe.enable_model_cpu_offload(device="cpu")  # the hooks work on any device
    assert torch.equal(drawn(pipe), image) and torch.equal(drawn(pipe), image)


def test_what_is_read_anew_cannot_be_given_beforehand(ready, learnt):
    pipe = pipeline(ready, learnt)
    with pytest.raises(ValueError, match=r"\*m is read from the latents at each sampling step"):
        pipe.encode_prompt("a *m")
    plain, negative = pipe.encode_prompt("a shape")
    with pytest.raises(ValueError, match="cannot be encoded beforehand"):
        drawn(pipe, None, prompt_embeds=plain, negative_prompt_embeds=negative)
    given = {"prompt_embeds": plain, "negative_prompt_embeds": negative}
    assert torch.equal(drawn(pipe, None, shape_strength=0.0, **given), drawn(pipe, "a shape"))
    mixed = drawn(pipe, negative_prompt_embeds=negative)
    assert torch.equal(mixed, drawn(pipe))

    def changes(_pipe, _i, _t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1}

    names = ["prompt_embeds"]
    with pytest.raises(ValueError, match="computed anew"):
        drawn(pipe, callback_on_step_end=changes, callback_on_step_end_tensor_inputs=names)
    drawn(pipe, callback_on_step_end=lambda *given: given[-1], callback_on_step_end_tensor_inputs=names)


# ---- files


def test_it_is_saved_and_loaded_whole(ready, learnt, tmp_path):
    path = learnt.save(tmp_path / "x.safetensors")
    assert abs(path.stat().st_size - learnt.nbytes) < 60_000
    again = escd.load_customization(path, ready)
    assert again.encoder.keys() == learnt.encoder.keys() and again.config == learnt.config
    for name, w in learnt.tensors.items():
        assert torch.equal(again.tensors[name], w) and again.tensors[name].dtype == w.dtype, name
    assert torch.equal(drawn(pipeline(ready, again)), drawn(pipeline(ready, learnt)))
    small = low_rank(learnt, 2)
    assert small.encoder is learnt.encoder
    pipeline(ready, learnt).save_pretrained(tmp_path / "pipe")
    stored = escd.ESCDPipeline.from_pretrained(tmp_path / "pipe", device="cpu")
    stored.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(stored), drawn(pipeline(ready, learnt)))
    assert stored.backbone.e4t is not None


def malformed(tensors):
    """Name -> (tensors that are wrong in one way, what the error names)."""

    def name(part):
        return f"encoder.{part}"

    final, deviation = tensors[name("final.weight")], tensors[name("deviation")]
    spoilt = final.clone()
    spoilt[0, 0] = float("nan")
    changed = {
        "another width": ({name("final.weight"): final[1:]}, r"encoder\.final\.weight is \(31, 8\)"),
        "fewer features": ({name("down.0.weight"): tensors[name("down.0.weight")][:, 1:]}, "it must be"),
        "a longer token": ({name("cls"): torch.zeros(40)}, r"encoder\.(mean|merge)"),
        "no token": ({name("cls"): torch.zeros(0)}, "reads nothing"),
        "nan": ({name("final.weight"): spoilt}, r"encoder\.final\.weight holds"),
        "whole numbers": ({name("final.weight"): final.int()}, "must be in floating point"),
        "no deviation": ({name("deviation"): deviation * 0}, "deviation must be positive"),
        "foreign": ({name("gain"): final}, r"encoder\.gain is no tensor of an encoder"),
        "no name": ({"encoder.": final}, "is no tensor of an encoder"),
    }
    cases = {kind: (tensors | change, told) for kind, (change, told) in changed.items()}
    for part in ("cls", "mean", "merge.bias"):
        left = {n: w for n, w in tensors.items() if n != name(part)}
        cases[f"without {part}"] = left, rf"encoder\.{part} is missing"
    return cases


def test_malformed_encoders_are_refused(ready, picture, tmp_path):
    start = escd.customize(picture, "shape", ready, method="e4t", steps=0)
    about = {"format": "escd-customization-1", "about": _about(start, tmp_path)}
    cases = malformed(start.tensors)
    assert len(cases) == 12
    for tensors, told in cases.values():
        path = tmp_path / "odd.safetensors"
        save_file({n: w.clone() for n, w in tensors.items()}, path, metadata=about)
        with pytest.raises(ValueError, match=told) as refused:
            escd.load_customization(path, ready)
        assert str(path) in str(refused.value)
    with pytest.raises(ValueError, match="no tensor of an encoder"):
        pipeline(ready, replace(start, encoder=start.encoder | {"x": torch.zeros(1)}))


def _about(customization, tmp_path):
    with safe_open(customization.save(tmp_path / "whole.safetensors"), "pt") as stored:
        return stored.metadata()["about"]


def test_it_cannot_be_exported(learnt, tmp_path):
    with pytest.raises(ValueError, match="no LoRA and no embedding can carry"):
        export(learnt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_pretrained_travels_with_the_backbone(ready, tmp_path):
    save_backbone(ready, tmp_path / "b")
    again = escd.load_backbone(tmp_path / "b", device="cpu")
    for name, w in ready.e4t.state_dict().items():
        assert torch.equal(again.e4t.state_dict()[name], w)
    assert again.identity == ready.identity
    # Of another backbone's widths it is refused.
    config = {k: v for k, v in ready.e4t.config.items() if not k.startswith("_")}
    E4T(**config | {"word_width": 31}).save_pretrained(tmp_path / "b" / "e4t")
    with pytest.raises(ValueError, match=r"E4T encoder in .* is of another backbone"):
        escd.load_backbone(tmp_path / "b", device="cpu")


# ---- where it is not pretrained


def test_a_backbone_without_it_says_what_to_run(backbone, picture, tiny_folder, tmp_path, capsys):
    command = r"`python -m escd\.pretrain e4t`.*--backbone NAME --data FOLDER"
    with pytest.raises(ValueError, match=f"tiny has none .*publishes none.*{command}"):
        escd.customize(picture, "shape", backbone, method="e4t")
    pretrain(backbone)
    backbone.e4t.register_to_config(backbone_identity="of another")
    with pytest.raises(ValueError, match=f"pretrained on other weights of it.*{command}"):
        escd.customize(picture, "shape", backbone, method="e4t")
    image = tmp_path / "image.png"
    Image.new("RGB", (64, 64), "white").save(image)
    given = ["customize", str(image), "--attribute", "shape", "--method", "e4t"]
    output = ["--backbone", str(tiny_folder), "--output", str(tmp_path / "x.safetensors")]
    assert main([*given, *output]) == 2
    assert "python -m escd.pretrain e4t" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:no silhouette")
def test_the_command_line_learns_and_draws_with_it(ready, tmp_path, capsys):
    save_backbone(ready, tmp_path / "b")
    image, output = tmp_path / "image.png", tmp_path / "x.safetensors"
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    where = ["--backbone", str(tmp_path / "b")]
    asked = ["--attribute", "shape", "--method", "e4t", "--steps", "1", "--output", str(output)]
    assert main(["customize", str(image), *asked, *where]) == 0
    assert "encoder.cls" in load_file(output)
    drawing = ["--shape", str(output), "--steps", "2", "--output", str(tmp_path)]
    assert main(["generate", "a *m", *drawing, *where]) == 0
    assert (tmp_path / "seed-0.png").is_file()
    assert main(["export", str(output), *where]) == 2
    assert "can carry" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"latent_encoder": True}, {"weight_offsets": True, "part": "decoder"}, {"offset_penalty": 0.01},
        {"latent_encoder": True, "part": "all", "conditioning": "half"},
        {"latent_encoder": True, "part": "all", "rank": 4},
        {"latent_encoder": True, "part": "all", "offset_penalty": -1.0},
        {"latent_encoder": True, "part": "all", "prior_images": 2, "prior_prompt": "a shape"},
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(changes):
    with pytest.raises(ValueError, match=r"whole UNet|offset_penalty"):
        TuningConfig.of("shape", **{"optimizer": "adamw"} | changes)


# ---- cost


def test_reading_is_counted_in_the_cost(ready):
    config = replace(METHODS["e4t"].config("shape", ready), steps=1)
    plain = replace(config, latent_encoder=False, offset_penalty=0.0, weight_offsets=False)
    costs = [tuning_cost(ready, each) for each in (config, plain)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x_t, t = torch.zeros(16, *ready.latent_shape), torch.zeros(16, dtype=torch.long)
        text = ready.encode_prompt([""]).expand(16, -1, -1)
        counter.flop_counts.clear()
        down_path(ready.unet, x_t, t, text)
    # Forward, and twice as much backward; attention computes some of its forward pass twice.
    more = costs[0].operations - costs[1].operations
    assert more / counter.get_total_flops() == pytest.approx(3, abs=0.3)
    assert costs[0].activations > costs[1].activations
    numbers = sum(p.numel() for p in ready.e4t.parameters())
    assert costs[0].learning > costs[1].learning + 16 * numbers


def test_the_cost_of_reading_at_stable_diffusions_size():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768,
            attention_head_dim=8,
        )  # fmt: skip
        given = torch.randn(1, 4, 64, 64), torch.zeros(1, dtype=torch.long), torch.randn(1, 77, 768)
    flops = []
    for path in (down_path, UNet2DConditionModel.forward):
        with FlopCounterMode(display=False) as counter:
            path(unet, *given)
        flops.append(counter.get_total_flops())
    # Of a forward pass; of a step with guidance, which has two, it is half as much.
    assert flops[0] / flops[1] == pytest.approx(0.32, abs=0.02)
