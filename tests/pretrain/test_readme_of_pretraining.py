"""The pretraining's README and the notes: tables agree with the records, links and commands exist."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "escd" / "pretrain" / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def tables() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "pretraining.py"))


def test_the_tables_are_those_of_the_records(tables):
    text = README.read_text(encoding="utf-8")
    assert tables["rewritten"](text) == text, "stale: run `python docs/pretraining.py`"


def test_a_changed_table_is_noticed(tables):
    text = README.read_text(encoding="utf-8")
    score = re.search(r"0\.\d{3} \|\s+\|\n", text).group()
    changed = text.replace(score, "9" + score)
    assert changed != text and tables["rewritten"](changed) == text


@pytest.mark.parametrize("name", ["stages", "curve", "trials"])
def test_a_missing_mark_is_named(tables, name):
    text = README.read_text(encoding="utf-8").replace(f"<!-- {name}:end -->", "")
    with pytest.raises(ValueError, match=rf"README.md lacks <!-- {name}:begin --> or <!-- {name}:end -->"):
        tables["rewritten"](text)


def test_time_is_added_up_for_each_device(tables):
    def run(device: str, seconds: float, processes: int = 1) -> dict:
        return {
            "seconds": seconds,
            "environment": {"device": device, "processes": processes, "threads": 1},
        }

    runs = [run("AVX512", 1800, 2), run("NO AVX", 60), run("AVX2", 5400, 2), run("NVIDIA H200", 372)]
    said = "2.0 h on 2 CPU cores, 1 min on 1 CPU core, 6 min on NVIDIA H200"
    assert tables["time_by_device"](runs) == said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_commands_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"python -m (escd[\w.]*)", text):
        # by file: an editable install of another clone would answer for a module that this one lacks
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_index_lists_every_note():
    listed = re.findall(r"\]\(notes/([^)]+)\)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs" / "notes").glob("*.md"))
    assert all(re.match(r"\d{4}-\d\d-\d\d-", name) for name in listed)
