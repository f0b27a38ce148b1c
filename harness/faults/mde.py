"""Minimum detectable effect: how large a scale error must be before the real lane turns red. What a green is worth.

The effect is planted on an emulated right output, so that it has to stand out from what a right kernel may err.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.case import Case
from harness.compare import compare
from harness.faults.layer import Layer, layer_of
from harness.inputs import make_inputs
from harness.oracle import expect
from reference.rounding import Rounding

TYPICAL, MOST = 0.5, 0.95  # of the cases: the median, and Hook and Kelly's kill ratio at which an effect counts as seen
SMALLEST, LARGEST = 2.0**-26, 2.0**6  # the search: below fp32's half spacing 2**-24, far above any plausible scale
STEPS = 11  # bisections of those 32 binades: 1 / 64 of one, that is 1.1 % of the effect


@dataclass(frozen=True)
class Threshold:
    """The smallest relative error that is refused in a typical case (the median) and in 95 % of them; inf: never."""

    typical: float
    most: float

    @classmethod
    def of(cls, smallest: Sequence[float]) -> Threshold:
        """From each case's smallest refused error."""
        ordered = sorted(smallest)
        return cls(*(ordered[math.ceil(share * len(ordered)) - 1] for share in (TYPICAL, MOST)))


@dataclass(frozen=True)
class Effect:
    """What the real lane sees of one recipe under one set of rounding points: `expert`, the output of one random active
    expert times 1 + eps; `output`, everything times 1 + eps. Over so many `cases`."""

    recipe: str
    rounding: Rounding
    cases: int
    expert: Threshold
    output: Threshold

    @property
    def sentence(self) -> str:
        """What a green means, in words."""
        most = f"95 % of {self.cases} cases" if self.cases >= 1 / (1 - MOST) else f"all {self.cases} cases"
        return (
            f"{self.recipe}: this green means a scale error of one expert above {_percent(self.expert.typical)} would have been"
            f" red in a typical case (in {most}: above {_percent(self.expert.most)})"
        )


def mde(cases: Iterable[Case], rounding: Rounding) -> Effect:
    """The effect over the real-fill cases with tokens among `cases`, all of one recipe; ValueError if there are none or
    several recipes."""
    real = [case for case in cases if case.fill == "real" and case.shape.tokens]
    recipes = {str(case.recipe) for case in real}
    if len(recipes) != 1:
        raise ValueError(f"wanted real cases of one recipe, got {len(real)} of {', '.join(sorted(recipes)) or 'none'}")
    found = [_smallest_of(case, rounding) for case in real]
    experts, outputs = zip(*found, strict=True)
    return Effect(recipes.pop(), rounding, len(real), Threshold.of(experts), Threshold.of(outputs))


def table(planned: Iterable[tuple[Case, Rounding]]) -> list[Effect]:
    """One effect per recipe and rounding among the real cases of a plan, by recipe."""
    groups: dict[tuple[str, Rounding], list[Case]] = {}
    for case, rounding in planned:
        if case.fill == "real" and case.shape.tokens:
            groups.setdefault((str(case.recipe), rounding), []).append(case)
    return [mde(cases, rounding) for (_, rounding), cases in sorted(groups.items(), key=lambda group: group[0][0])]


def _smallest_of(case: Case, rounding: Rounding) -> tuple[float, float]:
    """The smallest refused error of one expert and of the whole output in this case."""
    inputs = make_inputs(case)
    expected = expect(case, inputs, rounding)
    layer = layer_of(case, rounding, inputs)
    right = _before_the_last_rounding(layer)

    def refused(effect: Tensor) -> Callable[[float], bool]:
        return lambda eps: not compare(expected, (right + eps * effect).to(layer.out)).agrees

    return smallest(refused(expected.contribution(layer.chosen))), smallest(refused(expected.value))


def _before_the_last_rounding(layer: Layer) -> Tensor:
    """float64 [tokens, hidden]: the right output as it stands in the accumulator."""
    return replace(layer, rounding=replace(layer.rounding, out="fp32"), out=torch.float64).right


def smallest(refused: Callable[[float], bool]) -> float:
    """The smallest eps in [SMALLEST, LARGEST] that is refused, to STEPS bisections on a log scale, rounded up; inf if none."""
    low, high = math.log2(SMALLEST), math.log2(LARGEST)
    if not refused(LARGEST):
        return math.inf
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if refused(2.0**middle) else (middle, high)
    return float(2.0**high)


def _percent(share: float) -> str:
    return "no size at all" if math.isinf(share) else f"{100 * share:.2g} %"
