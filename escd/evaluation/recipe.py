"""The recipe of each attribute, one change at a time: `python -m escd.evaluation.recipe` makes the records.

A trial is how an attribute is tuned and how its images are generated. All trials of an attribute learn the
same development references; no evaluation reference has a say in a recipe. `tables` compares the records.
"160 steps" in a name of an appearance's trial: at true scale, noise around -1.5, 160 steps of 8 views.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState

from .. import records
from ..ending import run_command
from ..method.attributes import ATTRIBUTES
from ..method.config import TuningConfig
from .configs import StudyConfig
from .real_tables import Row, markdown_table_of, row_of
from .references import load_references
from .study import Study
from .study_command import run_missing

LIST = "real-development"
# Four images each: 16 images to a trial.
REFERENCES = 4


@dataclass(frozen=True)
class Trial:
    """One way to tune an attribute (fields of `TuningConfig`) and to generate (fields of `StudyConfig`)."""

    attribute: str
    name: str
    tuning: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    sampling: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def config(self, reference: str, kind: str = "customized") -> StudyConfig:
        """The run of a reference: customized by this trial, or a control of the same sampling."""
        tuned = kind == "customized"
        return StudyConfig(
            self.attribute,
            reference,
            kind,
            self._tuning() if tuned else None,
            list=LIST,
            **(GUIDANCE | dict(self.sampling)),
        )

    def _tuning(self) -> TuningConfig:
        return TuningConfig.of(self.attribute, **(START[self.attribute] | dict(self.tuning)))


GUIDANCE = {"guidance_scale": 4.0, "guidance_rescale": 0.0, "guidance_from": "customized"}
# The starting recipe, of which each trial changes something. All of it is written out, so that a later
# default does not change what a trial is.
START: dict[str, dict[str, Any]] = {
    "shape": {
        "part": "encoder", "steps": 160, "batch_size": 16, "views": 192, "augmentation": 1.0, "dropout": 0.15,
        "optimizer": "muon", "learning_rate": 1.2e-2, "word_learning_rate": 1e-4, "bias_learning_rate": 1e-3,
        "noise_level": 0.4, "true_scale": False,
    },
    "appearance": {
        "part": "decoder", "steps": 40, "batch_size": 8, "views": 64, "augmentation": 0.75, "dropout": 0.0,
        "optimizer": "muon", "learning_rate": 1e-3, "word_learning_rate": 1e-3, "bias_learning_rate": 3e-4,
        "noise_level": None, "true_scale": False,
    },
}  # fmt: skip
_SCALED = {"true_scale": True}
_LATE = _SCALED | {"noise_level": -1.5}
_LONG = _LATE | {"steps": 160}
# Stronger guidance takes texture away, so what only texture tells apart is tried at this scale.
_WEAK = {"guidance_scale": 2.0}


def _sampled(attribute: str, name: str, tuning: Mapping[str, Any]) -> list[Trial]:
    """A tuning at the first trial's guidance, at weaker guidance, and with the first one rescaled."""
    scales: list[tuple[str, dict[str, float]]] = [
        (f"{name}, guidance {scale:g}", {"guidance_scale": scale}) for scale in (3.0, 2.0, 1.5)
    ]
    scales.append((f"{name}, guidance 4 rescaled by 0.7", {"guidance_rescale": 0.7}))
    return [Trial(attribute, name, tuning), *(Trial(attribute, said, tuning, how) for said, how in scales)]


def _weakly_guided(changes: Mapping[str, Mapping[str, Any]]) -> list[Trial]:
    """The long tuning of an appearance with one change each, by name, at weak guidance."""
    return [
        Trial("appearance", f"160 steps, guidance 2, {name}", _LONG | dict(change), _WEAK)
        for name, change in changes.items()
    ]


def _from_backbone(
    attribute: str, name: str, tuning: Mapping[str, Any], scales: Sequence[float] = (2.0, 3.0)
) -> list[Trial]:
    """A tuning at scales of guidance whose branch without the prompt is the untouched backbone's."""
    return [
        Trial(attribute, f"{name}, guidance {scale:g} from the backbone", tuning, sampling)
        for scale in scales
        for sampling in [{"guidance_from": "backbone", "guidance_scale": scale}]
    ]


TRIALS: tuple[Trial, ...] = (
    Trial("appearance", "start"),
    Trial("appearance", "start, guidance 2", sampling=_WEAK),
    Trial("appearance", "true scale, guidance 2", _SCALED, _WEAK),
    Trial("appearance", "true scale, noise -1.5, guidance 2", _LATE, _WEAK),
    *_sampled("appearance", "160 steps", _LONG),
    *_weakly_guided(
        {
            "enlarged views": {"true_scale": False},
            "less noise": {"noise_level": -2.2},
            "more noise": {"noise_level": -0.8},
            "uniform timesteps": {"noise_level": None},
            "twice the rate": {"learning_rate": 2e-3},
            "half the rate": {"learning_rate": 5e-4},
            "AdamW": {"optimizer": "adamw", "learning_rate": 3e-4, "bias_learning_rate": None},
            "in the encoder": {"part": "encoder"},
            "gradient of the decoder alone": {"conditioning": "half"},
        }
    ),
    Trial("appearance", "80 steps, guidance 2", _LONG | {"steps": 80}, _WEAK),
    Trial("appearance", "80 steps of 16 views, guidance 2", _LONG | {"steps": 80, "batch_size": 16}, _WEAK),
    *_from_backbone("appearance", "160 steps", _LONG),
    *_from_backbone("appearance", "80 steps", _LONG | {"steps": 80}),
    *_from_backbone("appearance", "80 steps of 16 views", _LONG | {"steps": 80, "batch_size": 16}),
    *_sampled("shape", "start", {}),
    *_from_backbone("shape", "start", {}, (4.0, 6.0, 8.0)),
    *_from_backbone("shape", "no empty prompts", {"dropout": 0.0}, (3.0, 4.0)),
    *_from_backbone("shape", "half the rate", {"learning_rate": 6e-3}, (4.0, 6.0)),
    *_from_backbone("shape", "160 steps of 8 views", {"batch_size": 8}, (4.0, 6.0)),
    *_from_backbone(
        "shape", "160 steps of 8 views, half the rate", {"batch_size": 8, "learning_rate": 6e-3}, (4.0, 6.0)
    ),
    Trial("shape", "noise 0", {"noise_level": 0.0}),
    Trial("shape", "noise -0.5", {"noise_level": -0.5}),
    Trial("shape", "half the rate", {"learning_rate": 6e-3}),
    Trial("shape", "80 steps", {"steps": 80}),
    Trial("shape", "80 steps, 1.5 times the rate", {"steps": 80, "learning_rate": 1.8e-2}),
    Trial("shape", "160 steps of 8 views", {"batch_size": 8}),
    Trial("shape", "160 steps of 8 views, half the rate", {"batch_size": 8, "learning_rate": 6e-3}),
    Trial("shape", "160 steps of 8 views, 0.7 times the rate", {"batch_size": 8, "learning_rate": 8.4e-3}),
    Trial("shape", "in the decoder", {"part": "decoder", "learning_rate": 3e-3, "bias_learning_rate": 5e-4}),
)


def trials_of(attribute: str) -> list[Trial]:
    return [trial for trial in TRIALS if trial.attribute == attribute]


def grid(trials: Sequence[Trial], references: int) -> list[StudyConfig]:
    """The runs of the first references of `LIST`: each trial, its floor, and its oracle images."""
    names = [one.id for one in load_references(which=LIST)][:references]
    runs = [
        trial.config(name, kind)
        for name in names
        for trial in trials
        for kind in ("floor", "customized", "ceiling", "lossless")
    ]
    return list(dict.fromkeys(runs))


def tables(study: Study | None = None) -> dict[str, dict[str, Row]]:
    """By attribute, a row for each trial whose runs of `REFERENCES` references are all stored.

    study: with one, records of other weights than it has are left out.
    """
    made: dict[str, dict[str, Row]] = {}
    for attribute in ATTRIBUTES:
        for trial in trials_of(attribute):
            runs = _stored(grid([trial], REFERENCES), study)
            if runs is None:
                continue
            floors = {config: metrics for config, metrics in runs if config.kind == "floor"}
            rows = made.setdefault(attribute, {})
            rows[trial.name] = row_of([run for run in runs if run[0].kind == "customized"], floors)
            for kind in ("ceiling", "lossless"):
                rows.setdefault(kind, row_of([run for run in runs if run[0].kind == kind], floors))
    return made


def _stored(configs: Sequence[StudyConfig], study: Study | None) -> list[tuple[Any, dict[str, Any]]] | None:
    """Each config with its metrics; None where one of them has no record."""
    inputs = [study.inputs(config) if study else None for config in configs]
    try:
        found = [records.get(config, inputs=i) for config, i in zip(configs, inputs, strict=True)]
    except KeyError:
        return None
    return [(config, record.metrics) for config, record in zip(configs, found, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Make the missing records of the trials, then print the tables."""
    parser = argparse.ArgumentParser(prog="python -m escd.evaluation.recipe", description=main.__doc__)
    parser.add_argument("--attributes", nargs="+", choices=tuple(ATTRIBUTES), default=tuple(ATTRIBUTES))
    parser.add_argument("--references", type=int, default=REFERENCES, metavar="N", help="only the first N")
    arguments = parser.parse_args(argv)
    if arguments.references < 1:
        parser.error(f"--references must be at least 1, not {arguments.references}")
    torch.set_num_threads(1)  # as the study: one process and several give the same bits
    chosen = [trial for trial in TRIALS if trial.attribute in arguments.attributes]
    state = PartialState(cpu=not torch.cuda.is_available())
    study = Study(device=state.device if state.device.type == "cuda" else None)
    run_missing(study, grid(chosen, arguments.references), records.FOLDER)
    if state.is_main_process:
        for attribute, rows in tables(study).items():
            print(markdown_table_of(attribute, rows), end="\n\n")


if __name__ == "__main__":
    run_command("escd.evaluation.recipe")
