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
from ..method.baselines import RATES_FILE
from . import estimate, method_choice, method_tables, real_tables, tables
from .configs import PARTS, backbone_configs, configs, equal_size_configs, rank_configs, shard
from .method_configs import (
    GRID_LIST,
    GRID_REFERENCES,
    REFERENCES,
    SEEDS,
    grid_configs,
    method_configs,
    runnable,
)
from .references import DEFAULT_LIST, LISTS, REAL_LISTS, References
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
    compared = arguments.methods or arguments.method_grid
    grid = method_grid_of(study, listed, arguments) if compared else grid_of(listed, arguments)
    run_missing(study, grid, stored)
    if state.is_main_process:
        results = (records.get(c, folder=stored, inputs=study.inputs(c)) for c in grid)
        if arguments.method_grid:
            tried = method_choice.points(results, listed.name)
            print(method_choice.table(tried))
            if arguments.take_rates:
                method_choice.write_rates(tried, RATES_FILE)
        elif arguments.methods:
            print(method_tables.markdown(method_tables.compared(results)))
        elif listed.name in REAL_LISTS:
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
    whole = listed.name in (*LISTS, *REAL_LISTS) and arguments.references is None
    grid: list[Any] = backbone_configs(arguments.backbone) if whole else []
    grid += configs(listed, attributes=arguments.attributes, parts=arguments.parts, **of_all)
    grid += rank_configs(listed, **of_all) if arguments.ranks else []
    return grid + (equal_size_configs(listed, **of_all) if arguments.alike else [])


def method_grid_of(study: Study, listed: References, arguments: argparse.Namespace) -> list[Any]:
    """The configs that compare the methods, or their grid of rates and steps.

    Methods that the backbone cannot run are named on stderr and left out.
    """
    backbone = study.backbone(arguments.backbone)
    able, unable = runnable(backbone)
    for name, why in unable.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    if arguments.method_grid:
        return grid_configs(listed, backbone, able, name=arguments.backbone)
    return method_configs(listed, backbone, able, name=arguments.backbone, seeds=arguments.seeds)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m escd.study", description=main.__doc__)
    parser.add_argument("--backbone", default="mini", help="what load_backbone is to load (default: mini)")
    parser.add_argument(
        "--list", choices=(*LISTS, *REAL_LISTS),
        help=f"references (default: {DEFAULT_LIST}; the grid of the methods: {GRID_LIST})",
    )  # fmt: skip
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
    parser.add_argument(
        "--methods", action="store_true",
        help=f"compare the published methods instead (on {REFERENCES} references by default)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=SEEDS, metavar="N", help=f"runs of each method (default: {SEEDS})"
    )
    parser.add_argument(
        "--method-grid", action="store_true", help="learning rates and steps of each method instead"
    )
    parser.add_argument(
        "--take-rates", action="store_true", help="give the grid's best rates and steps to the presets"
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
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {arguments.seeds}")
    if arguments.methods and arguments.method_grid:
        parser.error("--methods and --method-grid are two runs: give one of them")
    if arguments.take_rates and not arguments.method_grid:
        parser.error("--take-rates takes them from --method-grid")
    if arguments.methods or arguments.method_grid:
        given = ("folder", "attributes", "parts", "ranks", "alike", "seed")
        if idle := [name for name in given if getattr(arguments, name) != parser.get_default(name)]:
            parser.error(f"--{idle[0]} is of the study of the halves: leave it out")
        which, count = (GRID_LIST, GRID_REFERENCES) if arguments.method_grid else ("real", REFERENCES)
        arguments.list = arguments.list or which
        arguments.references = arguments.references or count
    arguments.list = arguments.list or DEFAULT_LIST
    return arguments
