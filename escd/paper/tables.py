"""The tables of results in Markdown."""

from __future__ import annotations

from ..evaluation.formats import decimals, interval, share_of
from ..evaluation.tables import Row
from .results import Results, alike, results

ARMS = {
    "floor": "untouched backbone",
    "word": "pseudo-word only",
    "encoder": "encoder tuned",
    "decoder": "decoder tuned",
    "all": "whole UNet tuned",
    "ceiling": "autoencoder",
}
# What else `alike` calls by name.
PLACES = {
    "encoder": "encoder",
    "decoder/attentions": "decoder's transformer blocks",
    "up.1": "decoder's middle block",
    "decoder": "decoder",
}
LEAKAGE_PLACES = 3  # there is so little of it that two decimals would hide on which side of none it lies


def results_table(which: str = "evaluation") -> str:
    """The study as two Markdown tables: transfer, obedience and leakage of each part, and composition."""
    found = results(which)
    lines = []
    for mode, wanted in (("shape", "IoU"), ("appearance", "distance")):
        other = "texture" if mode == "shape" else "shape"
        asked = list(found.rows[mode]["floor"].obeyed)
        heads = [mode, wanted, "retrieved", *(["by texture alone"] if mode == "appearance" else []), *asked]
        lines += [
            f"| {' | '.join(heads)} | leakage of {other} (95 %) |",
            "|---|" + "--:|" * len(heads),
        ]
        for arm, row in arms_of(found, mode):
            cells = [decimals(row.transfer.get(wanted.lower())), share_of(row.transfer["retrieval"])]
            cells += [share_of(row.transfer["texture"])] if mode == "appearance" else []
            cells += [share_of(row.obeyed[name]) for name in asked]
            cells.append(interval(row.leakage, LEAKAGE_PLACES))
            lines.append(f"| {ARMS[arm]} | " + " | ".join(cells) + " |")
        lines.append("")
    if "composition" in found.rows:
        lines += ["| both in one pass | silhouette | material | both |", "|---|--:|--:|--:|"]
        names = {
            "floor": "untouched backbone",
            "ours": "shape in the encoder, appearance in the decoder",
            "reversed": "the other way round",
            "ceiling": "autoencoder",
        }
        for arm, name in names.items():
            got = found.rows["composition"][arm].transfer
            lines.append(
                f"| {name} | "
                + " | ".join(share_of(got[k]) for k in ("silhouette", "material", "both"))
                + " |"
            )
    return "\n".join(lines).rstrip("\n")


def alike_table(which: str = "evaluation") -> str:
    """`alike` of both attributes as a Markdown table; empty where there is none."""
    shape, look = (alike(name, which) for name in ("shape", "appearance"))
    lines = [
        "| tuned | MB | shape: IoU | difference | retrieved "
        "| appearance: distance | retrieved | difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for part in shape:
        a, b = shape[part], look[part]
        cells = [
            f"{a.megabytes:.1f}",
            decimals(a.row.transfer["iou"]),
            interval(a.beyond["IoU"]) if a.beyond else "",
            share_of(a.row.transfer["retrieval"]),
            decimals(b.row.transfer.get("distance")),
            share_of(b.row.transfer["retrieval"]),
            interval(b.beyond["transfer"]) if b.beyond else "",
        ]
        lines.append(f"| {PLACES[part]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) if shape else ""


def arms_of(found: Results, mode: str) -> list[tuple[str, Row]]:
    return [(arm, found.rows[mode][arm]) for arm in ARMS if arm in found.rows[mode]]
