"""The world: deterministic by (seed, factor, index), labelled, and with families kept for evaluation."""

from __future__ import annotations

import pytest
import torch

from escd.data import names
from escd.data.captions import captions_of, draw_caption
from escd.data.patterns import as_painted
from escd.data.random import CounterRNG
from escd.data.shapes import OUTLINES, rasterise
from escd.data.textures import TEXTURES
from escd.data.world import World
from escd.evaluation.measure import aligned_iou


def test_a_picture_does_not_depend_on_its_batch_or_on_the_process():
    world = World(seed=3)
    batch = world.batch([5, 900, 2**41])
    for row, index in enumerate((5, 900, 2**41)):
        sample = World(seed=3)[index]
        assert torch.equal(sample.image, batch.image[row])
        assert torch.equal(sample.mask, batch.mask[row])
        assert sample.captions == batch.captions[row]


def test_images_masks_and_labels_have_the_stated_ranges():
    b = World(seed=1).batch(range(64))
    assert b.image.shape == (64, 3, 64, 64) and b.image.dtype == torch.float32
    assert b.image.min() >= -1 and b.image.max() <= 1
    assert b.mask.shape == (64, 1, 64, 64) and b.mask.min() == 0 and b.mask.max() == 1
    area = b.mask.mean((1, 2, 3))
    assert area.min() > 0.005 and area.max() < 0.7
    assert (b.mask[..., 0, :] == 0).all() and (b.mask[..., :, -1] == 0).all(), "an object left the frame"
    for row in range(64):
        named = b.shape_family[row] in names.SHAPES
        assert (b.shape[row] == names.NONE) != named
        assert not named or names.SHAPES[b.shape[row]] == b.shape_family[row]
        assert b.colours[row].any() == (b.pattern[row] != names.NONE)


def test_another_seed_is_another_world():
    assert not torch.equal(World(seed=0)[7].image, World(seed=1)[7].image)


def test_factors_come_from_the_indices_they_are_given():
    world = World(seed=4)
    index, other = list(range(24)), list(range(500, 524))
    a = world.batch(index)
    same_shape = world.batch(other, shape=index, pose=index)
    assert torch.equal(a.mask, same_shape.mask) and a.shape_family == same_shape.shape_family
    assert not torch.equal(a.image, same_shape.image)
    same_look = world.batch(other, appearance=index)
    assert torch.equal(a.pattern, same_look.pattern) and torch.equal(a.colours, same_look.colours)
    assert not torch.equal(a.mask, same_look.mask)
    with pytest.raises(ValueError, match="indices"):
        world.batch()


def test_evaluation_families_are_held_out_of_training():
    train, heldout = World(seed=0).batch(range(600)), World(seed=0, split="heldout").batch(range(600))
    assert set(train.shape_family) == {*names.SHAPES, *names.UNNAMED_SHAPES}
    assert set(train.appearance_family) == {*names.PATTERNS, *names.UNNAMED_APPEARANCES}
    assert set(heldout.shape_family) == {*names.SHAPES, *names.HELDOUT_SHAPES}
    assert set(heldout.appearance_family) == {*names.PATTERNS, *names.HELDOUT_APPEARANCES}
    assert not {*names.HELDOUT_SHAPES} & {*names.UNNAMED_SHAPES}
    assert not {*names.HELDOUT_APPEARANCES} & {*names.UNNAMED_APPEARANCES, *names.VARIED_APPEARANCES}
    assert {*names.SHAPES, *names.UNNAMED_SHAPES, *names.HELDOUT_SHAPES} == {*OUTLINES}
    assert {*names.UNNAMED_APPEARANCES, *names.VARIED_APPEARANCES, *names.HELDOUT_APPEARANCES} == {*TEXTURES}


def test_named_shares_are_kept():
    assert set(World(seed=0, named_shapes=1).batch(range(50)).shape.tolist()) <= set(range(12))
    assert (World(seed=0, named_appearances=0).batch(range(50)).pattern == names.NONE).all()


def test_solid_objects_have_the_colour_of_their_label():
    b = World(seed=2, named_appearances=1).batch(range(400))
    rows = [r for r in range(400) if b.appearance_family[r] == "solid"]
    assert len(rows) > 30
    for r in rows:
        inside = b.mask[r, 0] > 0.99
        seen = b.image[r, :, inside].median(1).values / 2 + 0.5
        wanted = names.COLOURS[int(b.colours[r].nonzero())]
        nearest = min(
            names.COLOURS, key=lambda c: float((seen - torch.tensor(names.COLOUR_RGB[c])).square().sum())
        )
        # Shading darkens and lightens, so a neighbour may be nearer now and then; never a far one.
        assert nearest == wanted or float((seen - torch.tensor(names.COLOUR_RGB[wanted])).abs().max()) < 0.35


def test_dots_are_the_darker_colour_in_whatever_order_a_caption_names_them():
    white, blue = names.COLOURS.index("white"), names.COLOURS.index("blue")
    for name, same in (("dotted", True), ("striped", False)):
        pattern = torch.full((2,), names.PATTERNS.index(name))
        ground, other = as_painted(pattern, torch.tensor([white, blue]), torch.tensor([blue, white]))
        assert ground.tolist() == ([white, white] if same else [white, blue])
        assert (ground + other).tolist() == [white + blue] * 2
    world = World(seed=3, named_shapes=1.0, named_appearances=1.0)
    batch = world.batch(range(400))
    texture = world.textures(torch.arange(400))[0]
    orders = set()
    for k in (batch.pattern == names.PATTERNS.index("dotted")).nonzero()[:, 0].tolist():
        first, *second = (w for w in batch.captions[k][0].split() if w in names.COLOURS)
        if not second:
            continue
        rgb = torch.tensor([names.COLOUR_RGB[first], names.COLOUR_RGB[second[0]]])
        near = torch.cdist(texture[k].flatten(1).T, rgb).argmin(1).float().mean()  # share of the second
        light = rgb @ torch.tensor([0.299, 0.587, 0.114])
        ground = near if light[1] > light[0] else 1 - near
        assert 0.55 < ground < 0.85, (first, second, ground)
        orders.add(bool(light[0] > light[1]))
    assert orders == {True, False}


def test_rasterised_area_is_the_polygons_area():
    square = torch.tensor([[[[10.25, 40.0], [40.75, 40.0], [40.75, 20.5], [10.25, 20.5]]]])
    coverage = rasterise(square)
    assert coverage.sum().item() == pytest.approx(30.5 * 19.5, rel=1e-4)
    assert coverage[0, 30, 20] == 1 and coverage[0, 30, 10] == pytest.approx(0.75)
    hole = torch.tensor([[[[15.0, 25.0], [25.0, 25.0], [25.0, 35.0], [15.0, 35.0]]]])  # the other way round
    assert rasterise(torch.cat([square, hole], 1)).sum().item() == pytest.approx(30.5 * 19.5 - 100, rel=1e-4)


@pytest.mark.parametrize("family", names.UNNAMED_SHAPES + names.HELDOUT_SHAPES)
def test_no_outline_is_empty(family):
    d = CounterRNG(0, torch.arange(100_000))
    if family == "strokes":  # with none of its strokes drawn by lot
        d = d[(d.uniform("present", 5) >= 0.8).all(1).nonzero()[:, 0]]
    assert len(d) > 10
    contours = (
        OUTLINES[family](d[torch.arange(min(len(d), 256))]) * torch.tensor([24.0, -24.0]) + 32
    )  # px, y down
    areas = rasterise(contours).flatten(1).sum(1)
    assert areas.min() > 20


def test_two_pictures_of_one_named_shape_agree_and_of_two_do_not():
    world = World(seed=6, named_shapes=1)
    b = world.batch(range(300))
    first = {name: b.shape_family.index(name) for name in names.SHAPES}
    again = {name: len(b.shape_family) - 1 - b.shape_family[::-1].index(name) for name in names.SHAPES}
    same = [float(aligned_iou(b.mask[first[n]], b.mask[again[n]])) for n in names.SHAPES]
    other = [
        float(aligned_iou(b.mask[first[n]], b.mask[again[m]]))
        for n, m in zip(names.SHAPES, names.SHAPES[1:] + names.SHAPES[:1], strict=True)
    ]
    # Thin shapes (ring, crescent) vary in thickness and overlap little; on average a name is one outline.
    assert sum(same) / 12 > 0.75 and sum(same) / 12 > sum(other) / 12 + 0.15


def test_draws_are_uniform_and_independent_of_each_other():
    d = CounterRNG(0, torch.arange(20000))
    a, b = d.uniform("a"), d.uniform("b")
    assert a.min() >= 0 and a.max() < 1 and a.mean().item() == pytest.approx(0.5, abs=0.01)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([a[1:], a[:-1]]))[0, 1]) < 0.03
    counts = torch.bincount(d.choose("c", [1, 1, 2]), minlength=3) / 20000
    assert torch.allclose(counts, torch.tensor([0.25, 0.25, 0.5]), atol=0.02)


def test_captions_have_the_forms_people_use():
    full = captions_of("star", "striped", ["red", "white"], "cyan", "circle")
    assert full[0] == "a star shape with striped red and white appearance on a cyan background"
    assert full[1] == "a striped red and white star on a cyan background"
    assert "a star with the appearance of striped red and white on a cyan background" in full
    assert any("in the shape of star" in c for c in full)
    assert (
        captions_of("*m", "solid", ["red"], "pink", "shape")[0]
        == "a *m shape with solid red appearance on a pink background"
    )
    assert (
        captions_of("star", "*a", [], "beige", "shape")[0]
        == "a star shape with *a appearance on a beige background"
    )
    bare = captions_of("shape", None, [], "gray", "shape")
    assert bare[0] == "a shape shape with appearance appearance on a gray background"
    assert captions_of("arrow", "solid", ["orange"], "gray", "shape")[1].startswith("a solid orange arrow")
    assert captions_of("arrow", None, [], "gray", "shape")[0].startswith("an arrow shape")
    assert {draw_caption(full, u / 1000) for u in range(1000)} == set(full)


def test_full_frames_fill_the_frame():
    frames = World(seed=5).full_frames(range(16))
    assert frames.shape == (16, 3, 64, 64) and frames.min() >= -1 and frames.max() <= 1
    assert torch.equal(frames[3], World(seed=5).full_frames([3])[0])


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"named_shapes": 1.5}, {"named_appearances": -0.1}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError):
        World(**arguments)
