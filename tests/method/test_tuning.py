"""Stages 2 and 3: the filters, the tuning loop and what it leaves alone."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import save_file

import escd
import escd.method.customization
from escd.backbone.diffusion import draw_noise_levels, loss_weight, target_of
from escd.backbone.parts import NO_PART, names_of, parameters_of
from escd.data.names import BACKGROUND_RGB, COLOURS, PATTERNS, SHAPES
from escd.loading import read_backbone
from escd.method import config as config_module
from escd.method import step as step_module
from escd.method import tuning
from escd.method import views as views_module
from escd.method.config import TuningConfig
from escd.method.delta import Change, LowRank
from escd.method.export import export
from escd.method.fusion import REACH, AttributeFilter, pseudo_word
from escd.method.optimizers import optimizers_for
from escd.method.reference import Reference
from escd.method.step import NoisedViews, autocast_dtype, fast_arithmetic, predicted, read_ahead, working_copy
from escd.method.views import PROMPTS, recoloured, reshaped, views_of


@pytest.fixture()
def picture(backbone):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, backbone.image_size, backbone.image_size, generator=generator) * 2 - 1


def quick(attribute, part=None, **changes):
    return TuningConfig.of(attribute, part, **{"steps": 3, "batch_size": 2, "views": 4, **changes})


def test_a_new_filter_gives_the_words_own_embedding(backbone):
    new = AttributeFilter.for_backbone(backbone)
    word = backbone.word_embedding("shape")
    embeds_ref = torch.randn(3, new.config.cls_width + new.config.down_width)
    assert torch.equal(new(embeds_ref, word), word.expand(3, -1))
    torch.nn.init.normal_(new.fuse[-1].weight)
    moved = new(embeds_ref, word)
    assert not torch.allclose(moved[0], moved[1]) and not torch.allclose(moved[0], word)
    assert not torch.allclose(
        new(embeds_ref, backbone.word_embedding("texture")) - backbone.word_embedding("texture"), moved - word
    )
    with pytest.raises(ValueError, match="wide"):
        new(torch.randn(1, 7), word)


def test_no_image_takes_a_pseudo_word_farther_than_the_filter_reaches(backbone):
    word, far, near = (
        backbone.word_embedding("shape"),
        *(AttributeFilter.for_backbone(backbone) for _ in "ab"),
    )
    embeds_ref = torch.randn(64, far.config.cls_width + far.config.down_width)
    torch.nn.init.normal_(far.fuse[-1].weight, std=1e4)
    away = (far(embeds_ref, word) - word).norm(dim=-1) / word.norm()
    assert away.max() <= REACH * 1.0001 and away.min() > 0.9 * REACH
    # Little offsets are not bent: twice the layer is twice the offset.
    torch.nn.init.normal_(near.fuse[-1].weight, std=1e-4)
    once = near(embeds_ref, word) - word
    with torch.no_grad():
        near.fuse[-1].weight.mul_(2)
    assert torch.allclose(near(embeds_ref, word) - word, 2 * once, rtol=1e-2, atol=1e-5)


def test_pseudo_word_uses_the_shipped_filter(backbone, picture, monkeypatch):
    attribute = escd.ATTRIBUTES["shape"]
    word = backbone.word_embedding("shape")
    monkeypatch.setattr(backbone, "filters", {})
    assert torch.equal(pseudo_word(backbone, picture[None], attribute)[0], word)
    trained = AttributeFilter.for_backbone(backbone)
    torch.nn.init.normal_(trained.fuse[-1].weight)
    monkeypatch.setattr(backbone, "filters", {"shape": trained})
    assert not torch.allclose(pseudo_word(backbone, picture[None], attribute)[0], word)


@pytest.mark.parametrize(
    ("attribute", "part"),
    [("shape", "encoder"), ("appearance", "decoder"), ("shape", "all"), ("shape", "up.1/attn2")],
)
def test_only_the_named_part_changes(backbone, picture, attribute, part):
    before = {n: p.clone() for n, p in backbone.unet.named_parameters()}
    c = escd.customize(picture, attribute, backbone, config=quick(attribute, part), progress=False)
    assert set(c.delta) == set(names_of(backbone.unet, part)) and c.part == part
    assert sum(float(d.float().abs().sum()) for d in c.delta.values()) > 0
    assert not torch.equal(c.pseudo_word, backbone.word_embedding(attribute))
    assert all(torch.equal(p, before[n]) for n, p in backbone.unet.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in backbone.unet.parameters())
    assert all(p.grad is None for p in backbone.text_encoder.parameters())


def test_defaults_follow_the_source():
    assert TuningConfig.of("shape").part == "encoder" and TuningConfig.of("appearance").part == "decoder"
    own = escd.Attribute("texture", word="texture", token="*t", part="decoder")
    assert (
        TuningConfig.of(own).recipe == "appearance" and TuningConfig.of(own, "down.1/attn2").learning_rate > 0
    )


def own(part: str, recipe: str | None = None) -> escd.Attribute:
    return escd.Attribute("outline", word="shape", token="*o", part=part, recipe=recipe)


@pytest.mark.parametrize(
    ("part", "recipe"),
    [
        ("encoder", "shape"),
        ("down.1", "shape"),
        ("encoder/attn2+down.0", "shape"),
        ("up.0", "appearance"),
        ("decoder/attn1", "appearance"),
        ("mid", None),
        ("down.1+up.0", None),
        ("res.4", None),
        ("all", None),
    ],
)
def test_an_attributes_half_is_its_recipe_and_where_there_is_none_it_is_asked_for(part, recipe):
    assert own(part).recipe == recipe
    if recipe is None:
        with pytest.raises(ValueError, match="recipe='shape' or recipe='appearance'"):
            TuningConfig.of(own(part))
    else:
        assert TuningConfig.of(own(part)).recipe == recipe


def test_an_attributes_own_recipe_decides_how_it_is_learnt(backbone, picture):
    for recipe in ("shape", "appearance"):
        config = TuningConfig.of(own("up.0", recipe))
        assert config.recipe == recipe and config.steps == config_module.STEPS[recipe]
        assert config.learning_rate == config_module.RATES["muon"][recipe]["decoder"]
    said = TuningConfig.of(own("all"), recipe="shape")
    assert said.recipe == "shape" and said.steps == config_module.STEPS["shape"], (
        "and all that follows from it"
    )
    with pytest.raises(ValueError, match="recipe is 'shape' or 'appearance'"):
        own("encoder", "outline")
    with pytest.raises(ValueError, match="recipe"):
        TuningConfig.of("shape", recipe="outline")
    learnt = escd.customize(picture, own("down.1"), backbone, steps=1, progress=False)
    assert learnt.config["recipe"] == "shape" and set(learnt.delta) == set(names_of(backbone.unet, "down.1"))


def test_a_files_recipe_is_its_attributes(backbone, picture, tmp_path):
    """Files from before an attribute had a recipe have it in their configuration."""
    config = quick(own("all"), recipe="shape", steps=1)
    learnt = escd.customize(picture, own("all"), backbone, config=config, progress=False)
    plain = {name: w.contiguous() for name, w in {"pseudo_word": learnt.pseudo_word}.items()}
    about = {
        "attribute": {"name": "outline", "word": "shape", "token": "*o", "part": "all"},
        "part": "all",
        "backbone_identity": backbone.identity_without_filters,
        "backbone_name": "tiny",
        "steps": 1,
        "seed": 0,
        "config": learnt.config,
        "losses": [],
    }
    metadata = {"format": escd.method.customization.FORMAT, "about": json.dumps(about)}
    save_file(plain, tmp_path / "old.safetensors", metadata=metadata)
    assert escd.load_customization(tmp_path / "old.safetensors", backbone).attribute == own("all", "shape")
    kept = replace(learnt, attribute=own("all", "appearance")).save(tmp_path / "new.safetensors")
    assert escd.load_customization(kept, backbone).attribute == own("all", "appearance")


def test_a_part_learns_at_the_rate_of_the_half_its_parameters_are_in(backbone):
    rates = config_module.RATES["muon"]["shape"]
    for given in (None, backbone):
        for half, parts in {
            "encoder": ("encoder", "down.0+down.1/attn2"),
            "decoder": ("up.0 + decoder", "decoder/attn2"),
            "all": ("down.1+up.0", "up.0+down.1", "decoder+mid", "mid", "res.4", NO_PART),
        }.items():
            assert {TuningConfig.of("shape", part, given).learning_rate for part in parts} == {rates[half]}
    # Of the samplers at the UNet's full width there is only the way down's.
    assert names_of(backbone.unet, "res.8/samplers")[0].startswith("down_blocks.0.downsamplers")
    assert TuningConfig.of("shape", "res.8/samplers", backbone).learning_rate == rates["encoder"]
    with pytest.raises(ValueError, match="unknown part 'sideways'"):
        TuningConfig.of("shape", "sideways", backbone)
    for given in (None, backbone):
        with pytest.raises(TypeError, match="named by a string"):
            TuningConfig.of("shape", 5, given)


def test_none_can_be_said_where_it_is_a_value(backbone, picture):
    assert TuningConfig.of("shape").noise_level is not None
    config = quick("shape", noise_level=None, bias_learning_rate=None, rank=None)
    assert config.noise_level is None and config.bias_learning_rate is None and config.rank is None
    assert config.optimizer == config_module.OPTIMIZER, "no rank is no wish for AdamW"
    kept = quick("shape", learning_rate=None, batch_size=None)
    assert kept.learning_rate == TuningConfig.of("shape").learning_rate
    assert kept.batch_size == config_module.BATCH_SIZES["shape"]


@pytest.mark.parametrize(
    "said", [{"steps": 7}, {"seed": 0}, {"learning_rate": 0.5}, {"part": "decoder"}, {"rank": 4}]
)
def test_a_number_beside_a_configuration_must_agree_with_it(backbone, picture, said):
    config = quick("shape", seed=3)
    ((name, value),) = said.items()
    with pytest.raises(ValueError, match=rf"{name}={value!r} contradicts .*replace\(config, {name}="):
        escd.customize(picture, "shape", backbone, config=config, progress=False, **said)
    agreed = replace(quick("shape", optimizer="adamw", steps=0), **said)
    learnt = escd.customize(
        picture, "shape", backbone, config=agreed, progress=False, callback=lambda *_: True, **said
    )
    assert TuningConfig(**learnt.config) == agreed


def test_a_large_backbone_has_a_recipe_of_its_own(backbone, monkeypatch):
    assert TuningConfig.of("shape", backbone=backbone) == TuningConfig.of("shape")
    monkeypatch.setattr("escd.backbone.model.LARGE", 1)
    config = TuningConfig.of("shape", backbone=backbone)
    assert config.optimizer == "adamw" and config.learning_rate < TuningConfig.of("shape").learning_rate / 10
    assert config.bias_learning_rate is None and config.batch_size == 1
    assert config.augmentation < TuningConfig.of("shape").augmentation == 1
    assert config.dropout > TuningConfig.of("shape").dropout == 0, "guidance starts from the tuned UNet there"
    look = TuningConfig.of("appearance", backbone=backbone)
    assert look.noise_level is None and not look.true_scale and TuningConfig.of("appearance").true_scale
    conditioning = {a: TuningConfig.of(a, backbone=backbone).conditioning for a in ("shape", "appearance")}
    assert conditioning == {"shape": "joint", "appearance": "half"}
    assert TuningConfig.of("appearance", "all", backbone).conditioning == "joint"
    assert TuningConfig.of("appearance", NO_PART, backbone).conditioning == "joint"
    assert TuningConfig.of("appearance", backbone=backbone, conditioning="joint").conditioning == "joint"
    assert TuningConfig.of("shape", backbone=backbone, steps=7, learning_rate=0.5).learning_rate == 0.5
    assert TuningConfig.of("shape", backbone=backbone, rank=4).learning_rate > config.learning_rate


def test_either_optimizer_changes_every_parameter_of_the_part(backbone, picture):
    learnt = {}
    for kind in ("muon", "adamw"):
        config = quick("shape", optimizer=kind)
        learnt[kind] = escd.customize(picture, "shape", backbone, config=config, progress=False)
        assert set(learnt[kind].delta) == set(parameters_of(backbone.unet, "encoder"))
        assert all(float(d.abs().sum()) > 0 for n, d in learnt[kind].delta.items() if "to_k" not in n), kind
    kernel = "down_blocks.0.resnets.0.conv1.weight"
    flat = {kind: c.delta[kernel].float().flatten(1) for kind, c in learnt.items()}
    # Muon's step moves all directions of a matrix alike; Adam's has a few strong ones.
    values = {kind: torch.linalg.svdvals(w) for kind, w in flat.items()}
    uneven = {kind: float(s[0] / s[-1]) for kind, s in values.items()}
    assert uneven["muon"] < 0.8 * uneven["adamw"]
    assert learnt["muon"].delta[kernel].shape == backbone.unet.get_parameter(kernel).shape


@pytest.mark.parametrize("kind", config_module.OPTIMIZERS)
def test_biases_and_norms_have_a_rate_of_their_own(backbone, picture, kind):
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")

    def moved(**changes):
        config = quick("shape", optimizer=kind, learning_rate=1e-3, **changes)
        delta = escd.customize(picture, "shape", backbone, config=config, progress=False).delta
        return {vector: max(float(d.abs().max()) for d in delta.values() if (d.ndim < 2) == vector)
                for vector in (True, False)}  # fmt: skip

    same, slow = moved(bias_learning_rate=None), moved(bias_learning_rate=1e-5)
    assert same[True] > 1e-4 > 5e-5 > slow[True] > 0
    assert slow[False] > 0.5 * same[False]
    assert moved(bias_learning_rate=1.0) == same  # who lowers the rate lowers all of it
    with pytest.raises(ValueError, match="bias_learning_rate must be a positive number"):
        quick("shape", bias_learning_rate=0.0)


def test_halves_share_no_parameter(backbone, picture):
    shape = escd.customize(picture, "shape", backbone, config=quick("shape"), progress=False)
    look = escd.customize(picture, "appearance", backbone, config=quick("appearance"), progress=False)
    assert not set(shape.delta) & set(look.delta)


def test_zero_steps_and_no_part(backbone, picture):
    untuned = escd.customize(picture, "shape", backbone, steps=0)
    assert untuned.delta == {} and untuned.steps == 0
    word_only = escd.customize(picture, "shape", backbone, config=quick("shape", NO_PART), progress=False)
    assert word_only.delta == {} and word_only.steps == 3
    assert not torch.equal(word_only.pseudo_word, untuned.pseudo_word)
    escd.ESCDPipeline(backbone, shape=word_only)


def test_the_working_copy_is_the_same_function_and_leaves_the_unet_alone(backbone, seen):
    unet = backbone.unet
    trained = parameters_of(unet, "decoder")
    before = {name: id(p) for name, p in unet.named_parameters()}
    processors = {name: type(p) for name, p in unet.attn_processors.items()}
    network = working_copy(unet, trained)
    text = backbone.encode_prompt(["a star shape"] * len(seen.t))
    weights = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    found = []
    for one in (unet, network):
        with fast_arithmetic(unet.device):
            out = predicted(one, weights, seen, text, "joint").float()
            found.append((out.detach(), torch.autograd.grad(out.square().mean(), list(weights.values()))))
    (own, by_own), (copied, by_copied) = found
    # bfloat16 has eight bits; where the processor has none, the two agree much better
    assert (own - copied).norm() < 0.02 * own.norm()
    assert sum((a - b).norm() for a, b in zip(by_own, by_copied, strict=True)) < 0.05 * sum(
        a.norm() for a in by_own
    )
    assert {name: id(p) for name, p in unet.named_parameters()} == before
    assert {name: type(p) for name, p in unet.attn_processors.items()} == processors
    # what learns is the UNet's own, the rest is rounded once
    assert all(p is dict(unet.named_parameters())[n] for n, p in network.named_parameters() if n in trained)
    rest = {p.dtype for n, p in network.named_parameters() if n not in trained}
    assert rest == {autocast_dtype(unet.device) or unet.dtype}


def test_a_backbones_own_attention_processors_stay(backbone):
    class Own(AttnProcessor2_0):
        pass

    unet = copy.deepcopy(backbone.unet)
    first = next(iter(unet.attn_processors))
    unet.set_attn_processor({n: Own() if n == first else p for n, p in unet.attn_processors.items()})
    kept = working_copy(unet, {}).attn_processors
    assert type(kept.pop(first)) is Own and AttnProcessor2_0 not in map(type, kept.values())


@pytest.mark.parametrize("conditioning", ["joint", "half"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(backbone, seen, part, conditioning):
    weights, v = learning(backbone, part)
    kept, found = [], []
    for checkpointing in (False, True):
        network = working_copy(backbone.unet, weights, checkpointing)
        for p in [*weights.values(), v]:
            p.grad = None
        counted = 0

        def count(saved):
            nonlocal counted
            counted += saved.nbytes
            return saved

        text = backbone.encode_prompt(seen.prompts, {"*a": v})
        with fast_arithmetic(backbone.device):
            with torch.autograd.graph.saved_tensors_hooks(count, lambda saved: saved):
                out = predicted(network, weights, seen, text, conditioning)
            out.float().square().mean().backward()
        kept.append(counted)
        found.append([out.detach(), *(p.grad.clone() for p in [*weights.values(), v])])
    # The weights that learn are not the UNet's own, so a second pass through its own would show.
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)
    assert kept[1] < 0.5 * kept[0]


def test_a_unet_with_checkpointing_on_is_tuned_as_any_other(backbone, picture):
    plain = escd.customize(picture, "shape", backbone, config=quick("shape"), progress=False)
    unet = backbone.unet
    unet.enable_gradient_checkpointing()
    try:
        for checkpointing in (None, True):
            learnt = escd.customize(
                picture, "shape", backbone, config=quick("shape"), progress=False, checkpointing=checkpointing
            )
            assert learnt.losses == pytest.approx(plain.losses, rel=1e-3)
        assert unet.is_gradient_checkpointing
    finally:
        unet.disable_gradient_checkpointing()


def test_adamw_in_eight_bits_learns_with_smaller_averages(backbone, picture):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    config = quick("appearance", optimizer="adamw8bit", learning_rate=1e-3)
    v = torch.zeros(32, requires_grad=True)
    large = torch.nn.Parameter(torch.randn(128, 64))
    change = Change({"large": large})
    (optimizer,) = optimizers_for(v, change, config)
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    (change.weights()["large"].square().sum() + v.sum()).backward()
    optimizer.step()
    (weight,) = change.parameters()
    assert optimizer.state[weight]["state1"].dtype is torch.uint8, "a byte for each number"
    assert not torch.equal(change.weights()["large"], large)
    learnt = escd.customize(picture, "appearance", backbone, config=config, progress=False)
    exact = escd.customize(
        picture,
        "appearance",
        backbone,
        config=quick("appearance", optimizer="adamw", learning_rate=1e-3),
        progress=False,
    )
    assert learnt.losses == pytest.approx(exact.losses, rel=0.05)


def test_eight_bits_without_the_package_say_what_to_install(backbone, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    config = quick("appearance", optimizer="adamw8bit")
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        escd.customize(picture, "appearance", backbone, config=config, progress=False)


def test_the_same_seed_is_the_same_customization(backbone, picture):
    a, b, c = (
        escd.customize(picture, "shape", backbone, config=quick("shape", seed=s), progress=False)
        for s in (1, 1, 2)
    )
    assert a.losses == b.losses and torch.equal(a.pseudo_word, b.pseudo_word)
    assert all(torch.equal(a.delta[n], b.delta[n]) for n in a.delta)
    assert a.losses != c.losses


def test_tuning_learns_the_reference(backbone):
    # One flat picture, many steps: the loss must fall by far more than noise.
    flat = torch.full((3, backbone.image_size, backbone.image_size), 0.5)
    config = quick(
        "appearance",
        "all",
        steps=40,
        batch_size=4,
        augmentation=0.0,
        learning_rate=1e-2,
        word_learning_rate=0.05,
    )
    losses = escd.customize(flat, "appearance", backbone, config=config, progress=False).losses
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("conditioning", ["joint", "half"])
def test_a_change_learnt_at_a_rank_is_that_change_and_travels_whole(
    backbone, picture, tmp_path, conditioning
):
    before = {n: p.clone() for n, p in backbone.unet.named_parameters()}
    config = quick("shape", rank=2, conditioning=conditioning)
    assert (
        config.learning_rate == config_module.LOW_RANK_RATE * quick("shape", optimizer="adamw").learning_rate
    )
    learnt = escd.customize(picture, "shape", backbone, config=config, progress=False)
    matrices = {n for n, p in parameters_of(backbone.unet, "encoder").items() if p.ndim > 1}
    assert set(learnt.delta) == matrices, "biases and norms stay"
    assert all(isinstance(w, LowRank) and w.up.shape[1] <= 2 for w in learnt.delta.values())
    assert sum(float(w.float().abs().sum()) for w in learnt.delta.values()) > 0
    assert all(torch.equal(p, before[n]) for n, p in backbone.unet.named_parameters())
    read = escd.load_customization(learnt.save(tmp_path / "m.safetensors"), backbone)
    assert all(torch.equal(read.delta[n].float(), w.float()) for n, w in learnt.delta.items())
    assert export(read, tmp_path / "out").left_behind == ()
    assert learnt.nbytes < escd.customize(picture, "shape", backbone, config=quick("shape")).nbytes / 2


def test_the_first_step_at_a_rank_sees_the_untouched_unet(backbone, picture):
    """One factor starts at zero, so the loss of the first step is that of tuning in full."""
    first = [
        escd.customize(
            picture, "shape", backbone, config=quick("shape", rank=rank, steps=1), progress=False
        ).losses
        for rank in (None, 1, 64)
    ]
    assert first[1] == pytest.approx(first[0], rel=1e-4) and first[2] == pytest.approx(first[0], rel=1e-4)


def test_where_only_float16_is_fast_gradients_are_scaled(backbone, picture, monkeypatch):
    # As on a GPU before Ampere.
    exact = escd.customize(picture, "shape", backbone, config=quick("shape", steps=8), progress=False)
    for module in (step_module, tuning):  # the arithmetic, and the scaling of gradients
        monkeypatch.setattr(module, "autocast_dtype", lambda device, dtype=None: torch.float16)
    scaled = []
    step = torch.amp.GradScaler.step
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "step",
        lambda self, optimizer: scaled.append(self.get_scale()) or step(self, optimizer),
    )
    coarse = escd.customize(picture, "shape", backbone, config=quick("shape", steps=8), progress=False)
    assert len(scaled) == 8 * 2 and min(scaled) > 1  # Muon leaves some to AdamW
    assert coarse.losses == pytest.approx(exact.losses, rel=0.05)
    assert any(change.abs().sum() > 0 for change in coarse.delta.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"conditioning": "half"}, {"rank": 2}, {"optimizer": "muon"}])
def test_a_backbone_in_half_precision_is_tuned_as_it_is(tiny_folder, picture, dtype, changes):
    exact = escd.load_backbone(tiny_folder, device="cpu")
    half = escd.load_backbone(tiny_folder, device="cpu", dtype=dtype)
    assert half.identity == exact.identity
    given = {"optimizer": "adamw", "steps": 6} | changes
    losses = [
        escd.customize(
            picture,
            "appearance",
            one,
            config=quick("appearance", **given),
            checkpointing=again,
            progress=False,
        ).losses
        for one, again in ((exact, False), (half, False), (half, True))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[2] == pytest.approx(losses[1], rel=0.01)
    assert {p.dtype for p in half.unet.parameters()} == {dtype}


def test_a_full_gpu_says_what_helps(backbone, picture, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuning, "working_copy", full)
    with pytest.raises(MemoryError, match=r"memory is full.*rank=16.*adamw8bit"):
        escd.customize(picture, "shape", backbone, config=quick("shape"), progress=False)


def test_a_unet_built_as_stable_diffusion_2_is(backbone, picture):
    """Projections that are linear, heads counted for each block, attention in float32."""
    other = copy.copy(backbone)
    given = dict(backbone.unet.config) | {
        "use_linear_projection": True, "upcast_attention": True, "attention_head_dim": [2, 4, 8],
    }  # fmt: skip
    other.unet = UNet2DConditionModel.from_config(given).eval().requires_grad_(False)
    for name in ("identity", "identity_without_filters"):
        other.__dict__.pop(name, None)
    assert other.identity != backbone.identity
    for attribute in ("shape", "appearance"):
        losses = [
            escd.customize(
                picture, attribute, other, config=quick(attribute), checkpointing=again, progress=False
            ).losses
            for again in (False, True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2) and len(losses[0]) == 3
    learnt = escd.customize(picture, "shape", other, config=quick("shape", rank=2), progress=False)
    assert escd.ESCDPipeline(other, shape=learnt)("a *m shape", num_inference_steps=2).images


def test_interrupted_tuning_keeps_what_it_has(backbone, picture):
    def stop(step, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="after 2 of 3"):
        kept = escd.customize(
            picture, "shape", backbone, config=quick("shape"), callback=stop, progress=False
        )
    assert kept.steps == 2 and kept.delta
    ended = escd.customize(
        picture, "shape", backbone, config=quick("shape"), callback=lambda s, loss: s == 1, progress=False
    )
    assert ended.steps == 1


def gradients(backbone, seen, weights, v, conditioning):
    """Prediction, and gradients of its square, for the weights and for the pseudo-word."""
    for p in (*weights.values(), v):
        p.grad = None
    text = backbone.encode_prompt(seen.prompts, {"*a": v})
    out = predicted(backbone.unet, weights, seen, text, conditioning)
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in weights.items()}, v.grad.clone()


@pytest.fixture()
def seen(backbone):
    """Three noised views."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, *backbone.latent_shape)
    return NoisedViews(
        x_t=torch.randn(shape, generator=generator),
        t=torch.tensor([20, 400, 900]),
        target=torch.zeros(shape),
        mask=torch.ones(3, 1, 1, 1),
        prompts=["a star shape with *a appearance", "a *a star", "the appearance of *a"],
    )


def learning(backbone, part):
    parameters = parameters_of(backbone.unet, part)
    weights = {n: (p + 0.01).detach().requires_grad_() for n, p in parameters.items()}
    return weights, (0.3 * torch.randn(32, generator=torch.Generator().manual_seed(2))).requires_grad_()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_half_conditioning_changes_only_where_the_pseudo_words_gradient_comes_from(backbone, seen, part):
    weights, v = learning(backbone, part)
    joint, of_weights, of_word = gradients(backbone, seen, weights, v, "joint")
    half, of_weights_half, of_word_half = gradients(backbone, seen, weights, v, "half")
    assert torch.equal(joint, half)
    for name in weights:
        torch.testing.assert_close(of_weights_half[name], of_weights[name])
    assert not torch.allclose(of_word, of_word_half) and of_word_half.abs().max() > 0


def test_cached_encoder_outputs_give_the_loss_and_gradients_of_recomputing_them(backbone, seen):
    weights, v = learning(backbone, "decoder")
    cached = read_ahead(seen, backbone, escd.ATTRIBUTES["appearance"], batch_size=2)
    out, of_weights, of_word = gradients(backbone, cached, weights, v, "cached")

    # Recomputed by the UNet's own forward, whose decoder is handed the other text.
    words = [p.replace("*a", "appearance") for p in seen.prompts]
    plain, text = backbone.encode_prompt(words), backbone.encode_prompt(seen.prompts, {"*a": v})
    swap = [
        block.register_forward_pre_hook(
            lambda _module, inputs, given: (inputs, given | {"encoder_hidden_states": text}), with_kwargs=True
        )
        for block in backbone.unet.up_blocks
    ]
    v.grad = None
    again = torch.func.functional_call(backbone.unet, weights, (seen.x_t, seen.t, plain)).sample
    recomputed = torch.autograd.grad(again.square().mean(), [*weights.values(), v])
    for hook in swap:
        hook.remove()
    torch.testing.assert_close(out, again.detach())
    for mine, theirs in zip([*of_weights.values(), of_word], recomputed, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("conditioning", ["half", "cached"])
def test_the_other_conditionings_learn(backbone, picture, conditioning):
    config = quick("appearance", conditioning=conditioning, draws=6)
    learnt = escd.customize(picture, "appearance", backbone, config=config, progress=False)
    assert set(learnt.delta) == set(names_of(backbone.unet, "decoder")) and learnt.steps == 3
    assert not torch.equal(learnt.pseudo_word, backbone.word_embedding("appearance"))
    same = escd.customize(picture, "appearance", backbone, config=config, progress=False)
    assert same.losses == learnt.losses


@pytest.mark.parametrize(
    ("conditioning", "part"), [("cached", "encoder"), ("half", "all"), ("cached", "mid"), ("half", NO_PART)]
)
def test_conditionings_are_for_one_half(backbone, picture, conditioning, part):
    with pytest.raises(ValueError, match=r"alone, not for"):
        config = quick("shape", part, conditioning=conditioning)
        escd.customize(picture, "shape", backbone, config=config, progress=False)
    with pytest.raises(ValueError, match="conditioning is"):
        quick("shape", conditioning="none")


def test_a_mask_confines_the_loss(backbone, picture):
    size = backbone.image_size
    mask = torch.zeros(1, size, size)
    mask[:, : size // 2] = 1
    config = quick("shape", augmentation=0.0)
    seen, weight, prompts = views_of(Reference(picture, mask), config)
    assert len(prompts) == len(seen) and set(prompts) == {PROMPTS["shape"]}
    assert torch.equal(weight[0], mask) and torch.equal(seen[0], picture)
    a = escd.customize(picture, "shape", backbone, mask=mask, config=config, progress=False)
    b = escd.customize(picture, "shape", backbone, config=config, progress=False)
    assert a.losses != b.losses
    with pytest.raises(ValueError, match="mask"):
        escd.customize(picture, "shape", backbone, mask=torch.zeros(1, size, size), progress=False)


def test_a_cut_out_is_learnt_as_with_its_alpha_as_the_mask(backbone, tmp_path):
    size = backbone.image_size
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 4), np.uint8)
    noise[..., 3] = 0
    noise[3:12, 4:10, 3] = 255
    Image.fromarray(noise).save(tmp_path / "cut.png")
    mask = Image.fromarray(noise[..., 3])
    config = quick("shape", augmentation=0.5, optimizer="adamw")
    own, given = (
        escd.customize(tmp_path / "cut.png", "shape", backbone, mask=m, config=config, progress=False)
        for m in (None, mask)
    )
    assert own.losses == given.losses
    opaque = Image.open(tmp_path / "cut.png").convert("RGB")
    assert escd.customize(opaque, "shape", backbone, config=config, progress=False).losses != own.losses


def test_a_picture_without_a_silhouette_is_told_with_the_remedy(backbone, picture, blot):
    def learn(image, **options):
        config = quick("shape", steps=1, views=1, batch_size=1, optimizer="adamw")
        escd.customize(image, "shape", backbone, config=config, progress=False, **options)

    with pytest.warns(
        UserWarning, match=r"no silhouette was found.*whole frame is learnt as the shape.*mask="
    ):
        learn(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(picture, mask=torch.ones(1, *picture.shape[-2:]))
        learn(blot[0])
        escd.customize(picture, "shape", backbone, steps=0)  # nothing is learnt


def test_augmentations_change_only_the_other_attribute():
    generator = torch.Generator().manual_seed(0)
    image = torch.full((1, 3, 32, 32), -0.8)
    image[:, :, 8:24, 8:24] = 0.6
    changed = recoloured(image.expand(8, -1, -1, -1), generator)
    inside, outside = changed[:, :, 10:22, 10:22], changed[:, :, :6, :6]
    assert torch.allclose(inside.std((2, 3)), torch.zeros(8, 3), atol=1e-6), "recolouring moved the outline"
    assert (inside.mean((2, 3)) - outside.mean((2, 3))).abs().amax(1).min() > 0.05, "the object vanished"
    bent = reshaped(image.expand(8, -1, -1, -1), generator)
    assert bent.min() >= -0.81 and bent.max() <= 0.61
    assert not torch.equal(bent[0], bent[1])


@pytest.fixture()
def blot():
    """A dark square on a pale ground (3, 64, 64), and where it is (1, 64, 64)."""
    image, inside = torch.full((3, 64, 64), 0.7), torch.zeros(1, 64, 64)
    inside[:, 20:44, 16:48] = 1
    image[:, 20:44, 16:48] = torch.tensor([-0.9, -0.2, -0.6])[:, None, None]
    return image, inside


@pytest.mark.parametrize("given", [True, False])
def test_repainted_shapes_keep_the_silhouette_and_say_the_rest(blot, given):
    image, inside = blot
    config = TuningConfig.of("shape", augmentation=1.0)
    views, weights, prompts = views_of(Reference(image, inside if given else None), config)
    assert weights.min() == 1, "what is painted anew is right all over the frame"
    for view, said in zip(views, prompts, strict=True):
        words = said[0].split()
        assert "{}" in words and set(words) & set(PATTERNS) and set(words) & set(COLOURS)
        assert not set(words) & set(SHAPES)
        if words[-2] in BACKGROUND_RGB:  # it is there, outside the silhouette
            ground = torch.tensor(BACKGROUND_RGB[words[-2]])[:, None, None] * 2 - 1
            near = (view - ground).abs().amax(0) < 0.1
            assert near[inside[0] == 0].float().mean() > 0.85
    assert len({said[0] for said in prompts}) > 30


def test_repainted_appearances_keep_the_material_and_say_the_rest(blot):
    image, _ = blot
    views, _, prompts = views_of(Reference(image), TuningConfig.of("appearance", augmentation=1.0))
    colour = image[:, 32, 32][:, None, None]
    areas = []
    for view, said in zip(views, prompts, strict=True):
        words = said[0].split()
        assert "{}" in words and set(words) & set(SHAPES) and not set(words) & set(COLOURS)
        areas.append(float(((view - colour).abs().amax(0) < 0.1).float().mean()))
    assert min(areas) > 0.04 and max(areas) < 0.6 and len(set(areas)) > 30


def test_without_a_silhouette_a_shape_changes_its_colours_and_the_whole_frame_is_the_material():
    generator = torch.Generator().manual_seed(0)
    clutter = torch.rand(3, 64, 64, generator=generator) * 0.4 - torch.tensor([1.0, 0.2, 1.0])[:, None, None]
    views, _, prompts = views_of(Reference(clutter), TuningConfig.of("shape", augmentation=1.0))
    assert set(prompts) == {PROMPTS["shape"]} and not torch.equal(views[0], views[1])
    views, _, prompts = views_of(Reference(clutter), TuningConfig.of("appearance", augmentation=1.0))
    assert len(set(prompts)) > 30 and all(set(said[0].split()) & set(SHAPES) for said in prompts)
    of_clutter = ((views - clutter.mean((1, 2))[:, None, None]).abs().amax(1) < 0.3).float().mean((1, 2))
    assert of_clutter.min() > 0.04 and of_clutter.median() < 0.6


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"steps": -1}, ValueError),
        ({"steps": 2.5}, TypeError),
        ({"steps": True}, TypeError),
        ({"learning_rate": 0.0}, ValueError),
        ({"learning_rate": float("nan")}, ValueError),
        ({"part": "sideways"}, ValueError),
        ({"seed": "x"}, TypeError),
        ({"seed": 2**70}, ValueError),
        ({"learning_rate": 10**400}, ValueError),
    ],
)
def test_bad_numbers_are_refused(backbone, picture, changes, error):
    with pytest.raises(error):
        escd.customize(picture, "shape", backbone, progress=False, **changes)


@pytest.mark.parametrize("name", ["true_scale", "varied"])
def test_what_is_true_or_false_is_no_number(name):
    with pytest.raises(TypeError, match=f"{name} is True or False"):
        TuningConfig.of("shape", **{name: 1})


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan"), "0.5", torch.ones(2)])
@pytest.mark.parametrize("name", ["augmentation", "dropout"])
def test_shares_lie_between_0_and_1(name, share):
    with pytest.raises(ValueError, match=f"{name} is a share between 0 and 1"):
        TuningConfig.of("shape", **{name: share})


def test_unknown_optimizers_and_muon_for_factors_are_refused():
    with pytest.raises(ValueError, match="muon, adamw, adamw8bit"):
        TuningConfig.of("shape", optimizer="sgd")
    with pytest.raises(ValueError, match="whole matrices"):
        TuningConfig.of("shape", optimizer="muon", rank=2)


@pytest.mark.parametrize("level", [float("nan"), "high"])
def test_noise_levels_are_numbers(level):
    with pytest.raises(ValueError, match="noise_level"):
        TuningConfig.of("shape", noise_level=level)


def test_the_noise_level_says_how_noisy_the_views_are(backbone, picture, monkeypatch):
    met: dict[float, torch.Tensor] = {}
    for level in (-2.0, 2.0):
        seen = []
        monkeypatch.setattr(tuning, "predicted", lambda *a, seen=seen: seen.append(a[2].t) or predicted(*a))
        config = quick("shape", noise_level=level, steps=24, batch_size=8)
        escd.customize(picture, "shape", backbone, config=config, progress=False)
        met[level] = torch.cat(seen)
    alpha = backbone.scheduler.alphas_cumprod.double()
    ratio = {k: (((1 - alpha) / alpha.clamp(min=1e-9)).log() / 2)[t].median() for k, t in met.items()}
    for level, found in ratio.items():
        assert found == pytest.approx(level, abs=0.4)


def test_the_error_is_weighted_only_where_timesteps_are_uniform(backbone, picture, monkeypatch):
    called = []
    monkeypatch.setattr(tuning, "loss_weight", lambda *a: called.append(1) or loss_weight(*a))
    escd.customize(picture, "shape", backbone, config=quick("shape", noise_level=0.4), progress=False)
    assert not called
    escd.customize(
        picture, "shape", backbone, config=replace(quick("shape"), noise_level=None), progress=False
    )
    assert len(called) == 3


def test_unknown_attribute_is_refused_with_the_known_ones(backbone, picture):
    with pytest.raises(ValueError, match="shape, appearance"):
        escd.customize(picture, "colour", backbone)
    with pytest.raises(ValueError, match="configuration is for"):
        escd.customize(picture, "shape", backbone, config=quick("appearance"))
    odd = escd.Attribute("odd", word="unpronounceable", token="*o", part="decoder")
    with pytest.raises(ValueError, match="token"):
        escd.customize(picture, odd, backbone)


def test_tuning_follows_what_the_unet_predicts(backbone, picture, monkeypatch):
    noise_losses = escd.customize(picture, "shape", backbone, config=quick("shape"), progress=False).losses
    config = dict(backbone.scheduler.config) | {"prediction_type": "v_prediction"}
    velocity = type(backbone.scheduler).from_config(config)
    x_0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999])
    assert torch.equal(target_of(backbone.scheduler, x_0, noise, t), noise)
    assert torch.equal(loss_weight(backbone.scheduler, t), torch.ones(2))
    alpha = velocity.alphas_cumprod[t][:, None, None, None]
    assert torch.allclose(
        target_of(velocity, x_0, noise, t), alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0, atol=1e-5
    )
    little, much = loss_weight(velocity, t)
    assert little < 0.01 and much > 0.99
    monkeypatch.setattr(backbone, "scheduler", velocity)
    assert (
        escd.customize(picture, "shape", backbone, config=quick("shape"), progress=False).losses
        != noise_losses
    )
    sample = type(backbone.scheduler).from_config(config | {"prediction_type": "sample"})
    with pytest.raises(ValueError, match="'sample'"):
        target_of(sample, x_0, noise, t)


def test_a_filter_reads_what_an_image_has_of_its_own(backbone):
    learnt = AttributeFilter.for_backbone(backbone)
    torch.nn.init.normal_(learnt.fuse[-1].weight)
    word = backbone.word_embedding("shape")
    # what all images share is large, what tells them apart is small
    width = learnt.config.cls_width + learnt.config.down_width
    generator = torch.Generator().manual_seed(0)
    many = 50 + 0.01 * torch.randn(64, width, generator=generator)
    before = (learnt(many, word) - word).std(0).mean()
    learnt.standardise(many)
    after = (learnt(many, word) - word).std(0).mean()
    assert after > 10 * before
    assert torch.isfinite(learnt(1e6 * many, word)).all(), "an image unlike all others goes no farther"
    assert learnt(1e6 * many, word).abs().max() < 10 * learnt(many, word).abs().max()


# ---- whatever mode the caller is in


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_turned_on_by_tuning_itself(tiny_folder, mode):
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def tune(image):
        backbone = read_backbone(tiny_folder).to("cpu", torch.float32)
        return escd.customize(image, "shape", backbone, steps=2, mask=torch.ones(1, 16, 16), progress=False)

    wanted = tune(image)
    with mode():
        learnt = tune(image.clone())
    assert learnt.losses == wanted.losses and torch.equal(learnt.pseudo_word, wanted.pseudo_word)


def test_noise_levels_are_computed_where_there_is_float64(backbone):
    class OnAnAppleGPU:
        """The scheduler's table there: it has no float64, and has to come over first."""

        def __init__(self, table):
            self.table = table

        def cpu(self):
            return self.table

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    table = backbone.scheduler.alphas_cumprod
    wanted = draw_noise_levels(backbone.scheduler, 4, 0.4, torch.Generator().manual_seed(0))
    scheduler = SimpleNamespace(alphas_cumprod=OnAnAppleGPU(table), config=backbone.scheduler.config)
    assert torch.equal(draw_noise_levels(scheduler, 4, 0.4, torch.Generator().manual_seed(0)), wanted)


# ---- a material at its own scale


def test_tiled_views_hold_only_neighbours_that_the_material_has():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 40, 48, generator=generator)
    inside = torch.zeros(1, 40, 48)
    inside[:, 7:25, 9:33] = 1
    views = views_module.tiled(image, inside, 6, generator)
    assert views.shape == (6, 3, 40, 48)
    assert len({view.numpy().tobytes() for view in views}) == 6, "they differ"
    material = image[:, 8:24, 10:32]  # without its outermost pixels
    known = {tuple(pixel) for pixel in material.flatten(1).T.tolist()}
    assert {tuple(pixel) for pixel in views.transpose(0, 1).flatten(1).T.tolist()} == known

    def neighbours(of):
        left, right = (part.flatten(1).T.tolist() for part in (of[:, :, :-1], of[:, :, 1:]))
        return {frozenset((tuple(a), tuple(b))) for a, b in zip(left, right, strict=True)}

    mirrored = {frozenset([pixel]) for pixel in known}
    assert neighbours(views[0]) <= neighbours(material) | mirrored


@pytest.mark.parametrize(
    ("rows", "columns", "wanted"),
    [((0, 10), (0, 10), (1, 1, 8, 8)), ((3, 9), (2, 30), (4, 3, 4, 26)), ((5, 6), (4, 9), (5, 4, 1, 5))],
)
def test_the_largest_rectangle_lies_within_the_mask(rows, columns, wanted):
    mask = np.zeros((32, 32), bool)
    mask[slice(*rows), slice(*columns)] = True
    assert views_module._largest_rectangle(mask) == wanted


def test_views_at_true_scale_are_asked_for_by_the_configuration():
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = TuningConfig.of("appearance", steps=1, augmentation=1.0, views=4, true_scale=False)
    mask = torch.ones(1, *picture.shape[-2:])
    bent, _, said = views_of(Reference(picture, mask), config)
    plain, _, same = views_of(Reference(picture, mask), replace(config, true_scale=True))
    assert said == same and not torch.equal(bent, plain)
    pixels = [views.transpose(0, 1).flatten(1).T for views in (picture[None], plain, bent)]
    nearest = [torch.cdist(each, pixels[0]).amin(1) for each in pixels[1:]]
    own, interpolated = ((each < 1e-4).float().mean() for each in nearest)
    assert own > 0.1 and interpolated < 0.5 * own, "pixels of the material itself"


def test_views_at_a_large_size_are_the_reference_mirrored_and_cropped(backbone, monkeypatch):
    """The source's recipe is the default there: no repainted view, and the loss stays inside the mask."""
    monkeypatch.setattr(type(backbone), "large", True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 32, 32, generator=generator) * 2 - 1
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:20, 4:16] = 1
    image[:, mask[0] > 0] = 1.0
    for attribute in ("shape", "appearance"):
        config = TuningConfig.of(attribute, backbone=backbone)
        assert config.augmentation == 0 and config.varied and not TuningConfig.of(attribute).varied
        views, weights, prompts = views_of(Reference(image, mask), config)
        assert set(prompts) == {PROMPTS[config.recipe]}
        assert len({v.numpy().tobytes() for v in views}) == len(views)
        left = (weights[:, 0].sum((1,)) * torch.arange(32)).sum(1) / weights.sum((1, 2, 3))
        assert (left < 15).any() and (left > 17).any()  # mirrored, the mask with it
        inside = views.movedim(1, -1)[weights[:, 0] == 1]
        assert (inside == 1).all() == (attribute == "appearance")  # a shape's colours are changed
    plain = TuningConfig.of("shape", augmentation=0.0)
    assert torch.equal(views_of(Reference(image, mask), plain)[0], image.expand(plain.views, -1, -1, -1))
