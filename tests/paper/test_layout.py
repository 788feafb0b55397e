"""The package's layout, read from its code: layers, imports, private names, lengths, and their diagram."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest
from PIL import Image

from escd import paths
from escd.paper import layout
from escd.paper.layout import LAYERS, imports, layer_of, sources

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 80
# (file, what it imports in a function): why not at the top.
LATE = {
    ("method.optimizers", "bitsandbytes.optim"): "an optional package",
}
CODE = sources()
IMPORTS = imports(CODE)
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def test_all_imports_are_read(tmp_path):
    files = {
        "__init__.py": "from . import one\nif TYPE_CHECKING:\n    from .room import two\n",
        "one.py": "def late():\n    import pack.room.two\n    from pack.room import VALUE\n    import os\n",
        "room/__init__.py": "VALUE = 1\n",
        "room/two.py": "from ..one import late\nfrom .. import __version__\nfrom . import three, VALUE\n",
        "room/three.py": "import torch, json\nfrom package import one\nfrom .two import (\n    three\n)\n",
    }
    for name, text in files.items():
        (tmp_path / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pack" / name).write_text(text)
    assert imports(sources(tmp_path / "pack"), "pack") == {
        "__init__": {"one", "room.two"},
        "one": {"room.two", "room.__init__"},
        "room.__init__": set(),
        "room.two": {"one", "__init__", "room.three", "room.__init__"},
        "room.three": {"room.two"},
    }


def test_every_file_imports_from_its_own_layer_and_those_below():
    order = list(LAYERS)
    upward = [
        f"{name} imports {other}"
        for name, used in IMPORTS.items()
        for other in used
        if order.index(layer_of(other)) < order.index(layer_of(name))
    ]
    assert upward == []
    assert {layer_of(name) for name in CODE} == set(LAYERS)
    assert {file for files in LAYERS.values() for file in files} <= CODE.keys()


def test_no_circle_of_imports():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        # The second argument is the circle, from each file to one that imports it.
        pytest.fail(" <- ".join(error.args[1]))


def test_no_import_in_a_function_but_those_with_a_reason():
    late = set()
    for name, tree in CODE.items():
        for function in ast.walk(tree):
            for node in ast.walk(function) if isinstance(function, FUNCTIONS) else ():
                if isinstance(node, ast.Import):
                    late |= {(name, alias.name) for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    late.add((name, node.module))
    assert late == LATE.keys()


def test_no_private_name_of_another_file_is_imported_or_called():
    private = []
    for name, tree in CODE.items():
        modules = set()  # names that stand for files of the package
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if alias.name.startswith("_") and not alias.name.startswith("__") and node.level:
                    private.append(f"{name}: {alias.name}")
                if node.level and alias.name in {file.split(".")[-1] for file in CODE}:
                    modules.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                hidden = node.attr.startswith("_") and not node.attr.startswith("__")
                if hidden and node.value.id in modules:
                    private.append(f"{name}: {node.value.id}.{node.attr}")
    assert private == []


def test_no_file_and_no_function_is_long():
    long = []
    for name, tree in CODE.items():
        last = max((node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno")), default=0)
        if last > MOST_LINES:
            long.append(f"{name}: {last} lines")
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                lines = node.end_lineno - first + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{name}.{node.name}: {lines} lines")
    assert long == []


def test_the_diagram_has_an_arrow_for_each_layer_that_imports_from_another():
    arrows = {
        (layer_of(name), layer_of(other))
        for name, used in IMPORTS.items()
        for other in used
        if layer_of(name) != layer_of(other)
    }
    assert set(layout.layer_imports()) == arrows
    with Image.open(layout.PICTURE) as picture:
        drawn = picture.text[layout.IMPORTS_KEY].split("; ")
    assert {tuple(arrow.split(" -> ")) for arrow in drawn} == arrows, (
        "docs/layout.png is of other imports: python -m escd.paper.layout"
    )
    assert layout.PICTURE.stat().st_size < 60_000


def test_the_contributors_page_shows_the_diagram_and_names_files_that_are_there():
    page = (paths.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"({layout.PICTURE.relative_to(paths.ROOT)})" in page
    named = re.findall(r"`((?:escd|tests|docs|benchmarks|paper|\.ci)/[\w./-]*)`", page)
    assert [name for name in named if not (paths.ROOT / name).exists()] == []
    assert {name.split("/")[1] for name in named} >= LAYERS.keys() - {"files"}


def test_the_diagram_names_every_layer_from_the_top_down():
    figure = layout.diagram_layout([("paper", "data")])
    at = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    heights = [at[f"{layer}/" if layer != "files" else "files beside the folders"] for layer in LAYERS]
    assert all(above > below for above, below in pairwise(heights))
