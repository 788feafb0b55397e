"""The command of the study: which runs it makes, and how long it says they take."""

import dataclasses
import json

import pytest
from test_study import as_record

from escd import records
from escd.evaluation import configs, estimate, study, study_command
from escd.evaluation.configs import CompositionConfig, ObedienceConfig, RankConfig, StudyConfig
from escd.method.config import TuningConfig

SHAPE, APPEARANCE = TuningConfig.of("shape"), TuningConfig.of("appearance")


@pytest.fixture
def grids(monkeypatch, tmp_path):
    """The configs that a command line asks for; none of them is run."""

    def grid(*given: str) -> list:
        asked = []
        monkeypatch.setattr(study.Study, "run", lambda self, config, stored: asked.append(config))
        monkeypatch.setattr(study_command.tables, "table", lambda results: {})
        monkeypatch.setattr(study_command.real_tables, "real_tables", lambda results: {})
        study_command.main([*given, "--records", str(tmp_path)])
        return asked

    return grid


def test_the_backbone_is_measured_with_a_whole_bundled_list_only(grids):
    of_backbone = configs.backbone_configs()
    assert [config for config in grids() if config in of_backbone] == of_backbone
    for given in ("--list real", "--references 2", "--list real-development --references 1"):
        grid = grids(*given.split())
        assert {type(config) for config in grid} == {StudyConfig, CompositionConfig}, given


def test_ranks_and_parts_of_equal_size_are_asked_for(grids):
    plain, more = grids("--references", "1"), grids("--references", "1", "--ranks", "--alike")
    further = [config for config in more if config not in plain]
    assert len(more) == len(plain) + len(further)
    assert {type(config) for config in further} == {RankConfig, StudyConfig}


def test_it_says_how_many_runs_are_missing(grids, capsys):
    count = len(grids("--list", "development", "--references", "1"))
    said = capsys.readouterr().err
    assert f"{count} of {count} runs are missing (no estimate for {count} of them" in said


@pytest.mark.parametrize("given", [["--twenty", "2"], ["--twenty", "0", "--folder", "somewhere"]])
def test_a_list_of_a_folder_needs_a_folder_and_counts_from_one(given, capsys):
    with pytest.raises(SystemExit):
        study_command.main(given)
    assert "counts the lists of a --folder, from 1" in capsys.readouterr().err


def test_the_number_of_references_is_at_least_one(capsys):
    with pytest.raises(SystemExit):
        study_command.main(["--references", "-1"])
    assert "--references must be at least 1, not -1" in capsys.readouterr().err


# ---- how long it takes


def store(folder, config, seconds, learnt=None, device="cpu", kept=False):
    about = {
        name: {"date": "", "commit": None, "steps": 1, "sha256": "", "seconds": each, "kept": kept}
        for name, each in (learnt or {}).items()
    }
    record = dataclasses.replace(as_record(config, {}), seconds=seconds, learnt=about, device=device)
    with (folder / f"{record.kind}.jsonl").open("a") as file:
        file.write(json.dumps(dataclasses.asdict(record)) + "\n")


def test_missing_are_the_configs_without_a_record_of_these_inputs(tmp_path):
    floors = [StudyConfig("shape", name, "floor") for name in ("a", "b")]
    store(tmp_path, floors[0], 1.0)
    assert records.missing([*floors, ObedienceConfig()], lambda config: {}, folder=tmp_path) == [
        floors[1],
        ObedienceConfig(),
    ]
    assert records.missing(floors, lambda config: {"judges": "aa"}, folder=tmp_path) == floors


def test_seconds_are_medians_of_the_same_kind_and_device_and_each_part_is_learnt_once(tmp_path):
    def tuned(reference, tuning=SHAPE):
        return StudyConfig(tuning.attribute, reference, "customized", tuning)

    for name, seconds in (("a", 2.0), ("b", 4.0), ("c", 30.0)):
        store(tmp_path, StudyConfig("shape", name, "floor"), seconds)
        store(tmp_path, tuned(name), 50 + seconds, {"shape": 50.0})
    store(tmp_path, tuned("d"), 5.0, {"shape": 50.0}, kept=True)
    store(tmp_path, StudyConfig("shape", "e", "floor"), 1000.0, device="a faster one")
    assert estimate.seconds([StudyConfig("shape", "f", "floor")] * 2, "cpu", tmp_path) == (8.0, 0)
    assert estimate.seconds([tuned("f")], "cpu", tmp_path) == (50 + 4.5, 0)
    both = CompositionConfig("f", "g", "customized", SHAPE, APPEARANCE)
    store(tmp_path, dataclasses.replace(both, shape="a"), 6.0, {"shape": 50.0, "appearance": 20.0}, kept=True)
    assert estimate.seconds([tuned("f"), both], "cpu", tmp_path) == (50 + 4.5 + 20 + 6, 0)
    assert estimate.seconds([ObedienceConfig(), tuned("f")], "cpu", tmp_path) == (54.5, 1)


def test_controls_that_generate_nothing_take_as_long_as_the_ceiling(tmp_path):
    store(tmp_path, StudyConfig("shape", "a", "floor"), 100.0)
    store(tmp_path, StudyConfig("shape", "a", "ceiling"), 1.0)
    controls = [StudyConfig("shape", "b", kind) for kind in ("lossless", "copy")]
    assert estimate.seconds(controls, "cpu", tmp_path) == (2.0, 0)


def test_an_estimate_in_words():
    assert estimate.in_words(0, 7, 0.0, 0) == "all 7 runs are stored"
    assert estimate.in_words(2, 7, 40.0, 0) == "2 of 7 runs are missing: about 40 s"
    text = estimate.in_words(5, 7, 1200.0, 1, 2)
    assert text.startswith("5 of 7 runs are missing: about 10 min in 2 processes (no estimate for 1 of them")
    assert "about 2.0 h" in estimate.in_words(5, 7, 7200.0, 0)
