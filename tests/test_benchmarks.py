"""The benchmarks run; what they print depends on the machine."""

import runpy
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def test_world(capsys, monkeypatch):
    threads = torch.get_num_threads()
    arguments = ["--batches", "1", "4", "--threads", "1", "--seconds", "0.05"]
    monkeypatch.setattr("sys.argv", ["world.py", *arguments])
    try:
        runpy.run_path(str(FOLDER / "world.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["1", "4"]
    assert all(float(row.split()[1]) > 0 for row in rows[2:])
