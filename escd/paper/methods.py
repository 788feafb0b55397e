"""The published methods beside ours, as numbers, a table and a figure; all left out where no record is."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

from matplotlib.lines import Line2D

from .. import records
from ..evaluation import method_tables
from ..evaluation.configs import StudyConfig
from ..evaluation.formats import MISSING, decimals, markdown_table, percent, signed
from ..evaluation.method_configs import MethodConfig, MethodPairConfig, runnable
from ..evaluation.method_tables import LABELS, NAMES, Methods, compared
from ..evaluation.prompts import prompts_for
from ..evaluation.references import load_references
from ..method.attributes import ATTRIBUTES
from ..method.baselines import METHODS
from ..method.guidance import default_guidance
from . import results
from .canvas import INK, PAGE, Drawing, image_grid
from .sheets import SheetConfig, drawable, stored_images
from .stems import figure

LIST = "real"
EXAMPLES = 2  # images of each attribute in `methods_examples`
COMMAND = "python -m escd.study --methods"
KINDS = (StudyConfig, MethodConfig, MethodPairConfig)
# A dash, a marker and a colour of each method, to be told apart in grey too.
LOOKS = {
    "escd": ("-", "o", INK),
    "source": ("--", "o", INK),
    "textual-inversion": ("-", "s", "#56B4E9"),
    "dreambooth": ("-", "^", "#D55E00"),
    "custom-diffusion": ("-", "D", "#009E73"),
    "p-plus": ("-", "v", "#0072B2"),
    "e4t": ("-", "P", "#CC79A7"),
}


def methods() -> Methods:
    """The comparison on the real list from the stored records of the present weights and references."""
    files = [records.FOLDER / f"{records.kind_of(kind)}.jsonl" for kind in KINDS]
    return _methods("".join(records.sha256(file) for file in files if file.exists()))


@cache
def _methods(_state: str) -> Methods:
    found = []
    for kind in KINDS:
        stored = [record for record in records.all(kind) if record.config["list"] == LIST]
        for record in stored:
            if record.inputs == results.study().inputs(records.config_of(record, kind)):
                found.append(record)
    return compared(found)


def missing() -> str | None:
    """What makes the records of the comparison, where there are none."""
    return None if methods().attributes else f"no method is compared yet: `{COMMAND}` makes the records"


def method_numbers() -> dict[str, str]:
    """The comparison's numbers by key, "methods.METHOD.ATTRIBUTE.NAME"; empty where there are none."""
    found, texts = methods(), {}
    for attribute, one in found.attributes.items():
        texts[f"methods.{attribute}.references"] = str(one.references)
        texts[f"methods.{attribute}.seeds"] = str(one.seeds)
        for name, row in one.rows.items():
            key = f"methods.{name}.{attribute}"
            texts |= {f"{key}.{LABELS[score].lower()}": decimals(v) for score, v in row.quality.items()}
            for what, intervals in (("gain", row.gain), ("leakage", row.leakage)):
                for score, of_one in intervals.items():
                    ends = {"": of_one.mean, "_low": of_one.low, "_high": of_one.high}
                    places = 3 if what == "leakage" else 2
                    label = f"{key}.{LABELS[score].lower()}.{what}"
                    texts |= {f"{label}{end}": signed(value, places) for end, value in ends.items()}
            texts |= {
                f"{key}.steps": str(row.steps),
                f"{key}.obeyed": percent(row.obeyed),
                f"{key}.seconds": decimals(row.seconds, 0),
                f"{key}.prior_seconds": decimals(row.prior_seconds, 0),
                f"{key}.mb": decimals(row.megabytes),
                f"{key}.gb": decimals(row.memory_gb),
            }
        for score in method_tables.QUALITY[attribute]:
            equal = one.equal_quality(score)
            if equal is not None:
                key = f"methods.equal.{attribute}.{LABELS[score].lower()}"
                texts |= {
                    f"{key}.best": NAMES.get(equal.best, equal.best),
                    f"{key}.quality": decimals(equal.quality),
                    f"{key}.best_seconds": decimals(equal.seconds, 0),
                    f"{key}.seconds": "not reached" if equal.ours is None else decimals(equal.ours, 0),
                    f"{key}.ratio": "not reached" if equal.ratio is None else decimals(equal.ratio),
                }
    for name, row in found.pairs.items():
        texts |= {f"methods.{name}.both.{what}": percent(share) for what, share in row.shares.items()}
    return texts


def methods_in_words() -> list[str]:
    """The README's lines on the methods; none where nothing is compared."""
    text = method_tables.markdown(methods())
    if not text:
        return []
    title = (
        "The published methods on `mini`, each at its own number of steps (differences from ours over the "
        "same references and prompts, all with the guidance of ours, which none of the papers has; 95 % "
        "intervals over references; quality is the IoU, or the likeness of "
        "texture and colour; class images are generated once and counted apart; "
        "[figure](figures/methods_curve.png)):"
    )
    return ["", title, "", text]


def methods_in_latex() -> str:
    """The paper's table and figure of the methods, `paper/methods.tex`; a comment where there is none."""
    lines = ["% Written by `python -m escd.draw` from figures/records: do not edit."]
    if (why := missing()) is not None:
        return "\n".join([*lines, f"% {why}", ""])
    for attribute, one in methods().attributes.items():
        heads, *rows = [
            method_tables.heads_of(one), *(method_tables.cells_of(*each) for each in one.rows.items())
        ]  # fmt: skip
        lines += [
            r"\begin{table*}[t]",
            r"  \centering\scriptsize",
            rf"  \begin{{tabular}}{{@{{}}l{'r' * (len(heads) - 1)}@{{}}}}",
            r"    \toprule",
            *(f"    {_row(cells)}" + (r" \midrule" if cells is heads else "") for cells in (heads, *rows)),
            r"    \bottomrule",
            r"  \end{tabular}",
            rf"  \caption{{The published methods and ours, {attribute}. {' '.join(_escaped(one))}}}",
            rf"  \label{{tab:methods-{attribute}}}",
            r"\end{table*}",
        ]
    lines += [
        r"\begin{figure*}[t]",
        r"  \includegraphics{methods_curve}",
        r"  \caption{Quality after each number of steps against the seconds of tuning until then, without "
        r"those of the class images.}",
        r"  \label{fig:methods}",
        r"\end{figure*}",
        "",
    ]
    return "\n".join(lines)


def _escaped(one: method_tables.Comparison) -> list[str]:
    return [_latex(sentence) for sentence in method_tables.equal_in_words(one)]


def _row(cells: list[str]) -> str:
    return " & ".join(map(_latex, cells)) + r" \\"


def _latex(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_")


def methods_examples(reference: str | None = None) -> Drawing:
    """What each method makes of only the shape, and of only the appearance, of one real reference.

    One row a method, each at its own number of steps, under two prompts of the protocol for either
    attribute. reference: an id of the real list; None is its first. Images come from records, or from
    customizations that `python -m escd.study --methods` kept; a method that has neither is left out, and
    named. Raises KeyError where none has.
    """
    listed = load_references(which=LIST)
    shown = listed[0 if reference is None else reference]
    backbone = results.study().backbone("mini")
    used, rows, labels, absent = [], [], [], []
    able, _ = runnable(backbone)
    for name in able:
        sheets = []
        for attribute in ATTRIBUTES:
            prompts = tuple(one.text for one in prompts_for(shown, attribute)[:EXAMPLES])
            tuning = {f"{attribute}_tuning": METHODS[name].config(attribute, backbone)}
            guidance = asdict(default_guidance([attribute], backbone))
            sheets.append(SheetConfig(prompts, **{attribute: shown.id}, **tuning, **guidance, list=LIST))
        if not all(map(drawable, sheets)):
            absent.append(name)
            continue
        made = [stored_images(sheet) for sheet in sheets]
        used += [record for record, _ in made]
        rows.append([shown.image, *(image for _, images in made for image in images)])
        labels.append(NAMES.get(name, name))
    if absent:
        print(f"left out: {', '.join(absent)}; `{COMMAND}` makes what they are drawn from")
    if not rows:
        raise KeyError(f"no method has images of {shown.id}: `{COMMAND}` makes what they are drawn from")
    heads = ["reference"]
    for attribute in ATTRIBUTES:
        heads += [f"only the {attribute}", *[""] * (EXAMPLES - 1)]
    drawing = image_grid(
        rows, row_labels=labels, column_labels=heads, column_gaps=(0, EXAMPLES), label_width=1.2
    )
    return drawing.made_from(used)


def methods_at_size() -> dict[str, dict[str, dict[str, float]]]:
    """By method and attribute what `benchmarks/sd15_size.py --methods` measured last; empty without it."""
    stored = [r for r in records.all("size") if r.config["size"] == "sd15" and "methods" in r.metrics]
    return stored[-1].metrics["methods"] if stored else {}


def methods_at_size_in_words() -> list[str]:
    """The README's lines on the methods at Stable Diffusion's size; none where they are not measured."""
    rows = []
    for name, by_attribute in methods_at_size().items():
        for attribute, took in by_attribute.items():
            images = (
                f"{took['prior_images']:.0f}, {took['prior_seconds']:.0f} s" if took["prior_images"] else ""
            )
            rows.append([
                NAMES.get(name, name), attribute, f"{took['steps']:.0f}", f"{took['batch']:.0f}",
                decimals(took["step_seconds"], 1), decimals(took["tuning_seconds"], 0), images or MISSING,
                decimals((took["operations"] + took["prior_operations"]) / 1e15),
                decimals(took["sampling_passes"]), decimals(took["memory_gb"], 1),
                decimals(took["file_mb"], 1),
            ])  # fmt: skip
    if not rows:
        return []
    heads = ["method", "attribute", "steps", "batch", "s a step", "s in all", "class images",
             "10^15 operations", "passes a sampling step", "memory, GB", "MB"]  # fmt: skip
    title = (
        "Cost of each method at that size with its published batch, steps and class images (time of a step "
        "measured over a few of them, of class images on one; memory and operations counted):"
    )
    return ["", title, "", markdown_table(heads, rows)]


@figure("02_probing_study", missing)
def methods_curve() -> Drawing:
    """Quality of each method against its seconds of tuning, without class images; a marker is a budget."""
    found = methods()
    panels = [
        (one, score) for one in found.attributes.values() for score in method_tables.QUALITY[one.attribute]
    ]
    drawing = Drawing(PAGE, 2.4, layout="constrained")
    for axes, (one, score) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, curve in one.curves.items():
            dash, marker, colour = LOOKS.get(name, (":", "x", INK))
            axes.plot(
                curve.seconds, curve.quality[score], dash, marker=marker, ms=3, color=colour,
                label=NAMES.get(name, name),
            )  # fmt: skip
        label = "IoU" if score == "iou" else f"likeness of {LABELS[score]}"
        axes.set(title=f"{one.attribute}: {label}", xlabel="seconds of tuning", xscale="log")
        axes.grid(True, axis="y")
    names = dict.fromkeys(name for one in found.attributes.values() for name in one.curves)
    handles = []
    for name in names:
        dash, marker, colour = LOOKS.get(name, (":", "x", INK))
        handles.append(
            Line2D([], [], ls=dash, marker=marker, ms=3, color=colour, label=NAMES.get(name, name))
        )
    one = next(iter(found.attributes.values()))
    drawing.legend(
        handles=handles, loc="outside lower center", ncols=len(handles),
        title=f"{one.references} references, {one.seeds} seed{'s' if one.seeds > 1 else ''}",
    )  # fmt: skip
    return drawing.made_from(found.used)
