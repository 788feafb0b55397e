"""Building blocks of figures: a figure that displays itself, a grid of images, boxes and arrows in inches."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

from ..files import together
from ..records import Record

STYLE = Path(__file__).with_name("escd.mplstyle")
COLUMN, PAGE = 3.33, 6.9  # inches: one column of the paper, and both with the gutter between them
SHAPE, APPEARANCE = "#0072B2", "#E69F00"
TINTS = {SHAPE: "#BFDDF0", APPEARANCE: "#FBE3B0"}
FROZEN, TOWER, PANEL, INK, MUTED = "#E4E4E4", "#C9E8DC", "#F5F5F5", "#222222", "#6B6B6B"

Point = tuple[float, float]


def house_style() -> Any:
    """The figure style as a context, or as the decorator of a function that makes a figure."""
    return matplotlib.style.context(STYLE)


class Drawing(Figure):
    """A figure that needs no pyplot: a notebook shows it, and `save` writes equal bytes for equal figures."""

    def __init__(self, width: float, height: float, **options: Any) -> None:
        with house_style():
            super().__init__(figsize=(width, height), **options)
        self.records: list[Record] = []

    def made_from(self, used: Sequence[Record]) -> Drawing:
        """Register the records whose numbers or images it shows; returns itself."""
        self.records = list(used)
        return self

    def save(self, stem: Path) -> list[Path]:
        """Write `stem`.pdf and `stem`.png without date and version."""
        names = [stem.name + ending for ending in (".pdf", ".png")]
        with house_style(), together(stem.parent) as scratch:
            dateless = {"CreationDate": None, "Creator": None, "Producer": None}
            self.savefig(scratch / names[0], metadata=dateless)
            self.savefig(scratch / names[1], metadata={"Software": None})
        return [stem.with_name(name) for name in names]

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with house_style():
            self.savefig(buffer, format="png", dpi=self.dpi)
        return buffer.getvalue()


def pixels(image: torch.Tensor | Image.Image | np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 of a PIL image, of such an array, or of a (3 | 1, H, W) tensor in [-1, 1]."""
    if isinstance(image, torch.Tensor):
        image = image.detach().float().cpu().clamp(-1, 1).permute(1, 2, 0)
        image = ((image + 1) * 127.5).round().byte().numpy()
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] not in (1, 3) or array.dtype != np.uint8:
        raise ValueError(f"an image here is (H, W, 3) uint8, not {array.shape} {array.dtype}")
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


@house_style()
def image_grid(
    rows: Sequence[Sequence[Any]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    width: float = PAGE,
    column_gaps: Sequence[int] = (),
    row_gaps: Sequence[int] = (),
    label_width: float = 0.0,
    label_height: float = 0.16,
) -> Drawing:
    """Images in rows and columns, `width` inches wide; None leaves a place empty.

    Row labels stand left in `label_width` inches, column labels above in `label_height`. A wider gap follows
    the columns in `column_gaps` and rows in `row_gaps`, to set references apart from generated images.
    """
    columns = max(len(row) for row in rows)
    gap, wide = 0.03, 0.12
    side = (width - label_width - gap * (columns - 1) - wide * len(column_gaps)) / columns

    def places(count: int, gaps: Sequence[int], start: float) -> list[float]:
        return [start + i * (side + gap) + wide * sum(after < i for after in gaps) for i in range(count)]

    lefts = places(columns, column_gaps, label_width)
    tops = places(len(rows), row_gaps, label_height if column_labels else 0.0)
    canvas = Canvas(width, tops[-1] + side)
    for i, row in enumerate(rows):
        y = canvas.height - tops[i] - side
        for j, image in enumerate(row):
            if image is not None:
                canvas.image(image, (lefts[j], y), side)
        if row_labels:
            canvas.text((label_width - 0.06, y + side / 2), row_labels[i], ha="right", size=6.5)
    for j, label in enumerate(column_labels):
        canvas.text((lefts[j] + side / 2, canvas.height - tops[0] + 0.04), label, va="bottom", size=6.5)
    return canvas.figure


@house_style()
def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    log: str = "",
    width: float = COLUMN,
) -> Drawing:
    """A line for each name in `series`, by colour, dash and marker; `log`: axes, "x", "y" or "xy"."""
    drawing = Drawing(width, 0.62 * width, layout="constrained")
    axes = drawing.add_subplot()
    dashes = ("-", "--", ":", "-.")
    for i, (name, (x, y)) in enumerate(series.items()):
        axes.plot(x, y, dashes[i % 4], label=name, marker="osd^"[i % 4] if len(x) <= 12 else None)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set(**{f"{axis}scale": "log" for axis in log})
    axes.grid(True, axis="y")
    if len(series) > 1:
        axes.legend()
    return drawing


class Canvas:
    """An empty drawing measured in inches from its lower left corner, for diagrams."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Drawing(width, height)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def text(self, at: Point, text: str, *, size: float = 7, colour: str = INK, **options: Any) -> None:
        """Text, centred on `at` by default."""
        options = {"ha": "center", "va": "center", "linespacing": 1.15} | options
        self.axes.text(*at, text, fontsize=size, color=colour, **options)

    def panel(self, corner: Point, width: float, height: float, title: str = "") -> None:
        """A pale background behind a stage, with its title at the upper edge."""
        style = "round,pad=0,rounding_size=0.06"
        self._patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=PANEL, ec="none", zorder=0))
        if title:
            at = (corner[0] + width / 2, corner[1] + height - 0.11)
            self.text(at, title, size=7, weight="bold")

    def box(
        self,
        centre: Point,
        width: float,
        height: float,
        text: str = "",
        *,
        fill: str = "white",
        **options: Any,
    ) -> None:
        """A rounded box around its text."""
        corner = (centre[0] - width / 2, centre[1] - height / 2)
        style = "round,pad=0,rounding_size=0.04"
        edge = options.pop("edge", INK)
        self._patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=fill, ec=edge, zorder=2))
        if text:
            self.text(centre, text, zorder=4, **options)

    def half(self, left: Point, width: float, heights: Point, text: str = "", *, fill: str = FROZEN) -> None:
        """Half a UNet: a trapezoid from its left edge's middle, `heights` at the left and the right."""
        (x, y), (a, b) = left, heights
        corners = [(x, y - a / 2), (x, y + a / 2), (x + width, y + b / 2), (x + width, y - b / 2)]
        # A tuned part is coloured and hatched, to stay distinguishable in grey.
        hatch = "" if fill == FROZEN else "////"
        self._patch(Polygon(corners, closed=True, fc=fill, ec=MUTED, hatch=hatch, lw=0, zorder=2))
        self._patch(Polygon(corners, closed=True, fc="none", ec=INK, lw=0.7, zorder=3))
        if text:
            ground = {"boxstyle": "round,pad=0.12", "fc": fill, "ec": "none"}
            self.text((x + width / 2, y), text, size=6, zorder=4, bbox=ground)

    def unet(self, left: Point, width: float, height: float, *, encoder: str, decoder: str) -> None:
        """A UNet as two trapezoids and a mid block; a half whose fill is not FROZEN is a tuned one."""
        x, y = left
        part = 0.42 * width
        self.half((x, y), part, (height, 0.42 * height), "encoder", fill=encoder)
        self.half((x + width - part, y), part, (0.42 * height, height), "decoder", fill=decoder)
        gap = width - 2 * part
        self.box((x + width / 2, y), 0.6 * gap, 0.42 * height, fill=FROZEN)
        # one skip connection stands for all
        arch = [(x + 0.18 * part, y + 0.5 * height), (x + width - 0.18 * part, y + 0.5 * height)]
        self.arrow(*arch, curve=-0.16, colour=MUTED)

    def strip(self, left: Point, length: float, *, height: float = 0.13, fill: str = "white") -> None:
        """A vector: a bar from its left edge's middle."""
        corner = (left[0], left[1] - height / 2)
        self._patch(Rectangle(corner, length, height, fc=fill, ec=INK, lw=0.6, zorder=3))

    def sum(self, at: Point, sign: str = "+", *, radius: float = 0.075) -> None:
        """A small circle with a sign, where arrows meet."""
        self._patch(Circle(at, radius, fc="white", ec=INK, lw=0.7, zorder=3))
        self.text(at, sign, size=7, zorder=4)

    def image(self, image: Any, corner: Point, side: float) -> None:
        """A square image with its lower left corner at `corner`."""
        (x, y), array = corner, pixels(image)
        self.axes.imshow(array, extent=(x, x + side, y, y + side), aspect="auto", zorder=2)
        self.axes.set(xlim=(0, self.width), ylim=(0, self.height))

    def arrow(
        self,
        *points: Point,
        colour: str = INK,
        curve: float = 0.0,
        dashed: bool = False,
        head: bool = True,
    ) -> None:
        """An arrow through `points`; bends are square, or `curve` bows a straight one."""
        line = {"color": colour, "lw": 0.8, "ls": (0, (2.5, 1.5)) if dashed else "-", "zorder": 1.5}
        if len(points) > 2:
            self.axes.plot(*zip(*points[:-1], strict=True), solid_capstyle="butt", **line)
        self._patch(
            FancyArrowPatch(
                points[-2],
                points[-1],
                arrowstyle="-|>,head_length=2.6,head_width=1.4" if head else "-",
                connectionstyle=f"arc3,rad={curve}",
                shrinkA=0,
                shrinkB=0,
                mutation_scale=1,
                **line,
            )
        )

    def _patch(self, patch: Any) -> None:
        self.axes.add_patch(patch)
