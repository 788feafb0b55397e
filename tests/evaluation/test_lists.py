"""The lists of real things: what the rule says of the files that are here, and of a made-up folder."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from escd import records
from escd.evaluation import lists, measure, references
from escd.evaluation.references import BUNDLED, REAL_LISTS, TOO_ALIKE, category, load_references

LISTED = {which: load_references(which=which) for which in REAL_LISTS}


def things(listed):
    return {category(s.name).removeprefix("noto-") for s in listed.silhouettes}


def test_the_materials_are_those_the_rule_takes():
    for listed in LISTED.values():
        assert len({category(m.name) for m in listed.materials}) == 20
        spectra = []
        for material in listed.materials:
            parts = lists.quarters(material.whole)
            assert lists.steady(parts), material.name
            assert torch.equal(material.tile, material.whole[:, :64, :64])
            spectra.append(lists.spectra(parts).mean(0))
        for i, spectrum in enumerate(spectra):
            assert lists.apart(spectrum, spectra[:i])
    evaluation, development = LISTED.values()
    assert not {m.sha256 for m in evaluation.materials} & {m.sha256 for m in development.materials}
    # Only 25 of the 28 categories have a texture; the development list takes the five that are left first.
    new = {category(m.name) for m in development.materials} - {category(m.name) for m in evaluation.materials}
    assert len(new) == 5 and new == {category(m.name) for m in development.materials[:5]}


def test_the_silhouettes_are_those_the_rule_takes():
    evaluation, development = LISTED.values()
    assert len(things(evaluation) | things(development)) == 40
    masks = torch.cat([evaluation.silhouette_masks, development.silhouette_masks])
    alike = measure.iou_matrix(masks, masks, refined=()).fill_diagonal_(0)
    assert alike.max() <= TOO_ALIKE
    for listed in LISTED.values():
        assert sum(s.pierced for s in listed.silhouettes) == lists.PIERCED_COUNT
        assert any(r.silhouette.pierced for r in listed.references[:3])  # a few references have both
        for silhouette, mask in zip(listed.silhouettes, listed.silhouette_masks, strict=True):
            assert mask.float().mean() >= lists.LEAST_AREA, silhouette.name
            assert silhouette.pierced or lists.filled(mask.float())


def test_every_file_is_listed_and_small():
    entries = [
        entry
        for which in REAL_LISTS
        for kind in ("silhouettes", "materials")
        for entry in json.loads((BUNDLED / f"{which}.json").read_text())[kind]
    ]
    files = {p.relative_to(BUNDLED).as_posix() for p in (BUNDLED / "real").rglob("*.*")}
    assert {entry["file"] for entry in entries} == files and len(entries) == 80
    assert all(records.sha256(BUNDLED / entry["file"]) == entry["sha256"] for entry in entries)
    assert sum((BUNDLED / name).stat().st_size for name in files) < 600_000
    notice = (BUNDLED / "real" / "NOTICE").read_text()
    for licence in ("CC-BY-4.0", "Apache License", "CC0-1.0", "The MIT License", "The Bootstrap Authors"):
        assert licence in notice
    for entry in entries:  # one by one where the licence asks for names
        if entry["file"].startswith("real/silhouettes/") and not entry["name"].startswith("noto-"):
            assert entry["name"] in notice


def test_what_is_steady():
    rng = np.random.default_rng(0)
    noise = 50 + ndimage.gaussian_filter(rng.normal(size=(4, 64, 64)), (0, 1.5, 1.5), mode="wrap") * 40
    assert lists.steady(noise)
    assert not lists.steady(50 + (noise - 50) * 0.1)  # too faint
    drifting = noise + np.arange(4)[:, None, None] * 5
    assert not lists.steady(drifting)
    other = noise.copy()
    other[3] = 50 + ndimage.gaussian_filter(rng.normal(size=(64, 64)), 4, mode="wrap") * 100
    assert not lists.steady(other)
    assert not lists.apart(lists.spectra(noise)[0], [lists.spectra(noise)[1]])
    assert lists.apart(lists.spectra(other)[0], [lists.spectra(other)[3]])


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with more than two lists' materials and silhouettes, some of which do not pass."""
    folder = tmp_path_factory.mktemp("real")
    for part in ("silhouettes", "pierced", "materials"):
        (folder / part).mkdir()
    rng = np.random.default_rng(0)
    names = ["".join(letters) for letters in itertools.product("abc", "xyz", "pqr")]  # 27
    for number, name in enumerate(names):
        for file in (1, 2):
            grain = ndimage.gaussian_filter(
                rng.normal(size=(128, 128)), (0.5 + number % 5, 0.5 + number // 5), mode="wrap"
            )
            pixels = np.clip(128 + 40 * grain / grain.std(), 0, 255).astype(np.uint8)
            if name == "axp":  # a plain one
                pixels[:] = 128
            picture = Image.fromarray(pixels).convert("RGB")
            picture.save(folder / "materials" / f"{name}-{file}.webp", lossless=True)
    every = [m for which in references.LISTS for m in load_references(which=which).silhouette_masks]
    for number, mask in enumerate(every):
        white = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
        part = "pierced" if number % 5 < 2 else "silhouettes"
        white.save(folder / part / f"thing-{chr(97 + number // 26)}{chr(97 + number % 26)}.png")
    return folder


def test_both_lists_are_chosen_from_a_folder(source, monkeypatch):
    monkeypatch.setattr(lists, "APART", 0.05)  # how distinct they are is another test's
    one, other = lists.choose_materials(source / "materials")
    assert len(one) == len(other) == 20 and not set(one) & set(other)
    for chosen in (one, other):
        assert len({category(path) for path in chosen}) == 20
        assert "axp" not in {category(path) for path in chosen}
    # The categories the first list left are all in the second.
    good = {category(p) for p in (source / "materials").iterdir()} - {"axp"}
    assert good - {category(p) for p in one} <= {category(p) for p in other}


def test_a_folder_with_too_few_silhouettes_is_refused(source, monkeypatch):
    # Whether two are alike is another test's, and takes its time.
    monkeypatch.setattr(lists.measure, "iou_matrix", lambda a, b: torch.zeros(len(a), len(b)))
    with pytest.raises(ValueError, match="too few silhouettes for 2 lists"):
        lists.choose_silhouettes(source)
