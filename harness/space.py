"""Which values each axis of a case may take, the plainest first: what Hypothesis draws from and shrinking walks down. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.backends.base import Backend
from harness.case import LIMITS, NEUTRAL, OPS, SKEWS, Case, Limit, limits_of
from reference.routing import RULES

Value = int | str
SIZES = ("tokens", "hidden", "inter", "experts", "top_k")
# Drawn in this order: top_k is at most the experts, and what a case may cost is left to the widths, which the rest needs least.
ORDER = ("fill", "experts", "routing", "top_k", "tokens", "hidden", "inter", "activation", "skew", "bias", "weighting", "seed")
PLAIN = {  # what comes first; the rest in the order of its declaration
    "routing": ("renormalize", "default"),
    "activation": ("silu", "swiglu"),
    "fill": ("exact", "real"),
    "skew": ("uniform",),
    "bias": ("nobias",),
    "weighting": ("onoutput",),
}
SEEDS = 1 << 16
NARROWEST = 8  # columns drawn: on fewer, stale or zeroed outputs pass by chance, and the verdict is UNTRUSTED


@dataclass(frozen=True)
class Space:
    """values: axis of ORDER -> what it may be, the plainest first; limits: what forbids combinations of them."""

    values: Mapping[str, Sequence[Value]]
    limits: tuple[Limit, ...]

    def choices(self, case: Case, axis: str) -> list[Value]:
        """The values that keep a legal case legal when they replace its own on `axis`; the plainest first."""
        return [value for value in self.values[axis] if self._allows(moved(case, axis, value), axis)]

    def nearest(self, case: Case, axis: str, position: int) -> Case:
        """A legal case with the value at `position` of its axis, or with the last one before it that keeps it legal; as it
        is if there is none."""
        moves = (moved(case, axis, self.values[axis][i]) for i in range(position, -1, -1))
        return next((other for other in moves if self._allows(other, axis)), case)

    def _allows(self, case: Case, axis: str) -> bool:
        return all(limit.refuses(case) is None for limit in self.limits if axis in limit.axes)

    def takes(self, case: Case) -> bool:
        """Does no limit forbid this case?"""
        return all(limit.refuses(case) is None for limit in self.limits)

    def plainest(self, case: Case) -> Case:
        """Every axis as plain as the others let it be, from any case of the space."""
        before = None
        while case != before:
            before = case
            for axis in ORDER:
                moves = (moved(case, axis, value) for value in self.values[axis])
                case = next((other for other in moves if self._allows(other, axis)), case)
        return case


def moved(case: Case, axis: str, value: Value) -> Case:
    """The case with one axis of ORDER replaced. `Case.vary` parses the recipe again: ten times as long."""
    if axis in SIZES:
        return replace(case, shape=replace(case.shape, **{axis: value}))  # type: ignore[arg-type]
    return replace(case, **{axis: value})  # type: ignore[arg-type]


def below(case: Case, backend: Backend) -> Space:
    """Everything a failing case can be shrunk to: sizes up to its own, the names that the backend takes, the seed 0."""
    largest = {name: max(1, int(case.axes[name])) for name in SIZES}
    op, rules = OPS[case.op], backend.routings or tuple(RULES)
    names = {"routing": rules, "activation": backend.activations, "fill": op.fills, "skew": SKEWS}
    names |= {"bias": backend.biases, "weighting": backend.weightings}
    names = {name: values if name in op.axes else (str(case.axes[name]),) for name, values in names.items()}
    return _space(largest, names, sorted({0, case.seed}), (*limits_of(case.op), *backend.limits))


def within(axes: Mapping[str, Sequence[Value]], limits: Sequence[Limit]) -> Space:
    """Everything between the levels of a plan's `axes` too: sizes up to the power of two at or above the largest level."""
    largest = {name: 1 << (max(int(v) for v in axes[name]) - 1).bit_length() for name in SIZES}
    names = {name: axes[name] for name in ("routing", "activation", "fill", "skew")}
    names |= {name: axes.get(name, (str(NEUTRAL[name]),)) for name in ("bias", "weighting")}
    space = _space(largest, names, range(SEEDS), (*LIMITS, *limits))
    wide = {name: space.values[name][NARROWEST - 1 :] for name in ("hidden", "inter")}
    return Space({**space.values, **wide}, space.limits)


def _space(
    largest: Mapping[str, int], names: Mapping[str, Sequence[Value]], seeds: Sequence[int], limits: tuple[Limit, ...]
) -> Space:
    sizes: dict[str, Sequence[Value]] = {name: range(1, most + 1) for name, most in largest.items()}
    sizes["tokens"] = (*sizes["tokens"], 0)  # no token at all is stranger than many
    plain = {name: [*(v for v in PLAIN[name] if v in values), *values] for name, values in names.items()}
    ordered = {name: tuple(dict.fromkeys(values)) for name, values in plain.items()}
    return Space({**sizes, **ordered, "seed": seeds}, limits)
