"""One config, one record: keys, types, storage by many processes at once, and what counts as a repeat."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import typing
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pytest
import torch

from escd import records
from escd.evaluation import configs
from escd.evaluation.curve import CurveConfig
from escd.paper import sheets


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class ToyStudyConfig:
    part: Literal["encoder", "decoder"] = "encoder"
    steps: int = 3
    rate: float = 1.0
    seed: int = 0
    name: str | None = None
    prompts: tuple[str, ...] = ("a star",)
    inner: InnerConfig = InnerConfig()


def measure(config: ToyStudyConfig) -> dict:
    return {
        "loss": torch.tensor(0.25) * config.steps,
        "curve": np.array([1.0, 2.0]),
        "right": True,
        "missing": None,
    }


def test_the_second_get_does_not_run(tmp_path):
    first = records.get(ToyStudyConfig(), measure, folder=tmp_path, device="cpu")

    def never(config):
        raise AssertionError("ran although a record is stored")

    assert records.get(ToyStudyConfig(), never, folder=tmp_path) == first
    assert first.metrics == {"loss": 0.75, "curve": [1.0, 2.0], "right": True, "missing": None}
    assert (first.kind, first.seed, first.device) == ("toy_study", 0, "cpu")
    assert first.threads == torch.get_num_threads()
    assert first.instruction_set == torch.backends.cpu.get_cpu_capability()
    assert first.versions["torch"].startswith(torch.__version__.split("+")[0])
    lines = (tmp_path / "toy_study.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [records.key_of(ToyStudyConfig())]


def test_a_measurement_can_be_taken_again_and_the_newest_counts(tmp_path):
    first = records.get(ToyStudyConfig(), lambda config: {"seconds": 2.0}, folder=tmp_path)
    assert first == records.get(ToyStudyConfig(), lambda config: {"seconds": 1.0}, folder=tmp_path)
    again = records.get(ToyStudyConfig(), lambda config: {"seconds": 1.0}, folder=tmp_path, again=True)
    assert again.metrics == {"seconds": 1.0} and records.get(ToyStudyConfig(), folder=tmp_path) == again
    assert records.all("toy_study", folder=tmp_path) == [again]
    newer = records.measured(ToyStudyConfig(), lambda config: {"seconds": 0.5}, folder=tmp_path)
    assert newer == {"seconds": 0.5} == records.get(ToyStudyConfig(), folder=tmp_path).metrics
    assert records.measured(ToyStudyConfig(), lambda config: {"seconds": 9}) == {"seconds": 9}, "kept nowhere"


def test_a_line_is_parsed_once(tmp_path, monkeypatch):
    for seed in range(8):
        records.get(ToyStudyConfig(seed=seed), measure, folder=tmp_path, device="cpu")
    parsed = []
    monkeypatch.setattr(records, "with_defaults", lambda config, _class: parsed.append(config) or config)
    for seed in range(8):
        assert records.get(ToyStudyConfig(seed=seed), folder=tmp_path).seed == seed
    assert len(parsed) <= 1, "the last one, which nobody has read yet"


def test_another_config_is_another_record(tmp_path):
    for steps in (1, 2, 3):
        records.get(ToyStudyConfig(steps=steps), measure, folder=tmp_path)
    found = records.all(ToyStudyConfig, folder=tmp_path)
    assert [record.config["steps"] for record in found] == [1, 2, 3]
    assert records.all("toy_study", folder=tmp_path) == found
    assert records.all("nothing", folder=tmp_path) == []
    assert [records.config_of(record, ToyStudyConfig) for record in found] == [
        ToyStudyConfig(steps=steps) for steps in (1, 2, 3)
    ]


def test_other_inputs_put_a_record_out_of_date(tmp_path):
    old = records.get(ToyStudyConfig(), measure, inputs={"weights": "aa"}, folder=tmp_path)
    new = records.get(ToyStudyConfig(), measure, inputs={"weights": "bb"}, folder=tmp_path)
    assert old.inputs != new.inputs
    assert records.all("toy_study", folder=tmp_path) == [new]
    with pytest.raises(KeyError, match="make study"):
        records.get(ToyStudyConfig(), inputs={"weights": "cc"}, folder=tmp_path)


def test_nothing_stored_and_nothing_to_run(tmp_path):
    with pytest.raises(KeyError, match="make study"):
        records.get(ToyStudyConfig(), folder=tmp_path)


def test_equal_numbers_have_equal_keys():
    assert records.key_of(ToyStudyConfig(rate=1)) == records.key_of(ToyStudyConfig(rate=1.0))
    assert records.key_of(ToyStudyConfig(rate=2.0)) != records.key_of(ToyStudyConfig(rate=1.0))
    assert records.key_of(ToyStudyConfig(inner=InnerConfig(0.2))) != records.key_of(ToyStudyConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 3.0},
        {"steps": True},
        {"rate": "1e-4"},
        {"rate": float("nan")},
        {"part": "mid"},
        {"name": 3},
        {"prompts": ["a list"]},
        {"prompts": (1,)},
        {"inner": {"rate": 0.1}},
    ],
)
def test_a_value_of_another_type_is_an_error(wrong, tmp_path):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        records.get(ToyStudyConfig(**wrong), measure, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_must_be_frozen():
    @dataclasses.dataclass
    class LooseConfig:
        steps: int = 1

    for loose in (LooseConfig(), {"steps": 1}, ToyStudyConfig):
        with pytest.raises(TypeError, match="frozen"):
            records.key_of(loose)


@dataclasses.dataclass(frozen=True)
class ToldConfig:
    """A config with a field that has no default."""

    name: str
    inner: InnerConfig = InnerConfig()


def test_unknown_and_missing_fields_of_a_stored_config(tmp_path):
    record = records.get(ToldConfig("a"), measure_nothing, folder=tmp_path)
    for config in ({**record.config, "extra": 1}, {"inner": {"rate": 0.1}}):
        with pytest.raises(TypeError, match="unknown or missing"):
            records.config_of(dataclasses.replace(record, config=config), ToldConfig)
    with pytest.raises(ValueError, match="key"):
        changed = {**record.config, "name": "b"}
        records.config_of(dataclasses.replace(record, config=changed), ToldConfig)


def measure_nothing(config) -> dict:
    return {"name": config.name}


def grown(kind: type, name: str, default: object, **nested: type) -> type:
    """A config class of the same name, in another module, with one more field; `nested` replaces classes."""
    hints = typing.get_type_hints(kind)
    fields = [
        (f.name, nested[f.name], nested[f.name]()) if f.name in nested else (f.name, hints[f.name], f.default)
        for f in dataclasses.fields(kind)
    ]
    made = dataclasses.make_dataclass(kind.__name__, [*fields, (name, type(default), default)], frozen=True)
    made.__module__ = "elsewhere"
    return made


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    inner: InnerConfig = InnerConfig()
    several: tuple[InnerConfig, ...] = ()
    steps: int = 3


@pytest.mark.parametrize("config", [OuterConfig(), OuterConfig(InnerConfig(0.5), (InnerConfig(0.2),), 7)])
def test_a_new_field_with_a_default_orphans_no_record(config, tmp_path):
    stored = records.get(config, lambda config: {"loss": 1.0}, folder=tmp_path)
    inner = grown(InnerConfig, "momentum", 0.9)
    outer = grown(OuterConfig, "warm", True, inner=inner)
    same = outer(inner(config.inner.rate), config.several, config.steps)
    assert records.key_of(same) == records.key_of(config)
    found = records.get(same, folder=tmp_path)
    assert found.metrics == stored.metrics and found.config["inner"]["momentum"] == 0.9
    assert records.config_of(found, outer) == same
    assert [record.key for record in records.all(outer, folder=tmp_path)] == [stored.key]
    for other in (dataclasses.replace(same, warm=False), dataclasses.replace(same, inner=inner(0.1, 0.8))):
        with pytest.raises(KeyError):
            records.get(other, folder=tmp_path)


def test_a_record_is_not_taken_for_that_of_a_new_default(tmp_path):
    records.get(OuterConfig(), lambda config: {"loss": 3.0}, folder=tmp_path)
    kind, steps = OuterConfig, [("steps", int, 5)]
    changed = dataclasses.make_dataclass(kind.__name__, steps, bases=(kind,), frozen=True)
    with pytest.raises(KeyError):
        records.get(changed(), folder=tmp_path)
    assert records.get(changed(steps=3), folder=tmp_path).metrics == {"loss": 3.0}


def test_a_record_of_an_older_layout_is_found(tmp_path):
    """One whose key held every field, without a date and without what was learnt."""
    records.get(OuterConfig(steps=4), lambda config: {"loss": 4.0}, folder=tmp_path)
    path = tmp_path / "outer.jsonl"
    line = json.loads(path.read_text())
    older = {name: value for name, value in line.items() if name not in ("date", "learnt")}
    path.write_text(json.dumps(older | {"key": "0" * 64}) + "\n")
    found = records.get(OuterConfig(steps=4), folder=tmp_path)
    assert (found.date, found.learnt, found.key) == (None, {}, line["key"])


def test_a_record_says_when_it_was_made_and_what_was_learnt(tmp_path):
    told = {"shape": {"seconds": 3.5, "sha256": "ab"}}
    before = datetime.now(UTC).replace(microsecond=0)
    made = records.get(ToldConfig("a"), measure_nothing, folder=tmp_path, learnt=lambda: told)
    assert before <= datetime.fromisoformat(made.date) <= datetime.now(UTC)
    assert made.learnt == told and records.get(ToldConfig("a"), folder=tmp_path) == made


def test_every_stored_record_has_the_key_of_its_config():
    """The manifest's keys are looked up in these files."""
    kinds = [
        configs.StudyConfig,
        configs.CompositionConfig,
        configs.RankConfig,
        sheets.SheetConfig,
        CurveConfig,
    ]
    for kind in kinds:
        found = records.all(kind)
        assert found and [r.key for r in found] == [r.key for r in records.all(records.kind_of(kind))]
        for record in found:
            assert records.key_of(records.config_of(record, kind)) == record.key


@pytest.mark.parametrize("path", ["/home/someone/horse.png", "~/horse.png", "C:\\horse.png"])
def test_no_path_of_a_machine_is_kept(path, tmp_path):
    with pytest.raises(ValueError, match="path of this machine"):
        records.get(ToyStudyConfig(name=path), measure, folder=tmp_path)
    with pytest.raises(ValueError, match="path of this machine"):
        records.get(ToyStudyConfig(), lambda config: {"file": path}, folder=tmp_path)


def test_metrics_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.iou"):
        records.get(ToyStudyConfig(), lambda config: {"iou": float("nan")}, folder=tmp_path)
    with pytest.raises(TypeError, match=r"metrics\.image"):
        records.get(ToyStudyConfig(), lambda config: {"image": object()}, folder=tmp_path)


def test_a_failed_run_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        records.get(ToyStudyConfig(), lambda config: {"loss": 1 / 0}, folder=tmp_path)
    assert records.all("toy_study", folder=tmp_path) == []


def test_a_cut_off_append_is_replaced_and_a_broken_line_is_named(tmp_path):
    records.get(ToyStudyConfig(), measure, folder=tmp_path)
    path = tmp_path / "toy_study.jsonl"
    path.write_text(path.read_text() + '{"kind": "toy_st')
    assert len(records.all("toy_study", folder=tmp_path)) == 1
    records.get(ToyStudyConfig(steps=9), measure, folder=tmp_path)
    assert [json.loads(line)["config"]["steps"] for line in path.read_text().splitlines()] == [3, 9]

    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(ValueError) as raised:
        records.all("toy_study", folder=tmp_path)
    assert "line 3" in raised.value.__notes__[0]
    path.write_text('{"kind": "toy_study"}\n')
    with pytest.raises(ValueError, match="line 1"):
        records.all("toy_study", folder=tmp_path)


def _worker(arguments):
    folder, first = arguments
    for steps in range(first, first + 10):
        records.get(ToyStudyConfig(steps=steps), measure, folder=folder)
    return True


def test_many_processes_append_whole_lines_once(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_worker, [(tmp_path, first) for first in (0, 5, 10, 5)]) == [True] * 4
    lines = [json.loads(line) for line in (tmp_path / "toy_study.jsonl").read_text().splitlines()]
    assert sorted(line["config"]["steps"] for line in lines) == list(range(20))


def test_a_repeat_is_to_the_bit_or_within_its_bound(tmp_path):
    record = records.get(ToyStudyConfig(), measure, folder=tmp_path, device="cpu")
    assert records.same_platform(record, "cpu")
    assert not records.same_platform(dataclasses.replace(record, threads=record.threads + 1), "cpu")
    assert records.differences(record, measure(ToyStudyConfig())) == []
    near = {**record.metrics, "loss": 0.76}
    assert [line.split(":")[0] for line in records.differences(record, near)] == ["loss"]
    assert records.differences(record, near, {"loss": 0.02, "curve": 0.0}) == []
    assert len(records.differences(record, near, {"loss": 0.001})) == 1
    assert len(records.differences(record, {**near, "curve": [1.0, 2.5]}, {"loss": 0.02, "curve": 0.1})) == 1
    assert records.differences(record, {"loss": 0.75}) != []


def test_sha256_is_of_contents(tmp_path):
    (tmp_path / "image.png").write_bytes(b"pixels")
    assert records.sha256(tmp_path / "image.png") == records.sha256(b"pixels")
    whole = records.sha256(tmp_path)
    (tmp_path / "notes.txt").write_text("not a weight")
    (tmp_path / "training.json").write_text("{}")
    assert records.sha256(tmp_path) == whole
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert records.sha256(tmp_path) != whole
    array = np.arange(6, dtype=np.float32)
    assert records.sha256(array) == records.sha256(torch.from_numpy(array))
    assert records.sha256(array) != records.sha256(array.reshape(2, 3))
    assert records.sha256(array[::2]) == records.sha256(array[::2].copy())


def test_commit_is_that_of_the_clone(tmp_path):
    assert records.commit(tmp_path) is None

    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            check=True,
            capture_output=True,
        )

    git("init")
    assert records.commit(tmp_path) is None
    (tmp_path / "escd").mkdir()
    (tmp_path / "escd" / "a.py").write_text("a = 1\n")
    git("add", "escd")
    git("commit", "-m", "a", "--no-verify")
    clean = records.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "new.jsonl").write_text("{}\n")
    assert records.commit(tmp_path) == clean
    (tmp_path / "escd" / "a.py").write_text("a = 2\n")
    assert records.commit(tmp_path) == f"{clean}-dirty"
