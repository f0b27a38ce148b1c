"""Which cases: covering arrays over the valid space of each backend, plus named production rows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from harness import covering
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


@dataclass(frozen=True)
class Table:
    """A limit as data: which combinations of the values of its `axes`, those with a choice, it allows."""

    axes: tuple[str, ...]
    allowed: frozenset[tuple[int | str, ...]]


@dataclass(frozen=True)
class Grid:
    """What a backend is planned over: the levels of every axis, the limits on their combinations, and the case whose values
    stand in for axes that are not named."""

    axes: Axes
    limits: tuple[Limit, ...]
    base: Case = TEMPLATE

    def allows(self, row: Mapping[str, Any], limits: Iterable[Limit]) -> bool:
        """Does none of these limits refuse the case of this row?"""
        return all(limit.refuses(self.base.vary(**row)) is None for limit in limits)

    def tables(self) -> list[Table]:
        """The limits that forbid something here, in their order. An axis that a limit does not name keeps its one value or
        the base's, which the limit does not look at."""
        named = ([(name, tuple(self.axes[name])) for name in limit.axes if name in self.axes] for limit in self.limits)
        found = (_table(limit, tuple(axes), self.base) for limit, axes in zip(self.limits, named, strict=True))
        return [table for table in found if table is not None]


@lru_cache(maxsize=1 << 14)  # the limits of an op are asked for each of a hundred backends, of few sets of levels
def _table(limit: Limit, axes: tuple[tuple[str, tuple[int | str, ...]], ...], base: Case) -> Table | None:
    """What a limit allows of the levels of the axes that it looks at; None if that is everything."""
    names = tuple(name for name, values in axes if len(values) > 1)
    fixed = {name: values[0] for name, values in axes if len(values) == 1}
    keys = list(itertools.product(*(values for _, values in axes if len(values) > 1)))
    allowed = frozenset(k for k in keys if limit.refuses(base.vary(**fixed, **dict(zip(names, k, strict=True)))) is None)
    return Table(names, allowed) if len(allowed) < len(keys) else None


Rows = list[dict[str, Any]]
Cover = Callable[[Axes, Sequence[Table], int], Rows]


def cover(axes: Axes, forbidding: Sequence[Table], strength: int) -> Rows:
    """Rows in which every `strength`-way combination of axis values that the tables allow occurs at least once.

    Deterministic. Axes with one value are constants; a table is looked at as soon as its axes are assigned.
    """
    fixed = {name: values[0] for name, values in axes.items() if len(values) == 1}
    free = {name: list(values) for name, values in axes.items() if len(values) > 1}
    if not all(table.allowed for table in forbidding):
        return []
    if not free:
        return [fixed]
    made = covering.rows(free, min(strength, len(free)), [(table.axes, table.allowed) for table in forbidding])
    return [{**fixed, **row} for row in made]


def narrowed(axes: Axes, backend: Backend) -> dict[str, list[int | str]] | None:
    """`axes` restricted to those of the backend's op and to what it declares; None when nothing of some axis is left."""
    axes = {name: values for name, values in axes.items() if name in OPS[backend.op].axes}
    declared = {
        "recipe": backend.recipes,
        "activation": backend.activations,
        "routing": backend.routings or axes.get("routing", ()),
        "bias": backend.biases,
        "weighting": backend.weightings,
    }
    kept = {name: [v for v in values if v in declared.get(name, values)] for name, values in axes.items()}
    return kept if all(kept.values()) else None


def grid_of(axes: Axes, backend: Backend) -> Grid | None:
    """The levels of `axes` that the backend takes one by one, and every limit; None when nothing of some axis is left."""
    mine = narrowed(axes, backend)
    if mine is None:
        return None
    base = replace(template(backend.op), activation_format=backend.activation_format)
    grid = Grid(mine, (*limits_of(backend.op), *backend.limits), base)
    single = [limit for limit in grid.limits if len(limit.axes) == 1]
    mine = {
        name: [v for v in values if grid.allows({name: v}, (x for x in single if name in x.axes))]
        for name, values in mine.items()
    }
    return replace(grid, axes=mine) if all(mine.values()) else None


def plan_backend(axes: Axes, backend: Backend, device: Device, strength: int, rows: Cover = cover) -> list[Case]:
    """The covering cases of one backend, canonical order, none that it refuses. rows: `cover`, or what stands in for it."""
    grid = grid_of(axes, backend)
    if grid is None or (backend.archs and device.arch not in backend.archs):
        return []
    cases = [grid.base.vary(**row) for row in _rows(grid, strength, rows)]
    return sorted({case for case in cases if case.problem() is None and backend.supports(case, device).ok})


def probes(cases: Sequence[Case], fills: Sequence[str]) -> list[Case]:
    """One in PROBE_EVERY of the exact cases once more, with the fills in turn where they are possible."""
    chosen = [case for case in cases if case.fill == "exact" and case.shape.tokens][::PROBE_EVERY]
    varied = ([case.vary(fill=f) for f in (*fills[i % len(fills) :], *fills)] for i, case in enumerate(chosen) if fills)
    return [found[0] for options in varied if (found := [case for case in options if case.problem() is None])]


def _rows(grid: Grid, strength: int, rows: Cover) -> Rows:
    """Batches with tokens, and empty ones apart: a combination that only an empty batch has tests nothing. Both together
    hold every `strength`-way combination, those with 0 tokens included."""
    tokens = grid.axes["tokens"]
    parts = ([t for t in tokens if t], strength), ([t for t in tokens if not t], max(1, strength - 1))
    grids = [(replace(grid, axes={**grid.axes, "tokens": some}), ways) for some, ways in parts if some]
    return [row for part, ways in grids for row in rows(part.axes, part.tables(), ways)]
