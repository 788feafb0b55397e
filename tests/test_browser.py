"""The sliders and the committed notebooks as a person sees them: JupyterLab in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from browser import CHROMIUM, PATIENCE, Page, chromium, jupyterlab
from conftest import make_backbone, make_customization

from escd.backbone.folder import save_backbone

ROOT = Path(__file__).resolve().parents[1]
if not os.environ.get("ESCD_BROWSER"):  # jupyter and a browser need more seconds than a busy machine has
    pytest.skip("by hand: ESCD_BROWSER=1 python -m pytest tests/test_browser.py", allow_module_level=True)

COMMITTED = ("05_sliders", "your_image")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.timeout(5 * PATIENCE),
]

CELL = """
import escd
backbone = escd.load_backbone("backbone", device="cpu")
pipe = escd.ESCDPipeline(backbone, shape=escd.load_customization("shape.safetensors", backbone))
pipe.set_progress_bar_config(disable=True)
escd.attribute_sliders(pipe, "a *m shape", steps=5)
"""

KERNEL = "[...window.jupyterapp.shell.widgets('main')][0].sessionContext.session?.kernel"
# What the page shows: the text under the sliders, how solid the picture is, and what is on it.
SHOWN = "document.querySelector('.jp-OutputArea-output')?.innerText ?? ''"
OPACITY = "getComputedStyle(document.querySelector('.widget-image')).opacity"
DRAWN = "(document.querySelector('.widget-image').naturalWidth == 256)"
PIXELS = """(() => { const image = document.querySelector('.widget-image');
const canvas = Object.assign(document.createElement('canvas'), {width: 256, height: 256});
canvas.getContext('2d').drawImage(image, 0, 0);
return canvas.toDataURL(); })()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a notebook of sliders on a tiny backbone, and copies of the committed notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    backbone = make_backbone(tmp_path_factory.mktemp("tokenizer"))
    save_backbone(backbone, folder / "backbone")
    make_customization(backbone, "shape").save(folder / "shape.safetensors")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, folder / "sliders.ipynb")
    for name in COMMITTED:
        for copy in (f"{name}.ipynb", f"trusted_{name}.ipynb"):
            shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", folder / copy)
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with jupyterlab(folder) as address:
        yield address


@pytest.fixture
def page(tmp_path) -> Iterator[Page]:
    """A browser of the test's own: one with a notebook that is not saved asks before it leaves it."""
    with chromium(tmp_path) as page:
        yield page


def opened(page: Page, address: str, notebook: str) -> None:
    """Open a notebook, alone, and wait until its cells stand on the page and its kernel is there."""
    # JupyterLab puts only those cells on the page that are in sight.
    tall = {"width": 1200, "height": 9000, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **tall)
    page.call("Page.navigate", url=address.replace("NAME", f"{notebook}.ipynb") + "&reset")
    page.until("window.jupyterapp && document.querySelectorAll('.jp-Cell').length")
    page.until(f"({KERNEL})?.status == 'idle'")


def types(page: Page, prompt: str) -> None:
    """Write a prompt and leave the field."""
    page.js(
        f"""(() => {{ const field = document.querySelector('.widget-text input');
        field.value = {json.dumps(prompt)};
        field.dispatchEvent(new Event('input', {{bubbles: true}}));
        field.dispatchEvent(new Event('change', {{bubbles: true}})); }})()"""
    )


def test_the_sliders_say_what_surprises_and_dim_what_is_old(page, address):
    opened(page, address, "sliders")
    page.js("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.until(f"({SHOWN}).includes('No appearance is loaded: its slider changes nothing')")
    page.until(DRAWN)
    assert page.js(OPACITY) == "1"
    assert page.js("document.querySelectorAll('.widget-slider [disabled]').length"), "the slider of nothing"
    assert "No kernel" not in page.js(SHOWN)

    types(page, "a *m zebra")
    page.until(f"({SHOWN}).includes('does not know “zebra”')")
    types(page, "a star")
    page.until(f"({SHOWN}).includes('The prompt has no *m: the slider of shape changes nothing')")
    types(page, " ")
    page.until(f"({SHOWN}).includes('The prompt is empty')")
    types(page, "a red star on a gray background of blue and green and white stars and circles")
    page.until(f"({SHOWN}).includes('The model reads 16 tokens')")

    before = page.js(PIXELS)
    types(page, "a *b shape")
    page.until(f"({SHOWN}).includes('ValueError')")
    assert float(page.js(OPACITY)) < 0.5
    page.until(f"{PIXELS} == {json.dumps(before)}")

    page.js(
        """void (window.met = [], new MutationObserver(() => window.met.push(
        [document.querySelector('.jp-OutputArea-output').innerText,
        getComputedStyle(document.querySelector('.widget-image')).opacity]
        )).observe(document.querySelector('.jp-OutputArea-output'),
        {subtree: true, childList: true, attributes: true, characterData: true}))"""
    )
    types(page, "a *m shape")
    page.until(f"{OPACITY} == '1' && !({SHOWN}).includes('drawing')")
    page.until(f"{DRAWN} && {PIXELS} != {json.dumps(before)}")
    assert any("drawing" in text and float(opacity) < 0.5 for text, opacity in page.js("window.met"))

    moved = "document.querySelector('.widget-slider .noUi-handle')"
    before = page.js(PIXELS)
    page.js(f"{moved}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft', bubbles: true}}))")
    page.until(f"{DRAWN} && {PIXELS} != {json.dumps(before)}")

    page.js(f"({KERNEL}).restart()")
    page.until(f"({SHOWN}).includes('No kernel answers these sliders: run the cell again')")


@pytest.mark.parametrize("name", COMMITTED)
def test_a_clone_shows_pictures_in_place_of_widgets(page, address, name):
    opened(page, address, name)
    page.until("document.querySelectorAll('.jp-OutputArea-output img').length >= 3")  # the sliders' too
    text = page.js("document.querySelector('.jp-Notebook').innerText")
    assert "VBox(" not in text and "Error displaying widget" not in text
    assert "0%" not in text.replace("100%", "")


@pytest.mark.parametrize("name", COMMITTED)
def test_a_trusted_notebook_shows_its_widgets_and_that_no_kernel_answers(address, folder, tmp_path, name):
    own = os.environ | {"JUPYTER_DATA_DIR": str(folder / ".data")}
    file = folder / f"trusted_{name}.ipynb"
    subprocess.run([sys.executable, "-m", "jupyter", "trust", str(file)], env=own, check=True)
    missed = "Error displaying widget"
    # ipywidgets draws an output as "model not found" for good where a slow kernel connects before the
    # saved widgets are read (jupyter-widgets/ipywidgets#3823); a person would open the notebook again.
    for attempt in range(3):
        with chromium(tmp_path / str(attempt)) as page:
            opened(page, address, file.stem)
            text = page.until(
                f"(t => ['No kernel answers these sliders', '{missed}'].some(told => t.includes(told)) && t)"
                "(document.querySelector('.jp-Notebook').innerText)"
            )
        if missed not in text:
            break
    assert missed not in text and "VBox(" not in text
