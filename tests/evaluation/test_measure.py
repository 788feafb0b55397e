"""Masks, silhouettes, appearance and intervals, on pictures whose answers are known."""

import numpy as np
import pytest
import torch

from escd.data import foreground
from escd.data.world import World
from escd.evaluation import measure
from escd.evaluation.references import compose_reference, load_references

PLAIN = ("gray", "pink", "cyan", "beige", "plain", "gradient")


@pytest.fixture(scope="module")
def pictures():
    return World(seed=5, split="heldout").batch(range(160))


def iou(a, b):
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))


def test_masks_of_held_out_renders(pictures):
    masks, failed = foreground.foreground_mask(pictures.image)
    scores = iou(masks, pictures.mask[:, 0] > 0.5)
    plain = torch.tensor([family in PLAIN for family in pictures.background_family])
    print(f"mean IoU {scores[plain].mean():.3f} on plain backgrounds, {scores[~plain].mean():.3f} on clutter")
    assert scores[plain].mean() >= 0.95
    assert scores[~plain].mean() >= 0.7
    assert failed[plain].float().mean() <= 0.01


def test_masks_where_there_is_nothing_to_find():
    generator = torch.Generator().manual_seed(0)
    plain = torch.full((1, 3, 64, 64), 0.2)
    noise = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    speck = plain.clone()
    speck[:, :, 30:33, 30:33] = -1
    _, failed = foreground.foreground_mask(torch.cat([plain, noise, speck]))
    assert failed.tolist() == [True] * 3


def test_masks_keep_holes():
    image = torch.full((1, 3, 64, 64), 0.8)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    far = torch.hypot(x - 31.5, y - 31.5)
    ring = (far < 24) & (far > 12)
    image[0, :, ring] = -0.6
    mask, failed = foreground.foreground_mask(image)
    assert iou(mask, ring[None])[0] > 0.98 and not failed[0]


def test_masks_on_a_strong_gradient_at_another_size():
    shade = torch.linspace(-0.4, 0.4, 96).expand(96, 96)
    image = torch.stack([shade, -shade, shade.T])[None].clone()
    square = torch.zeros(96, 96, dtype=torch.bool)
    square[30:66, 30:66] = True
    image[0, 0, square], image[0, 1, square], image[0, 2, square] = 1.0, 1.0, -1.0
    mask, failed = foreground.foreground_mask(image)
    assert iou(mask, square[None])[0] > 0.95 and not failed[0]


def test_aligned_iou_ignores_place_size_and_small_rotation():
    world = World(seed=3)
    # The rook is no figure of rotation: every turn changes it.
    rook = load_references(which="evaluation")["rook/pylon"].mask.float()
    cos, sin = 1.3 * np.cos(0.5), 1.3 * np.sin(0.5)
    placed = torch.tensor([[[cos, -sin, 0.2], [sin, cos, -0.15]]], dtype=torch.float32)
    grid = torch.nn.functional.affine_grid(placed, [1, 1, 64, 64], align_corners=False)
    moved = torch.nn.functional.grid_sample(rook[None, None], grid, align_corners=False)[0] > 0.5
    assert measure.aligned_iou(rook[None], moved)[0] > 0.9
    upside_down = rook.flip(0)
    assert measure.aligned_iou(rook[None], upside_down[None])[0] < 0.9
    masks = world.batch(range(8)).mask[:, 0]
    assert torch.allclose(measure.aligned_iou(masks, masks), torch.ones(8))
    forwards, backwards = measure.aligned_iou(masks[:4], masks[4:]), measure.aligned_iou(masks[4:], masks[:4])
    assert torch.equal(forwards, backwards)
    assert torch.allclose(measure.iou_matrix(masks[:4], masks[4:]).diagonal(), forwards)
    assert measure.aligned_iou(torch.zeros(1, 64, 64), rook[None])[0] == 0


def test_aligned_iou_refuses_what_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        measure.aligned_iou(torch.ones(2, 8, 8), torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match=r"\(N, H, W\)"):
        measure.aligned_iou(torch.ones(8, 8), torch.ones(8, 8))


def test_a_material_is_found_again_in_another_silhouette():
    """The ceiling of the material scores: clean re-renders of the world's materials in other outlines."""
    world, index = World(seed=9, named_appearances=0.0), torch.arange(20)
    tiles = world.textures(index)[0]
    masks = world.masks(torch.arange(100, 120))[0][:, 0]
    whole = torch.ones(64, 64)
    candidates = [measure.appearance_of(tile * 2 - 1, whole) for tile in tiles]
    found = 0
    for i, (tile, mask) in enumerate(zip(tiles, masks, strict=True)):
        image, coverage, _ = compose_reference(mask, tile)
        query = measure.appearance_of(image, coverage > 0.5)
        found += measure.retrieval(lambda a, b: -measure.combined_distance(a, b), query, candidates) == i
    assert found >= 19


def test_texture_does_not_see_colour_and_colour_does_not_see_texture():
    generator = torch.Generator().manual_seed(0)
    whole = torch.ones(64, 64)
    rough = torch.rand(1, 64, 64, generator=generator) * 0.8
    stripes = ((torch.arange(64) // 4) % 2).float().expand(1, 64, 64) * 0.8
    red, gray = torch.tensor([1.0, 0.3, 0.3])[:, None, None], torch.tensor([0.57, 0.57, 0.57])[:, None, None]
    recoloured = measure.appearance_distance(rough * red * 2 - 1, whole, rough * gray * 2 - 1, whole)
    retextured = measure.appearance_distance(rough * red * 2 - 1, whole, stripes * red * 2 - 1, whole)
    assert recoloured["texture"] < 0.2 * retextured["texture"]
    rough = rough * gray
    order = torch.randperm(64 * 64, generator=generator)
    shuffled = rough.flatten(1)[:, order].view(3, 64, 64)
    smooth = rough.flatten(1).sort(1).values.view(3, 64, 64)
    assert measure.appearance_distance(rough * 2 - 1, whole, shuffled * 2 - 1, whole)["colour"] < 0.5
    assert measure.appearance_distance(rough * 2 - 1, whole, smooth * 2 - 1, whole)["texture"] > 0.1
    with pytest.raises(ValueError, match="empty mask"):
        measure.appearance_of(rough, torch.zeros(64, 64))


def test_retrieval_takes_the_best():
    assert measure.retrieval(lambda a, b: -abs(a - b), 3, [10, 4, 2]) == 1
    with pytest.raises(ValueError, match="nothing to retrieve"):
        measure.retrieval(lambda a, b: 0.0, 1, [])


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    better = base + 0.5 + 0.1 * rng.normal(size=200)
    interval = measure.paired_bootstrap(better, base, seed=1)
    assert interval.low < 0.5 < interval.high and interval.high - interval.low < 0.06
    assert interval == measure.paired_bootstrap(better, base, seed=1)
    # Twenty copies of one measurement are one measurement: the groups say so.
    repeated = np.repeat(better[:10] - base[:10], 20)
    alone = measure.paired_bootstrap(repeated, np.zeros(200))
    grouped = measure.paired_bootstrap(repeated, np.zeros(200), groups=np.repeat(np.arange(10), 20).tolist())
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    with pytest.raises(ValueError, match="cannot be paired"):
        measure.paired_bootstrap([1.0], [])
