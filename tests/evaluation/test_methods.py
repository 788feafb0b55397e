"""The comparison of the published methods: its runs, its grid, its curves, and time to equal quality."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import as_record

import escd
from escd import records
from escd.evaluation import method_choice, method_configs, method_scores, method_tables, study
from escd.evaluation.configs import StudyConfig, shard
from escd.evaluation.judges import Judge, Judges
from escd.evaluation.method_configs import (
    BUDGETS,
    GRID_FACTORS,
    MethodConfig,
    MethodPairConfig,
    budgets_of,
    grid_configs,
    runnable,
    scaled,
)
from escd.evaluation.method_configs import (
    method_configs as method_grid,
)
from escd.evaluation.method_tables import Comparison, Curve, compared
from escd.evaluation.prompts import PROMPTS
from escd.evaluation.references import load_references
from escd.method import baselines
from escd.method.baselines import METHODS
from escd.method.mixing import mix_layers
from escd.method.snapshots import Snapshot

OTHERS = [name for name in METHODS if name not in ("escd", "source", "e4t")]


@pytest.fixture(scope="module")
def listed():
    real = load_references(which="real")
    return replace(real, references=real.references[:2])


@pytest.fixture
def made(backbone, monkeypatch, tmp_path) -> study.Study:
    """A study of the tiny backbone with judges that have learnt nothing."""
    torch.manual_seed(0)
    untrained = Judges(Judge().eval().requires_grad_(False))
    monkeypatch.setattr(study, "_judges", lambda: untrained)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    (tmp_path / "weights" / "judges").mkdir(parents=True)
    monkeypatch.setattr(study.paths, "WEIGHTS", tmp_path / "weights")
    return study.Study(backbones={"tiny": backbone})


def quick(method, backbone, reference, attribute="shape", budgets=(0, 1, 2), **changes):
    tuning = METHODS[method].config(attribute, backbone, steps=2)
    few = {"prior_images": 2} if tuning.prior_images else {}
    tuning = replace(tuning, batch_size=2, views=2, **few)
    return MethodConfig(
        method, attribute, reference.id, tuning, budgets, backbone="tiny", sampler_steps=1, **changes
    )


# ---- runs


def test_one_run_is_scored_after_each_budget(made, backbone, listed, tmp_path, monkeypatch):
    """Each point has the scores of the customization of that many steps, and of tuning alone the seconds."""
    config = quick("custom-diffusion", backbone, listed[0])
    calls, clock = [], [0.0]
    customize = method_scores.customize

    def counted(*given, **named):
        calls.append(named["config"].steps)
        return customize(*given, **named)

    monkeypatch.setattr(method_scores, "customize", counted)
    monkeypatch.setattr("escd.method.snapshots.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    score = method_scores.score_customization

    def slow(*given, **named):
        clock[0] += 1000.0
        return score(*given, **named)

    monkeypatch.setattr(method_scores, "score_customization", slow)
    record = made.run(config, tmp_path)
    assert calls == [2], "one run"
    curve = record.metrics["curve"]
    assert [point["steps"] for point in curve] == [0, 1, 2]
    assert [point["seconds"] for point in curve] == [0.0] * 3, "scoring is not counted"
    assert record.metrics["prior_seconds"] == 0.0 and record.metrics["memory_gb"] > 0
    assert curve[0]["megabytes"] < curve[1]["megabytes"] == curve[2]["megabytes"]
    assert len({point["sha256"] for point in curve}) == 3
    for place in (0, 1):
        point = curve[place]
        studied = made.run(config.studied(point["steps"]), tmp_path)
        assert studied.learnt["shape"]["sha256"] == point["sha256"] and studied.learnt["shape"]["kept"]
        same = {name: value for name, value in studied.metrics.items() if name in point}
        assert {"iou", "texture_likeness", "obeyed_pattern"} <= same.keys()
        assert same == {name: point[name] for name in same}
    assert made.run(config, tmp_path) == record and calls == [2]  # stored


def test_what_was_kept_is_what_a_run_of_that_length_learns(made, backbone, listed, tmp_path):
    config = quick("p-plus", backbone, listed[0])
    made.score(config)
    one = replace(config.tuning, steps=1)
    assert made.knows("shape", listed[0], one, "tiny")
    assert not made.knows("shape", listed[0], replace(one, steps=3), "tiny")
    learnt = made.learn("shape", listed[0], one, "tiny")
    assert made.learnt["shape"]["kept"]
    again = escd.customize(listed[0].image, "shape", backbone, config=one, progress=False)
    assert torch.equal(learnt.pseudo_word, again.pseudo_word) and learnt.config == again.config


def test_a_decaying_rate_has_a_run_for_each_budget(backbone, listed, monkeypatch):
    config = quick("escd", backbone, listed[0])
    steps = []

    def fake(*_given, config, snapshots, **_named):
        steps.append(config.steps)
        snapshots.taken.append(Snapshot(SimpleNamespace(steps=config.steps), 3.0 * config.steps))

    monkeypatch.setattr(method_scores, "customize", fake)
    taken = list(method_scores.runs(config, listed[0], backbone))
    assert steps == [0, 1, 2] and [one.seconds for one, _ in taken] == [0.0, 3.0, 6.0]


def test_class_images_are_counted_apart(made, backbone, listed, monkeypatch):
    def fake(*_given, config, snapshots, **_named):
        snapshots.prior_seconds = 50.0
        for k in sorted(snapshots.steps):
            snapshots.taken.append(Snapshot(SimpleNamespace(steps=k), float(k)))

    monkeypatch.setattr(method_scores, "customize", fake)
    config = quick("dreambooth", backbone, listed[0])
    taken = [(one.seconds, prior) for one, prior in method_scores.runs(config, listed[0], backbone)]
    assert taken == [(0.0, 0.0), (1.0, 50.0), (2.0, 50.0)]


@pytest.mark.parametrize("method", ["p-plus", "dreambooth"])
def test_two_references_are_combined_as_the_method_does(made, backbone, listed, monkeypatch, method):
    tunings = [quick(method, backbone, listed[0], name).tuning for name in ("shape", "appearance")]
    config = MethodPairConfig(
        method, listed[0].id, listed[1].id, *(replace(t, steps=1) for t in tunings),
        backbone="tiny", sampler_steps=1,
    )  # fmt: skip
    drawn = []
    score = method_scores.score_customization

    def look(pipe, *given, **named):
        drawn.append(pipe)
        return score(pipe, *given, **named)

    monkeypatch.setattr(method_scores, "score_customization", look)
    scores = made.score(config)
    assert scores["way"] == config.way and len(scores["silhouette"]) == PROMPTS
    learnt = [
        made.learn(name, reference, tuning, "tiny")
        for name, reference, tuning in (
            ("shape", listed[0], config.shape_tuning), ("appearance", listed[1], config.appearance_tuning)
        )
    ]  # fmt: skip
    (pipe,) = drawn
    if method == "p-plus":
        assert list(pipe.customizations) == ["*m"]
        mixed = mix_layers(*learnt, backbone).pseudo_word
        assert torch.equal(pipe.customizations["*m"].pseudo_word, mixed)
        assert not torch.equal(mixed, learnt[0].pseudo_word)
    else:
        assert list(pipe.customizations) == ["*m", "*a"] and "added" in config.way


# ---- grids


def test_the_grid_of_the_comparison(backbone, listed):
    able, unable = runnable(backbone)
    assert {*able, *unable} == METHODS.keys() and {"escd", *OTHERS} <= {*able}
    grid = method_grid(listed, backbone, able, seeds=2)
    assert len({records.key_of(config) for config in grid}) == len(grid)
    kinds = {
        kind: [c for c in grid if type(c) is kind] for kind in (StudyConfig, MethodConfig, MethodPairConfig)
    }
    assert len(kinds[MethodConfig]) == len(able) * 2 * 2 * 2
    assert len(kinds[MethodPairConfig]) == len(able) * 2 * 2
    assert {config.floor for config in kinds[MethodConfig]} == {*kinds[StudyConfig]}
    for config in kinds[MethodConfig]:
        assert config.tuning.seed == config.seed and config.tuning.steps in config.budgets
        assert records.config_of(as_record(config, {}), MethodConfig) == config
    shares = [shard(grid, worker, 2) for worker in (0, 1)]
    assert sorted(map(records.key_of, [*shares[0], *shares[1]])) == sorted(map(records.key_of, grid))


def test_a_method_without_its_weights_is_named(backbone, monkeypatch):
    class Lacking(baselines.Method):
        def config(self, *given, **named):
            raise ValueError("it was not pretrained")

    monkeypatch.setitem(METHODS, "e9t", Lacking("e9t", "", ""))
    able, unable = runnable(backbone)
    assert "e9t" not in able and unable["e9t"] == "it was not pretrained"


def test_budgets_have_the_presets_own_steps():
    assert budgets_of("dreambooth", 160) == BUDGETS
    assert budgets_of("dreambooth", 100) == tuple(sorted((*BUDGETS, 100)))
    assert budgets_of("e4t", 15)[-1] == 15
    tuning = METHODS["dreambooth"].config("shape")
    for wrong in ((), (3, 2), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="ascending order"):
            MethodConfig("dreambooth", "shape", "a/b", tuning, wrong)


def test_each_method_has_as_many_points(backbone, listed):
    able, _ = runnable(backbone)
    grid = grid_configs(listed, backbone, able)
    count: dict[str, int] = {}
    for config in grid:
        count[config.method] = count.get(config.method, 0) + len(config.budgets)
    assert set(count.values()) == {9 * 2 * len(listed)} and len(count) == len(able)
    plain, faster = (next(c for c in grid if c.factor == f).tuning for f in (1.0, 4.0))
    assert faster == scaled(plain, 4.0) and faster.learning_rate == 4 * plain.learning_rate
    assert faster.word_learning_rate == 4 * plain.word_learning_rate
    assert faster.bias_learning_rate == 4 * plain.bias_learning_rate


def point(steps, seconds, quality, attribute="shape", obeyed=True, **changes):
    names = method_choice.QUALITY["shape"] + method_choice.QUALITY["appearance"]
    made = {name: [quality, quality] for name in names} | {
        "steps": steps, "seconds": seconds, "megabytes": 1.0 + steps, "failed": [False, False],
        "silhouette": [True, False], "texture_first": [False, False], "colour_first": [True, True],
        "obeyed_background": [obeyed, True],
    }  # fmt: skip
    return made | changes


def tried(method, reference, factor, curve, attribute="shape", **changes):
    tuning = scaled(METHODS[method].config(attribute), factor)
    config = MethodConfig(
        method, attribute, reference, tuning, tuple(one["steps"] for one in curve), factor,
        **{"list": method_configs.GRID_LIST} | changes,
    )  # fmt: skip
    return as_record(config, {"prior_seconds": 0.0, "memory_gb": 1.0, "curve": curve})


def test_the_best_point_is_of_transfer_and_obedience(tmp_path, monkeypatch):
    results = []
    for reference, gain in (("a/b", 0.0), ("c/d", 0.1)):
        results += [
            tried("dreambooth", reference, 0.25, [point(40, 1, 0.3 + gain), point(160, 2, 0.5 + gain)]),
            # transfers most, and does not do what the prompt says
            tried("dreambooth", reference, 4.0, [point(40, 1, 0.5 + gain), point(160, 2, 0.8, obeyed=False)]),
            tried("escd", reference, 1.0, [point(40, 1, 0.6), point(160, 2, 0.7)]),
        ]
    results.append(tried("dreambooth", "only/one", 4.0, [point(40, 1, 0.9), point(160, 2, 0.9)]))
    results.append(tried("dreambooth", "a/b", 1.0, [point(40, 1, 1.0)], list="real"))
    grid = method_choice.points(results)
    assert {point.references for point in grid} == {2}, "a reference without every factor does not count"
    best = method_choice.best(grid)
    chosen = best["dreambooth", "shape"]
    assert (chosen.factor, chosen.steps) == (4.0, 40), "of two equal points the one of fewer steps"
    assert chosen.transfer == pytest.approx(0.55) and chosen.score == pytest.approx((0.55 + 1) / 2)
    assert best["escd", "shape"].steps == 160
    text = method_choice.table(grid)
    assert text.count("**") == 4 and f"**{chosen.score:.3f}**" in text
    # the presets take them from the file, and ours does not
    file = tmp_path / "rates.json"
    monkeypatch.setattr(baselines, "RATES_FILE", file)
    before = METHODS["dreambooth"].config("shape")
    assert set(method_choice.write_rates(grid, file)) == {"dreambooth"}
    after = METHODS["dreambooth"].config("shape")
    assert after.steps == 40 and after.learning_rate == pytest.approx(4 * before.learning_rate)
    assert METHODS["dreambooth"].config("shape", before_grid=True) == before
    assert METHODS["dreambooth"].config("appearance") == METHODS["dreambooth"].config(
        "appearance", before_grid=True
    )
    assert METHODS["dreambooth"].config("shape", steps=7).steps == 7


# ---- the comparison

FLOOR = {
    "failed": [False] * 2, "iou": [0.2] * 2, "texture_likeness": [0.1] * 2, "colour_likeness": [0.1] * 2,
}  # fmt: skip


def results_of(curves, attribute="shape", references=("a/b", "c/d"), seeds=(0,)):
    """Records of each method's curve [(steps, seconds, quality)], the same on every reference."""
    results = []
    for seed in seeds:
        for reference in references:
            for method, curve in curves.items():
                tuning = replace(METHODS[method].config(attribute, seed=seed), steps=curve[-1][0])
                config = MethodConfig(
                    method, attribute, reference, tuning, tuple(one[0] for one in curve), seed=seed
                )
                metrics = {"prior_seconds": 5.0, "memory_gb": 1.0, "curve": [point(*one) for one in curve]}
                results.append(as_record(config, metrics))
            results.append(as_record(config.floor, FLOOR))
    return results


CURVES = {
    "escd": [(10, 1.0, 0.5), (20, 2.0, 0.7), (40, 4.0, 0.9)],
    "source": [(10, 1.0, 0.95), (20, 2.0, 0.95), (40, 4.0, 0.95)],
    "dreambooth": [(10, 10.0, 0.1), (20, 20.0, 0.65), (40, 40.0, 0.65)],
    "p-plus": [(10, 3.0, 0.9), (20, 6.0, 0.2), (40, 12.0, 0.3)],
}


def test_time_to_equal_quality_is_of_the_best_other_method():
    (one,) = compared(results_of(CURVES)).attributes.values()
    equal = one.equal_quality("iou")
    # not P+, which was better on its way; not the source's recipe, which is ours; not the end of DreamBooth
    assert (equal.best, equal.quality, equal.seconds) == ("dreambooth", pytest.approx(0.65), 20.0)
    assert equal.ours == 2.0 and equal.ratio == pytest.approx(0.1)
    assert "ours reaches it in 2 s, 0.10 of that time" in method_tables.equal_in_words(one)[0]
    worse = CURVES | {"escd": [(10, 1.0, 0.5), (20, 2.0, 0.5), (40, 4.0, 0.6)]}
    (one,) = compared(results_of(worse)).attributes.values()
    assert one.equal_quality("iou").ours is None and one.equal_quality("iou").ratio is None
    assert "ours does not reach it" in method_tables.equal_in_words(one)[0]
    (alone,) = compared(results_of({"escd": CURVES["escd"]})).attributes.values()
    assert alone.equal_quality("iou") is None and method_tables.equal_in_words(alone) == []


def test_a_row_is_of_the_methods_own_steps_beside_ours():
    found = compared(results_of(CURVES, seeds=(0, 1)))
    one = found.attributes["shape"]
    assert (one.references, one.seeds) == (2, 2) and list(one.rows) == list(CURVES)
    row = one.rows["dreambooth"]
    assert row.steps == 40 and row.quality == {"iou": pytest.approx(0.65)} and row.seconds == 40.0
    assert row.gain["iou"].mean == pytest.approx(0.65 - 0.9) and one.rows["escd"].gain == {}
    assert row.leakage["texture_likeness"].mean == pytest.approx(0.65 - 0.1)
    assert row.first == {"silhouette": 0.5} and row.obeyed == 1.0
    assert row.megabytes == 41.0 and row.prior_seconds == 5.0
    assert one.curves["p-plus"] == Curve((10, 20, 40), (3.0, 6.0, 12.0), {"iou": (0.9, 0.2, 0.3)})
    assert len(one.used) == 2 * 2 * (len(CURVES) + 1)
    text = method_tables.markdown(found)
    assert "| shape: 2 references, 2 seeds |" in text and "| DreamBooth | 40 | 0.65 | -0.25 [" in text


def test_only_references_that_every_method_has_count():
    results = results_of(CURVES)
    results = [
        r for r in results if not (r.config.get("method") == "p-plus" and r.config["reference"] == "c/d")
    ]
    assert compared(results).attributes["shape"].references == 1
    assert compared([]).attributes == {} and method_tables.markdown(compared([])) == ""
    without_ours = [r for r in results if r.config.get("method") != "escd"]
    assert compared(without_ours).attributes == {}
    with pytest.raises(KeyError, match="no floor is stored"):
        compared([r for r in results if r.kind != "study"])


def test_of_two_presets_the_newest_counts():
    older = results_of({"escd": [(10, 1.0, 0.1)]}, references=("a/b", "c/d", "e/f"))
    one = compared([*older, *results_of(CURVES)]).attributes["shape"]
    assert one.references == 2 and one.curves["escd"].steps == (10, 20, 40)


def test_appearance_has_texture_and_colour_apart():
    curves = {name: curve for name, curve in CURVES.items()}
    results = [
        dataclasses.replace(r, metrics=r.metrics | {"curve": [
            one | {"colour_likeness": [0.4, 0.4]} for one in r.metrics["curve"]
        ]}) if "curve" in r.metrics else r
        for r in results_of(curves, "appearance")
    ]  # fmt: skip
    one = compared(results).attributes["appearance"]
    row = one.rows["dreambooth"]
    assert row.quality == {"texture_likeness": pytest.approx(0.65), "colour_likeness": pytest.approx(0.4)}
    assert row.first == {"texture_first": 0.0, "colour_first": 1.0}
    assert row.leakage["iou"].mean == pytest.approx(0.65 - 0.2)
    assert isinstance(one, Comparison) and len(method_tables.equal_in_words(one)) == 2
    heads, cells = method_tables.heads_of(one), method_tables.cells_of("dreambooth", row)
    assert len(heads) == len(cells)


def test_pairs_say_how_they_are_combined():
    results = []
    for method, right in (("escd", [True, True]), ("p-plus", [True, False])):
        tunings = [METHODS[method].config(name) for name in ("shape", "appearance")]
        config = MethodPairConfig(method, "a/b", "c/d", *tunings)
        scores = {"silhouette": [True, True], "texture_first": right, "colour_first": [True, True]}
        results.append(as_record(config, scores))
    found = compared(results)
    assert found.pairs["p-plus"].shares == {"silhouette": 1.0, "texture": 0.5, "colour": 1.0, "right": 0.5}
    assert "style mixing" in found.pairs["p-plus"].way and found.pairs["escd"].shares["right"] == 1.0
    assert "| P+ | 100 % | 50 % | 100 % | 50 % | 1 |" in method_tables.markdown(found)
    assert GRID_FACTORS[1] == 1.0
