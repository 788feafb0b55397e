"""The trials of each attribute's recipe: what they run, and the rows of their tables."""

import dataclasses
import json

import pytest
from conftest import as_record

from escd import records
from escd.evaluation import recipe, scores
from escd.evaluation.configs import StudyConfig
from escd.evaluation.recipe import LIST, START, TRIALS, Trial
from escd.evaluation.references import load_references
from escd.method.attributes import ATTRIBUTES


def test_no_two_trials_are_the_same():
    names = [(trial.attribute, trial.name) for trial in TRIALS]
    runs = [trial.config("one") for trial in TRIALS]
    assert len(set(names)) == len(names) and len(set(runs)) == len(runs)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_the_first_trial_changes_nothing(attribute):
    first = recipe.trials_of(attribute)[0]
    assert first.name == "start" and not first.tuning and not first.sampling
    tuning = first.config("one").tuning
    assert {name: getattr(tuning, name) for name in START[attribute]} == START[attribute]


def test_the_trials_learn_from_development_references_only():
    grid = recipe.grid(TRIALS, references=2)
    known = [one.id for one in load_references(which=LIST)][:2]
    assert {config.reference for config in grid} == set(known)
    assert {config.list for config in grid} == {LIST} and LIST == "real-development"


def test_each_trial_has_a_floor_of_its_own_guidance():
    trial = Trial("appearance", "less", sampling={"guidance_scale": 2.0})
    customized, floor = trial.config("one"), trial.config("one", "floor")
    assert floor.guidance_scale == 2.0 and floor.tuning is None
    assert dataclasses.replace(customized, kind="floor", tuning=None) == floor


def store(folder, config: StudyConfig, texture: bool) -> None:
    metrics = {"failed": [False], "obeyed_shape": [True], "obeyed_background": [True]}
    metrics |= {"iou": [0.5], "silhouette": [False]}
    for name in ("texture", "colour", "both"):
        metrics |= {f"{name}_first": [texture], f"{name}_rank": [3], f"{name}_distance": [1.0]}
    record = as_record(config, metrics)
    with (folder / f"{record.kind}.jsonl").open("a") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def test_a_row_is_made_of_complete_trials_only(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setattr(recipe, "REFERENCES", 2)
    first, second, *_ = recipe.trials_of("appearance")
    for config in recipe.grid([first], 2):
        store(tmp_path, config, texture=config.kind != "floor")
    for config in recipe.grid([second], 2)[:1]:
        store(tmp_path, config, texture=True)
    rows = recipe.tables()["appearance"]
    assert list(rows) == ["start", "ceiling", "lossless"]
    assert rows["start"].texture.first == 1.0 and rows["start"].leakage.mean == 0.0


def test_images_are_generated_with_the_guidance_of_a_config():
    asked = {}

    class Pipe:
        def __call__(self, prompts, **given):
            asked.update(given)
            raise StopIteration

    with pytest.raises(StopIteration):
        scores.generate(Pipe(), ["a"], 0, 2, 4.0, 0.7, "backbone")
    assert (asked["guidance_rescale"], asked["guidance_from"]) == (0.7, "backbone")
