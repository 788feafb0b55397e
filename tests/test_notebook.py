"""Errors of a person's files, as a notebook shows them."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from escd.data.images import open_image
from escd.notebook import in_one_line

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def nothing_of_a_persons(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))


def shown(cell: str) -> str:
    """What running a cell prints."""
    shell = InteractiveShell.instance()
    printed = io.StringIO()
    with redirect_stdout(printed):
        shell.run_cell(cell)
    InteractiveShell.clear_instance()
    return printed.getvalue()


START = """
from escd.data.images import open_image
from escd.notebook import in_one_line
with in_one_line():
    """


@pytest.mark.parametrize("name", ["hores.png", "notes.txt"])
def test_a_picture_that_cannot_be_read_is_one_line_that_says_where_paths_start(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    (line,) = shown(f"{START}open_image({name!r}, 64)").strip().splitlines()
    assert name in line and f"paths start from {Path.cwd()}" in line


def test_your_image_says_a_wrong_path_in_one_line():
    cells = nbformat.read(ROOT / "notebooks" / "your_image.ipynb", as_version=4).cells
    (cell,) = (cell.source for cell in cells if "open_image_and_mask(" in cell.source)
    given = "import sys, escd\nimage, mask, backbone = 'hores.png', '', 'mini'\n"
    (line,) = shown(given + cell).strip().splitlines()
    assert "hores.png" in line and "paths start from" in line


def test_other_errors_keep_their_traceback_and_all_are_raised():
    with pytest.raises(FileNotFoundError), in_one_line():
        open_image("hores.png", 64)
    assert len(shown(f"{START}1 / 0").splitlines()) > 3
