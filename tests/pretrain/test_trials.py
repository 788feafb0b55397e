"""Trials of the recipe: each changes what it says, and nothing else."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from escd import records
from escd.data.world import World
from escd.evaluation.autoencoder import IMAGE_SETS, autoencoder_scores
from escd.pretrain import loop, trials
from escd.pretrain.autoencoder import AutoencoderLoss, AutoencoderStage
from escd.pretrain.trials import CHANGES, TrialConfig, loop_of, main
from escd.pretrain.unet import UNetStage

pytestmark = pytest.mark.usefixtures("few_pictures")

CPU = torch.device("cpu")


def stage_of(stage: str, change: str) -> loop.Stage:
    return trials._stage(TrialConfig(stage, change, 1), CPU)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return World(seed=3).batch(range(8)).image


@pytest.fixture(scope="module")
def perceptual(few_pictures) -> trials.PerceptualLoss:
    return stage_of("autoencoder", "perceptual term").module


@pytest.mark.parametrize("stage", [AutoencoderStage, UNetStage])
def test_a_trial_changes_one_thing(stage):
    recipe = asdict(stage.loop)
    for change, wanted in CHANGES[stage.name].items():
        changed = asdict(loop_of(TrialConfig(stage.name, change, 1), stage.loop))
        differ = {k: changed[k] for k in recipe if recipe[k] != changed[k]}
        assert differ == {k: v for k, v in wanted.items() if k not in ("latents", "perceptual")}, change
        assert len(wanted) == (change != "none"), change


def test_trials_begin_with_the_same_weights(perceptual):
    recipe, term = stage_of("autoencoder", "none").module.vae.state_dict(), perceptual.vae.state_dict()
    assert all(torch.equal(recipe[name], term[name]) for name in recipe)


def test_the_perceptual_term_asks_for_the_same_tokens(perceptual, images):
    module = perceptual
    assert not [name for name, _ in module.named_parameters() if "tower" in name]
    assert module.perceptual(images, images) == 0
    near, far = (images + spread * torch.randn_like(images) for spread in (0.05, 0.5))
    near.requires_grad_(True)
    term = module.perceptual(near, images)
    term.backward()
    assert 0 < term < module.perceptual(far, images) and near.grad.abs().sum() > 0
    plain = AutoencoderLoss()
    plain.vae = module.vae
    losses = []
    for loss in (module, plain):
        torch.manual_seed(0)
        losses.append(float(loss(images)[0].detach()))
    assert losses[0] > losses[1] + 0.01, "the term is part of the loss"


def test_an_autoencoder_of_more_latents_is_trained_and_scored(tmp_path, monkeypatch, images):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(trials.paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(trials, "image_sets", lambda: {"tiles": (images, images)})
    metrics = trials.score(TrialConfig("autoencoder", "16 latents", 32))
    assert metrics["latents"] == 16 and metrics["scores"][-1]["images"] == 32
    # as many numbers for the linear code: four times those of the recipe
    recipe = autoencoder_scores(AutoencoderLoss().vae, images, images)["pca_psnr"]
    assert metrics["tiles"]["images"] == 8 and metrics["tiles"]["pca_psnr"] > recipe + 3
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["trials"], "no state another could go on from"


def test_the_command_runs_what_has_no_record(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(trials, "score", lambda config: asked.append(config.change) or {"scores": [{}]})
    for _ in range(2):
        main(["unet", "--images", "8", "--records", str(tmp_path)])
    assert asked == list(CHANGES["unet"])
    main(["unet", "--images", "8", "--seed", "1", "--changes", "none", "--records", str(tmp_path)])
    assert asked[-1] == "none" and len(asked) == len(CHANGES["unet"]) + 1
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    found = [(r.config["change"], r.config["seed"]) for r in trials.results("unet")]
    assert found[:3] == [("none", 0), ("none", 1), (list(CHANGES["unet"])[1], 0)]
    for wrong in (["unet", "--images", "8", "--changes", "magic"], ["unet", "--images", "0"], ["words"]):
        with pytest.raises(SystemExit):
            main(wrong)
    assert "known: 'none'" in capsys.readouterr().err


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Trials of the autoencoder and of the UNet, with made-up scores."""
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for change, latents, images in (
        ("16 latents", 16, 80), ("none", 4, 80), ("none", 4, 40), ("perceptual term", 4, 80),
    ):  # fmt: skip
        scores = {"psnr": 30.04, "detail": 0.501, "pca_psnr": 20.0 + latents, "pca_detail": latents / 100}
        metrics = {"latents": latents, "scores": [{}]} | dict.fromkeys(IMAGE_SETS, scores)
        records.get(TrialConfig("autoencoder", change, images), lambda config, metrics=metrics: metrics)
    for seed, mse in ((1, 0.2), (0, 0.21044)):
        last = {"mse": mse, "mse_noisy": 0.3, "shape": 0.19, "appearance": 0.18}
        records.get(
            TrialConfig("unet", "none", 8, seed=seed), lambda c, last=last: {"scores": [{"mse": 1}, last]}
        )
    yield tmp_path


def test_the_rates_are_compared_at_the_same_number_of_pictures(recorded):
    found = trials.by_latents()
    assert list(found) == [4, 16]
    assert {r.config["images"] for r in found.values()} == {80}
    assert found[4].config["change"] == "none"


def test_the_tables_have_a_row_for_each_trial(recorded):
    heads, _, *rows = trials.table("autoencoder").splitlines()
    assert heads.count("linear code") == len(IMAGE_SETS)
    assert [row.split("|")[1:3] for row in rows] == [
        [" none ", " 40 "], [" none ", " 80 "], [" 16 latents ", " 80 "], [" perceptual term ", " 80 "],
    ]  # fmt: skip
    assert rows[2].endswith("| 30.0 dB, 50 % | 36.0 dB, 16 % |")
    _, _, *rows = trials.table("unet").splitlines()
    assert rows == [
        "| none | 8 | 210.4 | 300.0 | 190.0 | 180.0 |",
        "| none, seed 1 | 8 | 200.0 | 300.0 | 190.0 | 180.0 |",
    ]


def test_without_records_there_is_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    assert trials.table("unet") == trials.table("autoencoder") == "" and trials.by_latents() == {}
