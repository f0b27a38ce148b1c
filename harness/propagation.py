"""What can still become of a half-filled row under tables of allowed combinations: domains as bit masks. Pure.

A free axis loses the levels that a table whose other axes are all decided forbids, and those with which no level of a second
free axis gets on; an axis with one level left is decided; until nothing changes. Narrowing is monotone: the order of the steps
does not matter, and what was refused stays refused in a longer row. It is the forward check of covertable 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Partial = tuple[int | None, ...]  # of each axis the number of its level, or None


class Propagation:
    """sizes: how many levels each axis has, two at least; tables: (numbers of axes, flags [levels of the first, ...] of the
    combinations that are allowed)."""

    def __init__(self, sizes: Sequence[int], tables: Sequence[tuple[tuple[int, ...], NDArray[np.bool_]]]) -> None:
        self._sizes, self._tables = tuple(sizes), tuple(tables)
        self._allowed = [(axes, frozenset(map(tuple, np.argwhere(flags).tolist()))) for axes, flags in tables]
        self._naming = [[t for t, (axes, _) in enumerate(tables) if axis in axes] for axis in range(len(sizes))]
        self._named = tuple(axis for axis, naming in enumerate(self._naming) if naming)
        beside = ({other for t in naming for other in tables[t][0]} - {axis} for axis, naming in enumerate(self._naming))
        self._beside = [sorted(others) for others in beside]
        self._masks: dict[tuple[int, int, Partial], int] = {}
        self._rows: dict[tuple[int, int, int, Partial], list[int]] = {}
        self._seen: dict[Partial, bool] = {}
        self._completed: dict[Partial, Partial | None] = {}

    def allows(self, row: Sequence[int | None], new: Iterable[int]) -> bool:
        """Does no table that names one of the `new` axes, all of its axes decided, forbid the row?"""
        for axis in new:
            for t in self._naming[axis]:
                axes, allowed = self._allowed[t]
                values = tuple([row[a] for a in axes])
                if None not in values and values not in allowed:
                    return False
        return True

    def possible(self, row: Sequence[int | None]) -> bool:
        """False only if nothing that is allowed can become of the row; a search may refuse more."""
        key = tuple([row[axis] for axis in self._named])
        if key not in self._seen:
            self._seen[key] = self._narrow(list(row))
        return self._seen[key]

    def completed(self, row: Sequence[int | None]) -> list[int] | None:
        """The first allowed row with these levels, the later axes varying fastest; None if there is none."""
        found = self._search(tuple([row[axis] for axis in self._named]))
        if found is None:
            return None
        levels = dict(zip(self._named, found, strict=True))
        return [levels.get(axis, level) or 0 for axis, level in enumerate(row)]

    def _search(self, decided: Partial) -> Partial | None:
        """`completed` for the axes that tables name."""
        if None not in decided:
            return decided
        if decided not in self._completed:
            self._completed[decided] = next(filter(None, map(self._search, self._steps(decided))), None)
        return self._completed[decided]

    def _steps(self, decided: Partial) -> Iterable[Partial]:
        place = decided.index(None)
        row: list[int | None] = [None] * len(self._sizes)
        for axis, level in zip(self._named, decided, strict=True):
            row[axis] = level
        for level in range(self._sizes[self._named[place]]):
            row[self._named[place]] = level
            if self.allows(row, [self._named[place]]) and self.possible(row):
                yield (*decided[:place], level, *decided[place + 1 :])

    def _narrow(self, row: list[int | None]) -> bool:
        """`possible`, deciding in `row` what is left one level."""
        domains = [(1 << size) - 1 for size in self._sizes]
        changed = True
        while changed:
            changed = False
            for axis in self._named:
                for other in (axis, *self._beside[axis]):
                    if row[axis] is not None or (other != axis and row[other] is not None):
                        continue
                    allowed = self._alone(row, axis) if other == axis else self._beside_one(row, axis, other, domains)
                    kept = domains[axis] & allowed
                    if not kept:
                        return False
                    if kept != domains[axis]:
                        domains[axis], changed = kept, True
                        row[axis] = kept.bit_length() - 1 if kept & (kept - 1) == 0 else None
        return True

    def _alone(self, row: list[int | None], axis: int) -> int:
        """The levels of `axis` allowed by the tables whose other axes are decided."""
        mask = -1
        for t in self._naming[axis]:
            values = tuple([row[a] for a in self._tables[t][0]])
            if values.count(None) == 1:
                mask &= self._mask(t, axis, values)
        return mask

    def _beside_one(self, row: list[int | None], axis: int, other: int, domains: list[int]) -> int:
        """Those that go with some level of `other`, by the tables that name both and whose other axes are decided."""
        found = []
        for t in self._naming[axis]:
            axes = self._tables[t][0]
            if other in axes:
                values = tuple([row[a] for a in axes])
                if values.count(None) == 2:
                    found.append(self._by_level(t, axis, other, values))
        if not found:
            return -1
        mask = 0
        for level in range(self._sizes[other]):
            if domains[other] >> level & 1:
                both = -1
                for masks in found:
                    both &= masks[level]
                mask |= both
        return mask

    def _mask(self, table: int, axis: int, values: Partial) -> int:
        key = (table, axis, values)
        if key not in self._masks:
            self._masks[key] = _bits(self._part(table, values))
        return self._masks[key]

    def _by_level(self, table: int, axis: int, other: int, values: Partial) -> list[int]:
        """For each level of `other` the levels of `axis`."""
        key = (table, axis, other, values)
        if key not in self._rows:
            axes, part = self._tables[table][0], self._part(table, values)
            self._rows[key] = [_bits(row) for row in (part if axes.index(other) < axes.index(axis) else part.T)]
        return self._rows[key]

    def _part(self, table: int, values: Partial) -> Any:
        return self._tables[table][1][tuple(slice(None) if value is None else value for value in values)]


def _bits(allowed: NDArray[np.bool_]) -> int:
    return sum(1 << level for level, ok in enumerate(allowed.tolist()) if ok)
