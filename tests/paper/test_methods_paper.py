"""The methods in README, paper and figures: from records alone, and left out cleanly without them."""

from __future__ import annotations

import re
import runpy
from types import SimpleNamespace

import numpy as np
import pytest

from escd import paths, records
from escd.evaluation import method_tables
from escd.evaluation.configs import StudyConfig
from escd.evaluation.method_configs import MethodConfig, MethodPairConfig
from escd.evaluation.references import load_references
from escd.method.baselines import METHODS
from escd.paper import draw, methods, results, sheets
from escd.paper.stems import STEMS, Stem

INPUTS = {"backbone mini": "aa"}
BUDGETS = (0, 40, 160)
STEPS = {"shape": 160, "appearance": 40}
QUALITY = {"escd": (0.2, 0.7, 0.9), "dreambooth": (0.1, 0.2, 0.65), "p-plus": (0.1, 0.3, 0.4)}
SECONDS = {"escd": (1.0, 2.0, 4.0), "dreambooth": (10.0, 20.0, 40.0), "p-plus": (1.0, 10.0, 30.0)}


def scores(quality):
    names = ("iou", "texture_likeness", "colour_likeness")
    found = ("silhouette", "texture_first", "colour_first")
    made = {name: [quality] * 4 for name in names} | {name: [True, False] * 2 for name in found}
    return made | {"failed": [False] * 4, "obeyed_background": [True] * 4}


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "study", lambda: SimpleNamespace(inputs=lambda config: INPUTS))
    methods._methods.cache_clear()
    yield tmp_path
    methods._methods.cache_clear()


@pytest.fixture
def stored(empty):
    """Records of three methods on two references of the real list, of which ours is the best."""
    names = [reference.id for reference in load_references(which="real").references[:2]]
    for reference in names:
        for attribute in ("shape", "appearance"):
            floor = StudyConfig(attribute, reference, "floor", list="real")
            records.get(floor, lambda _: scores(0.1), inputs=INPUTS, device="cpu")
            for method, quality in QUALITY.items():
                tuning = METHODS[method].config(attribute, steps=STEPS[attribute])
                config = MethodConfig(method, attribute, reference, tuning, BUDGETS)
                curve = [
                    {"steps": k, "seconds": s, "megabytes": 2.5, **scores(q)}
                    for k, s, q in zip(BUDGETS, SECONDS[method], quality, strict=True)
                ]
                metrics = {"prior_seconds": 7.0, "memory_gb": 1.25, "curve": curve}
                records.get(config, lambda _, m=metrics: m, inputs=INPUTS, device="cpu")
    for method in QUALITY:
        tunings = [METHODS[method].config(name, steps=STEPS[name]) for name in ("shape", "appearance")]
        pair = MethodPairConfig(method, *names, *tunings)
        records.get(pair, lambda _: scores(0.5), inputs=INPUTS, device="cpu")
    return empty


def test_without_records_all_is_left_out_and_says_what_makes_them(empty, monkeypatch, capsys):
    assert methods.methods().attributes == {} and methods.method_numbers() == {}
    assert methods.methods_in_words() == [] and methods.methods_at_size_in_words() == []
    latex = methods.methods_in_latex()
    assert all(line.startswith("%") for line in latex.splitlines()) and methods.COMMAND in latex
    monkeypatch.setattr(draw, "STEMS", {"methods_curve": STEMS["methods_curve"]})
    draw.draw_figures(["methods_curve"], empty)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 1 and methods.COMMAND in lines[0]
    assert not list(empty.glob("*.pdf"))
    assert Stem(lambda: None, "").missing() is None, "other figures are always drawn"


def test_the_table_and_the_numbers_are_of_the_records(stored):
    values = methods.method_numbers()
    assert values["methods.shape.references"] == "2" and values["methods.shape.seeds"] == "1"
    # each at its own number of steps
    assert values["methods.dreambooth.shape.iou"] == "0.65"
    assert values["methods.dreambooth.shape.iou.gain"] == "-0.25"
    assert values["methods.escd.appearance.texture"] == "0.70"
    assert values["methods.equal.shape.iou.best"] == "DreamBooth"
    assert (
        values["methods.equal.shape.iou.seconds"] == "2" and values["methods.equal.shape.iou.ratio"] == "0.05"
    )
    assert values["methods.p-plus.both.right"] == "50"
    assert not [text for text in values.values() if re.search(r"[\\%&#$_{}]", text)], "LaTeX reads these"
    text = "\n".join(methods.methods_in_words())
    assert "| ours | 160 | 0.90 | -- | 50 % |" in text and "appearance, texture alone" in text.lower()
    assert "2 references, 1 seed |" in text
    latex = methods.methods_in_latex()
    assert latex.count(r"\begin{table*}") == 2 and r"\includegraphics{methods_curve}" in latex
    assert not re.search(r"(?<!\\)[%_]", latex.split("\n", 1)[1].replace("methods_curve", ""))
    rows = [line for line in latex.splitlines() if line.endswith(r"\\") or r"\\ \midrule" in line]
    assert {line.count("&") for line in rows[:4]} == {rows[0].count("&")}


def test_a_record_of_other_weights_does_not_count(stored, monkeypatch):
    monkeypatch.setattr(results, "study", lambda: SimpleNamespace(inputs=lambda config: {"x": "bb"}))
    methods._methods.cache_clear()
    assert methods.missing() is not None


def test_the_figure_shows_quality_against_seconds(stored):
    drawing = methods.methods_curve()
    panels = {axes.get_title(): axes for axes in drawing.axes}
    assert list(panels) == [
        "shape: IoU", "appearance: likeness of texture", "appearance: likeness of colour"
    ]  # fmt: skip
    for axes in panels.values():
        lines = {line.get_label(): line for line in axes.get_lines()}
        for name in QUALITY:
            line = lines[method_tables.NAMES[name]]
            assert tuple(line.get_xdata()) == SECONDS[name] and tuple(line.get_ydata()) == QUALITY[name]
    (legend,) = drawing.legends
    assert legend.get_title().get_text() == "2 references, 1 seed"
    assert len(drawing.records) == 2 * 2 * (len(QUALITY) + 1) + len(QUALITY)
    assert methods.missing() is None


def test_examples_are_drawn_from_what_is_kept(empty, monkeypatch, backbone, capsys):
    """Of each method a row; one whose customizations are not kept is named and left out."""
    kept = {"dreambooth", "p-plus"}
    tunings = {name: METHODS[name].config("shape", backbone) for name in METHODS if name != "e4t"}
    study = SimpleNamespace(
        backbone=lambda name: backbone,
        knows=lambda attribute, reference, tuning, name: any(
            tuning == METHODS[each].config(attribute, backbone) for each in kept
        ),
    )
    monkeypatch.setattr(results, "study", lambda: study)
    monkeypatch.setattr(sheets, "study", lambda: study)
    asked = []

    def images(config):
        asked.append(config)
        return SimpleNamespace(key="aa"), [np.zeros((8, 8, 3), np.uint8)] * len(config.prompts)

    monkeypatch.setattr(methods, "stored_images", images)
    monkeypatch.setattr(methods, "runnable", lambda backbone: (list(tunings), {}))
    drawing = methods.methods_examples()
    shown = load_references(which="real")[0].id
    assert {config.list for config in asked} == {"real"} and len(asked) == 2 * len(kept)
    assert {config.shape or config.appearance for config in asked} == {shown}
    assert all(len(config.prompts) == methods.EXAMPLES for config in asked)
    texts = {text.get_text() for axes in drawing.axes for text in axes.texts}
    assert {"P+", "DreamBooth", "only the shape", "only the appearance"} <= texts and "ours" not in texts
    assert methods.COMMAND in capsys.readouterr().out
    kept.clear()
    with pytest.raises(KeyError, match="--methods"):
        methods.methods_examples(shown)


def test_the_methods_at_full_size(empty):
    took = {
        "steps": 400, "batch": 1, "step_seconds": 2.5, "tuning_seconds": 1000.0, "prior_images": 200,
        "prior_seconds": 321.0, "operations": 1e15, "prior_operations": 2e15, "memory_gb": 15.0,
        "sampling_passes": 1.31, "file_mb": 1719.0,
    }  # fmt: skip
    metrics = {"methods": {"dreambooth": {"shape": took}}}
    size = runpy.run_path(str(paths.ROOT / "benchmarks" / "sd15_size.py"))["SizeConfig"]
    records.get(size(methods=True), lambda _: metrics, device="cpu")
    records.get(size(methods=True, size="small"), lambda _: {"methods": {}}, device="cpu")
    text = "\n".join(methods.methods_at_size_in_words())
    assert "| DreamBooth | shape | 400 | 1 | 2.5 | 1000 | 200, 321 s | 3.00 | 1.31 | 15.0 | 1719.0 |" in text
