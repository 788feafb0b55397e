"""Pretraining of mini: the vocabulary, the towers' parity, the linear start, and a loop that survives being
killed."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from escd.backbone.diffusion import NOISE_SPREAD, draw_noise_levels
from escd.backbone.folder import save_text_encoder
from escd.data.names import COLOURS, PATTERNS, SHAPES
from escd.data.random import CounterRNG
from escd.data.world import World
from escd.files import together
from escd.paper.results import STAGES
from escd.pretrain import loop
from escd.pretrain import unet as unet_module
from escd.pretrain.autoencoder import (
    DECODER_NOISE,
    MOST_CHANNELS,
    AutoencoderLoss,
    AutoencoderStage,
    GrowingLoss,
    make_autoencoder,
    start_linear,
)
from escd.pretrain.command import STAGES as TRAINED
from escd.pretrain.command import WEIGHTS, main
from escd.pretrain.diffusion_loss import NOISE_MEAN, DiffusionLoss, denoising_error
from escd.pretrain.loop import LoopConfig, psnr, train
from escd.pretrain.networks import make_scheduler, make_unet
from escd.pretrain.optimizers import make_optimizer
from escd.pretrain.pairs import (
    MATERIAL,
    OUTLINE,
    PORTION,
    PROBED,
    QUARTET,
    ROUGH,
    SAME_APPEARANCE,
    SAME_SHAPE,
    SHADES,
    Pictures,
    materials,
    outlines,
    pair_captions,
    quartets,
)
from escd.pretrain.towers import WIDTH, TowerLoss, load_text_tower, save_tokenizer, text_tower
from escd.pretrain.unet import UNetStage
from escd.pretrain.vocabulary import WORDS, learn_merges, make_tokenizer
from escd.pretrain.words import GROUNDS, WordLoss, draw_captions

pytestmark = pytest.mark.usefixtures("few_pictures")


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
    clip = WordLoss(len(tokenizer)).clip.eval()
    nn.init.normal_(clip.positional_embedding, std=0.5)
    ids = tokenizer(
        ["a star shape with striped red appearance", "", "a zebra"], padding="max_length", return_tensors="pt"
    ).input_ids
    model = text_tower(clip, tokenizer)
    with torch.no_grad():
        out = model(ids)
        pooled = F.normalize(out.pooler_output @ clip.text_projection, dim=-1)
        assert torch.allclose(pooled, clip.encode_text(ids, normalize=True), atol=1e-5)
        save_text_encoder(model, tmp_path)
        again = CLIPTextModel.from_pretrained(tmp_path)
        assert torch.allclose(again(ids).last_hidden_state, out.last_hidden_state, atol=1e-6)


def test_loading_a_frozen_text_tower_draws_no_random_numbers():
    # A stage's first weights are drawn after it.
    state = torch.get_rng_state()
    text = load_text_tower(WEIGHTS, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in text.parameters())


def test_token_ids_do_not_depend_on_chance():
    # Each process of a distributed training makes its own vocabulary: if they differ, so do the words.
    program = (
        "import sys, types\n"
        "sys.modules['transformers'] = types.SimpleNamespace(CLIPTokenizer=None)\n"  # no part of it, and slow
        "from escd.pretrain.vocabulary import *; print(learn_merges(WORDS))"
    )
    merges = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert merges == {f"{learn_merges(WORDS)}\n"}
    assert learn_merges(["aab", "ab"])[0] == ("a", "b</w>")


def test_drawn_captions_say_what_they_are_labelled_with():
    captions, said = draw_captions(CounterRNG(3, torch.arange(300)))
    again, _ = draw_captions(CounterRNG(3, torch.arange(100, 300)))
    assert captions[100:] == again, "a caption depends on its number alone"
    assert 0.7 < said["full"].float().mean() < 0.9
    for k in said["full"].nonzero()[:, 0].tolist():
        words = captions[k].split()
        assert GROUNDS[said["ground"][k]] == words[-2] and words[-1] == "background"
        assert [c for c, shown in zip(COLOURS, said["colours"][k], strict=True) if shown] == sorted(
            (w for w in words if w in COLOURS), key=COLOURS.index
        )
        if said["shape"][k] < len(SHAPES):
            assert SHAPES[said["shape"][k]] in words
        if said["pattern"][k] < len(PATTERNS):
            assert PATTERNS[said["pattern"][k]] in words


def test_the_stages_of_pretraining_learn_all_they_count():
    # a parameter that gets no gradient would stop a distributed training
    torch.manual_seed(0)
    words = WordLoss(len(make_tokenizer()))
    captions, said = draw_captions(CounterRNG(0, torch.arange(16)))
    tokens = make_tokenizer()(captions, padding="max_length", return_tensors="pt").input_ids
    towers = TowerLoss()
    pictures = {"images": torch.rand(8, 3, 64, 64), "text": torch.randn(4, WIDTH), "same": torch.eye(4)}
    for module, batch in ((words, said | {"tokens": tokens}), (towers, pictures)):
        module(batch)[0].backward()
        idle = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert idle == []


@pytest.fixture(scope="module")
def unet_stage(few_pictures) -> UNetStage:
    stage = UNetStage(torch.device("cpu"), WEIGHTS)
    stage.load(WEIGHTS)
    return stage


def test_every_picture_has_a_partner_of_its_shape_alone_and_one_of_its_appearance_alone(unet_stage):
    index = torch.arange(40, 64)
    b, rows = quartets(unet_stage.world, index), torch.arange(len(index))
    assert len(rows) % QUARTET == 0
    for turned, shared, other in (
        (SAME_SHAPE, b.shape_family, b.appearance_family),
        (SAME_APPEARANCE, b.appearance_family, b.shape_family),
    ):
        partners = (rows ^ turned).tolist()
        assert [shared[k] for k in partners] == shared
        assert [other[k] for k in partners] != other
        assert not any(torch.equal(b.image[k], b.image[p]) for k, p in enumerate(partners))
    # A probe's targets are nearly the same for another pose and background.
    targets = {SAME_SHAPE: outlines(b.mask), SAME_APPEARANCE: materials(b.image, b.mask)}
    for turned, of_image in targets.items():
        apart = torch.cdist(of_image, of_image)
        assert (apart[rows, rows ^ turned] < apart.mean(1)).float().mean() > 0.9


def test_the_probe_targets_of_a_material_are_its_colours_and_its_roughness():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 8:56, 8:56] = 1
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    plain, grey = mask * red - (1 - mask), torch.zeros(1, 3, 64, 64)
    targets = materials(plain, mask)
    assert targets.shape == (1, MATERIAL)
    # A colour at a level is in one bin, the ground is in none; half way between two levels it is shared out.
    bins = (targets[0, : SHADES**3] / 2).square()
    assert bins[(SHADES - 1) * SHADES**2] == 1 and bins.sum() == 1
    shared = (materials(plain * 0.75, mask)[0, : SHADES**3] / 2).square()
    assert torch.allclose(shared[shared > 0], torch.full((8,), 0.125))
    # An even surface changes nowhere; a checkerboard at the first resolution alone, and not along diagonals.
    still = 0.4 * math.log(0.02)
    assert torch.allclose(targets[0, SHADES**3 :], torch.full((4 * ROUGH,), still))
    odd = torch.arange(64) % 2
    board = grey + (odd[:, None] ^ odd[None]).float()
    rough = materials(board, mask)[0, SHADES**3 :]
    assert torch.allclose(rough[:2], torch.full((2,), 0.4 * math.log(1.02)))
    assert torch.allclose(rough[2:], torch.full((4 * ROUGH - 2,), still), atol=1e-4)
    # A mask too thin to be eroded still has a material.
    line = torch.zeros(1, 1, 64, 64)
    line[..., 30, :] = 1
    assert materials(plain, line).isfinite().all()


def test_a_step_shows_a_filter_what_the_picture_shares_and_nothing_of_the_picture(unet_stage):
    step = unet_stage.batch(1 << 30, 32)
    plain = step.plain
    kinds = [("*m" in p.split(), "*a" in p.split()) for p in step.prompts]
    assert kinds == (
        [(False, False)] * plain
        + [(True, False)] * step.shape
        + [(False, True)] * step.appearance
        + [(True, True)] * step.both
    )
    # What a filter reads is the partner's, wherever in the ring the picture lies.
    rows = [int((unet_stage.latents == x).flatten(1).all(1).nonzero()[0]) for x in step.x_0[plain:]]
    m, a = [*rows[: step.shape], *rows[-step.both :]], rows[step.shape :]
    for read, of, turned in ((step.shape_ref, m, SAME_SHAPE), (step.appearance_ref, a, SAME_APPEARANCE)):
        assert torch.equal(read, unet_stage.features[torch.tensor(of) ^ turned].float())
        assert not torch.equal(read, unet_stage.features[torch.tensor(of)].float())
    # The probes' targets are the reference's own outline and material.
    assert step.probe_ref.shape[0] == PROBED and step.outline.shape == (PROBED, OUTLINE**2)
    row = int((unet_stage.features.float() == step.probe_ref[0]).all(1).nonzero()[0])
    assert torch.equal(unet_stage.outlines[row], step.outline[0])
    assert torch.equal(unet_stage.materials[row], step.material[0])
    kinds = (step.plain, step.shape, step.appearance, step.both)
    text = unet_stage.module.read(unet_stage.module.ids(step), kinds, step.shape_ref, step.appearance_ref)
    assert text.shape[0] == 32 and text.requires_grad


def test_the_unet_has_as_many_latents_as_the_autoencoder_beside_it(tmp_path):
    for name in ("text_encoder", "tokenizer", "image_tower"):
        (tmp_path / name).symlink_to(WEIGHTS / name)
    make_autoencoder(6).save_pretrained(tmp_path / "vae")
    stage = UNetStage(torch.device("cpu"), tmp_path)
    step = stage.batch(0, 16)
    assert step.x_0.shape == (16, 6, 16, 16)
    loss, _ = stage.module(step)
    loss.backward()
    assert all(p.grad is not None for p in stage.module.unet.parameters())
    stage.export(tmp_path)
    unet = json.loads((tmp_path / "unet/config.json").read_text())
    assert unet["in_channels"] == unet["out_channels"] == 6
    with torch.no_grad():
        assert stage.sample(stage.backbone.encode_prompt(["a star"])).shape == (1, 3, 64, 64)


def test_a_grown_unet_trained_further_keeps_its_old_channels(tmp_path, monkeypatch):
    monkeypatch.setattr(unet_module, "BEGUN", 32)
    for name in ("text_encoder", "tokenizer", "image_tower"):
        (tmp_path / name).symlink_to(WEIGHTS / name)
    make_autoencoder(6).save_pretrained(tmp_path / "vae")
    stage = UNetStage(torch.device("cpu"), tmp_path)

    def trained_further(record: dict) -> DiffusionLoss:
        (tmp_path / "training.json").write_text(json.dumps({"unet": record}))
        stage.load(tmp_path)
        return stage.module

    stage.export(tmp_path)
    # Six channels from the beginning: none was added.
    plain = trained_further(stage.facts())
    assert plain.old_channels == 6 and plain.means[0] == NOISE_MEAN and plain.weights.unique().tolist() == [1]
    # Three of them added, in a run that was killed after it exported the grown UNet.
    plain.set_old_channels(3)
    state, facts = stage.state_dict(), stage.facts()
    weights = plain.weights.clone()
    assert trained_further({}).old_channels == 6
    stage.load_state_dict(state)
    assert stage.module.old_channels == 3 and torch.equal(stage.module.weights, weights)
    # Three of them added, in a training that is finished.
    plain.set_old_channels(6)
    assert trained_further(facts).old_channels == 3 and torch.equal(stage.module.weights, weights)
    # Two of these in the exported UNet, the others added now.
    small = make_unet(2)
    small.save_pretrained(tmp_path / "unet")
    assert trained_further({}).old_channels == 2
    step = stage.batch(0, 16)
    assert "added" in stage.module(step)[1]


def test_facts_of_a_stage_are_in_the_training_record(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")

    class Factual(Toy):
        def facts(self) -> dict[str, int]:
            return {"old_channels": 4}

    train(lambda device: Factual(), weights=tmp_path, images=8, progress=False)
    assert json.loads((tmp_path / "training.json").read_text())["toy"]["old_channels"] == 4


def test_workers_paint_ahead_what_the_stage_would_paint_itself():
    stage = UNetStage(torch.device("cpu"), WEIGHTS)
    stage.workers = 2
    first = stage.first = 1 << 31
    for begun in (0, 1):  # one portion after the other, each in whole
        images, masks, captions = stage._pictures(first, PORTION // 2 + 1)
        b = quartets(stage.world, first + begun * PORTION + torch.arange(PORTION))
        assert torch.equal(images, b.image) and torch.equal(masks, b.mask) and captions == pair_captions(b)
    # two processes have every other portion
    theirs = torch.cat([Pictures(stage.world, first, rank, 2)[0][0] for rank in range(2)])
    assert torch.equal(theirs, quartets(stage.world, first + torch.arange(2 * PORTION)).image)
    # all of a few steps' pictures at once
    painted = []
    for k in range(2 * stage.reuse + 1):
        stage.batch(first + k * PORTION, PORTION)
        painted.append(stage.painted)
    new = [b - a for a, b in itertools.pairwise(painted)]
    assert painted[0] == unet_module.BEGUN and new == [0, 0, 0, PORTION, 0, 0, 0, PORTION]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph of kernels needs a GPU")
def test_a_replayed_step_has_the_gradients_of_one_that_is_not():
    stage = UNetStage(torch.device("cuda"), WEIGHTS)
    stage.load(WEIGHTS)
    stage.workers = 2
    module = stage.module.cuda()
    found = []
    for step in (stage.batch(1 << 32, 64), stage.batch((1 << 32) + 64, 64)):
        for training in (True, False):  # replayed, and not
            module.train(training)
            torch.manual_seed(3)
            loss, _ = module(step)
            loss.backward()
            gradients = {n: p.grad.cpu() for n, p in module.named_parameters()}
            found.append((loss.detach().cpu(), gradients))
            module.zero_grad(set_to_none=True)
    assert len(module.captured) == 1
    for (loss, gradients), (plain, others) in (found[:2], found[2:]):
        assert torch.allclose(loss, plain, rtol=1e-3)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, others[name], atol=1e-2 * float(others[name].norm())), name
    assert not torch.allclose(found[0][0], found[2][0])


def test_the_unet_and_both_filters_learn_from_the_one_error(unet_stage):
    module = unet_stage.module
    module(unet_stage.batch((1 << 30) + 64, 32))[0].backward()
    idle = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    for name in ("shape", "appearance"):
        assert module.filters[name].fuse[-1].weight.grad.abs().sum() > 0
    module.zero_grad(set_to_none=True)


def test_the_error_of_a_perfect_prediction_is_none_at_any_noise():
    scheduler, x_0 = make_scheduler(), torch.randn(64, 4, 16, 16)
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6, "the last step is pure noise"

    def exact(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha = scheduler.alphas_cumprod[t][:, None, None, None]
        return (alpha.sqrt() * x_t - x_0) / (1 - alpha).sqrt()  # v from x_t and x_0

    t = draw_noise_levels(scheduler, len(x_0), NOISE_MEAN)
    assert denoising_error(exact, scheduler, x_0, t).max() < 1e-3
    blind = denoising_error(lambda x_t, t: torch.zeros_like(x_t), scheduler, x_0, t)
    assert 0.8 < blind.mean() < 1.2


def test_noise_levels_are_normal_in_the_logarithm_and_reach_pure_noise():
    scheduler = make_scheduler()
    t = torch.cat([draw_noise_levels(scheduler, 64, NOISE_MEAN) for _ in range(200)])
    assert t.min() < 20 and t.max() > 990 and 0 <= t.min() and t.max() <= 999
    alpha = scheduler.alphas_cumprod[t].double()
    level = ((1 - alpha) / alpha.clamp(min=1e-9)).log() / 2
    assert level.median() == pytest.approx(NOISE_MEAN, abs=0.15)
    middle = (level - NOISE_MEAN).abs() < NOISE_SPREAD
    assert middle.float().mean() == pytest.approx(0.9 * 0.683 + 0.1 * 0.5, abs=0.05)


@pytest.mark.parametrize("latents", [4, 16, MOST_CHANNELS])
def test_the_linear_start_reconstructs_before_any_training(latents):
    torch.manual_seed(0)
    vae = AutoencoderLoss(latents).vae
    images = World(seed=21).batch(range(96)).image
    with torch.no_grad():
        random = psnr(vae(images[:32]).sample, images[:32]).mean()
        start_linear(vae, images)
        code = vae.encode(images).latent_dist
        linear = psnr(vae(images[:32]).sample, images[:32]).mean()
    assert linear > 20 and linear > random + 8
    assert code.mean.std() == pytest.approx(1.0, abs=0.15), "the latents start whitened"
    assert code.mean.shape[1] == latents


class Toy:
    """Fits y = 2 x; `fail_at` kills it, as a power cut would."""

    name = "toy"

    def __init__(self, fail_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.module = ToyLoss()
        self.heavy: list[nn.Module] = []
        self.loop = LoopConfig(images=400, batch_size=8, learning_rate=0.2)
        self.fail_at, self.started_at, self.loaded = fail_at, None, None

    def load(self, folder: Path) -> None:
        self.loaded = json.loads((folder / "toy.json").read_text())["weight"]
        nn.init.constant_(self.module.layer.weight, self.loaded)

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


class Drawing(Toy):
    """Its steps draw from every stream of random numbers, and from a bank filled as `UNetStage`'s is."""

    name = "drawing"

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.module = DrawingLoss()
        self.generator, self.bank = torch.Generator().manual_seed(5), torch.zeros(0)

    def batch(self, first: int, count: int) -> torch.Tensor:
        x = super().batch(first, count)
        self.bank = torch.cat([self.bank, torch.rand(1, generator=self.generator)])
        row = int(torch.randint(0, len(self.bank), (1,), generator=self.generator))
        return x + 0.1 * self.bank[row] + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002

    def state_dict(self) -> dict:
        return {"bank": self.bank, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.bank = state["bank"]
        self.generator.set_state(state["generator"])

    def evaluate(self) -> dict[str, float]:
        return super().evaluate() | {"drawn": float(torch.rand(1))}


class DrawingLoss(ToyLoss):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen += x.mean()
        return super().forward(x + 0.1 * torch.randn_like(x))


def train_drawing(folder: Path, checkpoint_seconds: float = 0, **given) -> dict:
    """A training in `folder`; everything it leaves, but for what takes seconds."""
    folder.mkdir(exist_ok=True)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    stage = Drawing(**given)
    record = train(
        lambda device: stage, weights=folder, checkpoint_seconds=checkpoint_seconds, progress=False
    )
    state = torch.load(loop.RUNS / "drawing" / "state.pt", weights_only=True)
    points = [{k: v for k, v in p.items() if k != "seconds"} for p in record["curve"] + record["scores"]]
    kept = ("parameters", "buffers", "ema", "optimizer", "processes")
    exported = {path.name: path.read_text() for path in folder.glob("*.json") if path.stem == "toy"}
    running = state["progress"]["running"]
    return {"points": points, "exported": exported, "running": running} | {name: state[name] for name in kept}


def equal(one: object, other: object) -> bool:
    """To the bit, whatever is nested in what."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.fixture
def uninterrupted(tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(loop, "RUNS", tmp_path / "whole")
    found = train_drawing(tmp_path / "weights of whole", checkpoint_seconds=1000)
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    return found


@pytest.mark.parametrize("checkpoint_seconds", [0, 1000])
def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(
    uninterrupted, tmp_path, checkpoint_seconds
):
    for fail_at in (0, 8, 104, 200, 392):
        with pytest.raises(KeyboardInterrupt):
            train_drawing(tmp_path / "weights", checkpoint_seconds, fail_at=fail_at)
    assert equal(train_drawing(tmp_path / "weights", checkpoint_seconds), uninterrupted)


@pytest.mark.parametrize("number", [1, 2, 12, 30, 47])
def test_one_killed_while_it_writes_ends_with_the_same_bits(uninterrupted, tmp_path, monkeypatch, number):
    replace, done = os.replace, []

    def killed(*given):
        done.append(1)
        if len(done) == number:
            raise KeyboardInterrupt
        replace(*given)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        train_drawing(tmp_path / "weights")
    assert equal(train_drawing(tmp_path / "weights"), uninterrupted)


def test_one_that_goes_on_from_exported_weights_starts_from_those_of_its_beginning(tmp_path, monkeypatch):
    def stopped(folder):
        if folder.parent.name == "checkpoints":  # the weights are exported, the state is not written yet
            raise KeyboardInterrupt
        return together(folder)

    ends = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(loop, "RUNS", folder / "first")
        train(lambda device: Toy(), weights=folder, images=64, progress=False)
        monkeypatch.setattr(loop, "RUNS", folder / "second")
        if name == "killed":
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(loop, "together", stopped)
                train(lambda device: Toy(), weights=folder, progress=False, further=True)
        record = train(lambda device: Toy(), weights=folder, progress=False, further=True)
        ends.append((record["scores"][-1]["weight"], [e["images"] for e in record["earlier"]]))
    assert ends[0] == ends[1]


def test_one_that_got_a_kill_9_ends_with_the_same_bits(uninterrupted, tmp_path):
    program = (
        "import os, time, test_pretrain as t; from pathlib import Path\n"
        "class Slow(t.Drawing):\n"
        "    def batch(self, *given):\n"
        "        time.sleep(0.05)\n"
        "        return super().batch(*given)\n"
        "t.Drawing = Slow\n"
        "print(os.getpid(), flush=True)\n"
        f"t.train_drawing(Path({str(tmp_path / 'weights')!r}))"
    )
    paths = [str(Path(__file__).parents[k]) for k in range(3)]
    environment = os.environ | {"ESCD_RUNS": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    command = [*warm.python(), "-c", program]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    with running.stdout:
        process = int(running.stdout.readline())
    drawn = tmp_path / "pretrain" / "drawing" / "00000072.png"  # the first of six evaluations
    while not drawn.exists():
        assert running.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    shutil.move(tmp_path / "pretrain", tmp_path / "runs")
    state = torch.load(tmp_path / "runs" / "drawing" / "state.pt", weights_only=True)
    assert 0 < state["progress"]["images"] < 400
    assert equal(train_drawing(tmp_path / "weights"), uninterrupted)


class Inner(Drawing):
    """Muon trains its kernel, AdamW the rest."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.module.kernel = nn.Parameter(torch.ones(2, 3, 1, 1))
        self.module.forward = lambda x: self.loss(x)

    def loss(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, logs = DrawingLoss.forward(self.module, x)
        return loss + (self.module.kernel - torch.arange(6).view(2, 3, 1, 1) / 6).square().mean(), logs

    def muon_parameters(self) -> list[nn.Parameter]:
        return [self.module.kernel, self.module.layer.bias]


def test_muon_trains_what_the_stage_names_and_resumes_to_the_bit(tmp_path, monkeypatch):
    ends = []
    for name in ("whole", "killed"):
        monkeypatch.setattr(loop, "RUNS", tmp_path / name)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        given = {"weights": tmp_path / name, "checkpoint_seconds": 0, "progress": False, "optimizer": "muon"}
        (tmp_path / name).mkdir()
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                train(lambda device: Inner(fail_at=200), **given)
        record = train(lambda device: Inner(), **given)
        assert record["config"]["optimizer"] == "muon"
        state = torch.load(tmp_path / name / "drawing" / "state.pt", weights_only=True)
        ends.append({name: state[name] for name in ("parameters", "ema", "optimizer")})
    assert equal(*ends)
    kernel = ends[0]["parameters"]["kernel"].flatten()
    assert (kernel - torch.arange(6) / 6).square().mean() < 0.05  # it was 0.42
    # A bias has no matrix: Muon has the kernel alone.
    assert [tuple(s["momentum_buffer"].shape) for s in ends[0]["optimizer"]["muon"]["state"].values()] == [
        (2, 3)
    ]
    assert len(ends[0]["optimizer"]["adamw"]["state"]) == 2


def test_muon_takes_the_step_of_pytorch_and_adamw_the_rest():
    torch.manual_seed(0)
    kernel, bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
    alone = nn.Parameter(kernel.detach().clone().flatten(1))
    ours = make_optimizer([kernel, bias], [kernel, bias], 0.1, 0.01)
    muon = torch.optim.Muon(
        [alone], lr=0.05, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    for group in ours.param_groups:
        group["lr"] = 0.05
    before = bias.detach().clone()
    for _ in range(3):
        kernel.grad, bias.grad = torch.randn(4, 3, 3, 3), torch.ones(4)
        alone.grad = kernel.grad.flatten(1).clone()
        ours.step()
        muon.step()
    assert torch.equal(kernel.flatten(1), alone)
    assert torch.allclose(before - bias, torch.full((4,), 0.15), atol=1e-5)  # AdamW's steps on one gradient


def test_muon_is_refused_where_no_stage_says_what_it_may_train(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    for optimizer, said in (("muon", "Muon is not for toy"), ("sgd", "adamw or muon, not 'sgd'")):
        with pytest.raises(ValueError, match=said):
            train(lambda device: Toy(), weights=tmp_path, optimizer=optimizer, progress=False)


def test_a_state_of_an_older_layout_or_of_more_processes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    train_drawing(tmp_path / "weights")
    path = tmp_path / "runs" / "drawing" / "state.pt"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"processes": state["processes"] * 2}, path)
    with pytest.raises(ValueError, match=r"state\.pt is of a training on 2 processes, not on 1.*ESCD_RUNS"):
        train_drawing(tmp_path / "weights")
    torch.save({name: value for name, value in state.items() if name != "layout"}, path)
    with pytest.raises(ValueError, match=r"state\.pt was written by another version of escd.*ESCD_RUNS"):
        train_drawing(tmp_path / "weights")


def emptied(stage: UNetStage) -> UNetStage:
    """The same stage with a ring of its own, in which no picture is yet."""
    stage = copy.copy(stage)
    for name in unet_module.RINGS:
        setattr(stage, name, torch.zeros(unet_module.BANK, *getattr(stage, name).shape[1:]))
    stage.features, stage.captions = torch.empty(0), [()] * unet_module.BANK
    stage.generator = torch.Generator().manual_seed(13)
    stage.painted = stage.steps = 0
    return stage


def test_the_bank_of_pictures_is_part_of_the_state(unet_stage, tmp_path, monkeypatch):
    monkeypatch.setattr(unet_module, "BANK", 64)
    monkeypatch.setattr(unet_module, "BEGUN", 32)

    def steps(stage: UNetStage, numbers: range) -> list[dict]:
        return [vars(stage.batch(first, 16)) for first in numbers]

    one, two = emptied(unet_stage), emptied(unet_stage)
    two.load_state_dict(one.state_dict())  # nothing painted yet
    steps(one, range(0, 160, 16))  # more than the ring holds
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    further = range(160, 320, 16)
    assert equal(steps(two, further), steps(one, further))


def test_workers_paint_on_from_where_they_were():
    world = World(seed=3)
    for rank in range(2):
        whole, rest = Pictures(world, 256, rank, 2), Pictures(world, 256, rank, 2, taken=2)
        assert torch.equal(whole[3][0], rest[1][0]) and whole[3][2] == rest[1][2]


def test_a_diverging_run_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path)
    toy = Toy()
    nn.init.constant_(toy.module.layer.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(lambda device: toy, weights=tmp_path, progress=False)


def test_a_step_without_a_finite_gradient_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")

    class Stumbling(Toy):
        def batch(self, first: int, count: int) -> torch.Tensor:
            return super().batch(first, count) * (float("nan") if first in (0, 104) else 1.0)

    record = train(lambda device: Stumbling(), weights=tmp_path, progress=False)
    assert record["scores"][-1]["weight"] == pytest.approx(2, abs=0.3)
    assert all(math.isfinite(point["loss"]) for point in record["curve"])
    assert capsys.readouterr().out.count("skipped") == 2


def test_learning_rate_rises_stays_and_falls():
    config = LoopConfig(images=1000, batch_size=1, learning_rate=1.0, warmup=0.1, decay=0.5)
    rates = [config.rate(n) for n in (0, 50, 100, 400, 500, 750, 999)]
    assert rates[0] < 0.01 and rates[1] == pytest.approx(0.5, abs=0.01) and rates[2:5] == [1, 1, 1]
    assert rates[5] == pytest.approx(0.5) and rates[6] < 0.01


def test_a_training_goes_on_from_exported_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "first")
    train(lambda device: Toy(), weights=tmp_path, progress=False)
    monkeypatch.setattr(loop, "RUNS", tmp_path / "second")
    toy = Toy()
    record = train(lambda device: toy, weights=tmp_path, images=8, progress=False, further=True)
    assert toy.loaded == pytest.approx(2, abs=0.3)
    assert record["images"] == 8 and [one["images"] for one in record["earlier"]] == [400]
    monkeypatch.setattr(loop, "RUNS", tmp_path / "third")
    record = train(lambda device: Toy(), weights=tmp_path, images=16, progress=False, further=True)
    assert [one["images"] for one in record["earlier"]] == [400, 8]
    assert (tmp_path / "third" / "toy" / "checkpoints" / "00000424" / "toy.json").is_file()


def test_the_state_of_another_network_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    train(lambda device: Toy(), weights=tmp_path, images=8, progress=False)
    wider = Toy()
    wider.module.layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"state\.pt is the state of another network.*ESCD_RUNS"):
        train(lambda device: wider, weights=tmp_path, images=16, progress=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["oven"],
        ["unet", "--images", "0"],
        ["autoencoder", "--latents", "0", "--weights", "here"],
        ["autoencoder", "--latents", "16"],
        ["words", "--optimizer", "muon"],
        ["--latents", "16", "--weights", "here", "--further"],
    ],
)
def test_the_command_line_refuses_nonsense(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2 and "error" in capsys.readouterr().err


def test_the_shipped_weights_are_small_safe_and_recorded():
    files = [p for p in WEIGHTS.parent.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 40e6
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    records = json.loads((WEIGHTS / "training.json").read_text())
    assert set(records) - {"e4t"} == set(STAGES)
    assert list(TRAINED) == list(STAGES), "the command trains what the notebooks and the paper report"
    for record in records.values():
        assert record["images"] > 0 and record["seconds"] > 0 and record["curve"] and record["scores"]


class Small(AutoencoderStage):
    def batch(self, first: int, count: int) -> torch.Tensor:
        return torch.rand(min(count, 64), 3, 64, 64) * 2 - 1

    def evaluate(self) -> dict[str, float]:
        return {}

    def grid(self, path: Path) -> None:
        pass


def test_the_autoencoder_goes_on_with_its_decoder_alone(tmp_path, monkeypatch):
    # The UNet has learnt the latents that the encoder makes.
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    shutil.copytree(WEIGHTS / "vae", tmp_path / "vae")
    (tmp_path / "training.json").write_text((WEIGHTS / "training.json").read_text())

    stages = []

    def make(device):
        stages.append(Small(device, tmp_path))
        return stages[-1]

    for images in (16, 32):  # the second is resumed
        train(
            make,
            weights=tmp_path,
            images=images,
            progress=False,
            further=images == 16,
            evaluations=1,
        )
        files = (folder / "vae/diffusion_pytorch_model.safetensors" for folder in (WEIGHTS, tmp_path))
        before, after = map(load_file, files)
        changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"decoder", "post_quant_conv"}
    configs = [json.loads((f / "vae/config.json").read_text()) for f in (WEIGHTS, tmp_path)]
    assert configs[0]["scaling_factor"] == configs[1]["scaling_factor"]
    old, added = 4, configs[0]["latent_channels"] - 4
    expected = torch.tensor([DECODER_NOISE[0]] * old + [DECODER_NOISE[1]] * added)
    for stage in stages:  # a sampled latent is off by more than an encoded one
        assert torch.allclose(stage.module.noise.flatten() * configs[0]["scaling_factor"], expected)


def test_an_autoencoder_that_was_killed_after_it_exported_goes_on_growing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    monkeypatch.setattr("escd.pretrain.autoencoder.even_out", lambda *_: None)
    shutil.copytree(WEIGHTS / "vae", tmp_path / "vae")
    (tmp_path / "training.json").write_text((WEIGHTS / "training.json").read_text())
    stages = []

    def make(device):
        stages.append(Small(device, tmp_path, 18))
        return stages[-1]

    for images in (16, 32):  # the second is resumed, where the weights have eighteen channels already
        train(make, weights=tmp_path, images=images, progress=False, further=True, evaluations=1)
        assert isinstance(stages[-1].module, GrowingLoss)
    first, second = (stage.module.before.state_dict() for stage in stages)
    assert all(torch.equal(first[name], second[name]) for name in first)
