"""Figures of images and of numbers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from ..data.captions import with_article
from ..data.names import SHAPES
from ..evaluation.autoencoder import IMAGE_SETS
from ..evaluation.curve import points
from ..evaluation.references import load_references
from ..method.attributes import ATTRIBUTES
from ..pretrain import trials
from ..records import Record
from .canvas import APPEARANCE, COLUMN, FROZEN, INK, MUTED, PAGE, SHAPE, Drawing, image_grid
from .results import appearances, at_full_size, ranks, results, shapes, training
from .sheets import ProcessConfig, SheetConfig, sheet, stored_images
from .stems import figure
from .tables import ARMS

SET_COLOURS = (INK, MUTED, APPEARANCE)  # of IMAGE_SETS
SAMPLE_LOOKS = (  # appearance, background: one row of samples each
    ("solid red", "gray"),
    ("striped blue and white", "pink"),
    ("dotted yellow and purple", "cyan"),
    ("checkered black and orange", "beige"),
)
ASKED_LOOKS = (
    ("solid red", "pink"),
    ("striped blue and white", "beige"),
    ("dotted green and yellow", "gray"),
)
ASKED_SHAPES = (("star", "cyan"), ("heart", "beige"), ("circle", "pink"))
FORWARD_SAMPLE = 0  # of World(seed=0)
# Bricks, wood, rock, and two weaves (the second hardly shows in its reference), which a colour alone does not show;
# picked by their names, not by results.
SHOWN = (
    "noto-tiger/bricks-074",
    "bottle5/woodfloor-011",
    "noto-sari/rock-006",
    "noto-lab-coat/chainmail-004",
    "stoplights/tatami-004",
)


@figure("01_preliminaries")
def backbone_samples() -> Drawing:
    """Named shapes by named appearances, as the untouched backbone draws them: one seed, nothing chosen."""
    used, rows = [], []
    for look, ground in SAMPLE_LOOKS:
        prompts = tuple(_prompt(with_article(shape), look, ground) for shape in SHAPES)
        record, images = stored_images(sheet(prompts))
        used.append(record)
        rows.append(images)
    # pattern, colours and background under each other
    labels = [
        "\n".join([*look.replace(" and ", ", ").split(" ", 1), ground]) for look, ground in SAMPLE_LOOKS
    ]
    drawing = image_grid(rows, row_labels=labels, column_labels=SHAPES, label_width=0.82)
    return drawing.made_from(used)


@figure("01_preliminaries")
def forward_backward() -> Drawing:
    """Above, an image is noised; below, from right to left, one is generated from the same noise."""
    config = ProcessConfig(
        prompt="a star shape with striped red and white appearance on a cyan background",
        sample=FORWARD_SAMPLE,
        shown=(25, 23, 20, 16, 12, 8, 4, 0),
    )
    record, images = stored_images(config)
    drawing = image_grid(
        [images[: len(config.shown)], images[len(config.shown) :]],
        row_labels=["forward\n$q(x_t\\,|\\,x_0)$", "backward\n$p_\\theta(x_{t-1}|\\,x_t)$"],
        column_labels=[f"$t = {t}$" for t in record.metrics["times"]],
        label_width=0.8,
    )
    return drawing.made_from([record])


@figure("03_method")
def transfer_examples() -> Drawing:
    """The shape or the appearance of one image in other prompts, for real silhouettes and materials."""
    shown = [load_references()[name] for name in SHOWN]
    used, rows = [], []
    for reference in shown:
        shape_record, shapes = stored_images(
            sheet([_prompt("a *m", *asked) for asked in ASKED_LOOKS], shape=reference.id)
        )
        look_record, looks = stored_images(
            sheet(
                [_prompt(with_article(name), "*a", ground) for name, ground in ASKED_SHAPES],
                appearance=reference.id,
            )
        )
        used += [shape_record, look_record]
        rows.append([reference.image, *shapes, *looks])
    asked = [f"{what}\n{ground}".replace(" and ", ", ") for what, ground in ASKED_LOOKS + ASKED_SHAPES]
    drawing = image_grid(
        rows, column_labels=["reference", *asked], column_gaps=(0, len(ASKED_LOOKS)), label_height=0.34
    )
    return drawing.made_from(used)


@figure("03_method")
def composition_grid() -> Drawing:
    """The shape of each row's reference with the appearance of each column's, in one pass a step."""
    shown = [load_references()[name] for name in SHOWN]
    used, rows = [], [[None, *(reference.image for reference in shown)]]
    for row in shown:
        images = []
        for column in shown:
            record, composed = stored_images(_composed(row.id, column.id))
            used.append(record)
            images += composed
        rows.append([row.image, *images])
    drawing = image_grid(rows, width=COLUMN, column_gaps=(0,), row_gaps=(0,))
    return drawing.made_from(used)


def _composed(shape: str, appearance: str) -> SheetConfig:
    return sheet([_prompt("a *m", "*a", "gray")], shape, appearance)


def _prompt(shape: str, look: str, ground: str) -> str:
    return f"{shape} shape with {look} appearance on a {ground} background"


@figure("04_training")
def pretraining_curve() -> Drawing:
    """Training loss of every stage of pretraining against its number of images."""
    stages = training()
    drawing = Drawing(PAGE, 1.75, layout="constrained")
    for axes, (name, record) in zip(drawing.subplots(1, len(stages)), stages.items(), strict=True):
        thousands = [point["images"] / 1000 for point in record["curve"]]
        axes.plot(thousands, [point["loss"] for point in record["curve"]])
        unit = "captions" if name == "words" else "images"  # that stage uses no images
        axes.set(title=name, xlabel=f"thousand {unit}", yscale="log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.grid(True, axis="y")
    drawing.axes[0].set_ylabel("training loss")
    return drawing


@figure("04_training")
def training_scores() -> Drawing:
    """Scores and training time of the checkpoints of the UNet and of the autoencoder."""
    unet, autoencoder = points(), points(stage="autoencoder")
    tuned = [record for record in unet if "shape" in record.metrics]
    drawing = Drawing(PAGE, 2.0, layout="constrained")
    prompts, shape, look, psnr = drawing.subplots(1, 4)
    colours = {"background": FROZEN, "colours": MUTED, "pattern": APPEARANCE, "shape": SHAPE}
    for name, colour in colours.items():
        shares = [100 * r.metrics["obeyed"][name] for r in unet]
        prompts.plot(_millions(unet), shares, "o-", color=colour, label=name)
    prompts.set(title="prompts obeyed, %")
    panels = ((shape, "shape", "silhouette", SHAPE), (look, "appearance", "material", APPEARANCE))
    for axes, name, wanted, colour in panels:
        retrieved, leaked = ([100 * r.metrics[name][k] for r in tuned] for k in ("retrieved", "leaked"))
        axes.plot(_millions(tuned), retrieved, "o-", color=colour, label=wanted)
        axes.plot(_millions(tuned), leaked, "o--", color=MUTED, label="other attribute")
        axes.set(title=f"{name}: retrieved, %")
    for name, colour in zip(IMAGE_SETS, SET_COLOURS, strict=True):
        values = [r.metrics[name]["psnr"] for r in autoencoder]
        psnr.plot(_millions(autoencoder), values, "o-", color=colour, label=name)
    psnr.set(title="autoencoder, dB", ylim=(None, max(psnr.get_ylim()[1], 36)))  # room for the legend
    for axes in (prompts, shape, look):
        axes.set(ylim=(0, 103))
    for axes, shown in ((prompts, unet), (shape, tuned), (look, tuned), (psnr, autoencoder)):
        axes.grid(True, axis="y")
        axes.legend(loc="upper left" if axes is psnr else "best")
        axes.set(xlabel="million images")
        _hours_above(axes, shown)
    return drawing.made_from([*unet, *autoencoder])


@figure("04_training")
def autoencoder_rate() -> Drawing:
    """Reconstruction by number of latent channels: trained autoencoders, and a linear code."""
    by_channels = trials.by_latents()
    drawing = Drawing(COLUMN, 2.0, layout="constrained")
    channels = list(by_channels)
    for axes, score, title, scale in zip(
        drawing.subplots(1, 2), ("psnr", "detail"), ("PSNR, dB", "fine energy kept, %"), (1, 100), strict=True
    ):
        for name, colour in zip(IMAGE_SETS, SET_COLOURS, strict=True):
            for code, line in (("", "o-"), ("pca_", "o--")):
                values = [scale * by_channels[n].metrics[name][code + score] for n in channels]
                axes.plot(channels, values, line, color=colour, mfc="white" if code else colour, label=name)
        axes.set(title=title, xlabel="latents at a place", xscale="log")
        axes.set_xticks(channels, [str(n) for n in channels])
        axes.minorticks_off()
        axes.grid(True, axis="y")
    handles = drawing.axes[0].get_lines()
    linear = Line2D([], [], color=INK, ls="--", marker="o", mfc="white", label="linear code")
    drawing.legend(handles=[*handles[::2], linear], loc="outside lower center", ncols=4)
    return drawing.made_from(list(by_channels.values()))


def _millions(checkpoints: Sequence[Record]) -> list[float]:
    return [record.config["images"] / 1e6 for record in checkpoints]


def _hours_above(axes: Axes, checkpoints: Sequence[Record]) -> None:
    """Hours of training above the checkpoints, where no other label is near."""
    millions = _millions(checkpoints)
    labels: dict[float, str] = {}
    for at, record in zip(millions, checkpoints, strict=True):
        seconds = record.metrics["trained_seconds"]
        if seconds is not None and all(at - other > (millions[-1] - millions[0]) / 4 for other in labels):
            labels[at] = f"{seconds / 3600:.1f} h"
    axes.secondary_xaxis("top").set_xticks(list(labels), list(labels.values()))


@figure("02_probing_study")
def leakage_table() -> Drawing:
    """Transfer and leakage of each tuned part, for both attributes; filled: the method's choice."""
    table = results()
    drawing = Drawing(COLUMN, 2.75, layout="constrained")
    found = {
        "shape": {arm: (row.first, row.texture_leakage) for arm, row in shapes(table).items()},
        "appearance": {arm: (row.texture.first, row.leakage) for arm, row in appearances(table).items()},
    }
    arms = ["floor", "word", "encoder", "decoder", "all", "ceiling"][::-1]
    colours = {"encoder": SHAPE, "decoder": APPEARANCE}
    for axes, attribute in zip(drawing.subplots(2, 2, sharey=True), ATTRIBUTES.values(), strict=True):
        transfer, leakage = axes
        for y, arm in enumerate(arms):
            transferred, leaked = found[attribute.name][arm]
            colour = colours.get(arm, INK)
            look = {"color": colour, "mfc": colour if arm == attribute.part else "white", "zorder": 2}
            share = 100 * transferred
            transfer.plot([0, share], [y, y], color=FROZEN, lw=0.8, zorder=1)
            transfer.plot(share, y, "o", **look)
            transfer.annotate(
                f"{share:.0f}", (share, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=6
            )
            if leaked is not None:
                leakage.plot([leaked.low, leaked.high], [y, y], color=colour, lw=1, zorder=1)
                leakage.plot(leaked.mean, y, "o", **look)
        leakage.axvline(0, color=MUTED, lw=0.6, zorder=0)
        by = "silhouette" if attribute.name == "shape" else "texture"
        transfer.set(xlim=(0, 118), xticks=(0, 50, 100), xlabel=f"retrieved by {by}, %")
        transfer.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms])
        other = "texture" if attribute.name == "shape" else "shape"
        transfer.set_ylabel(attribute.name)
        leakage.set_xlabel(f"leakage of {other}")
        leakage.xaxis.set_major_locator(MaxNLocator(2, min_n_ticks=2))
        for each in axes:
            each.tick_params(axis="y", length=0)
    return drawing.made_from([record for record in table.used if record.kind == "study"])


@figure("03_method")
def transfer_by_rank() -> Drawing:
    """Transfer of each attribute, and file size, by the rank of the change of every weight."""
    by_attribute, used = ranks()
    if not by_attribute:
        raise KeyError("figures/records has no reference at every rank: `make study` makes it")
    large = at_full_size("size")
    drawing = Drawing(COLUMN, 2.9 if large is None else 4.2, layout="constrained")
    scores = {"shape": ("iou", "shape, IoU"), "appearance": ("retrieval", "appearance, by texture")}
    panels = drawing.subplots(2 if large is None else 3, 1, sharex=True)
    for axes, attribute in zip(panels[:2], ATTRIBUTES.values(), strict=True):
        score, label = scores[attribute.name]
        rows, colour = by_attribute[attribute.name], SHAPE if attribute.part == "encoder" else APPEARANCE
        low = [row for row in rows if row.rank is not None]
        full = next(row for row in rows if row.rank is None and not row.exportable)
        travels = next(row for row in rows if row.exportable)
        axes.axhline(full.transfer[score], color=INK, lw=0.8, label=f"in full, {full.megabytes:.0f} MB")
        axes.axhline(
            travels.transfer[score], color=colour, lw=1.6, ls=":", label="in full, no biases and norms"
        )
        axes.plot([row.rank for row in low], [row.transfer[score] for row in low], "o-", color=colour)
        for row in low:
            axes.annotate(
                f"{row.megabytes:.1f}",
                (row.rank, row.transfer[score]),
                xytext=(0, -9),
                textcoords="offset points",
                ha="center",
                fontsize=6,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([row.rank for row in low], [str(row.rank) for row in low])
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.1 * max(row.transfer[score] for row in rows))
        axes.grid(True, axis="y")
        axes.legend(loc="lower right")
    if large is not None:
        axes = panels[2]
        for attribute in ATTRIBUTES.values():
            sizes = large.metrics["mb_at_rank"][attribute.part]
            kept = [(int(rank), mb) for rank, mb in sizes.items() if int(rank) <= low[-1].rank]
            full = large.metrics["file_mb"][attribute.name]
            colour = SHAPE if attribute.part == "encoder" else APPEARANCE
            label = f"{attribute.name} ({full:.0f} in full)"
            axes.plot(*zip(*kept, strict=True), "o-", color=colour, label=label)
        axes.set_yscale("log")
        axes.set_ylabel("SD 1.5's size, MB")
        axes.grid(True, axis="y")
        axes.legend(loc="lower right")
    panels[-1].set_xlabel("rank of each weight's change (below points: MB)")
    return drawing.made_from(used if large is None else [*used, large])
