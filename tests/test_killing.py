"""Commands killed while they write; more of it by hand: `python tests/killing.py --help`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_kill_leaves_nothing_half_written_and_loses_nothing():
    killing = Path(__file__).with_name("killing.py")
    # A new process: one forked from a process with PyTorch, as `warm` gives, forks children that may fail.
    ran = subprocess.run(
        [sys.executable, str(killing), "--moments", "1"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("killed at") == 6, ran.stdout
