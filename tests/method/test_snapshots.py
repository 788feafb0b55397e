"""Snapshots of one tuning: each is the run of that many steps, and its seconds are those of tuning alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import escd
from escd.method import snapshots as snapshots_module
from escd.method import tuning
from escd.method.baselines import METHODS
from escd.method.config import TuningConfig
from escd.method.snapshots import Snapshots


@pytest.fixture
def picture(backbone):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, backbone.image_size, backbone.image_size, generator=generator) * 2 - 1


def short(method, backbone, steps, attribute="shape"):
    config = METHODS[method].config(attribute, backbone, steps=steps)
    few = {"prior_images": 2} if config.prior_images else {}
    return replace(config, batch_size=2, views=2, **few)


def learn(picture, backbone, config, **options):
    return escd.customize(picture, config.attribute, backbone, config=config, progress=False, **options)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("escd", "source", "e4t")])
def test_a_snapshot_is_the_run_of_that_many_steps(backbone, picture, method):
    config = short(method, backbone, 2)
    taken = Snapshots((0, 1, 2))
    last = learn(picture, backbone, config, snapshots=taken)
    found = [snapshot.customization for snapshot in taken.taken]
    assert [one.steps for one in found] == [0, 1, 2]
    for one in found[:2]:
        alone = learn(picture, backbone, replace(config, steps=one.steps))
        assert one.tensors.keys() == alone.tensors.keys() and one.losses == alone.losses
        assert all(torch.equal(w, alone.tensors[name]) for name, w in one.tensors.items()), one.steps
        assert one.config == alone.config and one.part == alone.part
    assert all(torch.equal(w, last.tensors[name]) for name, w in found[-1].tensors.items())
    changed = [float(sum(w.float().abs().sum() for w in one.tensors.values())) for one in found]
    assert len(set(changed)) == 3, "each step learns something"


def test_a_rate_with_a_schedule_has_no_early_snapshot(backbone, picture):
    config = short("escd", backbone, 4)
    assert not config.constant_rate
    with pytest.raises(ValueError, match="snapshot after 2 is no run of 2 steps: tune once for each"):
        learn(picture, backbone, config, snapshots=Snapshots((0, 2, 4)))
    whole = Snapshots((0, 4))
    learn(picture, backbone, config, snapshots=whole)
    assert [one.customization.steps for one in whole.taken] == [0, 4]
    with pytest.raises(ValueError, match="a run of 4 steps has no snapshot after 5"):
        learn(picture, backbone, config, snapshots=Snapshots((5,)))


def test_seconds_are_of_tuning_alone(backbone, picture, monkeypatch):
    """A clock that only class images, copies and steps move: 100 s, 10 s and 1 s each."""
    clock = [0.0]

    def slower(function, seconds):
        def run(*given, **named):
            clock[0] += seconds
            return function(*given, **named)

        return run

    monkeypatch.setattr(snapshots_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(snapshots_module, "copy", SimpleNamespace(deepcopy=slower(copy.deepcopy, 10.0)))
    monkeypatch.setattr(tuning, "prior_batches", slower(lambda *_: None, 100.0))
    monkeypatch.setattr(tuning, "predicted", slower(tuning.predicted, 1.0))
    taken = Snapshots((0, 1, 3))
    learn(picture, backbone, short("dreambooth", backbone, 3), snapshots=taken)
    assert taken.prior_seconds == 100.0 and clock[0] == 100 + 3 * 10 + 3
    assert [one.seconds for one in taken.taken] == [0.0, 1.0, 3.0]


def test_without_snapshots_nothing_is_kept(backbone, picture):
    none = Snapshots(())
    learn(picture, backbone, TuningConfig.of("shape", steps=1, views=2), snapshots=none)
    assert none.taken == [] and none.prior_seconds < 1
