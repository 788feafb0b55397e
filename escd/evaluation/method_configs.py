"""The runs that compare the published methods, and the grid that their rates and steps come from.

All numbers of the comparison stand here, before it is run: its size, the steps after which each method is
scored, and the grid of learning rates and steps, which has as many points for each method, ours included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from ..backbone.model import Backbone
from ..method.attributes import ATTRIBUTES
from ..method.baselines import METHODS
from ..method.config import TuningConfig
from ..method.guidance import default_guidance
from .configs import ListConfig, StudyConfig
from .references import References

# The default size. 20 references and 3 seeds take days on two cores: --references and --seeds enlarge it.
REFERENCES, SEEDS = 4, 1
# Steps after which a method is scored. E4T's domain tuning ends after some 15. Where the rate decays, each
# number of steps is a run of its own, and 640 steps would cost as much as all others together.
BUDGETS = (0, 10, 20, 40, 80, 160, 320, 640)
BUDGETS_OF = {"escd": BUDGETS[:-1], "source": BUDGETS[:-1], "e4t": (0, 5, 10, 15)}
# The grid: factors of all learning rates of the preset, times steps; on the first references of the
# development list. Nine points a method and attribute.
GRID_FACTORS = (0.25, 1.0, 4.0)
GRID_STEPS = (40, 160, 640)
GRID_STEPS_OF = {"escd": (40, 80, 160), "source": (40, 80, 160), "e4t": (5, 15, 45)}
GRID_REFERENCES = 2
GRID_LIST = "real-development"
OURS = ("escd", "source")


@dataclass(frozen=True)
class MethodConfig(ListConfig):
    """One method on one reference, scored after each of `budgets` steps.

    At a constant learning rate all budgets are snapshots of one run. A rate that decays over the run makes
    an early snapshot worse than a run of that length, so such a method has a run for each budget.
    """

    method: str  # of METHODS
    attribute: str
    reference: str
    tuning: TuningConfig  # the method's; its own steps are one of the budgets, but for the grid
    budgets: tuple[int, ...] = BUDGETS
    # Factor of the preset's learning rates, in the grid.
    factor: float = 1.0
    list: str = field(default="real", kw_only=True)

    def __post_init__(self) -> None:
        if not self.budgets or list(self.budgets) != sorted({*self.budgets}) or self.budgets[0] < 0:
            raise ValueError(f"budgets are different numbers of steps in ascending order, not {self.budgets}")

    def studied(self, steps: int) -> StudyConfig:
        """The run of the study that scores what this one scores after so many steps."""
        return StudyConfig(
            self.attribute, self.reference, "customized", replace(self.tuning, steps=steps),
            **shared(self),
        )  # fmt: skip

    @property
    def floor(self) -> StudyConfig:
        """The untouched backbone on the same prompts, from which leakage is measured."""
        return StudyConfig(self.attribute, self.reference, "floor", **shared(self))


@dataclass(frozen=True)
class MethodPairConfig(ListConfig):
    """The shape of one reference with the appearance of another, as a method combines two of its results."""

    method: str
    shape: str
    appearance: str
    shape_tuning: TuningConfig
    appearance_tuning: TuningConfig
    list: str = field(default="real", kw_only=True)

    @property
    def way(self) -> str:
        """How the method combines the two (WAYS)."""
        return WAYS.get(self.method, ADDED)


ADDED = "two runs, both words in one prompt, the changes of the weights added"
MIXED = "P+'s style mixing: the shape's embeddings on the coarse layers, the appearance's on the others"
# What differs from `ADDED`, which is what this pipeline does with any two customizations. For DreamBooth it
# stands for a merge of two whole UNets. For Custom Diffusion it stands for joint training and for the paper's
# constrained merge of keys and values, which this project has not.
WAYS = {
    "escd": "one pass: each attribute in its own half",
    "source": "one pass: each attribute in its own half",
    "textual-inversion": "two runs, both words in one prompt",
    "p-plus": MIXED,
}


def shared(config: ListConfig) -> dict[str, object]:
    """The fields that a run shares with the runs that it is compared with."""
    names = (
        "list",
        "backbone",
        "seed",
        "sampler_steps",
        "guidance_scale",
        "guidance_rescale",
        "guidance_from",
    )
    return {name: getattr(config, name) for name in names}


def runnable(backbone: Backbone) -> tuple[list[str], dict[str, str]]:
    """The methods that this backbone can run, and why it cannot run the others.

    A method's configuration raises ValueError where the backbone lacks weights that the method needs.
    """
    able: list[str] = []
    unable: dict[str, str] = {}
    for name, method in METHODS.items():
        try:
            for attribute in ATTRIBUTES:
                method.config(attribute, backbone)
        except ValueError as error:
            unable[name] = str(error)
        else:
            able.append(name)
    return able, unable


def budgets_of(method: str, steps: int) -> tuple[int, ...]:
    """The steps after which a method is scored: those of its curve, and its preset's own."""
    return tuple(sorted({*BUDGETS_OF.get(method, BUDGETS), steps}))


def method_configs(
    listed: References, backbone: Backbone, methods: Sequence[str], *, name: str = "mini", seeds: int = SEEDS
) -> list[MethodConfig | MethodPairConfig | StudyConfig]:
    """Each method x both attributes x the references x seeds, the floors, and each method's pairs.

    A pair takes the shape of each reference and the appearance of the next.
    """
    grid: list[MethodConfig | MethodPairConfig | StudyConfig] = []
    pairs: list[MethodPairConfig] = []
    for seed in range(seeds):
        common = {"list": listed.name, "backbone": name, "seed": seed}
        tunings = {
            (method, attribute): METHODS[method].config(attribute, backbone, seed=seed)
            for method in methods
            for attribute in ATTRIBUTES
        }
        for reference, following in zip(listed, [*[*listed][1:], listed[0]], strict=True):
            for attribute in ATTRIBUTES:
                common |= asdict(default_guidance([attribute], backbone))
                grid.append(StudyConfig(attribute, reference.id, "floor", **common))
                for method in methods:
                    tuning = tunings[method, attribute]
                    budgets = budgets_of(method, tuning.steps)
                    grid.append(MethodConfig(method, attribute, reference.id, tuning, budgets, **common))
            if len(listed) > 1:
                common |= asdict(default_guidance(ATTRIBUTES, backbone))
                pairs += [
                    MethodPairConfig(
                        method, reference.id, following.id,
                        tunings[method, "shape"], tunings[method, "appearance"], **common,
                    )
                    for method in methods
                ]  # fmt: skip
    return [*grid, *pairs]


def grid_configs(
    listed: References, backbone: Backbone, methods: Sequence[str], *, name: str = "mini"
) -> list[MethodConfig]:
    """The grid of rates and steps: each method x both attributes x the references x factors."""
    grid = []
    for reference in listed:
        for method in methods:
            budgets = GRID_STEPS_OF.get(method, GRID_STEPS)
            for attribute in ATTRIBUTES:
                tuning = METHODS[method].config(attribute, backbone, before_grid=True)
                for factor in GRID_FACTORS:
                    grid.append(
                        MethodConfig(
                            method, attribute, reference.id, scaled(tuning, factor), budgets, factor,
                            list=listed.name, backbone=name,
                            **asdict(default_guidance([attribute], backbone)),
                        )
                    )  # fmt: skip
    return grid


def scaled(tuning: TuningConfig, factor: float) -> TuningConfig:
    """The tuning with all its learning rates times `factor`."""
    names = ("learning_rate", "word_learning_rate", "bias_learning_rate")
    rates = {name: getattr(tuning, name) for name in names}
    return replace(tuning, **{name: rate * factor for name, rate in rates.items() if rate is not None})
