"""The tables of the real lists, from records whose rows are known."""

import dataclasses

import pytest
from conftest import as_record

from escd.evaluation import formats
from escd.evaluation import real_tables as tables
from escd.evaluation.configs import CompositionConfig, StudyConfig
from escd.evaluation.measure import Interval
from escd.evaluation.references import load_references
from escd.method.config import TuningConfig

LIST = "real-development"
LISTED = load_references(which=LIST)
PIERCED = next(r.id for r in LISTED if r.silhouette.pierced)
FILLED = next(r.id for r in LISTED if not r.silhouette.pierced)


def scores(failed=(False, False), **changes):
    values = {
        "iou": 0.8, "silhouette": True,
        "texture_first": False, "texture_rank": 4, "texture_distance": 0.5, "texture_likeness": 0.3,
        "colour_first": True, "colour_rank": 0, "colour_distance": 3.0, "colour_likeness": 0.6,
        "both_first": True, "both_rank": 1, "obeyed_shape": True, "obeyed_background": True,
        "obeyed_pattern": True, "obeyed_colours": True,
    } | changes  # fmt: skip
    return {"failed": list(failed)} | {
        name: [None if bad and not name.startswith("obeyed") else value for bad in failed]
        for name, value in values.items()
    }


def runs(attribute, reference):
    """A floor, and what was learnt."""
    floor = StudyConfig(attribute, reference, "floor", list=LIST)
    tuning = TuningConfig.of(attribute)
    return floor, dataclasses.replace(floor, kind="customized", tuning=tuning)


def test_a_failed_mask_is_a_miss_the_last_rank_and_a_leak():
    floor, tuned = runs("appearance", FILLED)
    rows = tables.real_tables([
        as_record(floor, scores(iou=0.5, silhouette=False)),
        as_record(tuned, scores(failed=(False, True), texture_first=True, texture_rank=0, iou=0.6)),
    ])["appearance"]  # fmt: skip
    row = rows["decoder"]
    assert row.texture == tables.Retrieval(0.5, 19 / 2, 0.5) and row.colour.first == 0.5
    assert row.both == tables.Retrieval(0.5, 10, None)
    assert row.leakage.mean == pytest.approx(((0.6 - 0.5) + (1.0 - 0.5)) / 2)
    assert row.leaked == 1.0 and row.failed == 0.5 and row.pictures == 2
    assert rows["floor"].leakage is None and rows["floor"].leaked == 0.0
    nothing = tables.real_tables([as_record(floor, scores(failed=(True, True)))])["appearance"]["floor"]
    assert nothing.texture == tables.Retrieval(0.0, 19.0, None)


def test_filled_and_pierced_outlines_are_rows_apart_and_so_are_texture_and_colour():
    made = []
    for reference, iou in ((FILLED, 0.9), (PIERCED, 0.6)):
        floor, tuned = runs("shape", reference)
        copy = dataclasses.replace(floor, kind="copy")
        made += [
            as_record(floor, scores(texture_likeness=0.1, colour_likeness=0.2)),
            as_record(tuned, scores(iou=iou, texture_likeness=0.2, colour_likeness=0.5)),
            as_record(copy, scores(texture_likeness=1.0, texture_first=True)),
        ]
    made.append(as_record(dataclasses.replace(floor, list="evaluation", reference="a/b"), {}))  # passed over
    rows = tables.real_tables(made)
    assert set(rows) == {"shape, filled", "shape, pierced"}
    assert rows["shape, filled"]["encoder"].iou == pytest.approx(0.9)
    pierced = rows["shape, pierced"]
    assert pierced["encoder"].iou == pytest.approx(0.6)
    assert pierced["encoder"].texture_leakage.mean == pytest.approx(0.1)
    assert pierced["encoder"].colour_leakage.mean == pytest.approx(0.3)
    assert pierced["copy"].texture_leakage.mean == pytest.approx(0.9) and pierced["copy"].leaked == 1.0
    with pytest.raises(KeyError, match="no floor is stored"):
        tables.real_tables(made[1:2])
    other = as_record(
        StudyConfig("shape", load_references(which="real")[0].id, "floor", list="real"), scores()
    )
    with pytest.raises(ValueError, match="on the lists real and real-development"):
        tables.real_tables([*made, other])


def test_both_counts_where_silhouette_texture_and_colour_are_right():
    tunings = TuningConfig.of("shape"), TuningConfig.of("appearance")
    config = CompositionConfig(FILLED, PIERCED, "customized", *tunings, list=LIST)
    metrics = scores() | {
        "silhouette": [True, True], "texture_first": [True, False], "colour_first": [True, True]
    }  # fmt: skip
    row = tables.real_tables([as_record(config, metrics)])["both"]["ours"]
    assert (row.silhouette, row.texture, row.colour, row.right) == (1.0, 0.5, 1.0, 0.5)


def test_markdown_has_the_controls_in_their_places():
    floor, tuned = runs("appearance", FILLED)
    source = dataclasses.replace(tuned, tuning=TuningConfig.of("appearance", augmentation=0.0))
    kinds = [dataclasses.replace(floor, kind=kind) for kind in ("copy", "flat", "lossless", "ceiling")]
    made = [as_record(config, scores()) for config in (tuned, source, *kinds, floor)]
    lines = tables.markdown(tables.real_tables(made)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "untouched backbone", "flat area of the material's mean colour", "decoder tuned",
        "decoder tuned, plain recipe", "right answer after the autoencoder", "right answer",
        "copy of the reference",
    ]  # fmt: skip
    assert "| 0 % | 4.0 | 0.50 | 100 % | 0.0 | 3.0 |" in lines[2] and "| -- |" in lines[2]


def test_numbers_as_text():
    assert formats.share_of(0.126) == "13 %" and formats.percent(0.126) == "13"
    assert formats.decimals(0.126) == "0.13" and formats.decimals(2.04, 1) == "2.0"
    assert formats.decimals(None) == formats.share_of(None) == formats.interval(None) == "--"
    assert formats.interval(Interval(-0.001, -0.02, 0.0141), 2) == "+0.00 [-0.02, +0.01]"
    table = formats.markdown_table(["arm", "IoU"], [["floor", "0.50"]])
    assert table == "| arm | IoU |\n|---|--:|\n| floor | 0.50 |"
