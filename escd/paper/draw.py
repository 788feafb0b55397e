"""Every figure of the paper, one function per stem: `python -m escd.draw [stem ...]`.

Without a stem, all are drawn, README.md and paper/numbers.tex get their numbers, and two records are run
again and compared. Generated images come from records too (kind "sheet" or "process", with the pixels in a
PNG): a clone draws exactly the paper's images. They are generated anew when weights or references change.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from tqdm.auto import tqdm

from .. import files, records
from . import diagrams, figures, methods
from .numbers import write_numbers
from .reproduce import repeatable, run_again
from .results import results
from .stems import STEMS

FIGURES = records.FOLDER.parent
REGISTERED = (diagrams, figures, methods)  # importing these fills STEMS, in this order


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw figures; without names all of them, then write the numbers and run two records again."""
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
    used = results().used
    again = repeatable(used)
    if not again:
        print("No stored record can be run again here: all are from other devices or take too long.")
    if differing := run_again(again, used):
        raise SystemExit("These records do not come out again:\n" + "\n".join(differing))
    print("Figures: figures/; their sources: figures/manifest.json; the numbers: README.md")


def draw_figures(stems: Sequence[str], folder: Path = FIGURES) -> None:
    """Draw each stem as PDF and PNG, and write its sources to manifest.json."""
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    progress = tqdm(stems, unit="figure")
    for stem in progress:
        progress.set_description(stem)
        if (why := STEMS[stem].missing()) is not None:
            tqdm.write(f"{stem} is left out: {why}")
            continue
        drawing = STEMS[stem].draw()
        drawn = drawing.save(folder / stem)
        entry = {
            "notebook": STEMS[stem].notebook,
            "records": [record.key for record in drawing.records],
            "commit": records.commit(),
            "versions": records.versions() | {"matplotlib": matplotlib.__version__},
            "sha256": {file.name: records.sha256(file) for file in drawn},
        }
        before = entries.get(stem, {})
        if entry | {"commit": None} != before | {"commit": None}:  # an unchanged figure keeps its commit
            entries[stem] = entry
        # after every figure, so that the manifest holds whatever else goes wrong
        text = json.dumps({stem: entries[stem] for stem in STEMS if stem in entries}, indent=1)
        files.write_text(manifest, text + "\n")
