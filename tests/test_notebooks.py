"""Notebooks are thin, committed as they ran, and still say so: papermill runs each once, nbval compares.

Where a notebook tunes, it takes a few steps here: what is compared does not depend on their number.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import warm
from nbformat import NotebookNode
from nbval import plugin

ROOT = Path(__file__).resolve().parents[1]
FOLDER, RUN = ROOT / "notebooks", ROOT / "build" / "notebooks"
# How many cells of each are compared, at least: the number may grow, and never falls.
CHECKED = {
    "01_preliminaries": 6,
    "02_probing_study": 3,
    "03_method": 5,
    "04_training": 5,
    "05_sliders": 1,
    "06_figures": 1,
    "your_image": 1,
}
WIDGETS = {"05_sliders": 4, "your_image": 2}  # outputs that are widgets, at least
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
SECONDS = 90  # on two cores that do nothing else; `make notebooks` notes what it took
PATIENCE = 4  # times that, on a machine that does


def notebook(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def is_checked(cell: NotebookNode) -> bool:
    return ("check", True) in list(plugin.find_comment_markers(cell.source))


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs in which what was printed stands in one piece, however many pieces the kernel sent it in."""
    whole: list[NotebookNode] = []
    for output in outputs:
        last = whole[-1] if whole else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            whole[-1] = nbformat.v4.new_output("stream", name=last.name, text=last.text + output.text)
        else:
            whole.append(output)
    return whole


def differences(ran: NotebookNode, stored: NotebookNode) -> list[str]:
    """What nbval finds different in the checked cells of two runs of a notebook, matched by their source."""
    found = {cell.source: joined(cell.outputs) for cell in code_cells(ran)}
    lines: list[str] = []
    # nbval compares inside a pytest item of its own; here it is handed what it reads of one.
    item = SimpleNamespace(
        colors=plugin.nocolors,
        sanitize=lambda text: text,
        comparison_traceback=[],
        ihook=SimpleNamespace(pytest_assertrepr_compare=lambda **_: []),
        config=None,
    )
    item.format_output_compare = lambda *args: plugin.IPyNbCell.format_output_compare(item, *args)
    skipped = (
        "metadata",
        "traceback",
        "prompt_number",
        "output_type",
        "name",
        "execution_count",
        "image/png",
    )
    for cell in filter(is_checked, code_cells(stored)):
        if not plugin.IPyNbCell.compare_outputs(item, found[cell.source], joined(cell.outputs), skipped):
            lines += [cell.source, *item.comparison_traceback]
    return lines


def jupyter(folder: Path) -> dict[str, str]:
    """An environment in which a notebook's kernel is a process that has PyTorch imported when it begins."""
    kernel = folder / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [*warm.python(), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
    return os.environ | {"JUPYTER_PATH": str(folder), "JUPYTER_PREFER_ENV_PATH": "1"}


def run(name: str, parameters: dict[str, str], folder: Path) -> tuple[NotebookNode, float]:
    """Run a notebook with papermill from another folder than its own: the notebook as it ran, and seconds."""
    # papermill only warns of a name the notebook does not have, and exits with 0
    known = papermill.inspect_notebook(str(FOLDER / f"{name}.ipynb"))
    if unknown := sorted(parameters.keys() - known.keys()):
        raise ValueError(f"{name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")
    RUN.mkdir(parents=True, exist_ok=True)
    (elsewhere := folder / "elsewhere").mkdir()
    options = [item for pair in parameters.items() for item in ("-p", *pair)]
    start = time.perf_counter()
    done = subprocess.run(
        [
            *(*warm.python(), "-m", "papermill", "--no-progress-bar", "--cwd", str(elsewhere)),
            *("--execution-timeout", str(PATIENCE * SECONDS), *options),
            *(str(FOLDER / f"{name}.ipynb"), str(RUN / f"{name}.ipynb")),
        ],
        env=jupyter(folder),
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr[-6000:]
    return nbformat.read(RUN / f"{name}.ipynb", as_version=4), seconds


def test_the_notebooks_are_those_that_are_checked():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == CHECKED.keys()


@pytest.mark.parametrize("name", CHECKED)
def test_a_notebook_is_thin(name):
    for cell in code_cells(notebook(name)):
        tree = ast.parse(cell.source)
        defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in ast.walk(tree) if isinstance(node, defined)], cell.source


@pytest.mark.parametrize("name", CHECKED)
def test_parameters_are_literals(name):
    nb = notebook(name)
    (cell,) = [cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", ())]
    values = {}
    for statement in ast.parse(cell.source).body:
        assert isinstance(statement, ast.Assign), cell.source
        values[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert values["backbone"] == "mini" and values["scale"] == "quick"
    assert papermill.inspect_notebook(str(FOLDER / f"{name}.ipynb")).keys() == values.keys()


@pytest.mark.parametrize("name", CHECKED)
def test_a_notebook_is_committed_as_it_ran(name):
    nb = notebook(name)
    cells = code_cells(nb)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    checked = [cell for cell in cells if is_checked(cell)]
    assert len(checked) >= CHECKED[name]
    for cell in checked:  # something is printed to compare, and no progress bar with its times
        assert {output.name for output in cell.outputs if output.output_type == "stream"} == {"stdout"}
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert 0 < nb.metadata["escd"]["seconds"] <= SECONDS
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert not re.findall(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|content|opt)/[\w.-]+", text)


def models_of(state: dict, model_id: str) -> set[str]:
    """A widget's model and all those it is made of, by id."""
    found, open_ids = set(), {model_id}
    while open_ids:
        found |= open_ids
        inner = (re.findall(r'"IPY_MODEL_(\w+)"', json.dumps(state[one])) for one in open_ids if one in state)
        open_ids = {one for ids in inner for one in ids} - found
    return found


@pytest.mark.parametrize("name", CHECKED)
def test_a_widget_is_committed_with_its_state_and_with_something_plain(name):
    nb = notebook(name)
    state = nb.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    views = [o.data for cell in code_cells(nb) for o in cell.outputs if VIEW in o.get("data", {})]
    for data in views:
        assert models_of(state, data[VIEW]["model_id"]) <= state.keys()
        assert "image/png" in data or "100%" in data["text/plain"], "a page without a kernel shows this"
    assert not re.findall(r"(?<!\d)\d?\d%\|", json.dumps([data["text/plain"] for data in views]))
    assert len(views) >= WIDGETS.get(name, 0)


def test_a_missing_model_is_noticed():
    state = {"a": {"state": {"children": ["IPY_MODEL_b"], "layout": "IPY_MODEL_c"}}, "b": {"state": {}}}
    assert models_of(state, "a") == {"a", "b", "c"} and models_of(state, "z") == {"z"}


def test_an_unknown_parameter_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="bakcbone"):
        run("06_figures", {"bakcbone": "mini"}, tmp_path)


def test_a_changed_number_is_noticed():
    def ran(*lines: str) -> NotebookNode:
        outputs = [nbformat.v4.new_output("stream", name="stdout", text=line) for line in lines]
        cell = nbformat.v4.new_code_cell("# NBVAL_CHECK_OUTPUT\nprint(x)", outputs=outputs)
        free = nbformat.v4.new_code_cell("x", outputs=outputs)
        return nbformat.v4.new_notebook(cells=[cell, free])

    assert differences(ran("IoU 0.79\n"), ran("IoU 0.79\n")) == []
    assert "IoU 0.80" in str(differences(ran("IoU 0.80\n"), ran("IoU 0.79\n")))
    assert differences(ran(), ran("IoU 0.79\n")) != []
    # a kernel may send what is printed in one piece or in several
    assert differences(ran("IoU 0.79\n", "of 4\n"), ran("IoU 0.79\nof 4\n")) == []
    assert differences(ran("IoU 0.79\n", "of 4\n"), ran("IoU 0.79\n")) != []


@pytest.mark.timeout(PATIENCE * SECONDS + 60)
@pytest.mark.parametrize("name", CHECKED)
def test_a_notebook_runs_and_says_the_same(name, tmp_path, record_property):
    # cwd is not the notebook's, and the parameters are handed over rather than left alone
    scale = "brief" if '"brief"' in code_cells(notebook(name))[0].source else "quick"
    ran, seconds = run(name, {"backbone": "mini", "scale": scale}, tmp_path)
    record_property("seconds", round(seconds))
    print(f"{name}: {seconds:.0f} s of {SECONDS} s")
    assert differences(ran, notebook(name)) == []
    assert seconds < PATIENCE * SECONDS


def test_nbval_itself_agrees(tmp_path):
    """The notebook that takes least time, once more, by nbval's own command."""
    done = subprocess.run(
        [
            *(*warm.python(), "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider"),
            *("--rootdir", str(tmp_path), "-c", os.devnull, "--nbval-cell-timeout", "120"),
            str(FOLDER / "06_figures.ipynb"),
        ],
        env=jupyter(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert f"{len(code_cells(notebook('06_figures')))} passed" in done.stdout
