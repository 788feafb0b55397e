"""Every figure of the paper, one function per stem: `python -m escd.draw [stem ...]`.

Without a stem all of them are drawn, README.md and paper/numbers.tex get their numbers, and then two records
are run again to see whether they still come out. A figure that shows generated images takes them from a
record as well (kind "sheet" or "process", the pixels beside it as a PNG), so that a clone draws the paper's
images and not merely similar ones; where weights or references have changed since, they are made anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from tqdm.auto import tqdm

from .. import files, records
from . import diagrams, figures
from .numbers import write_numbers
from .reproduce import repeatable, run_again
from .results import results
from .stems import STEMS

FIGURES = records.FOLDER.parent
REGISTERED = (diagrams, figures)  # importing these fills STEMS, in this order


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw figures; all of them, then write the numbers and run two records again, if none is named."""
    parser = argparse.ArgumentParser(prog="python -m escd.draw", description=main.__doc__)
    parser.add_argument(
        "stems", nargs="*", metavar="stem", help=f"one of {', '.join(STEMS)}; all of them if none"
    )
    stems = parser.parse_args(arguments).stems
    if unknown := sorted(set(stems) - STEMS.keys()):
        parser.error(f"no figure is called {', '.join(unknown)}; there are {', '.join(STEMS)}")
    draw_figures(stems or list(STEMS))
    if stems:
        return
    write_numbers()
    found = results().used
    again = repeatable(found)
    if not again:
        print("No stored record can be run again here: they were made on other devices, or take too long.")
    if differing := run_again(again, found):
        raise SystemExit("These records do not come out again:\n" + "\n".join(differing))
    print("Figures: figures/; what each was made from: figures/manifest.json; the numbers: README.md")


def draw_figures(stems: Sequence[str], folder: Path = FIGURES) -> None:
    """Draw each stem as PDF and PNG, and say in manifest.json what it was made from."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    progress = tqdm(stems, unit="figure")
    for stem in progress:
        progress.set_description(stem)
        drawing = STEMS[stem].draw()
        drawn = drawing.save(folder / stem)
        made = {
            "notebook": STEMS[stem].notebook,
            "records": [record.key for record in drawing.records],
            "commit": records.commit(),
            "versions": records.versions() | {"matplotlib": matplotlib.__version__},
            "sha256": {file.name: records.sha256(file) for file in drawn},
        }
        before = entries.get(stem, {})
        if made | {"commit": None} != before | {"commit": None}:  # else it is as it was, and keeps its commit
            entries[stem] = made
        # after every figure, so that the manifest holds whatever else goes wrong
        text = json.dumps({stem: entries[stem] for stem in STEMS if stem in entries}, indent=1)
        files.write_text(manifest, text + "\n")
