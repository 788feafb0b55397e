"""Which labels of a rendered image are unambiguous: the targets of a judge's training and validation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import foreground
from ..data.names import BACKGROUND_RGB, BACKGROUNDS, COLOUR_RGB, COLOURS, NONE, PATTERNS, SHAPES
from ..data.world import Batch
from . import measure
from .judges import HEADS, Judgement
from .silhouettes import named_outlines

IGNORED = -100  # the target of an ambiguous label
# Rules of what is ambiguous.
LIKE_NAMED = 0.8  # aligned IoU with a named outline from which on an unnamed outline is ambiguous
# Families that a person might call solid, gradient, checkered, striped or dotted.
PATTERN_LIKE = (
    "plain",
    "ramp",
    "plaid",
    "tiles",
    "brushed",
    "wood",
    "hexcells",
    "weave",
    "target",
)
HIDDEN = 0.2  # largest share of the object that may have the background's colour
HIDDEN_WITHIN = 10.0  # CIELAB: a distance below this counts as the background's colour
SHOWN = 0.08  # smallest share of the object a named colour, or a pattern's second tone, must cover
WIDE = 9  # px: a narrower object shows less than a named pattern's period of 12 to 18 px
FLAT = 8.0  # CIELAB: an unnamed material that deviates less than this from its mean might be called solid
NEAR_NAMED = 25.0  # CIELAB: an unnamed colour nearer to a named one than this might be called by its name
GROUND_NEAR_NAMED = 20.0  # the same for backgrounds


def targets_of(batch: Batch) -> dict[str, Tensor]:
    """Targets of each head; IGNORED (for colours -1) where the label is ambiguous.

    shape (N,), pattern (N,), background (N,): class numbers, the last being "none of these"; colours (N, 9):
    1 or 0; figure (N, 1, H, W): the object's coverage. Ambiguous is

    - an unnamed outline whose aligned IoU with a named shape is at least LIKE_NAMED;
    - everything but the background where more than HIDDEN of the object has the background's colour;
    - the pattern of an unnamed material of a PATTERN_LIKE family, or nearly even (FLAT; `still_clear` applies
      the rule to changed images); of a gradient of one colour, since side light makes one of a solid colour;
      of any whose second tone covers less than SHOWN of the object; and of all but a solid one where the
      object is nowhere WIDE px wide;
    - the colours where a named one covers less than SHOWN of the object (in a gradient: comes within
      NEAR_NAMED of its tone on less), or where an unnamed material shows as much of a colour within
      NEAR_NAMED of a named one;
    - an unnamed background whose mean is within GROUND_NEAR_NAMED of a named one.
    """
    lab = torch.from_numpy(foreground.to_lab(batch.image)).to(batch.image.device)  # (N, H, W, 3)
    mask, outside = batch.mask[:, 0] > 0.98, batch.mask[:, 0] < 0.02
    ground = _mean(lab, outside)  # (N, 3)
    hidden = _share((lab - ground[:, None, None]).norm(dim=-1) < HIDDEN_WITHIN, mask) > HIDDEN
    named, single = batch.pattern != NONE, batch.colours.sum(1) == 1
    faint = _faint(batch, lab, mask, single)

    like = torch.tensor([family in PATTERN_LIKE for family in batch.appearance_family], device=named.device)
    like |= _deviation(lab, mask) < FLAT
    solid, gradient = batch.pattern == PATTERNS.index("solid"), batch.pattern == PATTERNS.index("gradient")
    thick = -F.max_pool2d(-mask[:, None].float(), WIDE, 1, WIDE // 2)  # centres of squares within the mask
    thin = ~thick.flatten(1).any(1)
    pattern = torch.where(named, batch.pattern, len(PATTERNS))
    pattern[(like & ~named) | (gradient & single) | (named & ~solid & faint) | (thin & ~solid)] = IGNORED

    colours = torch.cat([batch.colours, ~named[:, None]], 1).float()
    tones = _lab(_colour_table()).to(lab.device)
    distance = (lab[:, :, :, None] - tones).norm(dim=-1).amin(-1)
    nameable = _share(distance < NEAR_NAMED, mask) >= SHOWN
    colours[(~named & nameable) | (named & ~single & faint)] = -1

    shape = _shape_target(batch)
    shape[hidden] = pattern[hidden] = IGNORED
    colours[hidden] = -1
    background = _background_target(batch, ground)
    targets = {"shape": shape, "pattern": pattern, "colours": colours, "background": background}
    return targets | {"figure": batch.mask}


def _shape_target(batch: Batch) -> Tensor:
    shape = torch.where(batch.shape == NONE, len(SHAPES), batch.shape)
    unnamed = (batch.shape == NONE).nonzero()[:, 0]
    if len(unnamed):
        known = named_outlines().to(batch.mask.device)
        iou = measure.iou_matrix(batch.mask[unnamed, 0] > 0.5, known, refined=()).amax(1)
        shape[unnamed[iou >= LIKE_NAMED]] = IGNORED
    return shape


def _background_target(batch: Batch, ground: Tensor) -> Tensor:
    background = torch.where(batch.background == NONE, len(BACKGROUNDS), batch.background)
    grounds = _lab(torch.tensor([BACKGROUND_RGB[name] for name in BACKGROUNDS])).to(ground.device)
    near = (ground[:, None] - grounds).norm(dim=-1).amin(1) < GROUND_NEAR_NAMED
    background[(batch.background == NONE) & near] = IGNORED
    return background


def _faint(batch: Batch, lab: Tensor, mask: Tensor, single: Tensor) -> Tensor:
    """Whether one of the two tones of a named pattern covers less than SHOWN of the object: (N,) bool."""
    tones, shades = (_lab(rgb).to(lab.device) for rgb in (_colour_table(), _shade_table()))
    first = batch.colours.int().argmax(1)
    second = len(COLOURS) - 1 - batch.colours.flip(1).int().argmax(1)
    others = torch.where(single[:, None], shades[first], tones[second])
    pair = torch.stack([tones[first], others], 1)  # (N, 2, 3)
    distance = (lab[:, :, :, None] - pair[:, None, None]).norm(dim=-1)  # (N, H, W, 2)
    share = _share(distance.argmin(-1) == 1, mask)
    faint = torch.minimum(share, 1 - share) < SHOWN
    # A gradient between two colours shows neither where the object covers only its middle.
    reached = distance < NEAR_NAMED
    least = torch.minimum(_share(reached[..., 0], mask), _share(reached[..., 1], mask))
    return faint | ((batch.pattern == PATTERNS.index("gradient")) & ~single & (least < SHOWN))


def still_clear(images: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets of rendered images after a change, such as an autoencoder's: images (N, 3, H, W).

    `targets_of` reads the renders. Where the change made an unnamed material nearly even (FLAT), as an
    autoencoder does with fine grain, its pattern is ambiguous. Pixels at the object's edge are left out.
    """
    unnamed = (targets["pattern"] == len(PATTERNS)) & targets["figure"].flatten(1).any(1)
    mask = -F.max_pool2d(-(targets["figure"] > 0.98).float(), 3, 1, 1)[:, 0] > 0
    lab = torch.from_numpy(foreground.to_lab(images)).to(images.device)
    faded = unnamed & (_deviation(lab, mask) < FLAT)
    return targets | {"pattern": targets["pattern"].masked_fill(faded, IGNORED)}


def _deviation(lab: Tensor, mask: Tensor) -> Tensor:
    """Root mean square CIELAB distance from the mean, (N,), of lab (N, H, W, 3) over a mask (N, H, W)."""
    return _mean((lab - _mean(lab, mask)[:, None, None]).square(), mask).sum(1).sqrt()


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where[..., None]).sum((1, 2)) / where.sum((1, 2))[:, None].clamp(min=1)


def _share(flags: Tensor, where: Tensor) -> Tensor:
    return (flags & where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)


def _colour_table() -> Tensor:
    return torch.tensor([COLOUR_RGB[name] for name in COLOURS])


def _shade_table() -> Tensor:
    """The second tone that the world gives a pattern of one colour."""
    table = _colour_table()
    dark = torch.tensor([name == "black" for name in COLOURS])[:, None]
    return torch.where(dark, table + 0.3, table * 0.6)


def _lab(rgb: Tensor) -> Tensor:
    return torch.from_numpy(foreground.to_lab(rgb[:, :, None, None] * 2 - 1)[:, 0, 0])


def accuracies(judgement: Judgement, targets: dict[str, Tensor]) -> dict[str, float]:
    """Accuracy of each head on unambiguous labels; colours are right when all nine are."""
    scores = {}
    for name in ("shape", "pattern", "background"):
        answer = getattr(judgement, name)
        answer = torch.where(answer == NONE, HEADS[name] - 1, answer)
        clear = targets[name] != IGNORED
        scores[name] = float((answer == targets[name])[clear].float().mean())
    clear = targets["colours"][:, 0] >= 0
    answer = torch.cat([judgement.colours, judgement.other_colour[:, None]], 1)
    scores["colours"] = float((answer == targets["colours"].bool()).all(1)[clear].float().mean())
    return scores
