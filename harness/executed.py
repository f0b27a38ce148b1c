"""How much of the space was really executed: combinations of axis values in verdicts that ran, of those that are possible.

Possible is what some case of the space has: a combination whose own axes no limit forbids may still not extend to a case.
So the limits, as tables, are joined over the axes that they connect and projected back; axes without a limit are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from harness.case import Case
from harness.select import Axes, Grid, Table
from harness.verdict import Stage, Status, Verdict

Booleans = npt.NDArray[np.bool_]
MAX_CELLS = 1 << 27  # of a joined table, a byte each; 13 activations x 11 rules x 15 recipes x all sizes of sm100 are 2**24
NOT_RUN = (Status.UNSUPPORTED, Status.UNAVAILABLE, Status.UNTRUSTED, Status.CONTRACT)
LAUNCHED = (Stage.LAUNCH, Stage.COMPARE, Stage.RELATIONS, Stage.DONE)


def ran(verdict: Verdict) -> bool:
    """Was the kernel run and its case a test? Not where it was refused, where a contract held it back, or where a wrong
    kernel would have passed too; a death counts once the launch was reached."""
    return verdict.status not in NOT_RUN and verdict.stage in LAUNCHED


@dataclass(frozen=True)
class Ways:
    """`covered` of the `possible` combinations of `strength` axes' values; possible is 0 where it is too many to count."""

    strength: int
    covered: int
    possible: int

    def __str__(self) -> str:
        if not self.possible:
            return f"{self.strength}-way not counted"
        share = 100 * self.covered / self.possible  # rounded down: 100 % means all
        return f"{self.strength}-way {self.covered} of {self.possible} ({share if share == 100 else int(10 * share) / 10:g} %)"


class Joined:
    """What the tables allow over some axes, joined; `onto(part)` projects it."""

    def __init__(self, axes: Axes, names: Sequence[str], joining: Iterable[Table]) -> None:
        self.names = tuple(names)
        self._sizes = {name: len(axes[name]) for name in names}
        whole = np.ones([self._sizes[n] for n in names], dtype=bool)
        for table in joining:
            shape = [self._sizes[n] if n in table.axes else 1 for n in names]
            whole &= _array(axes, table, names).reshape(shape)
        self._onto = {frozenset(names): whole}

    def onto(self, part: frozenset[str]) -> Booleans:
        """bool, one dimension for each axis of `part` in the order of `names`: which combinations some whole one has."""
        if part not in self._onto:
            more = min((n for n in self.names if n not in part), key=lambda n: self._sizes[n])
            position = [n for n in self.names if n in part or n == more].index(more)
            self._onto[part] = np.asarray(self.onto(part | {more}).any(axis=position))
        return self._onto[part]


def _array(axes: Axes, table: Table, names: Sequence[str]) -> Booleans:
    """The table as a bool array, its axes in the order of `names`."""
    order = [n for n in names if n in table.axes]
    keys = itertools.product(*(axes[n] for n in table.axes))
    flat = np.fromiter((key in table.allowed for key in keys), dtype=bool)
    return flat.reshape([len(axes[n]) for n in table.axes]).transpose([table.axes.index(n) for n in order])


@dataclass(frozen=True)
class Reach:
    """Counts combinations in a grid."""

    grid: Grid

    @property
    def axes(self) -> Axes:
        """The levels of every axis."""
        return self.grid.axes

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The axes with a choice."""
        return tuple(sorted(name for name, values in self.axes.items() if len(values) > 1))

    @cached_property
    def joined(self) -> list[Joined] | None:
        """One for each set of axes that limits connect; None if one of them is too large."""
        forbidding = self.grid.tables()
        parts: list[set[str]] = [{name} for name in self.names]
        for table in forbidding:
            touched = [part for part in parts if part & set(table.axes)]
            parts = [part for part in parts if part not in touched] + ([set().union(*touched)] if touched else [])
        if any(np.prod([float(len(self.axes[n])) for n in part]) > MAX_CELLS for part in parts):
            return None
        ordered = [[n for n in self.names if n in part] for part in parts]
        return [Joined(self.axes, part, [t for t in forbidding if set(t.axes) & set(part)]) for part in ordered]

    def allowed(self, group: tuple[str, ...]) -> Booleans:
        """bool, one dimension for each axis of `group`, which is sorted: the combinations that some case has."""
        found = np.ones([len(self.axes[n]) for n in group], dtype=bool)
        for joined in self.joined or ():
            part = frozenset(group) & frozenset(joined.names)
            found &= joined.onto(part).reshape([len(self.axes[n]) if n in part else 1 for n in group])
        return found

    def ways(self, cases: Iterable[Case], strength: int) -> Ways:
        """Combinations in these cases. A batch without tokens tests only combinations that name the tokens."""
        if self.joined is None:
            return Ways(strength, 0, 0)
        strength, rows = min(strength, len(self.names)), self._indices(cases)
        if not strength:  # nothing to choose: one case is all
            return Ways(0, int(any(len(found) for found in rows.values())), 1)
        empty = np.array([self.axes["tokens"][i] == 0 if i >= 0 else False for i in rows["tokens"]], dtype=bool)
        covered = possible = 0
        for group in itertools.combinations(self.names, strength):
            allowed = self.allowed(group)
            columns = np.stack([rows[name] for name in group])
            use = (columns >= 0).all(axis=0) & (~empty if "tokens" not in group else True)
            flat = np.unique(np.ravel_multi_index(tuple(columns[:, use]), allowed.shape))
            covered += int(allowed.reshape(-1)[flat].sum())
            possible += int(allowed.sum())
        return Ways(strength, covered, possible)

    def _indices(self, cases: Iterable[Case]) -> dict[str, npt.NDArray[np.int64]]:
        """For each axis the number of each case's level, -1 for a value that is none: production rows and probes have some."""
        number = {name: {value: i for i, value in enumerate(values)} for name, values in self.axes.items()}
        levels = [case.axes for case in cases]
        return {n: np.array([known.get(row.get(n, ""), -1) for row in levels], dtype=np.int64) for n, known in number.items()}
