"""The curve of a training: what each checkpoint can do, and what it had cost."""

from __future__ import annotations

import json

import pytest

from escd import records
from escd.evaluation import curve
from escd.evaluation.autoencoder import image_sets
from escd.evaluation.curve import (
    CurveConfig,
    ReconstructionCurveConfig,
    in_words,
    main,
    points,
    score_autoencoder,
    score_checkpoint,
    seconds_at,
)


def test_the_seconds_of_a_checkpoint_add_up_over_trainings(tmp_path):
    trained = {
        "earlier": [{"images": 100, "seconds": 10.0}, {"images": 50, "seconds": 4.0}],
        "scores": [{"images": 20, "seconds": 3.0}, {"images": 40, "seconds": 6.0}],
    }
    (tmp_path / "training.json").write_text(json.dumps({"unet": trained}))
    found = {images: seconds_at(images, tmp_path) for images in (0, 100, 150, 170, 190, 33)}
    assert found == {0: 0.0, 100: 10.0, 150: 14.0, 170: 17.0, 190: 20.0, 33: None}


def test_a_checkpoint_is_scored_like_the_study(tmp_path, monkeypatch):
    for attribute, steps in (("shape", 2), ("appearance", 1)):  # enough to see that it runs
        monkeypatch.setitem(curve.TUNING[attribute], "steps", steps)
    backbone = curve.MODELS["mini"].folder
    metrics = score_checkpoint(CurveConfig(7, prompts=4, references=1, sampler_steps=2), backbone)
    assert set(metrics["obeyed"]) == {"shape", "pattern", "colours", "background", "all"}
    for attribute in ("shape", "appearance"):
        assert all(0 <= metrics[attribute][name] <= 1 for name in ("retrieved", "leaked", "iou"))
    assert metrics["trained_seconds"] is None
    untuned = score_checkpoint(CurveConfig(7, prompts=4, references=0, sampler_steps=2), backbone)
    assert set(untuned) == {"obeyed", "trained_seconds"} and untuned["obeyed"] == metrics["obeyed"]


def test_points_are_in_the_order_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    points.cache_clear()
    for images, prompts in ((20, 8), (10, 8), (20, 16)):
        records.get(CurveConfig(images, prompts), lambda config: {"n": config.images}, folder=tmp_path)
    assert [record.metrics["n"] for record in points()] == [10, 20]
    assert points()[1].config["prompts"] == 16, "the one made last"
    points.cache_clear()


def test_a_checkpoint_of_the_autoencoder_is_scored_like_the_study(tmp_path, monkeypatch, capsys):
    folder, sets = curve.MODELS["mini"].folder, image_sets()
    few = {name: tuple(part[:16] for part in sets[name]) for name in ("world", "photographs")}
    monkeypatch.setattr(curve, "image_sets", lambda: few | {"tiles": sets["tiles"]})
    metrics = score_autoencoder(ReconstructionCurveConfig(7), folder)
    (stored,) = [r for r in records.all("autoencoder") if r.config == {"images": "tiles", "backbone": "mini"}]
    assert metrics["tiles"]["psnr"] == pytest.approx(stored.metrics["psnr"], abs=0.01)
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    points.cache_clear()
    records.get(ReconstructionCurveConfig(7), lambda config: metrics, folder=tmp_path)
    (point,) = points(stage="autoencoder")
    assert in_words(point).endswith(f"tiles {metrics['tiles']['psnr']:.1f} dB")
    points.cache_clear()


def test_no_checkpoints_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoints", str(tmp_path)])
    assert "training the unet leaves them there" in capsys.readouterr().err
