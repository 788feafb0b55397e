"""Figures: the canvas, equal bytes for equal figures, and where their images and numbers come from."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from PIL import Image

import escd
from escd import paths, records
from escd.paper import canvas, draw, sheets
from escd.paper import stems as stems_module
from escd.paper.canvas import Canvas, image_grid, pixels


def test_pixels_of_tensors_pictures_and_arrays():
    ramp = torch.linspace(-1.2, 1.2, 12).view(3, 2, 2)
    array = pixels(ramp)
    assert array.shape == (2, 2, 3) and array.min() == 0 and array.max() == 255
    assert np.array_equal(pixels(Image.fromarray(array)), array)
    assert np.array_equal(pixels(array), array)
    assert pixels(ramp[:1]).shape == (2, 2, 3)
    for wrong in (np.zeros((2, 2, 3)), np.zeros((2, 2), dtype=np.uint8), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match="uint8"):
            pixels(wrong)


def test_a_grid_is_as_wide_as_asked_and_every_image_is_in_it():
    images = [[torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)] for _ in range(2)]
    images[1][2] = None
    drawing = image_grid(
        images, row_labels=("a", "b"), column_labels="xyz", width=3.0, label_width=0.3, column_gaps=(0,)
    )
    axes = drawing.axes[0]
    shown = [picture.get_extent() for picture in axes.images]
    assert len(shown) == 5
    assert drawing.get_figwidth() == 3.0
    assert max(extent[1] for extent in shown) == pytest.approx(3.0)
    assert min(extent[2] for extent in shown) == pytest.approx(0.0)
    sides = {round(right - left, 6) for left, right, _, _ in shown}
    assert len(sides) == 1
    # nothing overlaps: lefts of the first row are further apart than an image is wide
    lefts = sorted(extent[0] for extent in shown[:3])
    assert min(np.diff(lefts)) > sides.pop()
    assert {text.get_text() for text in axes.texts} == {"a", "b", "x", "y", "z"}


def test_equal_figures_are_equal_files(tmp_path):
    def draw():
        sketch = Canvas(2.0, 1.0)
        sketch.panel((0, 0), 2, 1, "title")
        sketch.unet((0.2, 0.5), 1.2, 0.6, encoder=canvas.TINTS[canvas.SHAPE], decoder=canvas.FROZEN)
        sketch.box((1.6, 0.5), 0.3, 0.3, "box")
        sketch.arrow((1.4, 0.5), (1.4, 0.7), (1.6, 0.7))
        sketch.sum((1.5, 0.2))
        sketch.image(torch.zeros(3, 4, 4), (0, 0), 0.2)
        return sketch.figure

    style = ("font.size", "savefig.dpi", "pdf.fonttype", "image.interpolation", "axes.prop_cycle")
    before = [rcParams[name] for name in style]
    one, two = draw().save(tmp_path / "one"), draw().save(tmp_path / "two")
    assert [rcParams[name] for name in style] == before  # the caller's own figures keep their look
    for a, b in zip(one, two, strict=True):
        assert a.read_bytes() == b.read_bytes()
    with Image.open(one[1]) as picture:
        assert picture.size == (440, 220)
        assert not {"Software", "Creation Time"} & picture.info.keys()
    assert b"/FontType 3" not in one[0].read_bytes()
    assert b"/CreationDate" not in one[0].read_bytes()
    assert draw()._repr_png_().startswith(b"\x89PNG")


@pytest.fixture
def two_stems(monkeypatch):
    """Two figures to draw in the place of the paper's: a diagram, and one made from a record."""

    def line(colour: str) -> canvas.Drawing:
        sketch = Canvas(1.0, 0.5)
        sketch.arrow((0.1, 0.1), (0.9, 0.4), colour=colour)
        return sketch.figure

    record = SimpleNamespace(key="cafe")
    stems = {
        "one": stems_module.Stem(lambda: line("black"), "notebooks/03_method.ipynb"),
        "two": stems_module.Stem(lambda: line("red").made_from([record]), "notebooks/03_method.ipynb"),
    }
    monkeypatch.setattr(draw, "STEMS", stems)
    return stems


def test_the_manifest_names_what_each_figure_was_made_from(two_stems, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "commit", lambda: "first")
    draw.draw_figures(["two"], tmp_path)
    draw.draw_figures(["one"], tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest) == ["one", "two"]  # in the paper's order, whatever was drawn first
    assert manifest["two"]["records"] == ["cafe"] and manifest["one"]["records"] == []
    assert manifest["two"]["commit"] == "first"
    assert "matplotlib" in manifest["one"]["versions"]
    for entry in manifest.values():
        assert {path: records.sha256(tmp_path / path) for path in entry["sha256"]} == entry["sha256"]

    # drawn again at another commit: the same figure keeps its commit, a changed one does not
    monkeypatch.setattr(records, "commit", lambda: "second")
    two_stems["one"] = dataclasses.replace(two_stems["one"], notebook="notebooks/06_figures.ipynb")
    draw.draw_figures(["one", "two"], tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["one"]["commit"], manifest["two"]["commit"]) == ("second", "first")


def test_an_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit):
        draw.main(["diagram_pipelin"])
    assert "diagram_pipeline" in capsys.readouterr().err


def test_every_figure_belongs_to_a_notebook_and_to_the_committed_manifest():
    manifest = json.loads((draw.FIGURES / "manifest.json").read_text())
    # A figure whose records are not made yet is in neither.
    stems = stems_module.drawable()
    assert manifest.keys() == stems.keys()
    for name, stem in stems.items():
        assert (paths.ROOT / stem.notebook).is_file()
        assert f"draw.{name}()" in (paths.ROOT / stem.notebook).read_text()
        assert set(manifest[name]["sha256"]) == {f"{name}.pdf", f"{name}.png"}


@pytest.fixture
def stored(backbone, tmp_path, monkeypatch):
    """A records folder of its own, and the tiny backbone in the place of mini."""
    monkeypatch.setattr(records, "FOLDER", tmp_path / "records")
    monkeypatch.setattr(sheets, "weights_of", lambda name: {"backbone mini": "aa"})
    stand_in = SimpleNamespace(backbone=lambda name: backbone, learn=lambda *_: None, learnt={})
    monkeypatch.setattr(sheets, "study", lambda: stand_in)
    return tmp_path / "records"


def test_images_are_made_once_and_kept_with_their_record(stored, monkeypatch):
    config = sheets.SheetConfig(("a star shape", "a circle"), steps=2)
    record, images = sheets.stored_images(config)
    assert [image.shape for image in images] == [(16, 16, 3)] * 2
    assert not np.array_equal(*images)

    def never(config):
        raise AssertionError("made although stored")

    monkeypatch.setitem(sheets.MAKERS, sheets.SheetConfig, never)
    again, same = sheets.stored_images(config)
    assert again == record and np.array_equal(same, images)

    # other weights: made anew
    monkeypatch.setattr(sheets, "weights_of", lambda name: {"backbone mini": "bb"})
    with pytest.raises(AssertionError, match="made although stored"):
        sheets.stored_images(config)
    monkeypatch.setattr(sheets, "weights_of", lambda name: {"backbone mini": "aa"})

    # pixels that are not the record's are noticed
    (path,) = (stored / "images").glob("*.png")
    Image.fromarray(255 - np.concatenate(images, axis=1)).save(path)
    with pytest.raises(ValueError, match="pixels"):
        sheets.stored_images(config)


def test_every_record_of_images_has_its_file_and_every_file_its_record():
    folder = records.FOLDER / "images"
    made = {record.key[:16]: record for kind in ("sheet", "process") for record in records.all(kind)}
    assert made and made.keys() == {path.stem for path in folder.glob("*.png")}
    for key, record in made.items():
        strip = np.asarray(Image.open(folder / f"{key}.png").convert("RGB"))
        assert records.sha256(strip) == record.metrics["pixels"]


def assert_same(one: np.ndarray, other: np.ndarray) -> None:
    """The same picture; a batch of another size may round a pixel to the next number."""
    assert np.abs(one.astype(int) - other).max() <= 1


def test_a_process_begins_and_ends_where_the_pipeline_does(stored, backbone, monkeypatch):
    monkeypatch.setattr(sheets, "World", lambda seed: escd.World(seed=seed))
    config = sheets.ProcessConfig("a star", sample=3, shown=(2, 1, 0), steps=2)
    # the tiny backbone takes pictures of the world at 64 px too: its latents are larger, the steps the same
    monkeypatch.setattr(type(backbone), "latent_shape", property(lambda self: (4, 32, 32)))
    monkeypatch.setattr(type(backbone), "image_size", property(lambda self: 64))
    record, images = sheets.stored_images(config)
    assert len(images) == 6
    assert record.metrics["times"][0] == 0 and record.metrics["times"] == sorted(record.metrics["times"])
    x_0 = backbone.encode_images(escd.World(seed=0)[3].image[None])
    assert_same(images[0], pixels(backbone.decode_latents(x_0)[0]))
    noise = torch.randn((1, 4, 32, 32), generator=torch.Generator().manual_seed(0))
    assert_same(images[5], pixels(backbone.decode_latents(noise)[0]))
    pipe = escd.ESCDPipeline(backbone)
    pipe.set_progress_bar_config(disable=True)
    last = pipe("a star", num_inference_steps=2, latents=noise).images[0]
    assert_same(images[3], np.asarray(last))
