"""Texture and colour apart: on pictures whose answers are known, and what the real lists allow at best."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from escd.data import foreground
from escd.evaluation import measure, prompts, scores, texture
from escd.evaluation.references import REAL_LISTS, compose_reference, load_references

EVERYWHERE = np.ones((64, 64), bool)


def grain(seed, sigma):
    made = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(64, 64)), sigma, mode="wrap")
    return 50 + 8 * made / made.std()


def distance(a, b, inside=EVERYWHERE):
    one, other = texture.textures(np.stack([a, b]), inside)
    return float(texture.distances(one, other))


def test_a_texture_is_its_statistics_not_its_pixels():
    same, coarser = distance(grain(0, 1), grain(1, 1)), distance(grain(0, 1), grain(1, 3))
    turned = distance(grain(0, (1, 4)), grain(1, (4, 1)))
    sparse = grain(1, 1)
    sparse = 50 + 8 * (lambda x: (x - x.mean()) / x.std())(np.exp((sparse - 50) / 8))
    assert same < 0.3 * coarser and same < 0.3 * turned and same < 0.5 * distance(grain(0, 1), sparse)
    assert distance(grain(0, 1), grain(0, 1) + 20) < 1e-3  # how light it is, is no texture
    assert distance(grain(0, 1), np.full((64, 64), 50.0)) > coarser


def test_what_lies_outside_the_mask_does_not_count():
    inside = EVERYWHERE.copy()
    inside[:, :32] = False
    other = grain(0, 1)
    other[:, :32] = 0
    assert distance(grain(0, 1), other, inside) == 0


@pytest.fixture(scope="module")
def development():
    return load_references(which="real-development")


def test_texture_and_colour_are_found_apart(development):
    looks, tiles = development.looks, [m.tile for m in development.materials]
    mask = torch.zeros(64, 64)
    mask[8:56, 8:56] = 1
    plain = tiles[3].mean((1, 2), keepdim=True).expand(3, 64, 64)
    # The texture of one material in the colour of another.
    gray = tiles[10].mean(0)
    both = (plain + (gray - gray.mean())).clamp(0, 1)
    image = compose_reference(mask, both)[0]
    of_texture, of_colour = looks.score(image, mask, 10), looks.score(image, mask, 3)
    assert of_texture["texture_rank"] <= 1 and of_colour["texture_rank"] > 5
    assert of_colour["colour_rank"] <= 1 and of_texture["colour_rank"] > 5
    assert of_texture["texture_likeness"] > 0.4 and of_colour["colour_likeness"] > 0.7
    assert set(of_texture) == set(texture.SCORES)
    with pytest.raises(ValueError, match="empty mask"):
        looks.score(image, torch.zeros(64, 64), 0)


def test_equals_do_not_count_as_found(development):
    materials = [development.materials[k] for k in (0, 0, 10)]
    twice = texture.Candidates([m.whole for m in materials], [m.tile for m in materials])
    found = twice.score(development.materials[0].tile * 2 - 1, torch.ones(64, 64), 0)
    assert not found["texture_first"] and found["colour_rank"] == 1


@pytest.mark.parametrize("which", REAL_LISTS)
def test_the_list_can_tell(which):
    """Acceptance: right answers are found by texture alone and by shape, and a flat colour is not.

    Measured on the evaluation list: texture 91 % (mean rank 0.1), shape 100 %, a flat colour 5 % (9.4); on
    the development list 93 % (0.4), 100 %, 8 % (9.7).
    """
    listed = load_references(which=which)
    found = {"lossless": [], "flat": [], "silhouette": []}
    for number, reference in enumerate(listed):
        asked = prompts.prompts_for(reference, "appearance")
        for kind in ("lossless", "flat"):
            images = scores.oracle_images(asked, reference, reference, flat=kind == "flat")
            for image, mask, failed in zip(images, *foreground.foreground_mask(images), strict=True):
                # What fails counts as a miss, here as in the tables.
                score = {"texture_first": False, "texture_rank": 19}
                score = score if failed else listed.looks.score(image, mask, number)
                found[kind].append((score["texture_first"], score["texture_rank"]))
        asked = prompts.prompts_for(reference, "shape")
        masks, failed = foreground.foreground_mask(scores.oracle_images(asked, reference, reference))
        nearest = measure.iou_matrix(masks.float(), listed.silhouette_masks.float(), refined=()).argmax(1)
        found["silhouette"] += ((nearest == number) & ~failed).float()[:, None].tolist()
    means = {kind: np.mean(values, 0) for kind, values in found.items()}
    assert means["lossless"][0] >= 0.85 and means["lossless"][1] <= 0.5
    assert means["silhouette"][0] >= 0.95
    assert means["flat"][0] <= 0.1 and 7 <= means["flat"][1] <= 12


@pytest.mark.parametrize("which", REAL_LISTS)
def test_a_copy_of_the_reference_has_its_texture(which):
    """What full leakage scores, also where the mask takes in a little background."""
    listed = load_references(which=which)
    images = torch.stack([reference.image for reference in listed])
    masks, failed = foreground.foreground_mask(images)
    found = [
        listed.looks.score(image, mask, number)
        for number, (image, mask) in enumerate(zip(images, masks, strict=True))
        if not failed[number]
    ]
    assert np.mean([score["texture_rank"] for score in found]) <= 0.6
    assert np.mean([score["texture_likeness"] for score in found]) >= 0.6
