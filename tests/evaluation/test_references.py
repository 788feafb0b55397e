"""The committed lists are what they were made from, distinct, and disjoint; a folder can take their place."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from escd.data import foreground
from escd.evaluation import measure, references, silhouettes
from escd.evaluation.references import LISTS, REAL_LISTS, compose_reference, load_references


@pytest.mark.parametrize("which", (*LISTS, *REAL_LISTS))
def test_a_bundled_list(which):
    listed = load_references(which=which)  # every sha256 is compared on the way
    assert len(listed.silhouettes) == len(listed.materials) == 20
    assert len(listed) == (12 if which in LISTS else 20)
    assert (listed.looks is None) == (which in LISTS)
    alike = measure.iou_matrix(listed.silhouette_masks, listed.silhouette_masks).fill_diagonal_(0)
    assert alike.max() <= references.TOO_ALIKE
    assert (
        measure.iou_matrix(listed.silhouette_masks, silhouettes.named_outlines()).max()
        <= references.TOO_ALIKE
    )
    for reference in listed:
        assert reference.image.shape == (3, 64, 64) and reference.image.abs().max() <= 1
        mask, failed = foreground.foreground_mask(reference.image[None])
        true = reference.mask
        assert not failed[0] and (mask[0] & true).sum() / (mask[0] | true).sum() > 0.9, reference.id
        assert listed[reference.id] is reference


def test_the_two_lists_share_no_silhouette_and_no_photograph():
    folder = references.BUNDLED
    evaluation, development = (json.loads((folder / f"{which}.json").read_text()) for which in LISTS)

    def sources(listed):
        glyphs = {entry.get("glyph", entry.get("image")) for entry in listed["silhouettes"]}
        return glyphs | {entry["image"] for entry in listed["materials"]}

    assert not sources(evaluation) & sources(development)


def test_materials_are_found_again_in_the_next_silhouette():
    """The ceiling of material retrieval among the evaluation list's 20."""
    listed = load_references(which="evaluation")
    found = 0
    for i, material in enumerate(listed.materials):
        image, coverage, _ = compose_reference(listed.silhouettes[(i + 3) % 20].mask, material.tile)
        distances = [
            measure.combined_distance(measure.appearance_of(image, coverage > 0.5), candidate)
            for candidate in listed.appearances
        ]
        found += int(np.argmin(distances)) == i
    assert found >= 19


def test_composition():
    listed = load_references(which="evaluation")
    knight, brick = listed["knight/brick"].silhouette, listed["knight/brick"].material
    image, coverage, background = compose_reference(knight.mask, brick.tile, size=96)
    assert image.shape == (3, 96, 96) and coverage.shape == (96, 96) and background in references.GROUNDS
    soft = (coverage > 0.02) & (coverage < 0.98)
    assert 0.01 < soft.float().mean() < 0.2  # antialiased
    pink, _, name = compose_reference(knight.mask, brick.tile, "pink")
    assert name == "pink"
    assert torch.allclose((pink[:, 0, 0] + 1) / 2, torch.tensor(references.GROUNDS["pink"]), atol=1e-6)
    with pytest.raises(ValueError, match="unknown background"):
        compose_reference(knight.mask, brick.tile, "mauve")
    with pytest.raises(ValueError, match="a silhouette is"):
        compose_reference(knight.mask[None], brick.tile)


def test_the_background_contrasts():
    for rgb, not_this in (
        ((0.4, 0.86, 0.92), "cyan"),
        ((0.05, 0.05, 0.05), "black"),
        ((0.92, 0.86, 0.7), "beige"),
    ):
        tile = torch.tensor(rgb)[:, None, None].expand(3, 64, 64)
        assert compose_reference(torch.ones(64, 64), tile)[2] != not_this


def test_unknown_names():
    with pytest.raises(ValueError, match="evaluation, development"):
        load_references(which="training")
    with pytest.raises(KeyError, match="umbrella/rough-wood"):
        load_references(which="evaluation")["a/b"]
    with pytest.raises(ValueError, match="between 1 and 20"):
        load_references(count=0)


def test_a_changed_input_is_refused(monkeypatch):
    glyph = silhouettes.glyph_contours
    monkeypatch.setattr(references, "glyph_contours", lambda codepoint: [c + 1 for c in glyph(codepoint)])
    with pytest.raises(ValueError, match="not what the list was made from"):
        load_references(which="evaluation", count=11)


def write_folder(folder, silhouettes):
    (folder / "silhouettes").mkdir()
    (folder / "materials").mkdir()
    for i, mask in enumerate(silhouettes):
        Image.fromarray(mask.numpy().astype(np.uint8) * 255).save(
            folder / "silhouettes" / f"thing{chr(97 + i)}{i}.png"
        )
    rng = np.random.default_rng(0)
    for i in range(24):
        tile = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(tile).save(
            folder / "materials" / f"stuff{chr(97 + i // 2 * 2)}-{i:03}.webp", lossless=True
        )
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
            folder / "materials" / f"m{chr(97 + i)}-1.webp"
        )


def test_a_folder(tmp_path):
    every = torch.cat([load_references(which=which).silhouette_masks for which in LISTS])
    write_folder(tmp_path, every[:22])
    # A circle is no unseen outline, and of one category one file is taken.
    circle = silhouettes.named_outlines()[0].numpy().astype(np.uint8) * 255
    Image.fromarray(circle).save(tmp_path / "silhouettes" / "a-circle.png")
    Image.fromarray(circle[::-1]).save(tmp_path / "silhouettes" / "thinga7.png")
    listed = load_references(tmp_path)
    assert len(listed) == 20 and listed.name == "folder"
    names = [silhouette.name for silhouette in listed.silhouettes]
    assert "a-circle" not in names
    for items in (listed.silhouettes, listed.materials):
        assert len({references.category(item.name) for item in items}) == 20


def test_a_larger_folder_has_other_lists(tmp_path, monkeypatch):
    # Whether two are alike is another test's, and takes its time.
    monkeypatch.setattr(references.measure, "iou_matrix", lambda a, b: torch.zeros(len(a), len(b)))
    every = torch.cat([load_references(which=which).silhouette_masks for which in LISTS])
    write_folder(tmp_path, every)
    for number, path in enumerate(sorted((tmp_path / "materials").glob("m*.webp"))):
        shutil.copy(path, path.with_name(f"{path.stem[:-1]}{number + 2}.webp"))
    lists = [load_references(tmp_path, twenty=k) for k in (1, 2)]
    assert [one.name for one in lists] == ["folder", "folder 2"]
    for kind in ("silhouettes", "materials"):
        names = [{item.name for item in getattr(one, kind)} for one in lists]
        assert len(names[0]) == len(names[1]) == 20 and not names[0] & names[1]
    with pytest.raises(ValueError, match="the folder 3 list has 0"):
        load_references(tmp_path, twenty=3)
    with pytest.raises(ValueError, match="counted from 1"):
        load_references(tmp_path, twenty=0)


def test_a_folder_that_is_not_there_or_too_small(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_references(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no \*\.png"):
        load_references(tmp_path)
    write_folder(tmp_path, load_references(which="evaluation").silhouette_masks[:5])
    with pytest.raises(
        ValueError, match="20 silhouettes of distinct categories are needed, the folder list has 5"
    ):
        load_references(tmp_path)
