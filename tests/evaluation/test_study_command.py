"""The command of the study: which runs it makes, and how long it says they take."""

import dataclasses
import json

import pytest
from conftest import as_record

from escd import records
from escd.evaluation import configs, estimate, study, study_command
from escd.evaluation.configs import CompositionConfig, ObedienceConfig, RankConfig, StudyConfig
from escd.evaluation.method_configs import (
    GRID_FACTORS,
    GRID_REFERENCES,
    REFERENCES,
    MethodConfig,
    MethodPairConfig,
)
from escd.method.baselines import METHODS
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
    for given in ("--references 2", "--list real-development --references 1"):
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


def test_the_methods_are_compared_instead_of_the_halves(grids, monkeypatch, capsys):
    monkeypatch.setattr(study_command.method_tables, "compared", lambda results: None)
    monkeypatch.setattr(study_command.method_tables, "markdown", lambda methods: "")
    monkeypatch.setattr(
        study_command, "runnable", lambda backbone: (["escd", "p-plus"], {"e9t": "no weights"})
    )
    grid = grids("--methods")
    of_methods = [config for config in grid if isinstance(config, MethodConfig)]
    assert {config.list for config in grid} == {"real"} and not set(configs.backbone_configs()) & {*grid}
    assert len({config.reference for config in of_methods}) == REFERENCES
    assert {config.seed for config in grid} == {0} and len(of_methods) == REFERENCES * 2 * 2
    said = capsys.readouterr().err
    assert "e9t is left out: no weights" in said and f"{len(grid)} of {len(grid)} runs are missing" in said
    more = grids("--methods", "--references", "7", "--seeds", "3", "--list", "real-development")
    assert {config.seed for config in more} == {0, 1, 2} and {c.list for c in more} == {"real-development"}
    assert len({c.reference for c in more if isinstance(c, MethodConfig)}) == 7


def test_the_grid_of_rates_is_on_development_references(grids, monkeypatch, tmp_path):
    monkeypatch.setattr(study_command, "runnable", lambda backbone: (["dreambooth"], {}))
    monkeypatch.setattr(study_command.method_choice, "points", lambda results, which: [])
    written = tmp_path / "rates.json"
    monkeypatch.setattr(study_command, "RATES_FILE", written)
    grid = grids("--method-grid")
    assert {config.list for config in grid} == {"real-development"}
    assert len(grid) == GRID_REFERENCES * 2 * len(GRID_FACTORS)
    assert not written.exists()
    grids("--method-grid", "--take-rates")
    assert json.loads(written.read_text()) == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--methods --ranks", "--ranks is of the study of the halves"),
        ("--method-grid --parts all", "--parts is of the study of the halves"),
        ("--methods --method-grid", "give one of them"),
        ("--take-rates", "takes them from --method-grid"),
        ("--methods --seeds 0", "--seeds must be at least 1, not 0"),
    ],
)
def test_options_that_do_not_belong_together(given, said, capsys):
    with pytest.raises(SystemExit):
        study_command.main(given.split())
    assert said in capsys.readouterr().err


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


def test_a_method_takes_as_long_as_one_like_it_and_roughly_before_any_is_stored(tmp_path):
    def method(name, reference, budgets=(0, 10)):
        return MethodConfig(name, "shape", reference, METHODS[name].config("shape"), budgets)

    whole = TuningConfig.of("shape", batch_size=10, steps=100)
    store(tmp_path, StudyConfig("shape", "a", "customized", whole), 504.0, {"shape": 500.0})
    # 0.5 s a view and 1 s an image: 4 images after each of two numbers of steps, and 200 of the class
    tuning = METHODS["dreambooth"].config("shape")
    assert tuning.batch_size == 1 and tuning.prior_images == 200 and tuning.constant_rate
    once = estimate.seconds([method("dreambooth", "a")], "cpu", tmp_path)
    assert once == (10 * 2 * 0.5 + 200 + 2 * 4, 0)
    # a decaying rate has a run for each
    ours = METHODS["escd"].config("shape")
    assert estimate.seconds([method("escd", "a", (0, 10, 20))], "cpu", tmp_path) == (
        30 * ours.batch_size * 0.5 + 3 * 4, 0,
    )  # fmt: skip
    pair = MethodPairConfig("dreambooth", "a", "b", tuning, METHODS["dreambooth"].config("appearance"))
    assert estimate.seconds([pair], "cpu", tmp_path) == (4.0, 0)
    for name, seconds in (("dreambooth", 70.0), ("p-plus", 30.0)):
        store(tmp_path, method(name, "a"), seconds)
    found = [estimate.seconds([method(n, "b")], "cpu", tmp_path)[0] for n in ("dreambooth", "p-plus", "escd")]
    assert found == [70.0, 30.0, 50.0]


def test_an_estimate_in_words():
    assert estimate.in_words(0, 7, 0.0, 0) == "all 7 runs are stored"
    assert estimate.in_words(2, 7, 40.0, 0) == "2 of 7 runs are missing: about 40 s"
    text = estimate.in_words(5, 7, 1200.0, 1, 2)
    assert text.startswith("5 of 7 runs are missing: about 10 min in 2 processes (no estimate for 1 of them")
    assert "about 2.0 h" in estimate.in_words(5, 7, 7200.0, 0)
