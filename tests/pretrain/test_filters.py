"""Filters for another backbone: pairs made of a person's own images, and the stage that learns them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import escd
from escd.data.foreground import foreground_mask
from escd.data.world import World
from escd.loading import read_backbone
from escd.method.fusion import AttributeFilter
from escd.pretrain import loop
from escd.pretrain.command import main
from escd.pretrain.filters import NEEDED, FilterStage, images_to_learn_from

pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of objects on plain grounds, in two folders, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    pictures = World(seed=3, named_shapes=1.0).batch(range(12)).image
    for k, picture in enumerate(pictures):
        pixels = ((picture / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / ("more" if k % 2 else "") / f"{k}.png")
    (folder / "notes.txt").write_text("twelve pictures")
    return folder


@pytest.fixture(scope="module")
def stage(tiny_folder, folder):
    return FilterStage(torch.device("cpu"), tiny_folder, folder)


def test_some_images_are_kept_apart(stage, folder):
    assert len(images_to_learn_from(folder)) == 12
    assert len(stage.held_out) == 1 and len(stage.files) == 11 and not set(stage.held_out) & set(stage.files)


def test_a_pair_shares_its_attribute_and_the_prompt_says_the_rest(stage):
    images = torch.stack([stage._open(file) for file in stage.files])
    whole = stage._features(images, seed=0)
    for pairs in stage.batch(0, 2 * len(stage.files)):
        token = escd.ATTRIBUTES[pairs.attribute].token
        assert len(pairs.x_0) == len(pairs.prompts) == len(pairs.embeds_ref) == len(stage.files)
        assert all(token in prompt.split() for prompt in pairs.prompts)
        # The first time round a filter reads the images as they are.
        assert torch.allclose(pairs.embeds_ref, whole, atol=1e-4)
        _, failed = foreground_mask(images)
        assert torch.equal(pairs.probed, ~failed)
        # Nothing to be denoised is the image itself.
        latents = stage.backbone.encode_images(images)
        assert ((pairs.x_0 - latents).flatten(1).norm(dim=1) > 1e-2).all()
    # The second time round, views of them, whose material is not probed.
    again = stage.batch(len(stage.files), 2 * len(stage.files))
    assert all(((pairs.embeds_ref - whole).norm(dim=1) > 0.1).all() for pairs in again)
    assert not again[1].probed.any()


def test_filters_learn_what_they_are_shown(stage):
    torch.manual_seed(0)
    batch = stage.batch(0, 16)
    optimizer = torch.optim.Adam(stage.module.parameters(), 3e-3)
    history = []
    for _ in range(60):
        loss, logs = stage.module(batch)
        loss.backward()
        idle = [n for n, p in stage.module.named_parameters() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        history.append({name: float(value.detach()) for name, value in logs.items()})
    assert idle == []
    assert all(p.grad is None for p in stage.backbone.unet.parameters())
    for name in ("shape, probe", "appearance, probe"):
        assert history[-1][name] < 0.5 * history[0][name]


def test_the_command_writes_filters_that_load_backbone_takes(
    tiny_folder, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    weights = tmp_path / "filters"
    asked = ["filters", "--backbone", str(tiny_folder), "--data", str(folder), "--weights", str(weights)]
    main([*asked, "--images", "24"])
    assert "load_backbone" in capsys.readouterr().out
    backbone = escd.load_backbone(tiny_folder, filters=weights, device="cpu")
    for name, attribute in escd.ATTRIBUTES.items():
        read = escd.pseudo_word(backbone, torch.zeros(1, 3, 16, 16), attribute)[0]
        assert not torch.allclose(read, backbone.word_embedding(attribute.word))
        assert backbone.filters[name].mean.abs().sum() > 0
    (record,) = json.loads((weights / "training.json").read_text()).values()
    assert backbone.identity_without_filters in record["stage"] and record["images"] == 24
    assert {"shape", "shape, plain word", "appearance", "appearance, plain word"} < set(record["scores"][-1])
    # Goes on from them, and from nothing else.
    for path in (tmp_path / "runs").rglob("state.pt"):
        path.unlink()
    main([*asked, "--images", "16", "--further"])
    (record,) = json.loads((weights / "training.json").read_text()).values()
    assert [e["images"] for e in record["earlier"]] == [24]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["filters"], "--data FOLDER"),
        (["unet", "--data", "."], "runs alone"),
        (["filters", "--data", "nowhere"], "no folder nowhere"),
    ],
)
def test_what_is_missing_is_told_first(asked, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(asked)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_too_few_images_are_refused(tmp_path, folder):
    for file in images_to_learn_from(folder)[: NEEDED - 1]:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=f"holds {NEEDED - 1} images"):
        images_to_learn_from(tmp_path)


def test_filters_of_another_backbone_are_refused(tiny_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no attribute filters"):
        read_backbone(tiny_folder, filters=tmp_path)
    AttributeFilter(7, 32, 5).save_pretrained(tmp_path / "filters" / "shape")
    with pytest.raises(ValueError, match=r"shape filter in .* is of another backbone: .* 7, 32, 5 wide"):
        read_backbone(tiny_folder, filters=tmp_path)
