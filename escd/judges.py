"""Judges of named attributes: which shape, pattern, colours and background a picture shows, or none of these.

A judge is one small residual network with a head for each attribute, trained on pictures of the world whose
seed and whose initialisation the backbone never saw, half of them blurred as an autoencoder blurs. `python
-m escd.judges` trains it (resumable) and prints what share of held-out pictures it judges right *after* the
backbone's autoencoder. What no person could name is neither trained on nor validated on; `targets_of`
states the rules.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torchvision.utils import save_image

from . import measure, world
from .ending import run_command
from .pretrain.loop import LoopConfig, train
from .references import named_outlines
from .world import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOUR_RGB,
    COLOURS,
    NONE,
    PATTERNS,
    SHAPES,
    SIZE,
    Batch,
    World,
)

WEIGHTS = Path(__file__).resolve().parent / "weights"
IGNORED = -100  # the target of a head that has nothing to learn from a picture
HEADS = {
    "shape": len(SHAPES) + 1,
    "pattern": len(PATTERNS) + 1,
    "colours": len(COLOURS) + 1,
    "background": len(BACKGROUNDS) + 1,
}

MIRRORED = ((), (-1,), (-2,), (-2, -1))  # a picture and its mirror images show one pattern

# When a picture is too ambiguous to be judged
LIKE_NAMED = 0.8  # an unnamed outline whose aligned IoU with a named one is at least this has no right answer
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
)  # families a
# person might well call solid, gradient, checkered, striped or dotted
HIDDEN = 0.2  # largest share of the object that may have the background's colour,
HIDDEN_WITHIN = 10.0  # that is, lie within this CIELAB distance of it
SHOWN = 0.08  # smallest share of the object a named colour, or a pattern's second tone, must cover
WIDE = 9  # px: an object nowhere as wide shows less than a named pattern's period of 12 to 18 px
FLAT = 8.0  # CIELAB: an unnamed material that deviates less than this from its mean might be called solid
NEAR_NAMED = 25.0  # CIELAB: an unnamed colour nearer to a named one than this might be called by its name
GROUND_NEAR_NAMED = 20.0  # the same for backgrounds


class Judge(ModelMixin, ConfigMixin):
    """The network: images (N, 3, H, W) in [-1, 1] -> logits of each head, the last entry "none of these".

    First the figure is told from the ground, by a small network that learns it from the world's masks
    (`Figure`), and is centred and brought to one size. On this view a residual network sees the outline as
    an arrangement of coarse features, and pattern and colours as means and deviations of features at every
    scale, down to single pixels, inside the object.
    """

    @register_to_config
    def __init__(
        self, view: int = 48, pixel_width: int = 48, widths: tuple[int, ...] = (32, 64, 128), hidden: int = 64
    ) -> None:
        super().__init__()
        plane, fit, frame = _frame_fit()
        self.register_buffer("plane", plane, persistent=False)  # (S S, 3)
        self.register_buffer("fit", fit, persistent=False)  # (3, frame pixels)
        self.register_buffer("frame", frame, persistent=False)  # (S S,)
        self.figure = Figure()
        channels = 8  # colour, its difference from the ground, that difference's length, figure or not
        self.pixels = nn.Sequential(
            nn.Conv2d(channels, pixel_width, 1), nn.BatchNorm2d(pixel_width), nn.ReLU(),
            nn.Conv2d(pixel_width, pixel_width, 1), nn.BatchNorm2d(pixel_width), nn.ReLU(),
        )  # fmt: skip
        self.stages = nn.ModuleList()
        for k, width in enumerate(widths):
            first = nn.Conv2d(widths[k - 1], width, 3, 2, 1) if k else nn.Conv2d(channels, width, 5, 2, 2)
            last = k == len(widths) - 1
            layers = [first, *(Residual(width) for _ in range(1 if last else 2))]
            self.stages.append(nn.Sequential(*layers, *([nn.BatchNorm2d(width), nn.ReLU()] if last else [])))
        self.arrangement = nn.Sequential(
            nn.Linear(9 * widths[-1], widths[-1]), nn.BatchNorm1d(widths[-1]), nn.ReLU()
        )
        # three coefficients of three colours, how uneven the frame is, how large the view and the figure are
        self.ground = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        total = 2 * (pixel_width + sum(widths)) + 3 * widths[-1] + 64
        self.heads = nn.ModuleDict({
            name: nn.Sequential(
                nn.Linear(total, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, count)
            )
            for name, count in HEADS.items()
        })  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.read(images)[0]

    def read(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The logits of each head, and those of the figure (N, 1, S, S)."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        images = images.to(self.plane.dtype)
        with torch.autocast(images.device.type, enabled=False):
            apart, told, frame = self.apart_from_ground(images)
        found = self.figure(torch.cat([images, apart, told], 1)).float()
        with torch.autocast(images.device.type, enabled=False):
            # The figure learns from the world's masks alone, not from what its view was good for.
            view, ground = self.view_of(images, apart, found.detach().sigmoid() + 1e-4, frame)
        figure, view = view[:, -1:], view.contiguous(memory_format=torch.channels_last)
        pooled = _inside(self.pixels(view[..., ::2, ::2]), figure)
        maps = view
        for stage in self.stages:
            maps = stage(maps)
            pooled += _inside(maps, figure)
        arranged = self.arrangement(F.adaptive_avg_pool2d(maps, 3).flatten(1))
        pooled += [maps.mean((2, 3)), maps.amax((2, 3)), arranged, self.ground(ground)]
        features = torch.cat(pooled, 1)
        return {name: head(features) for name, head in self.heads.items()}, found

    def apart_from_ground(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How images differ from a plane of colour fitted to their frame, and whether by more than it does.

        (N, 3, S, S), (N, 1, S, S) from 0 to 1, and what the frame says of the ground (N, 10).
        """
        colours = images.flatten(2).transpose(1, 2)  # (N, S S, 3)
        plane = self.fit @ colours[:, self.frame]  # (N, 3, 3)
        apart = (colours - self.plane @ plane).transpose(1, 2).view_as(images)
        distance = apart.norm(dim=1, keepdim=True)  # (N, 1, S, S)
        uneven = distance.flatten(2)[..., self.frame].square().mean(-1).sqrt()  # (N, 1)
        told = ((distance - 2.5 * uneven[..., None, None] - 0.1) / 0.2).clamp(0, 1)
        return apart, told, torch.cat([plane.flatten(1), uneven], 1)

    def view_of(self, images: Tensor, apart: Tensor, figure: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """The figure (N, 8, V, V), centred and at one size, and what is said of the ground (N, 12)."""
        x, y = (self.plane[:, axis].view(SIZE, SIZE) for axis in (1, 2))
        area = figure.sum((1, 2, 3))
        across, down = ((figure[:, 0] * axis).sum((1, 2)) / area for axis in (x, y))
        spread = (x - across[:, None, None]).square() + (y - down[:, None, None]).square()
        variance = (figure[:, 0] * spread).sum((1, 2)) / area / 2
        scale = (2.3 * variance.sqrt()).clamp(0.2, 1.2)  # 2.3 deviations hold all but the longest limbs
        zero = torch.zeros_like(scale)
        theta = torch.stack([scale, zero, across, zero, scale, down], 1).view(-1, 2, 3)
        size = self.config.view
        grid = F.affine_grid(theta, [len(images), 8, size, size], align_corners=True)
        channels = torch.cat([images, apart, apart.norm(dim=1, keepdim=True), figure], 1)
        view = F.grid_sample(channels, grid, align_corners=True, padding_mode="border")
        share = area[:, None] / SIZE**2
        return view, torch.cat([frame, scale[:, None], share], 1)


def _frame_fit() -> tuple[Tensor, Tensor, Tensor]:
    """A plane's basis at every pixel, its least-squares fit to the frame's pixels, and which these are."""
    axis = torch.linspace(-1, 1, SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], -1).view(-1, 3)
    frame = torch.ones(SIZE, SIZE, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    return plane, torch.linalg.pinv(plane[frame.flatten()]), frame.flatten()


class Figure(nn.Module):
    """Tells the figure from the ground: (N, 7, S, S) -> logits (N, 1, S, S), at half size and coarser.

    It is given the picture, its difference from the plane of `Judge.apart_from_ground`, and what stands off
    that plane.
    """

    def __init__(self, channels: int = 7, widths: tuple[int, ...] = (24, 48, 64)) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for k, width in enumerate(widths):
            first = nn.Conv2d(widths[k - 1], width, 3, 2, 1) if k else nn.Conv2d(4 * channels, width, 3, 1, 1)
            self.down.append(nn.Sequential(first, Residual(width)))
        for narrow, wide in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.up.append(nn.Sequential(nn.Conv2d(wide + narrow, narrow, 1), Residual(narrow)))
        self.last = nn.Sequential(nn.BatchNorm2d(widths[0]), nn.ReLU(), nn.Conv2d(widths[0], 4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        seen = []
        for stage in self.down:
            x = stage(x)
            seen.append(x)
        for stage, beside in zip(self.up, seen[-2::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), beside], 1))
        return F.pixel_shuffle(self.last(x), 2)


def _inside(maps: Tensor, figure: Tensor) -> list[Tensor]:
    """Mean and deviation (N, C) of maps (N, C, h, w) over the figure (N, 1, V, V)."""
    weight = F.adaptive_avg_pool2d(figure, maps.shape[-2:])
    weight = weight / weight.sum((2, 3), keepdim=True).clamp(min=1e-3)
    maps = maps.float()
    mean = (maps * weight).sum((2, 3))
    variance = (maps.square() * weight).sum((2, 3)) - mean.square()
    return [mean, (variance.clamp(min=0) + 1e-5).sqrt()]


class Residual(nn.Module):
    """Pre-activation residual block (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


@dataclass(frozen=True)
class Judgement:
    """What the judge sees in N pictures; NONE where it is none of the named ones."""

    shape: Tensor  # (N,) index into SHAPES, or NONE
    pattern: Tensor  # (N,) index into PATTERNS, or NONE
    colours: Tensor  # (N, 8) bool: which of COLOURS the object shows
    other_colour: Tensor  # (N,) bool: it shows a colour that has no name
    background: Tensor  # (N,) index into BACKGROUNDS, or NONE

    def __len__(self) -> int:
        return len(self.shape)


class Judges:
    """The trained judge: `judges(images)` -> Judgement."""

    def __init__(self, network: Judge) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 128) -> Judgement:
        """Judge images (N, 3, H, W) in [-1, 1]; of another size than 64 px they are resized.

        The pattern is what the picture and its mirror images (`MIRRORED`) are together likeliest to show.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are (N, 3, H, W), not {tuple(images.shape)}")
        device = next(self.network.parameters()).device
        parts = []
        for part in images.split(batch_size):
            part = part.float().to(device)
            read = [self.network(part.flip(axes) if axes else part) for axes in MIRRORED]
            pattern = torch.stack([logits["pattern"].log_softmax(-1) for logits in read]).sum(0)
            parts.append(read[0] | {"pattern": pattern})
        return judgement(
            {name: torch.cat([part[name] for part in parts]).to(images.device) for name in HEADS}
        )


def judgement(logits: dict[str, Tensor]) -> Judgement:
    """The likeliest label of each head, and every colour likelier than not."""

    def label(name: str) -> Tensor:
        best = logits[name].argmax(-1)
        return torch.where(best == HEADS[name] - 1, NONE, best)

    present = logits["colours"] > 0
    return Judgement(label("shape"), label("pattern"), present[:, :-1], present[:, -1], label("background"))


def load_judges(folder: str | Path = WEIGHTS / "judges", device: str | torch.device = "cpu") -> Judges:
    """The judges that ship with the package, or those of a folder; FileNotFoundError where there are none."""
    # diffusers would look for a folder that is not there on the hub.
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"no judges in {folder}: `python -m escd.judges` trains them")
    network = Judge.from_pretrained(folder, torch_dtype=torch.float32)
    return Judges(network.to(device).eval().requires_grad_(False))


def obeyed(
    seen: Judgement,
    *,
    shape: Sequence[str] | None = None,
    pattern: Sequence[str] | None = None,
    colours: Sequence[Sequence[str]] | None = None,
    background: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Whether each picture shows what its prompt asked for, (N,) bool for each attribute that is given.

    One name a picture; `colours` one list a picture, obeyed when exactly these are shown. "None of these"
    is a miss. Raises ValueError for an unknown name.
    """
    for name, asked in (
        ("shape", shape),
        ("pattern", pattern),
        ("colours", colours),
        ("background", background),
    ):
        if asked is not None and len(asked) != len(seen):
            raise ValueError(f"{len(asked)} values of {name} were asked of {len(seen)} pictures")
    found: dict[str, Tensor] = {}
    for name, asked, known in (
        ("shape", shape, SHAPES),
        ("pattern", pattern, PATTERNS),
        ("background", background, BACKGROUNDS),
    ):
        if asked is not None:
            _require_one_each(name, asked, seen)
            wanted = torch.tensor([_index(word, known, name) for word in asked], device=seen.shape.device)
            found[name] = getattr(seen, name) == wanted
    if colours is not None:
        _require_one_each("colours", colours, seen)
        wanted = torch.zeros_like(seen.colours)
        for row, words in enumerate(colours):
            wanted[row, [_index(word, COLOURS, "colour") for word in words]] = True
        found["colours"] = (seen.colours == wanted).all(1) & ~seen.other_colour
    return found


def _require_one_each(name: str, asked: Sequence, seen: Judgement) -> None:
    if len(asked) != len(seen):
        raise ValueError(f"{len(asked)} values of {name} were asked of {len(seen)} pictures")


def _index(word: str, known: Sequence[str], what: str) -> int:
    if word not in known:
        raise ValueError(f"unknown {what} {word!r}; known: {', '.join(known)}")
    return known.index(word)


# ------------------------------------------------------------------------------------------------------------
# what a picture of the world teaches


def targets_of(batch: Batch) -> dict[str, Tensor]:
    """Targets of each head for pictures; IGNORED (or -1 for colours) where the answer is not clear.

    shape (N,), pattern (N,), background (N,): class numbers, the last being "none of these"; colours (N, 9):
    1, 0; figure (N, 1, H, W): the object's coverage. Not clear is

    - an unnamed outline whose aligned IoU with a named shape is at least LIKE_NAMED;
    - everything but the background where more than HIDDEN of the object has the background's colour;
    - the pattern of an unnamed material of a PATTERN_LIKE family, or nearly even (FLAT; `still_clear` asks
      the same of what became of the picture); of a gradient of one colour, which side light makes of a solid
      one too; of any whose second tone covers less than SHOWN of the object; and of all but a solid one where
      the object is nowhere WIDE px wide;
    - the colours where a named one covers less than SHOWN of the object (in a gradient: comes within
      NEAR_NAMED of its tone on less), or where an unnamed material shows as much of a colour within
      NEAR_NAMED of a named one;
    - an unnamed background whose mean is within GROUND_NEAR_NAMED of a named one.
    """
    lab = torch.from_numpy(measure.to_lab(batch.image)).to(batch.image.device)  # (N, H, W, 3)
    inside, outside = batch.mask[:, 0] > 0.98, batch.mask[:, 0] < 0.02
    ground = _mean(lab, outside)  # (N, 3)
    hidden = _share((lab - ground[:, None, None]).norm(dim=-1) < HIDDEN_WITHIN, inside) > HIDDEN

    shape = torch.where(batch.shape == NONE, len(SHAPES), batch.shape)
    unnamed = (batch.shape == NONE).nonzero()[:, 0]
    if len(unnamed):
        known = named_outlines().to(batch.mask.device)
        alike = measure.iou_matrix(batch.mask[unnamed, 0] > 0.5, known, refined=()).amax(1) >= LIKE_NAMED
        shape[unnamed[alike]] = IGNORED

    named = batch.pattern != NONE
    pattern = torch.where(named, batch.pattern, len(PATTERNS))
    like = torch.tensor([family in PATTERN_LIKE for family in batch.appearance_family], device=named.device)
    single = batch.colours.sum(1) == 1
    tones, shades = (_lab(rgb).to(lab.device) for rgb in (_colour_table(), _shade_table()))
    first = batch.colours.int().argmax(1)
    second = len(COLOURS) - 1 - batch.colours.flip(1).int().argmax(1)
    pair = torch.stack(
        [tones[first], torch.where(single[:, None], shades[first], tones[second])], 1
    )  # (N, 2, 3)
    nearer = (lab[:, :, :, None] - pair[:, None, None]).norm(dim=-1).argmin(-1) == 1  # (N, H, W): second tone
    share = _share(nearer, inside)
    faint = torch.minimum(share, 1 - share) < SHOWN
    # A gradient between two colours shows neither where the object covers its middle alone.
    reached = (lab[:, :, :, None] - pair[:, None, None]).norm(dim=-1) < NEAR_NAMED  # (N, H, W, 2)
    least = torch.minimum(_share(reached[..., 0], inside), _share(reached[..., 1], inside))
    faint |= (batch.pattern == PATTERNS.index("gradient")) & ~single & (least < SHOWN)
    solid, gradient = batch.pattern == PATTERNS.index("solid"), batch.pattern == PATTERNS.index("gradient")
    like |= _deviation(lab, inside) < FLAT
    thick = -F.max_pool2d(-inside[:, None].float(), WIDE, 1, WIDE // 2)  # centres of squares that fit inside
    thin = ~thick.flatten(1).any(1)
    pattern[(like & ~named) | (gradient & single) | (named & ~solid & faint) | (thin & ~solid)] = IGNORED

    colours = torch.cat([batch.colours, ~named[:, None]], 1).float()
    distance = (lab[:, :, :, None] - tones).norm(dim=-1).amin(-1)
    nameable = _share(distance < NEAR_NAMED, inside) >= SHOWN
    colours[(~named & nameable) | (named & ~single & faint)] = -1

    background = torch.where(batch.background == NONE, len(BACKGROUNDS), batch.background)
    grounds = _lab(torch.tensor([BACKGROUND_RGB[name] for name in BACKGROUNDS])).to(lab.device)
    near = (ground[:, None] - grounds).norm(dim=-1).amin(1) < GROUND_NEAR_NAMED
    background[(batch.background == NONE) & near] = IGNORED

    for target in (shape, pattern):
        target[hidden] = IGNORED
    colours[hidden] = -1
    targets = {"shape": shape, "pattern": pattern, "colours": colours, "background": background}
    return targets | {"figure": batch.mask}


def still_clear(images: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The targets of rendered pictures, for what became of them (N, 3, H, W).

    `targets_of` looks at pictures as they are rendered. Where an unnamed material is nearly even (FLAT) only
    by now, as autoencoders make fine grain, its pattern is not clear any more. A pixel at the object's edge,
    where colours run into each other, does not count.
    """
    unnamed = (targets["pattern"] == len(PATTERNS)) & targets["figure"].flatten(1).any(1)
    inside = -F.max_pool2d(-(targets["figure"] > 0.98).float(), 3, 1, 1)[:, 0] > 0
    lab = torch.from_numpy(measure.to_lab(images)).to(images.device)
    faded = unnamed & (_deviation(lab, inside) < FLAT)
    return targets | {"pattern": targets["pattern"].masked_fill(faded, IGNORED)}


def _deviation(lab: Tensor, inside: Tensor) -> Tensor:
    """Root mean square CIELAB distance from the mean, (N,), of lab (N, H, W, 3) inside (N, H, W)."""
    return _mean((lab - _mean(lab, inside)[:, None, None]).square(), inside).sum(1).sqrt()


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where[..., None]).sum((1, 2)) / where.sum((1, 2))[:, None].clamp(min=1)


def _share(flags: Tensor, where: Tensor) -> Tensor:
    return (flags & where).sum((1, 2)) / where.sum((1, 2)).clamp(min=1)


def _colour_table() -> Tensor:
    return torch.tensor([COLOUR_RGB[name] for name in COLOURS])


def _shade_table() -> Tensor:
    """The second tone of a pattern of one colour, as the world paints it."""
    table = _colour_table()
    dark = torch.tensor([name == "black" for name in COLOURS])[:, None]
    return torch.where(dark, table + 0.3, table * 0.6)


def _lab(rgb: Tensor) -> Tensor:
    return torch.from_numpy(measure.to_lab(rgb[:, :, None, None] * 2 - 1)[:, 0, 0])


def loss_of(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of each head over the pictures it may learn from, summed."""
    total = logits["shape"].new_zeros(())
    for name in ("shape", "pattern", "background"):
        if (targets[name] != IGNORED).any():
            total = total + F.cross_entropy(logits[name].float(), targets[name], ignore_index=IGNORED)
    clear = (targets["colours"] >= 0).float()
    each = F.binary_cross_entropy_with_logits(
        logits["colours"].float(), targets["colours"].clamp(min=0), reduction="none"
    )
    return total + 4 * (each * clear).sum() / clear.sum().clamp(min=1)


def accuracies(seen: Judgement, targets: dict[str, Tensor]) -> dict[str, float]:
    """Share judged right by each head where the answer is clear; colours are right when all nine are."""
    scores = {}
    for name in ("shape", "pattern", "background"):
        answer = getattr(seen, name)
        answer = torch.where(answer == NONE, HEADS[name] - 1, answer)
        clear = targets[name] != IGNORED
        scores[name] = float((answer == targets[name])[clear].float().mean())
    clear = targets["colours"][:, 0] >= 0
    answer = torch.cat([seen.colours, seen.other_colour[:, None]], 1)
    scores["colours"] = float((answer == targets["colours"].bool()).all(1)[clear].float().mean())
    return scores


# ------------------------------------------------------------------------------------------------------------
# training


class JudgedLoss(nn.Module):
    """The judge and its loss, as `escd.pretrain.loop` trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = Judge()

    def forward(self, batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        logits, figure = self.judge.read(images)
        right = accuracies(judgement(logits), targets)
        off = F.binary_cross_entropy_with_logits(figure, targets["figure"])
        logs = {name: torch.tensor(score) for name, score in right.items()}
        return loss_of(logits, targets) + 4 * off, logs | {"figure": off.detach()}


class JudgeStage:
    """Trains the judge to read what the autoencoder in the folder `vae` makes of a picture."""

    name = "judges"
    # about a quarter of an hour on one thread
    loop = LoopConfig(
        images=128_000, batch_size=64, learning_rate=4e-3, warmup=0.02, decay=0.7, ema_decay=0.98, seed=15
    )
    decoded = 0.5  # share of the training pictures that go through the autoencoder itself
    reuse = 3  # times a picture is shown, always spoilt another way: making one takes longer than learning it
    bank, begun = 12_288, 1_024  # pictures to choose from, in the end and at first

    def __init__(self, device: torch.device, vae: Path) -> None:
        torch.manual_seed(self.loop.seed)  # the backbone's stages start from other seeds
        self.module = JudgedLoss()
        self.heavy: list[nn.Module] = []
        self.world = World(seed=15, named_shapes=0.5, named_appearances=0.5, device=device)
        self.vae = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).to(device).eval()
        self.vae.requires_grad_(False)
        self.device = device
        self.painted = 0  # pictures painted so far
        self.images = torch.empty(self.bank, 3, SIZE, SIZE, dtype=torch.half, device=device)
        self.targets: dict[str, Tensor] = {}
        self.fixed: dict[str, dict[str, tuple[Tensor, dict[str, Tensor]]]] = {}

    def load(self, folder: Path) -> None:
        self.module.judge.load_state_dict(
            Judge.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
        )

    def state_dict(self) -> dict[str, Any]:
        """The bank of pictures."""
        filled = min(self.painted, self.bank)
        targets = {name: target[:filled].clone() for name, target in self.targets.items()}
        return {"painted": self.painted, "images": self.images[:filled].clone(), "targets": targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.painted, filled = state["painted"], len(state["images"])
        self.images[:filled] = state["images"].to(self.device)
        for name, target in state["targets"].items():
            self.targets[name] = torch.empty(
                self.bank, *target.shape[1:], dtype=target.dtype, device=self.device
            )
            self.targets[name][:filled] = target.to(self.device)

    def batch(self, first: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        fresh = max(1, count // self.reuse) if self.painted else self.begun
        self._paint(torch.arange(first, first + fresh, device=self.device))
        draws = world.Draws(self.world.seed, torch.arange(first, first + count, device=self.device))
        rows = draws.integer("row", 0, min(self.painted, self.bank))
        targets = {name: target[rows] for name, target in self.targets.items()}
        images = spoil(self.images[rows].float(), draws)
        return images, still_clear(images, targets)

    def _paint(self, index: Tensor) -> None:
        """Put the pictures with these numbers into the bank; the oldest go."""
        pictures, draws = self.world.batch(index), world.Draws(self.world.seed, index)
        targets, images = targets_of(pictures), pictures.image.clone()
        empty = (draws.uniform("empty") < 0.04).nonzero()[:, 0]
        if len(empty):
            images[empty] = self.world.backgrounds(index[empty])[0] * 2 - 1
            targets["shape"][empty], targets["pattern"][empty] = len(SHAPES), len(PATTERNS)
            targets["colours"][empty], targets["figure"][empty] = -1, 0
        through = (draws.uniform("through") < self.decoded).nonzero()[:, 0]
        if len(through):
            images[through] = self.reconstruct(images[through], draws[through])
        if not self.targets:
            self.targets = {n: t.new_empty(self.bank, *t.shape[1:]) for n, t in targets.items()}
        rows = (self.painted + torch.arange(len(images), device=self.device)) % self.bank
        self.images[rows] = images.half()
        for name, target in targets.items():
            self.targets[name][rows] = target
        self.painted += len(images)

    def reconstruct(self, images: Tensor, draws: world.Draws | None = None) -> Tensor:
        """Images after the autoencoder; with draws, latents are off by up to a sixth, as sampled ones are."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16):
            latents = self.vae.encode(images).latent_dist.mean
            if draws is not None:
                off = torch.randn_like(latents) * latents.std()
                latents = latents + off * draws.uniform("off", 1, 1, 1, high=0.17)
            return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def held_out(self, split: str, count: int = 1024) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """Fixed pictures no training saw, rendered and decoded (after the autoencoder), and their targets."""
        if split not in self.fixed:
            unseen = World(
                seed=9015, split=split, named_shapes=0.5, named_appearances=0.5, device=self.device
            )
            parts = [unseen.batch(range(first, first + 128)) for first in range(0, count, 128)]
            targets = [targets_of(part) for part in parts]
            rendered = torch.cat([part.image for part in parts])
            decoded = torch.cat([self.reconstruct(part.image) for part in parts])
            clear = {name: torch.cat([target[name] for target in targets]) for name in targets[0]}
            self.fixed[split] = {
                "rendered": (rendered, clear),
                "decoded": (decoded, still_clear(decoded, clear)),
            }
        return self.fixed[split]

    def evaluate(self) -> dict[str, float]:
        judges, scores = Judges(self.module.judge), {}
        for split in ("train", "heldout"):
            for kind, (images, targets) in self.held_out(split).items():
                right = accuracies(judges(images), targets)
                scores |= {f"{name}, {split}, {kind}": round(right[name], 4) for name in right}
        return scores

    def grid(self, path: Path) -> None:
        """What the judge gets wrong after the autoencoder."""
        decoded, targets = self.held_out("train")["decoded"]
        seen = Judges(self.module.judge)(decoded)
        wrong = torch.zeros(len(decoded), dtype=torch.bool, device=decoded.device)
        for name in ("shape", "pattern", "background"):
            answer = getattr(seen, name)
            answer = torch.where(answer == NONE, HEADS[name] - 1, answer)
            wrong |= (answer != targets[name]) & (targets[name] != IGNORED)
        if wrong.any():
            save_image(decoded[wrong][:64] / 2 + 0.5, path, nrow=16)

    def export(self, folder: Path) -> None:
        # ModelMixin.half() would change the network being trained.
        copy = Judge(**{k: v for k, v in self.module.judge.config.items() if not k.startswith("_")})
        copy.load_state_dict(self.module.judge.state_dict())
        copy.half().save_pretrained(folder)


def spoil(images: Tensor, draws: world.Draws) -> Tensor:
    """What an autoencoder and a sampler may do to a picture without changing what it shows, to half of them.

    A blur to between 60 and 100 % of the resolution, a cast and a gain of a few per cent, and soft noise.
    """
    out = images.clone()
    kind = draws.integer("sharpness", 0, 8)
    for k, side in enumerate((40, 46, 52, 58)):
        rows = (kind == k).nonzero()[:, 0]
        if len(rows):
            small = F.interpolate(
                images[rows], (side, side), mode="bilinear", antialias=True, align_corners=False
            )
            out[rows] = F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False)
    spoiled = (draws.uniform("spoiled") < 0.5).to(images)[:, None, None, None]
    gain = 1 + spoiled * draws.uniform("gain", 1, 1, 1, low=-0.06, high=0.06)
    cast = spoiled * draws.uniform("cast", 3, 1, 1, low=-0.05, high=0.05)
    soft = F.avg_pool2d(torch.randn_like(out), 3, 1, 1) * draws.uniform("noise", 1, 1, 1, high=0.12) * spoiled
    return (out * gain + cast + soft).clamp(-1, 1)


def main(argv: list[str] | None = None) -> None:
    """Train the judges and print their validation."""
    parser = argparse.ArgumentParser(prog="python -m escd.judges", description=main.__doc__)
    parser.add_argument(
        "--vae",
        type=Path,
        default=WEIGHTS / "mini" / "vae",
        help="the autoencoder to judge after (default: mini's)",
    )
    parser.add_argument(
        "--images", type=int, help=f"pictures to see in all (default: {JudgeStage.loop.images})"
    )
    parser.add_argument("--learning-rate", type=float, help="its peak (default: the recipe's)")
    parser.add_argument(
        "--further", action="store_true", help="start from the exported weights instead of from random ones"
    )
    parser.add_argument(
        "--weights",
        type=Path,
        default=WEIGHTS / "judges",
        help="where to export (default: the package's own)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    arguments.weights.mkdir(parents=True, exist_ok=True)
    record = train(
        lambda device: JudgeStage(device, arguments.vae),
        weights=arguments.weights,
        images=arguments.images,
        further=arguments.further,
        learning_rate=arguments.learning_rate,
    )
    for name, score in record["scores"][-1].items():
        print(f"{name:>28}  {score:.4f}" if isinstance(score, float) else f"{name:>28}  {score}")


if __name__ == "__main__":
    run_command(main)
