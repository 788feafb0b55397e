"""Paths: the package, the clone around it, and the folder of runs."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # the clone: figures, notebooks and paper stand beside the package
WEIGHTS = PACKAGE / "weights"
RUNS = Path(os.environ.get("ESCD_RUNS", "runs"))  # training states, customizations of the study
