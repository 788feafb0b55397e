"""The filters' ablation: each arm leaves out what it says, and is scored by what its own filters make."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from escd import records
from escd.backbone.hub import MODELS
from escd.method.attributes import ATTRIBUTES
from escd.pretrain import ablation, loop
from escd.pretrain.ablation import ARMS, AblationConfig, AblationStage, main, table
from escd.pretrain.pairs import SAME_SHAPE

pytestmark = pytest.mark.usefixtures("few_pictures")


def test_a_run_trains_filters_alone_and_scores_them(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ablation.paths, "RUNS", tmp_path / "runs")
    made = []

    class Watched(AblationStage):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)
            self.before = {n: p.clone() for n, p in self.module.named_parameters()}

    monkeypatch.setattr(ablation, "AblationStage", Watched)
    quick = partial(ablation.score_customization, sampler_steps=2)
    monkeypatch.setattr(ablation, "score_customization", quick)
    config = ablation.AblationConfig("no tower", images=64, references=1)
    metrics = ablation.score(config)
    (stage,) = made
    moved = {n for n, p in stage.module.named_parameters() if not torch.equal(p, stage.before[n])}
    assert moved and all(n.startswith(("filters.", "probe.")) for n in moved)
    assert set(metrics["errors"]) == set(ATTRIBUTES)
    assert len(metrics["shape"]["silhouette"]) == len(metrics["appearance"]["material"]) == 4
    assert not (tmp_path / "runs" / stage.name).exists(), "no state to be taken for another training's"
    # What the image tower says makes no difference.
    learnt = stage.module.filters["shape"]
    embeds_ref = stage.features[:2].float()
    other = embeds_ref.clone()
    other[:, : learnt.config.cls_width] += 1
    word = stage.backbone.word_embedding("shape")
    assert torch.equal(learnt(embeds_ref, word), learnt(other, word))


def test_what_the_arms_leave_out():
    folder = MODELS["mini"].folder
    stage = AblationStage(torch.device("cpu"), folder, "own picture")
    step = stage.batch(1 << 30, 32)
    assert step.plain == 0
    rows = [int((stage.latents == x).flatten(1).all(1).nonzero()[0]) for x in step.x_0[: step.shape]]
    assert torch.equal(step.shape_ref[: step.shape], stage.features[torch.tensor(rows)].float())
    assert not torch.equal(
        step.shape_ref[: step.shape], stage.features[torch.tensor(rows) ^ SAME_SHAPE].float()
    )
    assert stage.module.probe_weight == 0
    word = AblationStage(torch.device("cpu"), folder, "class word").backbone.word_embedding
    assert torch.equal(word("shape"), word("appearance"))
    assert torch.equal(word("shape"), stage.backbone.word_embedding("object"))


def test_the_command_runs_what_has_no_record(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ablation, "score", lambda config: asked.append(config.arm) or {"errors": {}})
    main(["--records", str(tmp_path)])
    main(["--records", str(tmp_path)])
    assert asked == list(ARMS)
    lines = (tmp_path / "ablation.jsonl").read_text().splitlines()
    assert [json.loads(line)["config"]["arm"] for line in lines] == list(ARMS)
    with pytest.raises(SystemExit):
        main(["--arms", "nothing at all"])


def test_the_table_pairs_the_arms_and_leaves_out_what_failed(tmp_path, monkeypatch):
    assert table(tmp_path) == ""
    iou = [0.5, 0.5, 0.7, 0.7, 0.6, 0.6, 0.6, 0.6]
    scores = {
        "all": {
            "shape": {"iou": iou, "silhouette": [True] * 4 + [False] * 4},
            "appearance": {"combined": [8.0] * 8, "material": [True] * 8},
        },
        "no tower": {
            "shape": {"iou": [x - 0.1 for x in iou[:7]] + [None], "silhouette": [False] * 7 + [None]},
            "appearance": {"combined": [9.0] * 7 + [None], "material": [True, False] * 3 + [True, None]},
        },
    }
    for arm, metrics in scores.items():
        records.get(AblationConfig(arm), lambda config, metrics=metrics: metrics, folder=tmp_path)
    _, _, whole, without = table(tmp_path).splitlines()
    assert whole == f"| {ARMS['all']} | 0.60 |  | 50 % | 100 % | 8.0 |  |"
    cells = [cell.strip() for cell in without.split("|")[1:-1]]
    # a missing silhouette is an overlap of nothing, and has no distance
    assert cells[:2] == [ARMS["no tower"], "0.44"] and cells[2].startswith("-0.16 [")
    assert cells[3:] == ["0 %", "50 %", "9.0", "+1.00 [+1.00, +1.00]"]


def test_whose_numbers_the_records_hold(tmp_path):
    config = AblationConfig("all")
    shipped, metrics = ablation.inputs(config), {"errors": {}}
    records.get(config, lambda config: metrics, inputs=shipped, folder=tmp_path)
    assert ablation.weights_in_words(tmp_path) == "the weights that ship"
    older = AblationConfig("no word")
    records.get(older, lambda config: metrics, inputs=shipped | {"filters": "0" * 64}, folder=tmp_path)
    assert ablation.weights_in_words(tmp_path) == "earlier weights"
