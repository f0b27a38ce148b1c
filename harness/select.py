"""Which cases: covering arrays over the valid space of each backend, plus named production rows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import covertable

from harness.backends.base import Backend, Device
from harness.case import NEUTRAL, OPS, Case, Limit, Recipe, Shape, limits_of

Axes = Mapping[str, Sequence[int | str]]
PROBE_EVERY = 4  # of the exact half of a plan: an eighth more cases
TEMPLATE = Case("moe", Shape(1, 64, 64, 8, 1), "renormalize", "swiglu", Recipe.parse("bf16"), "real")


@dataclass(frozen=True, order=True)
class Item:
    """One line of a plan: a case for a subject."""

    case_id: str
    subject: str


def template(op: str) -> Case:
    """The case whose values stand in for axes that are not varied."""
    return TEMPLATE if op == "moe" else Case.of({**NEUTRAL, "op": op})


def cover(axes: Axes, limits: Iterable[Limit], strength: int, base: Case = TEMPLATE) -> list[dict[str, Any]]:
    """Rows in which every `strength`-way combination of axis values that `limits` allow occurs at least once.

    Deterministic. Axes with one value are constants, axes that are not named keep the value of `base`; a limit is checked as
    soon as its axes are assigned.
    """
    fixed = {name: values[0] for name, values in axes.items() if len(values) == 1}
    free = {name: list(values) for name, values in axes.items() if len(values) > 1}
    if not free:
        return [fixed] if _allowed(fixed, limits, base) else []
    constraints = [_constraint(limit, free, fixed, base) for limit in limits]
    strength = min(strength, len(free))
    rows = covertable.make(free, strength=strength, constraints=[c for c in constraints if c is not None])
    return [{**fixed, **row} for row in rows]


def _allowed(row: Mapping[str, Any], limits: Iterable[Limit], base: Case = TEMPLATE) -> bool:
    return all(limit.refuses(base.vary(**row)) is None for limit in limits)


def _constraint(limit: Limit, free: Axes, fixed: Mapping[str, Any], base: Case) -> dict[str, Any] | None:
    """covertable's form of a limit; every other axis keeps its fixed value or that of `base`, which the limit ignores."""
    seen = [name for name in limit.axes if name in free]
    if not seen:
        return None
    verdicts: dict[tuple[Any, ...], bool] = {}

    def evaluate(row: Mapping[str, Any]) -> bool:
        key = tuple(row[name] for name in seen)
        if key not in verdicts:
            verdicts[key] = limit.refuses(base.vary(**{**fixed, **dict(zip(seen, key, strict=True))})) is None
        return verdicts[key]

    return {"operator": "fn", "requires": seen, "evaluate": evaluate}


def narrowed(axes: Axes, backend: Backend) -> dict[str, list[int | str]] | None:
    """`axes` restricted to those of the backend's op and to what it declares; None when nothing of some axis is left."""
    axes = {name: values for name, values in axes.items() if name in OPS[backend.op].axes}
    declared = {
        "recipe": backend.recipes,
        "activation": backend.activations,
        "routing": backend.routings or axes.get("routing", ()),
    }
    kept = {name: [v for v in values if v in declared.get(name, values)] for name, values in axes.items()}
    return kept if all(kept.values()) else None


def plan_backend(axes: Axes, backend: Backend, device: Device, strength: int) -> list[Case]:
    """The covering cases of one backend, canonical order, none that it refuses."""
    mine = narrowed(axes, backend)
    if mine is None or (backend.archs and device.arch not in backend.archs):
        return []
    limits, base = (*limits_of(backend.op), *backend.limits), template(backend.op)
    single = [limit for limit in limits if len(limit.axes) == 1]
    mine = {
        name: [v for v in values if _allowed({name: v}, [x for x in single if x.axes == (name,)], base)]
        for name, values in mine.items()
    }
    if not all(mine.values()):
        return []
    base = replace(base, activation_format=backend.activation_format)
    cases = [base.vary(**row) for row in _rows(mine, limits, strength, base)]
    return sorted({case for case in cases if case.problem() is None and backend.supports(case, device).ok})


def probes(cases: Sequence[Case], fills: Sequence[str]) -> list[Case]:
    """One in PROBE_EVERY of the exact cases once more, with the fills in turn where they are possible."""
    chosen = [case for case in cases if case.fill == "exact" and case.shape.tokens][::PROBE_EVERY]
    varied = ([case.vary(fill=f) for f in (*fills[i % len(fills) :], *fills)] for i, case in enumerate(chosen) if fills)
    return [found[0] for options in varied if (found := [case for case in options if case.problem() is None])]


def _rows(axes: Axes, limits: Sequence[Limit], strength: int, base: Case) -> list[dict[str, Any]]:
    """Batches with tokens, and empty ones apart: a combination that only an empty batch has tests nothing. Both together
    hold every `strength`-way combination, those with 0 tokens included."""
    tokens = [t for t in axes["tokens"] if t]
    rows = cover({**axes, "tokens": tokens}, limits, strength, base) if tokens else []
    return rows + (cover({**axes, "tokens": [0]}, limits, max(1, strength - 1), base) if 0 in axes["tokens"] else [])


def coverage(rows: Sequence[Case], axes: Axes, limits: Iterable[Limit], strength: int) -> tuple[int, int]:
    """(covered, possible) `strength`-way combinations of axis values; possible = allowed by every limit within them.

    Honest about holes: it counts what `rows` contain, whoever made them.
    """
    names = sorted(name for name, values in axes.items() if len(values) > 1)
    limits = tuple(limits)
    constants = {n: values[0] for n, values in axes.items() if len(values) == 1}
    seen = {_combination(case.axes, group) for case in rows for group in itertools.combinations(names, strength)}
    possible = 0
    for group in itertools.combinations(names, strength):
        relevant = [limit for limit in limits if set(limit.axes) & set(names) <= set(group)]  # the rest is constant
        for values in itertools.product(*(axes[name] for name in group)):
            possible += _allowed({**constants, **dict(zip(group, values, strict=True))}, relevant)
    return len(seen), possible


def _combination(axes: Mapping[str, Any], group: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, axes[name]) for name in group)
