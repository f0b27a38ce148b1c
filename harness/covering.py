"""covertable's algorithm with its constraints as tables: the same rows, in a fraction of the time. Pure.

covertable asks a constraint again and again about rows that differ where it does not look. A table's answer, and what can still
follow from a half-filled row, depend on the few axes that the tables name: looked up or remembered, nothing else is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from covertable.main import Controller, Row


class Greedy:
    """covertable.criteria.greedy over whole numbers."""

    @staticmethod
    def extract(ctrl: Controller) -> Iterator[tuple[int, ...]]:
        """The combination to try next, until none fits: the first that covers enough, else the one that covers most."""
        incomplete, parents, width = ctrl.incomplete, ctrl.parents, ctrl.strength
        while True:
            row, refused = ctrl.row, ctrl.row.invalid_pairs
            if len(row) == ctrl.factor_length:
                return
            held, size, chosen, most = set(row.values()), len(row), None, -1
            covered = sum(map(incomplete.__contains__, combinations(sorted(held), width)))
            for pair in ctrl.fitting():
                if pair in refused:
                    continue
                new = [serial for serial in pair if serial not in held]
                if not ctrl._storable_check([(parents[serial], serial) for serial in new]):
                    continue
                found = sum(map(incomplete.__contains__, combinations(sorted(held.union(new)), width))) - covered
                if found + ctrl.tolerance > size * len(new):
                    chosen = pair
                    break
                if found > most:
                    most, chosen = found, pair
            if chosen is None:
                return
            yield chosen


class Tabled(Controller):  # type: ignore[misc]  # covertable carries no annotations
    """A covertable controller whose constraints are tables: axes -> the combinations of their values that are allowed."""

    def __init__(self, axes: Mapping[str, Sequence[Any]], strength: int, tables: Sequence[tuple[tuple[str, ...], Any]]) -> None:
        self._tables: list[tuple[tuple[str, ...], frozenset[tuple[int, ...]]]] = []
        self._given = tables
        self._named: tuple[str, ...] = tuple(dict.fromkeys(name for names, _ in tables for name in names))
        self._seen: dict[tuple[int | None, ...], bool] = {}
        constraints = [{"operator": "fn", "requires": list(names), "evaluate": _lookup(names, ok)} for names, ok in tables]
        super().__init__(dict(axes), strength=strength, criterion=Greedy, constraints=constraints)
        self._order = list(self.incomplete)
        self._index = {pair: number for number, pair in enumerate(self._order)}
        self._pairs = np.array(self._order, dtype=np.int64).reshape(-1, strength)
        self._left = np.ones(len(self._order), dtype=bool)

    def fitting(self) -> Iterator[tuple[int, ...]]:
        """What is not covered yet, contradicts nothing in the row and adds to it, in covertable's order."""
        held = np.zeros(len(self.parents), dtype=bool)
        other = held.copy()
        for name, serial in self.row.items():
            other[self.serials[name]] = True
            held[serial], other[serial] = True, False
        found = self._left & ~other[self._pairs].any(axis=1) & ~held[self._pairs].all(axis=1)
        return (self._order[number] for number in np.flatnonzero(found))

    def consume_pairs(self, row: Row) -> None:
        """Cross off what a finished row covers."""
        super().consume_pairs(row)
        covered = (self._index.get(pair) for pair in combinations(sorted(row.values()), self.strength))
        self._left[[number for number in covered if number is not None]] = False

    def _resolve_constraints(self, constraints: Any) -> None:
        super()._resolve_constraints(constraints)
        serials = {name: dict(zip(self.factors[name], self.serials[name], strict=True)) for name in self._named}
        for names, allowed in self._given:
            numbers = frozenset(tuple(serials[n][v] for n, v in zip(names, values, strict=True)) for values in allowed)
            self._tables.append((names, numbers))

    def _storable_check(self, candidate: Sequence[tuple[str, int]], row: Row | None = None) -> bool:
        """Does no table forbid the row with these (axis, serial) in it?"""
        held = {**(self.row if row is None else row), **dict(candidate)}
        for names, allowed in self._tables:
            values = tuple(held.get(name) for name in names)
            if None not in values and values not in allowed:
                return False
        return True

    def _forward_check(self, snapshot: Mapping[str, int]) -> bool:
        key = tuple(snapshot.get(name) for name in self._named)
        if key not in self._seen:
            self._seen[key] = bool(super()._forward_check({name: snapshot[name] for name in self._named if name in snapshot}))
        return self._seen[key]

    def set_pair(self, pair: tuple[int, ...]) -> bool:
        """Take it into the row, unless that leaves no valid row."""
        candidate = self.get_candidate(pair)
        if not self._storable_check(candidate) or not self._forward_check({**self.row, **dict(candidate)}):
            return False
        self.row.update(candidate)
        self._mark_passed_constraints(self.row)
        return True


def _lookup(names: tuple[str, ...], allowed: Any) -> Any:
    return lambda row: tuple(row[name] for name in names) in allowed


def rows(
    axes: Mapping[str, Sequence[Any]], strength: int, tables: Sequence[tuple[tuple[str, ...], Any]]
) -> list[dict[str, Any]]:
    """covertable.make(axes, strength, constraints) for constraints that are (axes, allowed combinations)."""
    return list(Tabled(axes, strength, tables).make_async())
