"""How PyTorch's threads wait: said before torch is imported, and never over what a person has said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from escd.waiting import SPIN, wait_briefly

ROOT = Path(__file__).resolve().parents[1]
UNSET = {k: v for k, v in os.environ.items() if k not in (*SPIN, "OMP_WAIT_POLICY")}


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, SPIN),
        ({"GOMP_SPINCOUNT": "7"}, SPIN | {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_environment_says_stays(monkeypatch, there, expected):
    monkeypatch.delitem(sys.modules, "torch")
    wait_briefly(there)
    assert there == expected


def test_once_torch_is_there_nothing_is_said():
    late: dict[str, str] = {}
    wait_briefly(late)
    assert "torch" in sys.modules and late == {}


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP tells what it read")
def test_the_command_line_sets_it_before_torch_reads_it():
    done = subprocess.run(
        [sys.executable, "-m", "escd", "--help"],
        cwd=ROOT,
        env=UNSET | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{SPIN['GOMP_SPINCOUNT']}'" in done.stderr


def made(tmp_path: Path, **said: str) -> dict[str, str]:
    """What a command of our Makefile finds in its environment."""
    names = (*SPIN, "OMP_WAIT_POLICY")
    (tmp_path / "Makefile").write_text(f"include {ROOT}/Makefile\ntold:\n\t@env\n")
    told = subprocess.run(
        ["make", "-s", "-C", tmp_path, "told"], env=UNSET | said, capture_output=True, text=True, check=True
    )
    lines = (line.partition("=") for line in told.stdout.splitlines())
    return {name: value for name, _, value in lines if name in names}


def test_make_says_it_to_everything_it_starts(tmp_path):
    assert made(tmp_path) == SPIN
    assert made(tmp_path, GOMP_SPINCOUNT="7") == SPIN | {"GOMP_SPINCOUNT": "7"}
    assert made(tmp_path, OMP_WAIT_POLICY="active") == {"OMP_WAIT_POLICY": "active"}
