"""Pretraining of mini: the vocabulary, the towers' parity, the linear start, and a loop that survives being
killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from escd.pretrain import loop
from escd.pretrain.__main__ import WEIGHTS, main
from escd.pretrain.autoencoder import AutoencoderLoss, start_linear
from escd.pretrain.loop import LoopConfig, psnr, train
from escd.pretrain.towers import TowerLoss, save_text_tower, save_tokenizer, text_tower
from escd.pretrain.vocabulary import WORDS, make_tokenizer
from escd.world import World


def test_every_word_of_the_world_is_one_token(tmp_path):
    tokenizer = make_tokenizer()
    spoken = {w for captions in World(seed=0).batch(range(200)).captions for c in captions for w in c.split()}
    assert spoken <= set(WORDS)
    save_tokenizer(tokenizer, tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for word in WORDS:
        ids = tokenizer(word, add_special_tokens=False).input_ids
        assert len(ids) == 1 and again(word, add_special_tokens=False).input_ids == ids
    assert len(tokenizer("zebra", add_special_tokens=False).input_ids) > 1
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}


def test_the_text_tower_gives_open_clips_numbers(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    clip = TowerLoss(len(tokenizer)).clip.eval()
    nn.init.normal_(clip.positional_embedding, std=0.5)
    ids = tokenizer(
        ["a star shape with striped red appearance", "", "a zebra"], padding="max_length", return_tensors="pt"
    ).input_ids
    model = text_tower(clip, tokenizer)
    with torch.no_grad():
        out = model(ids)
        pooled = F.normalize(out.pooler_output @ clip.text_projection, dim=-1)
        assert torch.allclose(pooled, clip.encode_text(ids, normalize=True), atol=1e-5)
        save_text_tower(model, tmp_path)
        again = CLIPTextModel.from_pretrained(tmp_path)
        assert torch.allclose(again(ids).last_hidden_state, out.last_hidden_state, atol=1e-6)


def test_the_linear_start_reconstructs_before_any_training():
    torch.manual_seed(0)
    vae = AutoencoderLoss().vae
    images = World(seed=21).batch(range(96)).image
    with torch.no_grad():
        random = psnr(vae(images[:32]).sample, images[:32]).mean()
        start_linear(vae, images)
        latents = vae.encode(images).latent_dist
        linear = psnr(vae(images[:32]).sample, images[:32]).mean()
    assert linear > 20 and linear > random + 8
    assert latents.mean.std() == pytest.approx(1.0, abs=0.15), "the latents start whitened"


class Toy:
    """Fits y = 2 x; `fail_at` kills it, as a power cut would."""

    name = "toy"

    def __init__(self, fail_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module = ToyLoss()
        self.loop = LoopConfig(images=400, batch_size=8, learning_rate=0.2)
        self.fail_at, self.started_at = fail_at, None

    def batch(self, first: int, count: int) -> torch.Tensor:
        self.started_at = first if self.started_at is None else self.started_at
        if self.fail_at is not None and first >= self.fail_at:
            raise KeyboardInterrupt
        return torch.linspace(-1, 1, count)[:, None]

    def evaluate(self) -> dict[str, float]:
        return {"weight": float(self.module.layer.weight.detach())}

    def grid(self, path: Path) -> None:
        path.write_text("drawn")

    def export(self, folder: Path) -> None:
        (folder / "toy.json").write_text(json.dumps(self.evaluate()))


class ToyLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = (self.layer(x) - 2 * x).square().mean()
        return loss, {"squared": loss.detach()}


def test_the_loop_resumes_where_it_was_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    with pytest.raises(KeyboardInterrupt):
        train(lambda device: Toy(fail_at=200), weights=tmp_path, checkpoint_seconds=0, progress=False)
    stage = Toy()
    record = train(lambda device: stage, weights=tmp_path, checkpoint_seconds=0, progress=False)
    assert stage.started_at == 200, "the images seen before the kill were forgotten"
    assert record["images"] == 400 and record["scores"][-1]["weight"] == pytest.approx(2, abs=0.3)
    assert record["curve"][0]["images"] < 200 < record["curve"][-1]["images"]
    stored = json.loads((tmp_path / "training.json").read_text())["toy"]
    assert stored["images"] == 400 and {"device", "threads", "torch"} <= set(stored["environment"])
    assert json.loads((tmp_path / "toy.json").read_text())["weight"] == pytest.approx(2, abs=0.3)
    assert len(list((tmp_path / "runs" / "toy").glob("*.png"))) == 6


def test_a_diverging_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    toy = Toy()
    nn.init.constant_(toy.module.layer.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(lambda device: toy, weights=tmp_path, progress=False)


def test_learning_rate_rises_stays_and_falls():
    config = LoopConfig(images=1000, batch_size=1, learning_rate=1.0, warmup=0.1, decay=0.5)
    rates = [config.rate(n) for n in (0, 50, 100, 400, 500, 750, 999)]
    assert rates[0] < 0.01 and rates[1] == pytest.approx(0.5, abs=0.01) and rates[2:5] == [1, 1, 1]
    assert rates[5] == pytest.approx(0.5) and rates[6] < 0.01


@pytest.mark.parametrize("arguments", [["oven"], ["unet", "--images", "0"]])
def test_the_command_line_refuses_nonsense(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "error" in capsys.readouterr().err


def test_the_shipped_weights_are_small_safe_and_recorded():
    files = [p for p in WEIGHTS.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    records = json.loads((WEIGHTS / "training.json").read_text())
    assert set(records) == {"autoencoder", "towers", "unet", "filters"}
    for record in records.values():
        assert record["images"] > 0 and record["seconds"] > 0 and record["curve"] and record["scores"]
