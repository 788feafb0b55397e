"""Numbers: from records to README and paper, and whether a record that does not come out again is noticed."""

from __future__ import annotations

import dataclasses
import re
import runpy
from types import SimpleNamespace

import numpy as np
import pytest

from escd import paths, records
from escd.evaluation.autoencoder import IMAGE_SETS
from escd.evaluation.configs import (
    AutoencoderConfig,
    CompositionConfig,
    JudgesConfig,
    ObedienceConfig,
    StudyConfig,
    backbone_configs,
    configs,
    equal_size_configs,
    rank_configs,
)
from escd.evaluation.references import load_references
from escd.method.config import TuningConfig
from escd.paper import numbers, reproduce, results, tables
from escd.paper.results import CostConfig
from escd.pretrain import ablation
from escd.pretrain.trials import TrialConfig

BENCHMARKS = {
    name: runpy.run_path(str(paths.ROOT / "benchmarks" / f"{name}.py"))
    for name in ("sd15_size", "tuning_cost")
}
LISTED = dataclasses.replace(load_references(), references=load_references().references[:3])
# how likely a picture of an arm is right: any numbers do, as long as the arms differ
RIGHT = {
    "floor": 0.1,
    "word": 0.3,
    "encoder": 0.6,
    "decoder": 0.7,
    "all": 0.8,
    "ceiling": 1.0,
    "ours": 0.5,
    "reversed": 0.4,
    "decoder/attentions": 0.9,
    "up.1": 0.2,
    "flat": 0.25,
    "encoder (source)": 0.45,
    "decoder (source)": 0.55,
    "lossless": 1.0,
    "copy": 0.95,
}


def made_up(config) -> dict:
    """Scores drawn for a config, of the form the study gives them."""
    if isinstance(config, AutoencoderConfig):
        return {"images": 4, "psnr": 30.0, "detail": 0.5, "pca_psnr": 24.0, "pca_detail": 0.25}
    if isinstance(config, JudgesConfig):
        right = {"shape": 0.996, "pattern": 0.997, "background": 1.0, "colours": 0.995}
        return right | {f"{name}_judged": 0.52 for name in right}
    if isinstance(config, ObedienceConfig):
        return {
            "shape": 0.8,
            "pattern": 0.76,
            "colours": 0.9,
            "background": 0.96,
            "all": 0.6,
            "by_shape": {"star": 0.5},
        }
    draw = np.random.default_rng(int(records.key_of(config)[:8], 16))
    right = RIGHT[config.arm]
    scores: dict[str, list] = {}
    for name in ("iou", "texture_likeness", "colour_likeness", "texture_distance", "colour_distance"):
        scores[name] = (right * draw.random(4)).tolist()
    for name in ("silhouette", "texture_first", "colour_first", "both_first", "obeyed_background"):
        scores[name] = (draw.random(4) < right).tolist()
    for name in ("texture_rank", "colour_rank", "both_rank"):
        scores[name] = draw.integers(0, 20, 4).tolist()
    scores["failed"] = [False] * 4
    if isinstance(config, StudyConfig):
        scores |= {"megabytes": 10 * right} if config.kind == "customized" else {}
        asked = ("pattern", "colours") if config.attribute == "shape" else ("shape",)
        scores |= {f"obeyed_{name}": (draw.random(4) < right).tolist() for name in asked}
    return {"prompts": ["a *m shape"] * 4, **scores}


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Records of a study of three references, with made-up scores, and a study that knows their inputs."""
    stand_in = SimpleNamespace(references=lambda which: LISTED, inputs=lambda config: {"backbone mini": "aa"})
    monkeypatch.setattr(results, "study", lambda: stand_in)
    monkeypatch.setattr(results, "weights_of", lambda backbone: {"backbone mini": "aa"})
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    for config in [*configs(LISTED), *backbone_configs()]:
        records.get(config, made_up, inputs=stand_in.inputs(config), device="cpu")
    for attribute in ("shape", "appearance"):
        costs = {"steps": 200, "seconds": 31.4, "megabytes": 4.2}
        config = CostConfig(TuningConfig.of(attribute), load_references(which="development")[0].id)
        records.get(config, lambda _, costs=costs: costs, inputs={"backbone mini": "aa"}, device="cpu")
    for arm in ablation.ARMS:
        records.get(ablation.AblationConfig(arm, references=2), untuned, device="cpu")
    size = BENCHMARKS["sd15_size"]["SizeConfig"]
    records.get(size(), lambda _: FULL_SIZE, device="cpu")
    records.get(size(size="small"), lambda _: {}, device="cpu")  # no number of the paper's
    return tmp_path


def untuned(config) -> dict:
    """Scores of an arm of the ablation: two references of four pictures."""
    draw = np.random.default_rng(len(config.arm))
    right = draw.random(8) < 0.5
    return {
        "shape": {"iou": draw.random(8), "silhouette": right},
        "appearance": {"combined": draw.random(8), "material": right},
    }


FULL_SIZE = {
    "seconds": {"shape: 3 steps": 17.4, "appearance: 3 steps": 18.2},
    "peak_gb": {"shape: 3 steps": 11.0, "appearance: 3 steps": 15.6},
    "file_mb": {"shape": 499.2, "appearance": 1021.6},
    "mb_at_rank": {"encoder": {"16": 10.8}, "decoder": {"16": 20.5}},
}


STEP = ("step", "gradients", "peak", "flops")


def took(step: float, gradients: float, peak: float) -> dict[str, float]:
    return {"step": step, "gradients": gradients, "peak": peak}


def test_a_step_is_held_to_one_of_the_whole_unet_in_the_same_round(stored):
    assert results.step_costs() == {}, "no record, no ratio"
    config = BENCHMARKS["tuning_cost"]["TuningCostConfig"]
    whole, *others = results.STEPS_OF
    assert [whole, *others] == list(BENCHMARKS["tuning_cost"]["METHODS"])
    # The second round met a slow minute, and the third one in its other half.
    rounds = {whole: [took(4, 2, 10), took(8, 4, 10), took(4, 2, 10)]}
    rounds |= {name: [took(3, 1, 5), took(6, 2, 5), took(8, 2, 5)] for name in others}
    measured = {"rounds": rounds, "flops": {name: 10 if name == whole else 8 for name in rounds}}
    records.get(config(tuple(rounds), rounds=3), lambda _: measured, device="cpu")
    row = results.step_costs()["shape"]
    assert row == {"step": 0.75, "gradients": 0.5, "peak": 0.5, "flops": 0.8}
    values = numbers.numbers()
    assert values["step.kept.step"] == "0.75" and values["step.whole.step"] == "1.00"
    # what was measured last counts
    again = measured | {"flops": {name: 10 for name in rounds}}
    records.get(config(tuple(rounds), rounds=3), lambda _: again, device="cpu", again=True)
    assert results.step_costs()["shape"]["flops"] == 1


def test_results_are_of_whole_references(stored):
    found = results.results()
    assert found.references == 3
    assert set(found.rows) == {"shape", "shape, filled", "shape, pierced", "appearance", "both"}
    apart = [found.rows[f"shape, {kind}"]["encoder"].pictures for kind in ("filled", "pierced")]
    assert sum(apart) == found.rows["shape"]["encoder"].pictures and 0 not in apart
    assert found.rows["shape"]["encoder"].pictures == 12
    # without one arm of one reference, that reference does not count
    path = stored / "study.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    gone = next(line for line in lines if LISTED[0].id in line)
    path.write_text("".join(line for line in lines if line is not gone))
    assert results.results().references == 2
    assert all(record.config.get("reference") != LISTED[0].id for record in results.results().used)


def test_records_of_other_weights_do_not_count(stored, monkeypatch):
    stand_in = SimpleNamespace(references=lambda which: LISTED, inputs=lambda config: {"backbone mini": "bb"})
    results._results.cache_clear()
    monkeypatch.setattr(results, "study", lambda: stand_in)
    with pytest.raises(KeyError, match="make study"):
        results.results()
    results._results.cache_clear()


def test_the_table_has_every_arm_and_the_intervals(stored):
    text = tables.results_table()
    for arm in tables.ARMS.values():
        assert re.findall(rf"^\| {re.escape(arm)} \|", text, re.M)
    row = results.results().rows["shape, pierced"]["encoder"]
    (line,) = re.findall(rf"^\| encoder tuned \| {row.iou:.2f} \| .*$", text.split("pierced")[1], re.M)
    leakage = row.texture_leakage
    assert f"{100 * row.first:.0f} %" in line
    assert f"[{leakage.low:+.3f}, {leakage.high:+.3f}]".replace("-0.000", "+0.000") in line
    row = results.results().rows["appearance"]["flat"]
    shown = f"{100 * row.texture.first:.0f} % | {row.texture.rank:.1f} | {row.texture.distance:.2f}"
    assert f"| flat area of the material's mean colour | {shown} |" in text


def test_what_is_left_at_a_rank(stored):
    assert results.ranks() == ({}, []), "no record, no rank"
    kept = {1: 0.5, 2: 0.7, 4: 0.79} | dict.fromkeys((8, 16, 32, 64, None), 0.8)
    for config in rank_configs(LISTED):
        if config.reference == LISTED[2].id and config.rank == 4:
            continue  # so this reference does not count

        def scores(config):
            right = kept[config.rank] - 0.1 * config.exportable
            found = {"iou": [right, None], "silhouette": [True, None], "texture_first": [right > 0.69] * 2}
            return {"error": 1 - right, "megabytes": 2.0, **found}

        records.get(config, scores, inputs={"backbone mini": "aa"}, device="cpu")
    found, used = results.ranks()
    assert {attribute: len(rows) for attribute, rows in found.items()} == {"shape": 9, "appearance": 9}
    assert all(row.references == 2 for rows in found.values() for row in rows) and len(used) == 2 * 2 * 9
    full = next(row for row in found["shape"] if row.rank is None and not row.exportable)
    assert full.transfer == {"iou": pytest.approx(0.4), "retrieval": 0.5} and full.megabytes == 2.0
    assert results.smallest_rank("shape", found["shape"]).rank == 4
    assert results.smallest_rank("appearance", found["appearance"]).rank == 2
    assert results.smallest_rank("shape", [row for row in found["shape"] if row.rank in (1, None)]) is None


def test_a_contrast_is_between_the_same_pictures(stored):
    same = results.contrast("shape", "encoder", "encoder")
    assert (same["retrieval"].mean, same["leakage"].low, same["leakage"].high) == (0, 0, 0)
    rows = results.results().rows["appearance"]
    found = results.contrast("appearance", "all", "encoder")
    for name in ("texture", "colour"):
        firsts = [getattr(rows[arm], name).first for arm in ("all", "encoder")]
        assert found[name].mean == pytest.approx(firsts[0] - firsts[1])
    assert found["leakage"].mean == pytest.approx(rows["all"].leakage.mean - rows["encoder"].leakage.mean)
    shapes = results.results().rows["shape"]
    beside = results.contrast("shape", "all", "encoder")
    assert list(beside) == ["retrieval", "IoU", "leakage"]
    assert list(found) == ["texture", "colour", "leakage"]
    assert beside["IoU"].mean == pytest.approx(shapes["all"].iou - shapes["encoder"].iou)
    assert found["texture"].low < found["texture"].mean < found["texture"].high


def test_the_halves_at_equal_size(stored):
    assert results.alike("shape") == {} and tables.alike_table() == "", "not before they are run"
    *most, last = equal_size_configs(LISTED)
    for config in most:
        records.get(config, made_up, inputs={"backbone mini": "aa"}, device="cpu")
    two = results.alike("shape")["encoder"]
    assert two.row.pictures == 8, "a reference without all of them is left out"
    records.get(last, made_up, inputs={"backbone mini": "aa"}, device="cpu")
    found = results.alike("appearance")
    assert list(found) == ["encoder", "decoder/attentions", "up.1", "decoder"] and not found["encoder"].beyond
    part, encoder = found["up.1"], found["encoder"]
    assert part.megabytes == pytest.approx(2) and part.row.pictures == encoder.row.pictures == 12
    assert part.beyond["texture"].mean == pytest.approx(part.row.texture.first - encoder.row.texture.first)
    assert results.results().references == 3 and "up.1" not in results.results().rows["shape"]
    values, rows = numbers.numbers(), tables.alike_table().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in tables.PLACES.values()]
    shape = results.alike("shape")["decoder/attentions"]
    assert values["shape.decoder_attentions.iou"] == f"{shape.row.iou:.2f}" in rows[1]
    assert values["shape.decoder_attentions.iou.gain"] == f"{shape.beyond['IoU'].mean:+.2f}" in rows[1]
    assert values["appearance.up_1.mb"] == "2.0"


def test_what_composition_gains_is_between_the_same_pictures(stored):
    same, rows = results.composed("ours", "ours"), results.results().rows["both"]
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    gain = results.composed()
    assert gain.mean == pytest.approx(rows["ours"].right - rows["reversed"].right)
    assert gain.low <= gain.mean <= gain.high


def keys_in(paper: str) -> set[str]:
    """Keys the paper uses; \\interval{x} stands for the ends of x, \\stepcost{x} for four numbers."""
    paper = re.sub(r"(?<!\\)%.*", "", paper)
    paper = re.sub(r"\\newcommand\{\\(interval|escdnum)\}.*", "", paper)
    ends = {f"{key}_{end}" for key in re.findall(r"\\interval\{([^}#]+)\}", paper) for end in ("low", "high")}
    steps = {f"step.{way}.{k}" for way in re.findall(r"\\stepcost\{([^}#]+)\}", paper) for k in STEP}
    return set(re.findall(r"\\escdnum\{([^}#]+)\}", paper)) | ends | steps


def test_every_number_of_the_paper_has_its_record(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "training", lambda backbone="mini": {"unet": {"images": 200_000}})
    ways = {name: [took(1, 1, 1)] for name in results.STEPS_OF}
    config = BENCHMARKS["tuning_cost"]["TuningCostConfig"](tuple(ways))
    records.get(config, lambda _: {"rounds": ways, "flops": dict.fromkeys(ways, 1)}, device="cpu")
    for one in equal_size_configs(LISTED):
        records.get(one, made_up, inputs={"backbone mini": "aa"}, device="cpu")
    assert numbers._rates_in_words(numbers.numbers()) == [], "nothing to compare yet"
    for latents, change in ((4, "none"), (8, "8 latents"), (16, "16 latents")):
        scores = {"psnr": 25.04 + latents, "detail": latents / 100, "pca_psnr": 20.0, "pca_detail": 0.2}
        metrics = {"latents": latents} | dict.fromkeys(IMAGE_SETS, scores)
        records.get(TrialConfig("autoencoder", change, 9_000), lambda _, metrics=metrics: metrics)
    used = keys_in((paths.ROOT / "paper" / "main.tex").read_text())
    assert len(used) > 50
    values = numbers.numbers()
    assert used <= values.keys(), sorted(used - values.keys())
    assert "with 4, 8 and 16 of them, trained alike on 9,000 images" in numbers._rates_in_words(values)[0]
    assert (
        "the tiles have 29.0, 33.0 and 41.0 dB and keep 4, 8 and 16 %" in numbers._rates_in_words(values)[0]
    )
    assert values["backbone.images_seen"] == "200,000"
    assert values["backbone.judge_accuracy"] == "99.5" and values["backbone.judged_patterns"] == "52"
    assert values["obedience.colour"] == "90"
    assert values["tuning.shape.seconds"] == "31" and values["tuning.threads"] == "2"
    row = results.results().rows["shape"]["encoder"]
    assert values["shape.encoder.iou"] == f"{row.iou:.2f}"
    assert values["shape.encoder.leakage"][0] in "+-"
    assert not [
        text for text in values.values() if re.search(r"[\\%&#$_{}]", text)
    ]  # nothing LaTeX would read

    readme, macros = tmp_path / "README.md", tmp_path / "numbers.tex"
    readme.write_text(f"# Before\n{numbers.BEGIN}\nformer numbers\n{numbers.END}\nafter\n")
    numbers.write_numbers(readme, macros)
    text = readme.read_text()
    assert text.startswith("# Before\n") and text.endswith("after\n") and "former numbers" not in text
    assert f"trained on {values['backbone.images_seen']} rendered images" in text
    assert f"| {tables.ARMS['encoder']} | {values['shape_filled.encoder.iou']} |" in text
    numbers.write_numbers(readme, macros)
    assert readme.read_text() == text
    assert (
        rf"\escddef{{shape.encoder.iou}}{{{values['shape.encoder.iou']}}}" in macros.read_text().splitlines()
    )

    readme.write_text("no marks")
    with pytest.raises(ValueError, match="numbers:begin"):
        numbers.write_numbers(readme, macros)


def test_which_records_are_run_again_follows_from_the_commit(stored, monkeypatch):
    found = records.all("study")
    chosen = set()
    for commit in "abcdefgh":
        monkeypatch.setattr(records, "commit", lambda commit=commit: commit)
        again = reproduce.repeatable(found)
        assert len(again) == 2 and again == reproduce.repeatable(list(reversed(found)))
        chosen |= {record.key for record in again}
    assert len(chosen) > 4
    slow = [dataclasses.replace(record, seconds=61.0) for record in found]
    elsewhere = [dataclasses.replace(record, device="a GPU") for record in found]
    learnt = {"shape": {"seconds": 61.0, "kept": True}}
    earlier = [dataclasses.replace(record, learnt=learnt) for record in found]
    assert reproduce.repeatable(slow + elsewhere + earlier + records.all("composition")) == []


def test_a_record_that_does_not_come_out_again_is_noticed(stored):
    found = records.all("study")
    record = next(r for r in found if r.config["kind"] == "customized" and r.config["attribute"] == "shape")
    assert reproduce.run_again([record], found, made_up) == []
    changed = {**record.metrics, "iou": [value + 1e-9 for value in record.metrics["iou"]]}
    on_this = dataclasses.replace(record, metrics=changed)
    assert len(reproduce.run_again([on_this], found, made_up)) == 1
    # on another machine a small difference is none, and a large one is
    on_another = dataclasses.replace(on_this, machine="another")
    assert reproduce.run_again([on_another], found, made_up) == []
    far = dataclasses.replace(on_another, metrics={**record.metrics, "iou": [5.0] * 4})
    (line,) = reproduce.run_again([far], found, made_up)
    assert "iou" in line
    # one yes or no of a picture may turn there, where all others are right too, but not two
    fresh = {**record.metrics, "obeyed_background": [True] * 4}
    alike = [dataclasses.replace(r, metrics={**r.metrics, "obeyed_background": [True] * 4}) for r in found]
    for wrong in (1, 2):
        answers = [False] * wrong + [True] * (4 - wrong)
        turned = dataclasses.replace(on_another, metrics={**record.metrics, "obeyed_background": answers})
        lines = reproduce.run_again([turned], alike, lambda config: fresh)
        assert [line.split(": ")[1] for line in lines] == ["obeyed_background"] * (wrong - 1)


def test_the_study_of_the_check_learns_anew(backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = reproduce.FreshStudy(device="cpu")
    study._backbones["mini"] = backbone
    tuning = TuningConfig.of("shape", steps=1)
    learnt = study.learn("shape", LISTED[0], tuning)
    assert learnt.steps == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_kinds_are_told_apart():
    assert records.kind_of(CostConfig) == "cost"
    assert records.kind_of(CompositionConfig) == "composition"
