"""The protocol, on a tiny backbone with random weights and on scores whose table is known."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import as_record

from escd import records
from escd.backbone.parts import parameters_of
from escd.data.names import BACKGROUNDS, COLOURS, PATTERNS, SHAPES
from escd.evaluation import autoencoder, configs, judges, prompts, study, tables, texture
from escd.evaluation import scores as scores_module
from escd.evaluation.configs import (
    AutoencoderConfig,
    CompositionConfig,
    ObedienceConfig,
    RankConfig,
    StudyConfig,
)
from escd.evaluation.judges import Judge, Judges
from escd.evaluation.prompts import prompts_for
from escd.evaluation.references import load_references
from escd.evaluation.silhouettes import named_outlines
from escd.loading import load_backbone
from escd.method.config import TuningConfig
from escd.method.e4t import E4T


@pytest.fixture(scope="module")
def listed():
    return load_references(which="development")


@pytest.fixture
def made(backbone, monkeypatch, tmp_path) -> study.Study:
    """A study of the tiny backbone with judges that have learnt nothing."""
    torch.manual_seed(0)
    untrained = Judges(Judge().eval().requires_grad_(False))
    monkeypatch.setattr(study, "_judges", lambda: untrained)
    monkeypatch.setattr(study, "load_backbone", lambda name, device: backbone)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    (tmp_path / "weights" / "judges").mkdir(parents=True)
    monkeypatch.setattr(study.paths, "WEIGHTS", tmp_path / "weights")
    return study.Study()


SHORT = {"list": "development", "backbone": "tiny", "sampler_steps": 2}


# ---- prompts


def test_prompts_ask_for_something_else(listed):
    for reference in listed:
        asked = prompts_for(reference, "shape")
        assert asked == prompts_for(reference, "shape")
        colours, shapes = prompts.other_colours(reference.material.tile), prompts.other_shapes(reference.mask)
        for one in asked:
            look = f"{one.pattern} {' and '.join(one.colours)}"
            assert one.text == f"a *m shape with {look} appearance on a {one.background} background"
            assert one.pattern in PATTERNS
            assert set(one.colours) <= set(colours)
            assert len(one.colours) == len(set(one.colours)) == (1 if one.pattern == "solid" else 2)
            assert one.background in BACKGROUNDS and one.background != reference.background
        asked = prompts_for(reference, "appearance")
        assert len({one.shape for one in asked}) == 4
        for one in asked:
            assert one.shape in shapes and one.background != reference.background
            assert "*a" in one.text and "*m" not in one.text
    assert prompts_for(listed[0], "shape") != prompts_for(listed[1], "shape")
    with pytest.raises(ValueError, match="not for 'mood'"):
        prompts_for(listed[0], "mood")


def test_prompts_of_a_pair_avoid_both_backgrounds(listed):
    for first, second in zip(listed, [*listed][1:], strict=False):
        for one in prompts.prompts_for_pair(first, second):
            assert one.background not in (first.background, second.background)
            assert one.shape is one.pattern is one.colours is None


def test_other_colours_and_shapes():
    red = torch.tensor([0.86, 0.1, 0.1])[:, None, None].expand(3, 64, 64)
    assert set(COLOURS) - set(prompts.other_colours(red)) == {"red"}
    star = named_outlines()[3 * SHAPES.index("star")]
    assert "star" not in prompts.other_shapes(star) and "ring" in prompts.other_shapes(star)


def test_named_prompts_cover_everything_evenly():
    asked = prompts.named_prompts(512, seed=0)
    assert asked == prompts.named_prompts(512, seed=0) != prompts.named_prompts(512, seed=1)
    for names, attribute in ((SHAPES, "shape"), (PATTERNS, "pattern"), (BACKGROUNDS, "background")):
        counts = [sum(getattr(one, attribute) == name for one in asked) for name in names]
        assert min(counts) > 0.5 * len(asked) / len(names)


# ---- scores


def test_oracle_images_score_as_right(listed, backbone, monkeypatch):
    """Without an autoencoder in between, what a prompt asks for is found by every measure."""
    monkeypatch.setattr(type(backbone), "encode_images", lambda self, images: images)
    monkeypatch.setattr(type(backbone), "decode_latents", lambda self, latents: latents)
    monkeypatch.setattr(type(backbone), "image_size", 64)
    found = {"shape": [], "appearance": []}
    for reference in listed.references[:4]:
        for mode in found:
            asked = prompts_for(reference, mode)
            images = scores_module.oracle_reconstructions(asked, reference, reference, backbone)
            scores = scores_module.score_images(
                images, asked, reference, reference, listed, judges.load_judges()
            )
            assert not any(scores["failed"])
            found[mode].append(scores)
    shape = {name: np.mean([s[name] for s in found["shape"]]) for name in found["shape"][0]}
    look = {name: np.mean([s[name] for s in found["appearance"]]) for name in found["appearance"][0]}
    print(shape, look)
    assert shape["iou"] > 0.9 and shape["silhouette"] >= 0.9 and look["material"] >= 0.9
    assert look["iou"] < 0.7 and shape["texture_similarity"] < look["texture_similarity"]
    for name in ("pattern", "colours", "background"):
        assert shape[f"obeyed_{name}"] >= 0.8, name
    assert look["obeyed_shape"] >= 0.9 and look["obeyed_background"] >= 0.9


def test_a_picture_without_foreground_has_no_scores(listed):
    plain = torch.full((1, 3, 64, 64), 0.1)
    one = prompts.Prompt("", "gray", shape="star")
    scores = scores_module.score_images(plain, [one], listed[0], listed[0], listed, judges.load_judges())
    assert scores["failed"] == [True] and scores["iou"] == [None] and scores["material"] == [None]
    assert scores["obeyed_shape"] == [False]


def test_runs_are_scored_stored_and_repeat(made, listed, tmp_path):
    tuning = TuningConfig.of("shape", "encoder", steps=2, views=4)
    config = StudyConfig("shape", listed[0].id, "customized", tuning, **SHORT)
    record = made.run(config, tmp_path)
    assert len(record.metrics["failed"]) == prompts.PROMPTS and record.metrics["megabytes"] > 0
    assert {"obeyed_pattern", "obeyed_colours", "obeyed_background"} <= record.metrics.keys()
    assert made.run(config, tmp_path) == record  # stored
    assert made.score(config) == record.metrics  # from the kept customization, to the bit
    for kept in (tmp_path / "runs").iterdir():
        kept.unlink()
    assert made.score(config) == record.metrics  # learnt again, to the bit
    assert f"references {config.list}" in record.inputs and "judges" in record.inputs


def test_an_interrupted_arm_leaves_no_record_and_nothing_kept(made, listed, tmp_path, interrupted_once):
    config = TuningConfig.of("shape", "encoder", steps=3, views=4)
    config = StudyConfig("shape", listed[0].id, "customized", config, **SHORT)
    with pytest.raises(KeyboardInterrupt):
        made.run(config, tmp_path)
    assert not list(tmp_path.glob("*.jsonl")) and not list((tmp_path / "runs").glob("*"))
    assert made.run(config, tmp_path).learnt["shape"]["steps"] == 3


def test_a_record_says_how_what_it_scored_was_learnt(made, listed, tmp_path):
    short = TuningConfig.of("shape", steps=2, batch_size=2, views=4)
    config = StudyConfig("shape", listed[0].id, "customized", short, **SHORT)
    record = made.run(config, tmp_path)
    (told,) = record.learnt.values()
    assert told["steps"] == 2 and not told["kept"] and 0 < told["seconds"] <= record.seconds
    # Another run uses what was kept: its record says when that was learnt, and the hash of what it scored.
    full = RankConfig("shape", listed[0].id, short, None, **SHORT)
    assert made.run(full, tmp_path).learnt["shape"] == told | {"kept": True}
    reduced = made.run(dataclasses.replace(full, rank=1), tmp_path).learnt["shape"]
    assert reduced["sha256"] != told["sha256"] and reduced["date"] == told["date"]
    assert made.run(StudyConfig("shape", listed[0].id, "floor", **SHORT), tmp_path).learnt == {}
    assert records.get(config, folder=tmp_path).learnt == record.learnt


def test_other_filters_are_other_inputs(made, listed, backbone):
    config = StudyConfig("shape", listed[0].id, "floor", **SHORT)
    before = made.inputs(config)
    backbone.filters["shape"].fuse[-1].weight.data += 0.01
    after = study.Study(backbones={"tiny": backbone}).inputs(config)
    assert {name for name in before if before[name] != after[name]} == {"backbone tiny"}


def test_what_e4t_pretrained_is_an_input_of_its_own_runs_alone(made, listed, backbone, tmp_path):
    reads = TuningConfig(
        attribute="shape", recipe="shape", part="all", steps=1, learning_rate=1e-4, latent_encoder=True
    )
    plain = TuningConfig.of("shape", steps=2)
    configs = [StudyConfig("shape", listed[0].id, "customized", each, **SHORT) for each in (plain, reads)]

    inputs, keys = [], []

    def look():
        weights = study.kept.weights_sha256(backbone)
        inputs.append([study.Study(backbones={"tiny": backbone}).inputs(config) for config in configs])
        keys.append([
            study.kept.key_of("shape", listed[0], tuning, backbone, weights) for tuning in (plain, reads)
        ])  # fmt: skip

    look()
    backbone.e4t = E4T.for_backbone(backbone)
    look()
    backbone.e4t.encoder.final.weight.data += 0.01
    look()
    of_plain, of_e4t = zip(*inputs, strict=True)
    assert "E4T" not in of_plain[0] and of_plain[0] == of_plain[1] == of_plain[2]
    assert len({each.get("E4T") for each in of_e4t}) == 3
    of_plain, of_e4t = zip(*keys, strict=True)
    assert len(set(of_plain)) == 1 and len(set(of_e4t)) == 3


def test_the_shipped_weights_hash_leaves_e4t_out(tmp_path, monkeypatch):
    for name in ("unet", "e4t"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    folder = dataclasses.replace(study.MODELS["mini"], folder=tmp_path)
    monkeypatch.setattr(study, "MODELS", {"mini": folder})
    hashes = []
    for name in ("unet", "e4t", "unet"):
        study._sha256.cache_clear()
        hashes.append(study.shipped_weights("mini"))
        (tmp_path / name / "config.json").write_text('{"changed": 1}')
    study._sha256.cache_clear()
    assert hashes[0] != hashes[1] == hashes[2] == study.shipped_weights("mini")


def test_the_floor_is_the_untouched_backbone(made, listed, backbone):
    config = StudyConfig("shape", listed[0].id, "floor", **SHORT)
    texts = [one.text.replace("*m", "shape") for one in prompts_for(listed[0], "shape")]
    pipe = scores_module.quiet(study.ESCDPipeline(backbone))
    images = scores_module.generate(pipe, texts, 0, 2, 4.0)
    expected = scores_module.score_images(
        images, prompts_for(listed[0], "shape"), listed[0], listed[0], listed, made.judges()
    )
    scores = made.score(config)
    assert {name: scores[name] for name in expected} == expected


def test_compositions_and_other_kinds(made, listed):
    word = {a: TuningConfig.of(a, "none", steps=0) for a in ("shape", "appearance")}
    pair = CompositionConfig(
        listed[0].id, listed[1].id, "customized", word["shape"], word["appearance"], **SHORT
    )
    assert pair.arm == "word"
    scores = made.score(pair)
    assert len(scores["prompts"]) == prompts.PROMPTS and "obeyed_background" in scores
    assert "obeyed_shape" not in scores
    ceiling = made.score(StudyConfig("appearance", listed[0].id, "ceiling", **SHORT))
    assert "obeyed_shape" in ceiling
    obedience = made.score(ObedienceConfig(prompts=6, backbone="tiny", sampler_steps=2))
    assert all(0 <= obedience[name] <= 1 for name in ("shape", "pattern", "colours", "background", "all"))
    with pytest.raises(ValueError, match="says how it was tuned"):
        StudyConfig("shape", listed[0].id, "customized").arm  # noqa: B018
    with pytest.raises(ValueError, match="needs a folder"):
        made.references("folder")


def test_ranks_are_scored_like_the_study(made, listed, tmp_path, monkeypatch):
    short = TuningConfig.of("shape", steps=2, batch_size=2, views=4)
    full = RankConfig("shape", listed[0].id, short, None, **SHORT)
    whole, one, travels = (
        made.run(config, tmp_path).metrics
        for config in (full, dataclasses.replace(full, rank=1), dataclasses.replace(full, exportable=True))
    )
    studied = made.run(StudyConfig("shape", listed[0].id, "customized", short, **SHORT), tmp_path).metrics
    assert whole["iou"] == studied["iou"] and whole["megabytes"] == studied["megabytes"]
    assert whole["error"] == 0 < travels["error"] and one["error"] > 0
    assert one["megabytes"] < whole["megabytes"]
    grid = configs.rank_configs(dataclasses.replace(listed, references=listed.references[:2]))
    assert len(grid) == len(set(grid)) == 2 * 2 * (len(configs.RANKS) + 2)
    assert {config.tuning for config in grid} == {TuningConfig.of("shape"), TuningConfig.of("appearance")}


def test_parts_alike_in_size(listed):
    unet = load_backbone("mini").unet
    whole, *others = (
        sum(p.numel() for p in parameters_of(unet, part).values())
        for part in ("encoder", *configs.EQUAL_SIZE)
    )
    assert all(0.9 < other / whole < 1.1 for other in others)
    for part in configs.EQUAL_SIZE:
        assert set(parameters_of(unet, part)) <= set(parameters_of(unet, "decoder"))
    two = dataclasses.replace(listed, references=listed.references[:2])
    grid = configs.equal_size_configs(two)
    assert len(set(grid)) == len(grid) == 2 * 2 * len(configs.EQUAL_SIZE)
    assert {config.arm for config in grid} == set(configs.EQUAL_SIZE)
    # The rates are the half's own.
    assert {c.tuning.learning_rate for c in grid if c.attribute == "shape"} == {
        TuningConfig.of("shape", "decoder").learning_rate
    }


def test_the_controls_of_a_real_list(made):
    real = load_references(which="real-development")
    short = SHORT | {"list": "real-development"}
    found = {
        kind: made.score(StudyConfig("appearance", real[0].id, kind, **short))
        for kind in ("floor", "lossless", "flat", "copy")
    }
    assert all(set(texture.SCORES) <= scores.keys() for scores in found.values())
    assert all(value == 0 for value in found["lossless"]["colour_rank"])
    assert np.mean(found["lossless"]["texture_rank"]) < np.mean(found["flat"]["texture_rank"])
    assert min(found["copy"]["iou"]) > 0.9 > max(found["lossless"]["iou"])
    # The old lists are scored as they were.
    old = made.score(StudyConfig("appearance", load_references(which="development")[0].id, "copy", **SHORT))
    assert not set(texture.SCORES) & old.keys()
    copied = made.score(StudyConfig("shape", real[0].id, "copy", **short))
    assert all(copied["texture_first"]) or np.mean(copied["texture_rank"]) < 2
    with pytest.raises(ValueError, match="a control of an appearance"):
        StudyConfig("shape", real[0].id, "flat")
    with pytest.raises(ValueError, match="none of them is a copy of both"):
        CompositionConfig(real[0].id, real[1].id, "copy")


def test_the_grid_of_a_real_list_has_the_controls_and_the_recipe_of_the_source():
    real = load_references(which="real-development")
    one = dataclasses.replace(real, references=real.references[:1])
    grid = configs.configs(one)
    arms = {
        mode: {c.arm for c in grid if isinstance(c, StudyConfig) and c.attribute == mode}
        for mode in ("shape", "appearance")
    }
    shared = {"floor", "word", "encoder", "decoder", "all", "ceiling", "lossless", "copy"}
    assert arms["shape"] == shared | {"encoder (source)"}
    assert arms["appearance"] == shared | {"decoder (source)", "flat"}
    sources = [c.tuning for c in grid if c.arm.endswith("(source)")]
    assert [tuning.augmentation for tuning in sources] == [0.0, 0.0]
    assert {"lossless", "flat"} <= {c.arm for c in grid if isinstance(c, CompositionConfig)}
    assert len({records.key_of(config) for config in grid}) == len(grid)


def test_the_grid(listed):
    two = dataclasses.replace(listed, references=listed.references[:2])
    grid = configs.configs(two)
    assert len({records.key_of(config) for config in grid}) == len(grid) == 2 * 2 * 6 + 2 * 4
    assert {c.arm for c in grid if isinstance(c, StudyConfig)} == {
        "floor", "word", "encoder", "decoder", "all", "ceiling"
    }  # fmt: skip
    pairs = {c.arm for c in grid if isinstance(c, CompositionConfig)}
    assert pairs == {"floor", "ours", "reversed", "ceiling"}
    for config in grid:
        assert records.config_of(as_record(config, {}), type(config)) == config


# ---- the table


def scores(failed=(False, False), **changes):
    values = {
        "iou": 0.8, "silhouette": True, "colour": 5.0, "texture": 0.1, "combined": 8.0, "material": True,
        "texture_material": False, "texture_similarity": 0.4, "obeyed_background": True,
    } | changes  # fmt: skip
    return {"failed": list(failed)} | {
        name: [None if bad and not name.startswith("obeyed") else value for bad in failed]
        for name, value in values.items()
    }


def test_workers_share_what_is_to_be_learnt(listed):
    grid = [*configs.backbone_configs(), *configs.configs(listed), *configs.rank_configs(listed)]
    assert configs.shard(grid, 0, 1) == grid
    grid += configs.equal_size_configs(listed)
    shares = [configs.shard(grid, worker, 2) for worker in (0, 1)]
    assert sorted(map(records.key_of, [*shares[0], *shares[1]])) == sorted(map(records.key_of, grid))
    learnt = [
        {(c.reference, c.tuning) for c in mine if isinstance(c, StudyConfig) and c.tuning} for mine in shares
    ]
    assert not learnt[0] & learnt[1] and len(learnt[0]) == len(learnt[1])
    # What the ranks ask for, the worker has learnt; and learning comes before what combines it.
    for mine, known in zip(shares, learnt, strict=True):
        assert {(c.reference, c.tuning) for c in mine if isinstance(c, RankConfig)} <= known
        kinds = [type(c) for c in mine]
        assert kinds.index(CompositionConfig) > max(i for i, kind in enumerate(kinds) if kind is StudyConfig)


def test_a_failed_mask_is_a_miss_and_a_leak():
    tuning = TuningConfig.of("shape", "encoder")
    floor = StudyConfig("shape", "a/b", "floor")
    tuned = dataclasses.replace(floor, kind="customized", tuning=tuning)
    rows = tables.table([
        as_record(floor, scores(texture_similarity=0.2, iou=0.5)),
        as_record(tuned, scores(failed=(False, True), texture_similarity=0.3)),
    ])["shape"]  # fmt: skip
    assert rows["encoder"].transfer == {"iou": 0.4, "retrieval": 0.5}
    assert rows["encoder"].leakage.mean == pytest.approx(((0.3 - 0.2) + (1.0 - 0.2)) / 2)
    assert rows["encoder"].leaked == 0.5 and rows["encoder"].failed == 0.5
    assert rows["floor"].leakage is None and rows["floor"].leaked == 0.0
    assert "shape" in tables.show({"shape": rows})


def test_leakage_of_shape_in_appearance_mode_and_a_missing_floor():
    tuning = TuningConfig.of("appearance", "decoder")
    floor = StudyConfig("appearance", "a/b", "floor")
    tuned = dataclasses.replace(floor, kind="customized", tuning=tuning)
    records_of = [as_record(floor, scores(iou=0.5)), as_record(tuned, scores(iou=0.7))]
    row = tables.table(records_of)["appearance"]["decoder"]
    wanted = {"retrieval": 1.0, "texture": 0.0, "distance": 8.0}
    assert row.leakage.mean == pytest.approx(0.2) and row.transfer == wanted
    with pytest.raises(KeyError, match="no floor"):
        tables.table(records_of[1:])


def test_a_composition_counts_where_both_are_right():
    tunings = TuningConfig.of("shape", "encoder"), TuningConfig.of("appearance", "decoder")
    config = CompositionConfig("a/b", "c/d", "customized", *tunings)
    metrics = scores() | {"silhouette": [True, False], "material": [True, True]}
    row = tables.table([as_record(config, metrics)])["composition"]["ours"]
    assert row.transfer["both"] == row.transfer["silhouette"] == 0.5 and row.transfer["material"] == 1.0
    assert row.leakage is None


# ---- the autoencoder


def test_the_linear_code_is_the_best_of_its_rate():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(12, 3, 8, 8), (64, 64), mode="bicubic") * 2 - 1
    made = autoencoder.linear_code(smooth[:4], smooth[4:], 16)
    assert made.shape == (4, 3, 64, 64)
    assert (made - smooth[:4]).square().mean() < 0.02 * smooth.var()
    noise = torch.rand(4, 3, 64, 64) * 2 - 1
    # 16 of 192 numbers hold a twelfth of white noise
    kept = 1 - (autoencoder.linear_code(noise, noise, 16) - noise).square().mean() / noise.square().mean()
    assert 1 / 12 < kept < 0.25


def test_autoencoder_scores_and_sets(made):
    sets = autoencoder.image_sets()
    assert set(sets) == {"world", "photographs", "tiles"}
    for images, others in sets.values():
        assert images.shape[1:] == others.shape[1:] == (3, 64, 64) and images.abs().max() <= 1
    images, others = sets["tiles"]
    result = autoencoder.autoencoder_scores(made.backbone("tiny").vae, images[:8], others)
    assert result["psnr"] < result["pca_psnr"] and 0 < result["pca_detail"] < 1
    assert AutoencoderConfig("tiles") != AutoencoderConfig("world")


def test_fine_energy_is_that_of_fine_detail():
    x = torch.arange(64).float()
    fine, coarse = (torch.cos(2 * np.pi * f * x).expand(1, 3, 64, 64) for f in (24 / 64, 4 / 64))
    assert autoencoder._fine_energy(fine)[0] > 1e6 * autoencoder._fine_energy(coarse)[0]
