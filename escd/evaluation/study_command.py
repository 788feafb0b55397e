"""The command `python -m escd.study`: makes the missing records of the study, then prints its tables.

`accelerate launch` spreads the runs over its processes. It can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from .. import records
from ..method.attributes import ATTRIBUTES
from . import estimate, real_tables, tables
from .configs import PARTS, backbone_configs, configs, equal_size_configs, rank_configs, shard
from .references import LISTS, REAL_LISTS, References
from .study import RUNS, Study


def main(argv: list[str] | None = None) -> None:
    """Make the records of the study that are missing, then print its table."""
    arguments = _arguments(argv)
    torch.set_num_threads(1)  # one process and several processes give the same bits
    state = PartialState(cpu=not torch.cuda.is_available())
    study = Study(arguments.folder, state.device if state.device.type == "cuda" else None)
    # Results of a person's own folder are not results of this project.
    stored = arguments.records or (RUNS / "records" if arguments.folder else records.FOLDER)
    listed = study.references(f"folder {arguments.twenty}" if arguments.folder else arguments.list)
    if arguments.references is not None:
        listed = replace(listed, references=listed.references[: arguments.references])
    grid = grid_of(listed, arguments)
    run_missing(study, grid, stored)
    if state.is_main_process:
        results = (records.get(c, folder=stored, inputs=study.inputs(c)) for c in grid)
        if listed.name in REAL_LISTS:
            print(real_tables.markdown(real_tables.real_tables(results)))
        else:
            print(tables.show(tables.table(results)))


def run_missing(study: Study, grid: Sequence[Any], stored: Path) -> None:
    """Make the records of a grid that `stored` lacks, shared out among the processes of `accelerate launch`.

    Says on stderr how many are missing and how long they take; returns when all processes are done.
    """
    state = PartialState()
    if state.is_main_process:
        missing = records.missing(grid, study.inputs, folder=stored)
        seconds = estimate.seconds(missing, study.device, stored)
        print(estimate.in_words(len(missing), len(grid), *seconds, state.num_processes), file=sys.stderr)
    mine = shard(grid, state.process_index, state.num_processes)
    for config in tqdm(mine, unit="run", disable=not state.is_local_main_process):
        study.run(config, stored)
    state.wait_for_everyone()


def grid_of(listed: References, arguments: argparse.Namespace) -> list[Any]:
    """The configs that the command makes records of.

    What is measured of the backbone by itself (`backbone_configs`: minutes, and in no table here) goes with
    a whole bundled list only.
    """
    of_all = {"backbone": arguments.backbone, "seed": arguments.seed}
    whole = listed.name in LISTS and arguments.references is None
    grid: list[Any] = backbone_configs(arguments.backbone) if whole else []
    grid += configs(listed, attributes=arguments.attributes, parts=arguments.parts, **of_all)
    grid += rank_configs(listed, **of_all) if arguments.ranks else []
    return grid + (equal_size_configs(listed, **of_all) if arguments.alike else [])


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m escd.study", description=main.__doc__)
    parser.add_argument("--backbone", default="mini", help="what load_backbone is to load (default: mini)")
    parser.add_argument(
        "--list", choices=(*LISTS, *REAL_LISTS), default="evaluation", help="references (default: evaluation)"
    )
    parser.add_argument("--folder", type=Path, help="use its silhouettes/*.png and materials/*.webp instead")
    parser.add_argument(
        "--twenty", type=int, default=1, metavar="K", help="the folder's K-th list of twenty (default: 1)"
    )
    parser.add_argument("--references", type=int, metavar="N", help="the first N references only")
    parser.add_argument("--attributes", nargs="+", choices=tuple(ATTRIBUTES), default=tuple(ATTRIBUTES))
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, help="parts to tune (default: encoder decoder all)"
    )
    parser.add_argument("--ranks", action="store_true", help="also each customization at low ranks")
    parser.add_argument(
        "--alike", action="store_true", help="also parts of the decoder of the size of mini's encoder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--records", type=Path, help="folder of the records (default: figures/records, or runs)"
    )
    arguments = parser.parse_args(argv)
    if arguments.twenty < 1 or (arguments.twenty > 1 and not arguments.folder):
        parser.error("--twenty counts the lists of a --folder, from 1")
    if arguments.references is not None and arguments.references < 1:
        parser.error(f"--references must be at least 1, not {arguments.references}")
    return arguments
