"""The artefact: attributes, saving, loading, refusing, and weights that come and go."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict

import pytest
import torch
from conftest import assert_untouched, make_backbone, make_customization, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import escd
from escd import ATTRIBUTES, Attribute, ESCDPipeline, load_customization
from escd.loading import read_backbone
from escd.method import customization
from escd.method.attributes import resolve_attribute
from escd.method.customization import customized, load_customizations
from escd.method.delta import LowRank
from escd.method.low_rank import low_rank

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
    wanted = {"name": "shape", "word": "shape", "token": "*m", "part": "encoder", "recipe": "shape"}
    assert about["attribute"] == wanted
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

    monkeypatch.setattr(customization, "save_file", dies)
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
    both = rf"tiny \({shape.backbone_identity}\), not on other \({other.identity_without_filters}\)"
    with pytest.raises(ValueError, match=f"backbone {both}"):
        load_customization(path, other)


def test_changes_outside_the_stated_part(shape, backbone, tmp_path):
    shape.delta["conv_out.weight"] = torch.zeros_like(backbone.unet.conv_out.weight)
    with pytest.raises(ValueError, match=r"changes conv_out\.weight .*encoder has not"):
        load_customization(shape.save(tmp_path / "x.safetensors"), backbone)
    del shape.delta["conv_out.weight"]
    shape.delta["conv_in.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"changes conv_in\.bias \(3,\)"):
        load_customization(shape.save(tmp_path / "x.safetensors"), backbone)


# ---- files from strangers


@pytest.fixture(scope="module")
def fixed(tiny_folder):
    """A tiny backbone that these tests share, as none changes it."""
    return read_backbone(tiny_folder, name="tiny")


@pytest.fixture(scope="module")
def stored(fixed, tmp_path_factory):
    """(what it says of itself, its tensors) of a file with changes in full and in factors."""
    folder = tmp_path_factory.mktemp("stored")
    file = low_rank(make_customization(fixed, "shape", seed=1), 2).save(folder / "x.safetensors")
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["about"]), load_file(file)


def refused(fixed, folder, about, tensors, field):
    """Write a file and see that loading it names the file and the field, in one line."""
    file = folder / "stranger.safetensors"
    metadata = {"format": escd.method.customization.FORMAT}
    if about is not None:
        metadata["about"] = about if isinstance(about, str) else json.dumps(about)
    save_file({name: w.clone() for name, w in tensors.items()}, file, metadata=metadata)
    with pytest.raises(ValueError, match=rf"stranger\.safetensors: .*{field}") as told:
        load_customization(file, fixed)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


def test_the_file_that_the_following_ones_differ_from_is_taken(fixed, stored, tmp_path):
    about, tensors = stored
    metadata = {"format": escd.method.customization.FORMAT, "about": json.dumps(about)}
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    loaded = load_customization(tmp_path / "x.safetensors", fixed)
    assert any(isinstance(w, LowRank) for w in loaded.delta.values())
    assert any(isinstance(w, torch.Tensor) for w in loaded.delta.values())


@pytest.mark.parametrize("about", [None, "", "words", "[]", "3", "null", "[" * 100_000, '{"a": 1'])
def test_what_says_nothing_of_itself(about, fixed, stored, tmp_path):
    refused(fixed, tmp_path, about, stored[1], "about")


WRONG = {
    "part": (3, None, "", [], "sideways", "encoder/left", "none", "decoder"),
    "backbone_identity": (None, 3, "", []),
    "backbone_name": (None, 3, [], ""),
    "steps": (-1, 2.5, "7", None, True, [7]),
    "seed": (1.5, "1", None, False),
    "config": ([], "x", None, 3),
    "losses": ({}, 3, "x", None, ["0.5"], [None], [True], [[0.5]]),
    "attribute": (None, "shape", [], {}, {"name": "shape"}),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG.items() for v in values])
def test_fields_that_are_not_what_they_must_be(field, value, fixed, stored, tmp_path):
    about, tensors = stored
    named = (
        "conv_in" if (field, value) in (("part", "none"), ("part", "decoder")) else f"({field}|unknown part)"
    )
    refused(fixed, tmp_path, {**about, field: value}, tensors, named)


@pytest.mark.parametrize(
    "field", ["part", "backbone_identity", "backbone_name", "steps", "seed", "attribute"]
)
def test_fields_that_are_missing(field, fixed, stored, tmp_path):
    about, tensors = stored
    refused(fixed, tmp_path, {k: v for k, v in about.items() if k != field}, tensors, field)


def test_fields_of_no_customization(fixed, stored, tmp_path):
    refused(fixed, tmp_path, {**stored[0], "delta": {}}, stored[1], "'delta' is no field")


@pytest.mark.parametrize(
    "change",
    [{"name": "../x"}, {"name": 3}, {"word": "zebra"}, {"word": None}, {"token": "m"}, {"token": "*M"},
     {"token": ["*m"]}, {"part": "sideways"}, {"part": None}, {"more": "x"}],
)  # fmt: skip
def test_attributes_of_strangers(change, fixed, stored, tmp_path):
    about, tensors = stored
    told = "(attribute|zebra|unknown part)"
    refused(fixed, tmp_path, {**about, "attribute": {**about["attribute"], **change}}, tensors, told)


def other_tensors(tensors):
    """Name -> (tensors that are wrong in one way, what the error names)."""
    word, bias = tensors["pseudo_word"], tensors["delta.conv_in.bias"]
    up, down = "up.conv_in.weight", "down.conv_in.weight"
    without = {k: w for k, w in tensors.items() if k not in (up, down)}
    full = torch.zeros(len(tensors[up]), *tensors[down].shape[1:])
    infinite, spoilt = bias.clone(), tensors[up].clone()
    infinite[0], spoilt[0, 0] = float("inf"), float("nan")
    changed = {
        "another width": ({"pseudo_word": torch.zeros(31)}, r"pseudo_word is \(31,\)"),
        "a scalar": ({"pseudo_word": torch.tensor(1.0)}, r"pseudo_word is \(\)"),
        "no numbers": ({"pseudo_word": torch.zeros(0)}, "pseudo_word"),
        "a row": ({"pseudo_word": word[None]}, "pseudo_word"),
        "nan": ({"pseudo_word": word * float("nan")}, "pseudo_word holds numbers that are not finite"),
        "whole numbers": ({"pseudo_word": word.long()}, "pseudo_word must be in floating point"),
        "beyond float32": ({"pseudo_word": word.double() + 1e300}, "pseudo_word holds"),
        "infinite": ({"delta.conv_in.bias": infinite}, r"delta\.conv_in\.bias holds numbers"),
        "integers": ({"delta.conv_in.bias": bias.int()}, r"delta\.conv_in\.bias must be in floating"),
        "truths": ({"delta.conv_in.bias": bias > 0}, r"delta\.conv_in\.bias must be in floating"),
        "complex": ({"delta.conv_in.bias": bias.to(torch.complex64)}, r"delta\.conv_in\.bias must be in"),
        "eight bits": ({"delta.conv_in.bias": bias.to(torch.float8_e4m3fn)}, r"delta\.conv_in\.bias must"),
        "another shape": ({"delta.conv_in.bias": bias[None]}, r"changes conv_in\.bias \(1, 16\)"),
        "another part": ({"delta.conv_out.bias": torch.zeros(4)}, r"changes conv_out\.bias"),
        "no weight": ({"delta.conv_in.weights": bias}, r"changes conv_in\.weights"),
        "two forms": ({"delta.conv_in.weight": full}, r"conv_in\.weight is stored as delta and down and up"),
        "foreign": ({"lora_A": bias}, "'lora_A' is no tensor"),
        "foreign with a dot": ({"unet.conv_in.bias": bias}, r"'unet\.conv_in\.bias' is no tensor"),
        "no name": ({"delta": bias}, "changes "),
        "a factor with nan": ({up: spoilt}, r"up\.conv_in\.weight holds"),
        "whole factors": ({down: tensors[down].short()}, r"down\.conv_in\.weight must be"),
        "of rank 0": ({up: tensors[up][:, :0], down: tensors[down][:0]}, "do not belong together"),
        "a scalar factor": ({up: torch.tensor(1.0)}, "do not belong together"),
        "a product beyond float32": (
            {up: tensors[up].float() + 1e30, down: tensors[down].float() + 1e30}, "multiply to numbers"
        ),
    }  # fmt: skip
    cases = {name: (tensors | change, told) for name, (change, told) in changed.items()}
    cases["no pseudo-word"] = (
        {k: w for k, w in tensors.items() if k != "pseudo_word"},
        "pseudo_word is missing",
    )
    for name in (up, down):
        cases[f"{name} alone"] = (without | {name: tensors[name]}, r"conv_in\.weight is stored as (up|down);")
    return cases


@pytest.mark.parametrize("case", list(other_tensors(defaultdict(lambda: torch.zeros(16, 2)))))
def test_tensors_that_no_customization_has(case, fixed, stored, tmp_path):
    about, tensors = stored
    refused(fixed, tmp_path, about, *other_tensors(tensors)[case])


def test_a_customization_that_was_changed_in_memory_is_refused_by_a_pipeline(fixed):
    shape = make_customization(fixed, "shape")
    shape.pseudo_word = torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"pseudo_word is \(\)"):
        ESCDPipeline(fixed, shape=shape)


# ---- lists of customizations


@pytest.mark.parametrize(
    "names",
    [["../x"], ["/etc/x"], ["a/b"], [".."], [""], [3], {"shape": 1}, "shape", None, ["shape", "shape"]],
)
def test_a_list_cannot_lead_out_of_its_folder(names, fixed, tmp_path):
    beside = tmp_path / "customizations"
    beside.mkdir()
    make_customization(fixed, "shape").save(tmp_path / "x.safetensors")
    (beside / "index.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"index\.json lists names of attributes"):
        load_customizations(beside, fixed)


def test_a_list_that_is_none_and_one_that_is_mistaken(fixed, tmp_path):
    (tmp_path / "index.json").write_text('["shape"')
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        load_customizations(tmp_path, fixed)
    (tmp_path / "index.json").write_text('["shape"]')
    with pytest.raises(FileNotFoundError, match=r"no customization at .*shape\.safetensors"):
        load_customizations(tmp_path, fixed)
    made = make_customization(fixed, "appearance").save(tmp_path / "shape.safetensors")
    with pytest.raises(ValueError, match=r"shape\.safetensors is listed as shape and holds appearance"):
        load_customizations(tmp_path, fixed)
    made.rename(tmp_path / "appearance.safetensors")
    (tmp_path / "index.json").write_text('["appearance"]')
    assert list(load_customizations(tmp_path, fixed)) == ["appearance"]


# ---- changed weights


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
