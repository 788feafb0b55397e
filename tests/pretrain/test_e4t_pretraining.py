"""Pretraining of E4T: the stage learns, resumes to the bit, and writes what `method="e4t"` starts from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import escd
from escd.data.world import World
from escd.method.e4t import E4T
from escd.pretrain import e4t as module
from escd.pretrain import loop
from escd.pretrain.command import WEIGHTS, main
from escd.pretrain.e4t import E4TStage
from escd.pretrain.loop import train

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_pictures")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "STANDARD", 32)
    monkeypatch.setattr(module, "SCORED", 8)


@pytest.fixture
def stage(tiny_folder):
    return E4TStage(CPU, tiny_folder)


def test_the_pseudo_word_stands_for_the_picture_that_is_denoised(stage):
    pictures = stage.batch(40, 6)
    images = World(module.SEED, named_shapes=module.NAMED_SHAPES, named_appearances=module.NAMED_APPEARANCES,
                   varied=True, size=16).batch(range(40, 46)).image  # fmt: skip
    assert torch.equal(pictures.x_0, stage.backbone.encode_images(images).float())
    assert torch.equal(pictures.cls, stage.backbone.image_tower(images))
    for k, prompt in enumerate(pictures.prompts):
        attribute = list(escd.ATTRIBUTES.values())[k % 2]
        assert attribute.token in prompt
        assert torch.equal(pictures.words[k], stage.backbone.word_embedding(attribute.word))
    assert len({*pictures.prompts}) > 2, "all templates are used"
    again = stage.batch(42, 2)
    assert again.prompts == pictures.prompts[2:4]
    assert not torch.equal(stage.held_out[:4], images[:4])


def test_it_starts_as_the_untouched_backbone_and_learns(stage):
    scores = stage.evaluate()
    assert scores["e4t"] == scores["plain word"]
    pictures = stage.batch(0, 16)
    optimizer = torch.optim.Adam(stage.module.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        torch.manual_seed(0)  # the same noise: only learning lowers the loss
        loss, logs = stage.module(pictures)
        loss.backward()
        idle = [name for name, p in stage.module.named_parameters() if p.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert idle == [] and losses[-1] < 0.97 * losses[0]
    error, length = (float(logs[name].detach()) for name in ("error", "squared length"))
    assert length > 0 and losses[-1] == pytest.approx(error + 0.01 * length)
    assert all(any(p.any() for p in offset.row.parameters()) for offset in stage.module.e4t.offsets.values())
    assert all(p.grad is None and not p.requires_grad for p in stage.backbone.unet.parameters())
    after = stage.evaluate()
    assert after["plain word"] == scores["plain word"] and after["e4t"] != scores["e4t"]


def test_the_features_are_standardised_over_images_and_noise(stage):
    encoder = stage.module.e4t.encoder
    assert (encoder.deviation > 0).all() and encoder.mean.abs().sum() > 0
    pictures = stage.batch(0, 64)
    x_t, t, _ = stage.module.noised(pictures)
    with torch.no_grad():
        features = torch.cat([pictures.cls, stage.module.features(x_t, t, {})], 1)
    apart = ((features - encoder.mean) / encoder.deviation).square().mean()
    assert 0.5 < float(apart) < 2


class Killed(E4TStage):
    fail_at: int | None = None

    def batch(self, first, count):
        if self.fail_at is not None and first >= self.fail_at:
            raise KeyboardInterrupt
        return super().batch(first, count)


def trained(folder, tiny_folder, fail_at=None):
    """The exported tensors and the record of a short training."""
    folder.mkdir(exist_ok=True)

    def make(device):
        stage = Killed(device, tiny_folder)
        stage.fail_at = fail_at
        return stage

    record = train(
        make, weights=folder, images=64, evaluations=2, checkpoint_seconds=0, progress=False, batch_size=8
    )
    return load_file(folder / "e4t" / "diffusion_pytorch_model.safetensors"), record


def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "whole")
    whole, record = trained(tmp_path / "a", tiny_folder)
    monkeypatch.setattr(loop, "RUNS", tmp_path / "killed")
    for fail_at in (24, 40):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "b", tiny_folder, fail_at)
    again, resumed = trained(tmp_path / "b", tiny_folder)
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)
    assert all(w.dtype is torch.float16 for w in whole.values())

    def timeless(points):
        return [{k: v for k, v in point.items() if k != "seconds"} for point in points]

    assert timeless(record["scores"]) == timeless(resumed["scores"])
    assert timeless(record["curve"]) == timeless(resumed["curve"])
    assert record["scores"][-1]["e4t"] != record["scores"][-1]["plain word"]


def test_a_state_of_another_backbone_is_not_gone_on_with(stage):
    stage.load_state_dict(stage.state_dict())
    with pytest.raises(ValueError, match="is on the backbone another"):
        stage.load_state_dict({"backbone": "another"})


def test_the_command_trains_it_beside_the_backbone(tiny_folder, tmp_path, monkeypatch, picture):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    folder = tmp_path / "b"
    shutil.copytree(tiny_folder, folder)
    main(["e4t", "--weights", str(folder), "--images", "32"])
    records = json.loads((folder / "training.json").read_text())
    assert records["e4t"]["images"] == 32 and {"e4t", "plain word"} < set(records["e4t"]["scores"][-1])
    assert (tmp_path / "runs" / "e4t" / "00000032.png").is_file()
    backbone = escd.load_backbone(folder, device="cpu")
    learnt = escd.customize(picture, "appearance", backbone, method="e4t", steps=1, progress=False)
    assert learnt.encoder is not None and learnt.steps == 1
    # Goes on from them.
    shutil.rmtree(tmp_path / "runs")
    main(["e4t", "--weights", str(folder), "--images", "16", "--further"])
    records = json.loads((folder / "training.json").read_text())
    assert [e["images"] for e in records["e4t"]["earlier"]] == [32]


def test_the_command_trains_it_for_another_backbone_from_a_folder(
    tiny_folder, tmp_path, monkeypatch, picture, capsys
):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    (tmp_path / "images").mkdir()
    for k, image in enumerate(World(seed=3).batch(range(10)).image):
        pixels = ((image / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k}.png")
    weights = tmp_path / "out"
    asked = ["e4t", "--backbone", str(tiny_folder), "--data", str(tmp_path / "images")]
    main([*asked, "--weights", str(weights), "--images", "16"])
    assert "load_backbone" in capsys.readouterr().out
    backbone = escd.load_backbone(tiny_folder, filters=weights, device="cpu")
    assert backbone.filters == {}
    learnt = escd.customize(picture, "shape", backbone, method="e4t", steps=0)
    assert learnt.encoder is not None
    (name,) = json.loads((weights / "training.json").read_text())
    assert name == f"e4t-{backbone.identity_without_filters}"


def test_it_is_not_part_of_a_training_of_everything(capsys):
    for asked in (["e4t", "unet", "--data", "."], ["e4tt"]):
        with pytest.raises(SystemExit):
            main(asked)
        assert "e4t" in capsys.readouterr().err


def test_what_is_exported_for_mini_is_small(tmp_path):
    new = E4T.for_backbone(escd.load_backbone(WEIGHTS, device="cpu"))
    new.half().save_pretrained(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.5e6
