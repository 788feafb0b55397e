"""The comparison of the published methods from their records: rows, curves, and time to equal quality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import records
from .configs import StudyConfig
from .formats import MISSING, decimals, interval, markdown_table, share_of
from .measure import Interval, paired_bootstrap
from .method_choice import QUALITY
from .method_configs import OURS, MethodConfig, MethodPairConfig
from .runs import Runs, leakage, mean, obeyed, pair_shares, values

NAMES = {
    "escd": "ours",
    "source": "ours, the source's recipe",
    "textual-inversion": "Textual Inversion",
    "dreambooth": "DreamBooth",
    "custom-diffusion": "Custom Diffusion",
    "p-plus": "P+",
    "e4t": "E4T",
}
LABELS = {"iou": "IoU", "texture_likeness": "texture", "colour_likeness": "colour"}
FIRST = {"shape": ("silhouette",), "appearance": ("texture_first", "colour_first")}
# The scores of the other attribute, of which the floor's are subtracted.
LEAKED = {"shape": ("texture_likeness", "colour_likeness"), "appearance": ("iou",)}


@dataclass(frozen=True)
class Curve:
    """A method's qualities after each of its numbers of steps: means over references and seeds."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    quality: dict[str, tuple[float, ...]]  # by score (QUALITY)

    def reaches(self, score: str, quality: float) -> float | None:
        """Seconds until the first number of steps that has this quality; None where none has."""
        pairs = zip(self.seconds, self.quality[score], strict=True)
        return next((seconds for seconds, value in pairs if value >= quality), None)


@dataclass(frozen=True)
class MethodRow:
    """A method at its own number of steps. gain: difference from ours; leakage: less the floor's."""

    steps: int
    quality: dict[str, float]
    gain: dict[str, Interval]  # empty for ours
    first: dict[str, float]
    leakage: dict[str, Interval]
    obeyed: float
    seconds: float
    prior_seconds: float
    megabytes: float
    memory_gb: float


@dataclass(frozen=True)
class EqualQuality:
    """How long ours takes to the quality that the best other method ends with.

    `seconds` are that method's until it first has this quality, `ours` those of ours, None where ours never
    has it. Class images are not counted.
    """

    best: str
    quality: float
    seconds: float
    ours: float | None

    @property
    def ratio(self) -> float | None:
        """Our share of its time."""
        return None if self.ours is None else self.ours / self.seconds


@dataclass(frozen=True)
class Comparison:
    """All methods on one attribute, over the references and seeds that every one of them has."""

    attribute: str
    references: int
    seeds: int
    rows: dict[str, MethodRow]
    curves: dict[str, Curve]
    used: tuple[records.Record, ...]

    def equal_quality(self, score: str) -> EqualQuality | None:
        """When ours has the quality of the best other method; None where there is no other."""
        ends = {name: curve.quality[score][-1] for name, curve in self.curves.items() if name not in OURS}
        if not ends:
            return None
        best = max(ends, key=ends.__getitem__)
        own = self.curves[best].reaches(score, ends[best])
        return EqualQuality(best, ends[best], own, self.curves["escd"].reaches(score, ends[best]))


@dataclass(frozen=True)
class PairRow:
    """A method's composition: shares of pictures that are right, and how it combines two references."""

    way: str
    pairs: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Methods:
    """The whole comparison: by attribute, and both attributes in one image."""

    attributes: dict[str, Comparison]
    pairs: dict[str, PairRow]
    used: tuple[records.Record, ...]


Floors = dict[StudyConfig, records.Record]
MethodRuns = Sequence[tuple[MethodConfig, records.Record]]


def compared(results: Iterable[records.Record]) -> Methods:
    """The comparison from records; attributes that ours has no record of are left out.

    Of each method the tuning of its newest record counts, so that presets may change. Raises KeyError where
    the floor of a scored reference is not among the records.
    """
    results = list(results)
    floors: Floors = {}
    runs: dict[str, dict[str, list[tuple[MethodConfig, records.Record]]]] = {}
    for record in results:
        if record.kind == records.kind_of(StudyConfig) and record.config["kind"] == "floor":
            floors[records.config_of(record, StudyConfig)] = record
        elif record.kind == records.kind_of(MethodConfig):
            config = records.config_of(record, MethodConfig)
            runs.setdefault(config.attribute, {}).setdefault(config.method, []).append((config, record))
    found = {
        attribute: _comparison(attribute, {name: _newest(one) for name, one in of_all.items()}, floors)
        for attribute, of_all in runs.items()
        if "escd" in of_all
    }
    attributes = {name: found[name] for name in QUALITY if name in found and found[name].references}
    pairs, of_pairs = _pairs(results)
    used = [record for one in attributes.values() for record in one.used]
    return Methods(attributes, pairs, (*used, *of_pairs))


def _newest(runs: MethodRuns) -> MethodRuns:
    newest = replace(runs[-1][0].tuning, seed=0), runs[-1][0].budgets
    return [(c, r) for c, r in runs if (replace(c.tuning, seed=0), c.budgets) == newest]


def _comparison(attribute: str, by_method: dict[str, MethodRuns], floors: Floors) -> Comparison:
    each = [{(config.reference, config.seed) for config, _ in runs} for runs in by_method.values()]
    shared = sorted(set.intersection(*each))
    # Every method in the same order of references and seeds, so that pictures can be paired.
    paired = {
        name: sorted(
            (one for one in runs if (one[0].reference, one[0].seed) in shared),
            key=lambda one: (one[0].reference, one[0].seed),
        )
        for name, runs in by_method.items()
    }
    rows, curves = {}, {}
    for name in sorted(paired, key=_order) if shared else ():
        rows[name] = _row(attribute, paired[name], paired["escd"] if name != "escd" else None, floors)
        curves[name] = _curve(attribute, paired[name])
    used = [record for runs in paired.values() for _, record in runs]
    used += [floors[config.floor] for config, _ in paired["escd"]]
    return Comparison(
        attribute, len({reference for reference, _ in shared}), len({seed for _, seed in shared}),
        rows, curves, tuple(used),
    )  # fmt: skip


def _order(name: str) -> int:
    return list(NAMES).index(name) if name in NAMES else len(NAMES)


def _at(runs: MethodRuns, place: int) -> Runs:
    """The runs of the study that a method's runs are after the number of steps at this place."""
    return [(c.studied(c.budgets[place]), record.metrics["curve"][place]) for c, record in runs]


def _own(runs: MethodRuns) -> int:
    config = runs[0][0]
    return config.budgets.index(config.tuning.steps)


def _row(attribute: str, runs: MethodRuns, ours: MethodRuns | None, floors: Floors) -> MethodRow:
    place = _own(runs)
    scored, points = _at(runs, place), [record.metrics["curve"][place] for _, record in runs]
    groups = [config.reference for config, metrics in scored for _ in metrics["failed"]]
    base = {config: record.metrics for config, record in floors.items()}
    gain = {}
    for score in QUALITY[attribute] if ours is not None else ():
        pair = values(scored, score, 0.0), values(_at(ours, _own(ours)), score, 0.0)
        gain[score] = paired_bootstrap(*pair, groups=groups)
    return MethodRow(
        steps=runs[0][0].tuning.steps,
        quality={score: mean(scored, score, 0.0) for score in QUALITY[attribute]},
        gain=gain,
        first={score: mean(scored, score, False) for score in FIRST[attribute]},
        leakage={score: leakage(scored, base, score) for score in LEAKED[attribute]},
        obeyed=float(np.mean(list(obeyed(scored).values()))),
        seconds=float(np.mean([point["seconds"] for point in points])),
        prior_seconds=float(np.mean([record.metrics["prior_seconds"] for _, record in runs])),
        megabytes=float(np.mean([point["megabytes"] for point in points])),
        memory_gb=float(np.mean([record.metrics["memory_gb"] for _, record in runs])),
    )


def _curve(attribute: str, runs: MethodRuns) -> Curve:
    places = range(len(runs[0][0].budgets))
    seconds = [np.mean([r.metrics["curve"][k]["seconds"] for _, r in runs]) for k in places]
    return Curve(
        runs[0][0].budgets,
        tuple(map(float, seconds)),
        {score: tuple(mean(_at(runs, k), score, 0.0) for k in places) for score in QUALITY[attribute]},
    )


def _pairs(results: Sequence[records.Record]) -> tuple[dict[str, PairRow], list[records.Record]]:
    """The composition of each method over the pairs and seeds that every one of them has."""
    runs: dict[str, dict[tuple, tuple[MethodPairConfig, records.Record]]] = {}
    for record in results:
        if record.kind == records.kind_of(MethodPairConfig):
            config = records.config_of(record, MethodPairConfig)
            pair = config.shape, config.appearance, config.seed
            runs.setdefault(config.method, {})[pair] = config, record  # the newest tuning counts
    shared = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    rows, used = {}, []
    for name in sorted(runs, key=_order) if shared else ():
        of_one = [runs[name][pair] for pair in shared]
        shares = pair_shares([(config, record.metrics) for config, record in of_one])
        rows[name] = PairRow(of_one[0][0].way, len(shared), shares)
        used += [record for _, record in of_one]
    return rows, used


# ------------------------------------------------------------------------------------------------------------
# as text


def heads_of(one: Comparison) -> list[str]:
    """The heads of an attribute's table."""
    quality = [head for score in QUALITY[one.attribute] for head in (LABELS[score], "to ours (95 %)")]
    other = {"iou": "shape"} | LABELS
    leaks = [f"leakage of {other[score]} (95 %)".replace("IoU", "shape") for score in LEAKED[one.attribute]]
    first = ["found first"] if len(FIRST[one.attribute]) == 1 else ["texture first", "colour first"]
    size = f"{one.references} references, {one.seeds} seed{'s' if one.seeds > 1 else ''}"
    return [f"{one.attribute}: {size}", "steps", *quality, *first, *leaks,
            "obeyed", "s", "class images, s", "MB", "memory, GB"]  # fmt: skip


def cells_of(name: str, row: MethodRow) -> list[str]:
    """A method's cells under `heads_of`."""
    quality = [
        cell
        for score, value in row.quality.items()
        for cell in (decimals(value), interval(row.gain.get(score)))
    ]
    return [
        NAMES.get(name, name), str(row.steps), *quality, *map(share_of, row.first.values()),
        *(interval(leaked, 3) for leaked in row.leakage.values()), share_of(row.obeyed),
        decimals(row.seconds, 0), decimals(row.prior_seconds, 0) if row.prior_seconds else MISSING,
        decimals(row.megabytes, 2), decimals(row.memory_gb),
    ]  # fmt: skip


PAIR_HEADS = ["both", "silhouette", "texture", "colour", "all three", "pairs", "how"]


def pair_cells(name: str, row: PairRow) -> list[str]:
    """A method's cells under `PAIR_HEADS`."""
    return [NAMES.get(name, name), *map(share_of, row.shares.values()), str(row.pairs), row.way]


def equal_in_words(one: Comparison) -> list[str]:
    """For each quality how long ours takes to what the best other method ends with."""
    sentences = []
    for score in QUALITY[one.attribute]:
        equal = one.equal_quality(score)
        if equal is None:
            continue
        ours = "ours does not reach it"
        if equal.ours is not None:
            ours = f"ours reaches it in {equal.ours:.0f} s, {equal.ratio:.2f} of that time"
        what = one.attribute if score == "iou" else f"{one.attribute}, {LABELS[score]} alone"
        sentences.append(
            f"{what[0].upper()}{what[1:]}: the best other method, {NAMES.get(equal.best, equal.best)}, "
            f"reaches {equal.quality:.2f} in {equal.seconds:.0f} s; {ours}."
        )
    return sentences


def markdown(methods: Methods) -> str:
    """The comparison in Markdown; empty where there is none."""
    parts = []
    for one in methods.attributes.values():
        parts.append(markdown_table(heads_of(one), [cells_of(name, row) for name, row in one.rows.items()]))
        parts += equal_in_words(one)
    if methods.pairs:
        parts.append(markdown_table(PAIR_HEADS, [pair_cells(*one) for one in methods.pairs.items()]))
    return "\n\n".join(parts)
