"""Scoring of subjects: what is compared with what, with small random networks for CLIP and DINO."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from escd.evaluation import benchmark as evaluate
from escd.evaluation.benchmark import (
    CARRIERS,
    SCENES,
    EvaluationConfig,
    Scorers,
    carriers_and_scenes,
    subjects_in,
)
from escd.loading import read_backbone
from escd.method.config import TuningConfig


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder with a tiny vision transformer, as transformers writes one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**size, image_size=16, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def scorers(dino, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = open_clip.CLIP(
        16,
        open_clip.CLIPVisionCfg(image_size=16, patch_size=8, width=16, layers=1, head_width=8),
        open_clip.CLIPTextCfg(width=16, heads=2, layers=1),
    )
    preprocess = open_clip.image_transform(16, is_train=False)
    (tmp_path / "clip.safetensors").touch()  # what is in it is open_clip's to read
    monkeypatch.setattr(evaluate, "create_model_from_pretrained", lambda *_, **__: (model, preprocess))
    return Scorers(torch.device("cpu"), tmp_path / "clip.safetensors", str(dino))


@pytest.fixture
def folder(tmp_path):
    """A picture with a mask, a folder of two pictures, and a folder without any."""
    for name in ("pets", "empty"):
        (tmp_path / name).mkdir()
    for file, colour in (("vase.png", "red"), ("pets/1.jpg", "blue"), ("pets/0.jpg", "green")):
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((10, 18, 54, 46), fill=colour)
        picture.save(tmp_path / file)
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((10, 18, 54, 46), fill=255)
    mask.save(tmp_path / "vase.mask.png")
    return tmp_path


def test_one_image_of_each_subject(folder):
    vase, pets = subjects_in(folder)
    assert (vase.name, vase.image.name, vase.mask.name) == ("vase", "vase.png", "vase.mask.png")
    assert (pets.name, pets.image.name, pets.mask) == ("pets", "0.jpg", None)
    with pytest.raises(FileNotFoundError, match="holds no images"):
        subjects_in(folder / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        subjects_in(folder / "nowhere")


@pytest.mark.parametrize("attribute", CARRIERS)
def test_no_two_prompts_are_alike(attribute):
    every = carriers_and_scenes(attribute, len(SCENES) * len(CARRIERS[attribute]))
    assert len(set(every)) == len(every)
    assert {thing for thing, _ in every[:4]} == set(CARRIERS[attribute])


def test_what_is_scored(scorers, folder):
    reference = Image.open(folder / "vase.png")
    inside = torch.zeros(64, 64)
    inside[18:47, 10:55] = 1
    turned, empty = reference.rotate(90), Image.new("RGB", (64, 64), "white")
    texts = ["a cake", "a car", "a cat"]
    scores = scorers.score([reference, turned, empty], texts, reference, inside)
    assert set(scores) == {"clip_t", "clip_i", "dino", "iou"}
    for name in ("clip_i", "dino"):
        assert scores[name][0] == pytest.approx(1, abs=1e-5) and scores[name][2] < 0.9999
    assert scores["iou"][0] > 0.75 and scores["iou"][2] is None
    # each image with its own text
    texts_first = scorers.score([turned, reference], texts[1::-1], reference, inside)
    assert texts_first["clip_t"] == pytest.approx(scores["clip_t"][1::-1], abs=1e-5)
    assert "iou" not in scorers.score([reference], texts[:1], reference, None)


def test_the_floor_is_the_untouched_backbone(scorers, folder, tiny_folder, tmp_path):
    backbone = read_backbone(tiny_folder, name="tiny")
    before = {n: p.clone() for n, p in backbone.unet.named_parameters()}
    subject = subjects_in(folder)[0]
    found = {}
    for floor in (True, False):
        config = EvaluationConfig(
            "vase",
            TuningConfig.of("shape", steps=2, batch_size=2, views=4, learning_rate=0.05),
            backbone="tiny",
            floor=floor,
            prompts=2,
            images=2,
            sampler_steps=2,
        )
        found[floor] = evaluate.evaluate(subject, config, backbone, scorers, tmp_path / "out")
        drawn = tmp_path / "out" / "vase-shape" / ("floor" if floor else "learnt")
        assert len(list(drawn.glob("*.png"))) == 4
    assert all(len(values) == 4 for metrics in found.values() for values in metrics.values())
    assert found[True]["clip_i"] != found[False]["clip_i"]
    assert all(torch.equal(p, before[n]) for n, p in backbone.unet.named_parameters())


def test_the_command_writes_records_and_does_not_run_them_twice(
    scorers, folder, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evaluate, "Scorers", lambda *_: scorers)
    output = tmp_path / "scores"
    asked = [
        str(folder),
        "--attribute",
        "appearance",
        "--backbone",
        str(tiny_folder),
        "--output",
        str(output),
    ]
    evaluate.main([*asked, "--prompts", "1", "--steps", "1"])
    table = capsys.readouterr().out
    assert "untouched backbone" in table and "clip_t" in table
    lines = (output / "evaluation.jsonl").read_text().splitlines()
    assert len(lines) == 4
    made = [json.loads(line) for line in lines]
    assert {one["config"]["floor"] for one in made} == {True, False}
    for one in made:
        told = {name: how["steps"] for name, how in one["learnt"].items()}
        assert told == ({} if one["config"]["floor"] else {"appearance": 1})
    evaluate.main([*asked, "--prompts", "1", "--steps", "1"])
    assert (output / "evaluation.jsonl").read_text().splitlines() == lines
    assert table == capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"--prompts": "0"}, "from 1 to 80"),
        ({"--steps": "-1"}, "steps"),
        ({"--backbone": "nowhere"}, "nowhere"),
        ({"--backbone": "mini", "--clip": "nothing.safetensors"}, "nothing.safetensors"),
        ({"--backbone": "mini", "--filters": "nowhere"}, "no attribute filters in nowhere"),
    ],
)
def test_bad_input_is_told_in_a_line(changes, told, folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([str(folder), "--attribute", "shape", *[x for pair in changes.items() for x in pair]])
    assert stopped.value.code == 2 and told in capsys.readouterr().err
