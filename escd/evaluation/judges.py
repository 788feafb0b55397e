"""Judges: classifiers of the named shape, pattern, colours and background of an image, or "none of these".

One small residual network has a head for each attribute. `python -m escd.pretrain.judges` trains it on
renders of the world with a seed and an initialisation of its own, half of them blurred like the output of an
autoencoder, and prints its accuracy on held-out renders *after* the backbone's autoencoder. Ambiguous labels
are left out of training and validation (`answers.targets_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..data.names import BACKGROUNDS, COLOURS, NONE, PATTERNS, SHAPES, SIZE
from ..paths import WEIGHTS

HEADS = {
    "shape": len(SHAPES) + 1,
    "pattern": len(PATTERNS) + 1,
    "colours": len(COLOURS) + 1,
    "background": len(BACKGROUNDS) + 1,
}
MIRRORED = ((), (-1,), (-2,), (-2, -1))  # flipped axes: an image and its mirror images have one pattern


class Judge(ModelMixin, ConfigMixin):
    """The network: images (N, 3, H, W) in [-1, 1] -> logits of each head, the last entry "none of these".

    A small network (`Figure`), trained on the world's masks, segments the figure, which is then centred and
    scaled to one size. On this view a residual network describes the outline by the arrangement of coarse
    features, and pattern and colours by means and deviations of features over the figure, at every scale
    down to single pixels.
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
        channels = 8  # colour (3), its difference from the ground (3), that difference's norm, the figure
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
        # 3 x 3 plane coefficients, unevenness of the frame, scale of the view, area of the figure
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
            apart, stands_off, frame = self.apart_from_ground(images)
        figure_logits = self.figure(torch.cat([images, apart, stands_off], 1)).float()
        with torch.autocast(images.device.type, enabled=False):
            # Detached: the figure is trained on the world's masks only, not through the heads.
            view, ground = self.view_of(images, apart, figure_logits.detach().sigmoid() + 1e-4, frame)
        figure, view = view[:, -1:], view.contiguous(memory_format=torch.channels_last)
        pooled = _pooled(self.pixels(view[..., ::2, ::2]), figure)
        maps = view
        for stage in self.stages:
            maps = stage(maps)
            pooled += _pooled(maps, figure)
        arranged = self.arrangement(F.adaptive_avg_pool2d(maps, 3).flatten(1))
        pooled += [maps.mean((2, 3)), maps.amax((2, 3)), arranged, self.ground(ground)]
        features = torch.cat(pooled, 1)
        return {name: head(features) for name, head in self.heads.items()}, figure_logits

    def apart_from_ground(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Difference of images from a plane of colour fitted to their frame.

        Returns the difference (N, 3, S, S), whether it exceeds the frame's own unevenness (N, 1, S, S) in
        [0, 1], and the features of the frame (N, 10).
        """
        colours = images.flatten(2).transpose(1, 2)  # (N, S S, 3)
        plane = self.fit @ colours[:, self.frame]  # (N, 3, 3)
        apart = (colours - self.plane @ plane).transpose(1, 2).view_as(images)
        distance = apart.norm(dim=1, keepdim=True)  # (N, 1, S, S)
        uneven = distance.flatten(2)[..., self.frame].square().mean(-1).sqrt()  # (N, 1)
        stands_off = ((distance - 2.5 * uneven[..., None, None] - 0.1) / 0.2).clamp(0, 1)
        return apart, stands_off, torch.cat([plane.flatten(1), uneven], 1)

    def view_of(self, images: Tensor, apart: Tensor, figure: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        """The figure (N, 8, V, V), centred and at one size, and the features of the ground (N, 12)."""
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
    """Segments the figure: (N, 7, S, S) -> logits (N, 1, S, S), computed at half size and coarser.

    The input is the image and the two maps of `Judge.apart_from_ground`.
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
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for stage, skip in zip(self.up, skips[-2::-1], strict=True):
            x = stage(torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1))
        return F.pixel_shuffle(self.last(x), 2)


def _pooled(maps: Tensor, figure: Tensor) -> list[Tensor]:
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
    """The labels of N images; NONE where a label is none of the named ones."""

    shape: Tensor  # (N,) index into SHAPES, or NONE
    pattern: Tensor  # (N,) index into PATTERNS, or NONE
    colours: Tensor  # (N, 8) bool: which of COLOURS the object shows
    other_colour: Tensor  # (N,) bool: the object shows a colour without a name
    background: Tensor  # (N,) index into BACKGROUNDS, or NONE

    def __len__(self) -> int:
        return len(self.shape)


class Judges:
    """The trained judge: `judges(images)` -> Judgement."""

    def __init__(self, network: Judge) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 128) -> Judgement:
        """Judge images (N, 3, H, W) in [-1, 1]; they are resized to 64 px.

        The pattern is the likeliest one for the image and its mirror images (`MIRRORED`) together.
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
    """The likeliest label of each head, and every colour with a probability above a half."""

    def label(name: str) -> Tensor:
        best = logits[name].argmax(-1)
        return torch.where(best == HEADS[name] - 1, NONE, best)

    present = logits["colours"] > 0
    return Judgement(label("shape"), label("pattern"), present[:, :-1], present[:, -1], label("background"))


def load_judges(folder: str | Path = WEIGHTS / "judges", device: str | torch.device = "cpu") -> Judges:
    """The judges of the package, or those of a folder; FileNotFoundError where there are none."""
    # diffusers would look up the name of a missing folder on the hub.
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"no judges in {folder}: `python -m escd.pretrain.judges` trains them")
    network = Judge.from_pretrained(folder, torch_dtype=torch.float32)
    return Judges(network.to(device).eval().requires_grad_(False))


def obeyed(
    judged: Judgement,
    *,
    shape: Sequence[str] | None = None,
    pattern: Sequence[str] | None = None,
    colours: Sequence[Sequence[str]] | None = None,
    background: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Whether each image shows what its prompt names: (N,) bool for each attribute that is given.

    Each argument has one value per image; `colours` a list of names, obeyed when exactly these are shown.
    "None of these" is a miss. Raises ValueError for an unknown name and for another number of values.
    """
    given = {"shape": shape, "pattern": pattern, "background": background, "colours": colours}
    for name, named in given.items():
        if named is not None and len(named) != len(judged):
            raise ValueError(f"{len(named)} values of {name} are given for {len(judged)} images")
    right: dict[str, Tensor] = {}
    for name, known in (("shape", SHAPES), ("pattern", PATTERNS), ("background", BACKGROUNDS)):
        if given[name] is not None:
            wanted = torch.tensor([_index(word, known, name) for word in given[name]])
            right[name] = getattr(judged, name) == wanted.to(judged.shape.device)
    if colours is not None:
        wanted = torch.zeros_like(judged.colours)
        for row, words in enumerate(colours):
            wanted[row, [_index(word, COLOURS, "colour") for word in words]] = True
        right["colours"] = (judged.colours == wanted).all(1) & ~judged.other_colour
    return right


def _index(word: str, known: Sequence[str], what: str) -> int:
    if word not in known:
        raise ValueError(f"unknown {what} {word!r}; known: {', '.join(known)}")
    return known.index(word)
