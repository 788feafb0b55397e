"""The scores of the protocol for generated images, and the images of the controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone.model import Backbone
from ..data import foreground, patterns
from ..data.names import COLOUR_RGB, COLOURS, PATTERNS, SHAPES, SIZE
from ..data.random import CounterRNG
from ..method.attributes import ATTRIBUTES
from ..method.guidance import CUSTOMIZED, PLAIN_SCALE, Start
from ..method.pipeline import ESCDPipeline
from . import measure, texture
from .judges import Judges, load_judges, obeyed
from .prompts import Prompt, named_prompts
from .references import Reference, References, compose_reference
from .silhouettes import named_outlines

BATCH = 16  # images generated at once; results are bit-exact for equal batch shapes only
SCORES = (
    "iou", "silhouette", "colour", "texture", "combined", "material", "texture_material", "texture_similarity"
)  # fmt: skip


def score_images(
    images: Tensor,
    prompts: Sequence[Prompt],
    shape: Reference,
    appearance: Reference,
    listed: References,
    judges: Judges,
) -> dict[str, list]:
    """All scores of the protocol for images (N, 3, H, W) in [-1, 1]: lists with one entry per image.

    Against the silhouette of `shape`: aligned `iou`, and whether it is the nearest of the list's candidates
    (`silhouette`). Against the material of `appearance`: `colour`, `texture` and `combined` distance; whether
    it is the nearest candidate by both (`material`) and by texture alone (`texture_material`); and
    `texture_similarity`, which is 1 at distance 0 and 0 at the mean distance of the other candidates. On the
    real lists also the scores of `texture.Candidates.score`. `obeyed_*`: whether the image shows what its
    prompt names. `failed`: whether the image has no foreground; its other scores are then None.
    """
    if images.shape[-2:] != (SIZE, SIZE):
        images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
    masks, failed = foreground.foreground_mask(images)
    ious = measure.iou_matrix(masks.float(), listed.silhouette_masks.float())  # (N, 20)
    own = listed.silhouettes.index(shape.silhouette), listed.materials.index(appearance.material)
    others = [c for i, c in enumerate(listed.appearances) if i != own[1]]
    unlike = float(np.mean([measure.texture_distance(listed.appearances[own[1]], c) for c in others]))
    scores: dict[str, list] = {"failed": failed.tolist()}
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        row: dict[str, Any] = dict.fromkeys(SCORES if listed.looks is None else SCORES + texture.SCORES)
        if not failed[i]:
            look = measure.appearance_of(image, mask)
            mine = listed.appearances[own[1]]
            rough = measure.texture_distance(look, mine)
            row = {
                "iou": float(ious[i, own[0]]),
                "silhouette": int(ious[i].argmax()) == own[0],
                "colour": measure.colour_distance(look, mine),
                "texture": rough,
                "combined": measure.combined_distance(look, mine),
                "material": _nearest(measure.combined_distance, look, listed.appearances) == own[1],
                "texture_material": _nearest(measure.texture_distance, look, listed.appearances) == own[1],
                "texture_similarity": float(np.clip(1 - rough / unlike, 0, 1)),
            }
            if listed.looks is not None:
                row |= listed.looks.score(image, mask, own[1])
        for name, value in row.items():
            scores.setdefault(name, []).append(value)
    judged = judges(images)
    for name in ("shape", "pattern", "colours", "background"):
        wanted = [getattr(one, name) for one in prompts]
        if None not in wanted:
            scores[f"obeyed_{name}"] = obeyed(judged, **{name: wanted})[name].tolist()
    return scores


def _nearest(distance: Callable, look: measure.Appearance, candidates: Sequence[measure.Appearance]) -> int:
    return measure.retrieval(lambda query, candidate: -distance(query, candidate), look, candidates)


def score_customization(
    pipe: ESCDPipeline, prompts: Sequence[Prompt], shape: Reference, appearance: Reference,
    listed: References, judges: Judges, *, seed: int = 0, sampler_steps: int = 25,
    guidance_scale: float = PLAIN_SCALE, guidance_rescale: float = 0.0, guidance_from: Start = CUSTOMIZED,
) -> dict[str, list]:  # fmt: skip
    """Generate one image per prompt with a pipeline and score them (`score_images`).

    A pseudo-word that the pipeline has not loaded is replaced by its plain word, so a pipeline without
    customizations gives the floor.
    """
    texts = [one.text for one in prompts]
    for attribute in ATTRIBUTES.values():
        if attribute.token not in pipe.customizations:
            texts = [text.replace(attribute.token, attribute.word) for text in texts]
    images = generate(pipe, texts, seed, sampler_steps, guidance_scale, guidance_rescale, guidance_from)
    return score_images(images, prompts, shape, appearance, listed, judges)


def generate(
    pipe: ESCDPipeline,
    prompts: Sequence[str],
    seed: int,
    sampler_steps: int = 25,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    guidance_from: Start | None = None,
) -> Tensor:
    """One image per prompt, (N, 3, H, W) in [-1, 1]; image i starts from the noise of seed + i.

    Guidance that is None is the default of each prompt's pseudo-words (`method.guidance`).
    """
    images = []
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        noise = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        out = pipe(
            part,
            num_inference_steps=sampler_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_from=guidance_from,
            generator=noise,
            output_type="pt",
        )
        images.append(out.images.float().cpu() * 2 - 1)
    return torch.cat(images)


@torch.no_grad()
def oracle_reconstructions(
    prompts: Sequence[Prompt], shape: Reference, appearance: Reference, backbone: Backbone
) -> Tensor:
    """`oracle_images`, encoded and decoded by the autoencoder: the ceiling. (N, 3, H, W) in [-1, 1]."""
    latents = backbone.encode_images(oracle_images(prompts, shape, appearance, backbone.image_size))
    return backbone.decode_latents(latents).float().cpu()


def oracle_images(
    prompts: Sequence[Prompt],
    shape: Reference,
    appearance: Reference,
    size: int = SIZE,
    *,
    flat: bool = False,
) -> Tensor:
    """Images painted as the prompts say: (N, 3, size, size) in [-1, 1].

    The silhouette is that of `shape` unless the prompt names a shape; the material is that of `appearance`
    unless the prompt names a pattern. flat: paint the material's mean colour only.
    """
    images = []
    for number, one in enumerate(prompts):
        mask = shape.silhouette.mask
        if one.shape is not None:
            mask = named_outlines()[3 * SHAPES.index(one.shape)].float()
        tile = appearance.material.tile
        if flat:
            tile = tile.mean((1, 2), keepdim=True).expand_as(tile)
        if one.pattern is not None:
            draws = CounterRNG(0, torch.tensor([number]))
            named = [torch.tensor([COLOURS.index(name)]) for name in (one.colours[0], one.colours[-1])]
            painted = patterns.as_painted(torch.tensor([PATTERNS.index(one.pattern)]), *named)
            rgb = [torch.tensor([COLOUR_RGB[COLOURS[int(k)]]]) for k in painted]
            tile = patterns.paint_pattern(draws, one.pattern, *rgb)[0]
        images.append(compose_reference(mask, tile, one.background, size)[0])
    return torch.stack(images)


def prompt_obedience(
    backbone: Backbone, n: int = 512, seed: int = 0, *, judges: Judges | None = None,
    sampler_steps: int = 25, guidance_scale: float = PLAIN_SCALE, guidance_rescale: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Share of `n` random prompts that one image each obeys: by attribute, and in all attributes at once."""
    prompts = named_prompts(n, seed)
    pipe = quiet(ESCDPipeline(backbone))
    images = generate(
        pipe, [one.text for one in prompts], seed, sampler_steps, guidance_scale, guidance_rescale
    )
    judged = (judges or load_judges())(images)
    names = ("shape", "pattern", "colours", "background")
    right = obeyed(judged, **{name: [getattr(one, name) for one in prompts] for name in names})
    shares: dict[str, Any] = {name: float(right[name].float().mean()) for name in names}
    shares["all"] = float(torch.stack(list(right.values())).all(0).float().mean())
    for name, words in (("shape", SHAPES), ("pattern", PATTERNS)):
        rows = {word: [i for i, one in enumerate(prompts) if getattr(one, name) == word] for word in words}
        shares[f"by_{name}"] = {word: float(right[name][r].float().mean()) for word, r in rows.items() if r}
    return shares


def quiet(pipe: ESCDPipeline) -> ESCDPipeline:
    """The pipeline, without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
