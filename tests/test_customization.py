"""The artefact: attributes, saving, loading, refusing, and weights that come and go."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import make_backbone, make_customization
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import escd.customization
from escd import ATTRIBUTES, Attribute, load_customization
from escd.customization import customized, resolve_attribute

# ---- attributes


def test_the_two_attributes_of_the_paper():
    assert ATTRIBUTES["shape"] == Attribute("shape", word="shape", token="*m", part="encoder")
    assert ATTRIBUTES["appearance"] == Attribute("appearance", word="appearance", token="*a", part="decoder")
    assert resolve_attribute("shape") is ATTRIBUTES["shape"]
    texture = Attribute("texture", word="texture", token="*t", part="decoder")
    assert resolve_attribute(texture) is texture


@pytest.mark.parametrize("name", ["colour", "Shape", "", None, 3])
def test_an_unknown_attribute_lists_the_known(name):
    with pytest.raises(
        ValueError, match=r"unknown attribute .*known: shape, appearance; .*escd\.Attribute\("
    ):
        resolve_attribute(name)


@pytest.mark.parametrize(
    "change",
    [
        {"token": "t"},
        {"token": "*T"},
        {"token": "* t"},
        {"token": ""},
        {"word": ""},
        {"name": "../x"},
        {"part": None},
    ],
)
def test_attributes_that_cannot_be(change):
    with pytest.raises(ValueError, match="an attribute's"):
        Attribute(**{"name": "texture", "word": "texture", "token": "*t", "part": "decoder"} | change)


# ---- storing


def test_saving_and_loading_is_exact(shape, backbone, tmp_path):
    path = shape.save(tmp_path / "horse.safetensors")
    assert path.stat().st_size - shape.nbytes < 20_000  # nothing but the tensors and a header
    again = load_customization(str(path), backbone)
    for field in dataclasses.fields(shape):
        was, now = getattr(shape, field.name), getattr(again, field.name)
        if field.name == "delta":
            assert list(was) == sorted(now, key=list(was).index)
            assert all(
                torch.equal(was[name], now[name]) and was[name].dtype == now[name].dtype for name in was
            )
        elif field.name == "pseudo_word":
            assert torch.equal(was, now)
        else:
            assert was == now, field.name
    assert [p.name for p in tmp_path.iterdir()] == ["horse.safetensors"]


def test_the_file_says_what_it_is(shape, tmp_path):
    with safe_open(shape.save(tmp_path / "x.safetensors"), "pt") as stored:
        about = json.loads(stored.metadata()["about"])
    assert about["attribute"] == {"name": "shape", "word": "shape", "token": "*m", "part": "encoder"}
    assert (about["part"], about["steps"], about["seed"]) == ("encoder", 7, 1)
    assert (about["backbone_name"], about["backbone_identity"]) == ("tiny", shape.backbone_identity)


def test_size_is_predicted(shape, backbone):
    parameters = sum(p.numel() for p in escd.parts.parameters_of(backbone.unet, "encoder").values())
    assert shape.nbytes == 4 * (parameters + 32)
    assert f"{shape.nbytes / 2**20:.1f} MB" in repr(shape) and "*m" in repr(shape)


def test_a_pseudo_word_alone(shape, backbone, tmp_path):
    shape.delta, shape.part = {}, "none"
    assert load_customization(shape.save(tmp_path / "w.safetensors"), backbone).delta == {}


def test_a_customization_of_ones_own_attribute(backbone, tmp_path):
    texture = Attribute("texture", word="texture", token="*t", part="up.1/attn2")
    made = make_customization(backbone, texture)
    assert load_customization(made.save(tmp_path / "t.safetensors"), backbone).attribute == texture


def test_an_interrupted_save_leaves_the_old_file(shape, appearance, backbone, tmp_path, monkeypatch):
    path = shape.save(tmp_path / "x.safetensors")

    def dies(tensors, file, metadata):
        file.write_bytes(b"half a")
        raise KeyboardInterrupt

    monkeypatch.setattr(escd.customization, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        appearance.save(path)
    assert load_customization(path, backbone).attribute.name == "shape"


# ---- what is refused


def test_a_missing_file(backbone, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no customization at .*none"):
        load_customization(tmp_path / "none.safetensors", backbone)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(kept, shape, backbone, tmp_path):
    path = shape.save(tmp_path / "cut.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else kept])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
        load_customization(path, backbone)


def test_files_that_are_something_else(shape, backbone, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("words " * 1000)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_customization(path, backbone)
    save_file({"lora_A": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="not a customization"):
        load_customization(path, backbone)
    save_file({"lora_A": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not a customization"):
        load_customization(path, backbone)


def test_a_customization_of_another_backbone(shape, tmp_path):
    other = make_backbone(tmp_path, seed=1)
    other.name = "other"
    path = shape.save(tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=rf"backbone tiny \({shape.backbone_identity}\), not on other \({other.identity}\)"
    ):
        load_customization(path, other)


def test_changes_outside_the_stated_part(shape, backbone, tmp_path):
    shape.delta["conv_out.weight"] = torch.zeros_like(backbone.unet.conv_out.weight)
    with pytest.raises(ValueError, match=r"changes conv_out\.weight .*encoder has not"):
        load_customization(shape.save(tmp_path / "x.safetensors"), backbone)
    del shape.delta["conv_out.weight"]
    shape.delta["conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"changes conv_in\.bias \(3,\)"):
        load_customization(shape.save(tmp_path / "x.safetensors"), backbone)


# ---- changed weights


def snapshot(unet):
    return {name: (p.data_ptr(), p._version, p.detach().clone()) for name, p in unet.named_parameters()}


def assert_untouched(unet, before):
    for name, p in unet.named_parameters():
        pointer, version, values = before[name]
        assert p.data_ptr() == pointer and p._version == version and torch.equal(p, values), name


def test_changed_weights_are_w0_plus_s_dw_and_the_unet_keeps_its_own(backbone, shape, appearance):
    before = snapshot(backbone.unet)
    changed = customized(backbone.unet, [(shape, 0.5), (appearance, 2.0)])
    for name, p in changed.named_parameters():
        w0 = before[name][2]
        if name in shape.delta:
            assert torch.equal(p, w0 + 0.5 * shape.delta[name])
        elif name in appearance.delta:
            assert torch.equal(p, w0 + 2.0 * appearance.delta[name])
        else:
            assert p.data_ptr() == before[name][0]
    assert_untouched(backbone.unet, before)


def test_customizations_of_one_part_add_up(backbone, appearance):
    more = make_customization(backbone, Attribute("texture", "texture", "*t", "up.2"), seed=5)
    name = next(iter(more.delta))
    w0 = dict(backbone.unet.named_parameters())[name].detach().clone()
    w = dict(customized(backbone.unet, [(appearance, 1.0), (more, 3.0)]).named_parameters())[name]
    torch.testing.assert_close(w.detach(), w0 + appearance.delta[name] + 3 * more.delta[name])


def test_strength_zero_touches_nothing(backbone, shape):
    assert_untouched(customized(backbone.unet, [(shape, 0)]), snapshot(backbone.unet))


def test_changed_weights_are_made_once_for_several_calls(backbone, shape, appearance):
    made = {}
    alone = dict(customized(backbone.unet, [(shape, 0.5)], made).named_parameters())
    both = dict(customized(backbone.unet, [(shape, 0.5), (appearance, 2.0)], made).named_parameters())
    more = dict(customized(backbone.unet, [(shape, 0.6)], made).named_parameters())
    name = next(iter(shape.delta))
    assert alone[name].data_ptr() == both[name].data_ptr() != more[name].data_ptr()


def test_a_change_that_does_not_fit_is_refused(backbone, shape):
    before = snapshot(backbone.unet)
    shape.delta["conv_in.weight"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError):
        customized(backbone.unet, [(shape, 1.0)])
    shape.delta = {"conv_in.gain": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"the UNet has no conv_in\.gain"):
        customized(backbone.unet, [(shape, 1.0)])
    assert_untouched(backbone.unet, before)


def test_half_precision_deltas(backbone, shape, tmp_path):
    shape.delta = {name: w.half() for name, w in shape.delta.items()}
    file = load_file(shape.save(tmp_path / "x.safetensors"))
    assert file["delta.conv_in.weight"].dtype == torch.float16
    w0 = backbone.unet.conv_in.weight.detach().clone()
    changed = customized(backbone.unet, [(shape, 1.0)])
    assert torch.equal(changed.conv_in.weight, w0 + shape.delta["conv_in.weight"].float())


def test_the_embedding_moves_from_the_word_to_the_pseudo_word(shape, backbone):
    e = backbone.word_embedding("shape")
    assert torch.equal(shape.embedding(e, 0), e)
    torch.testing.assert_close(shape.embedding(e, 1.0), shape.pseudo_word)
    torch.testing.assert_close(shape.embedding(e, 2.0), 2 * shape.pseudo_word - e)
