"""Covering arrays under constraints that are tables: the rows of covertable 3.2, in its order, in a fraction of the time. Pure.

covertable asks its constraints again and again about rows that differ where they do not look, counts anew for every candidate
what it covers, and tries again what has just failed. Here a table is looked up, what can follow is remembered
(propagation.py), and what the candidates cover comes from counts that grow with the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.propagation import Propagation

Numbers = NDArray[Any]
RULE = "3.2.0, then sure"  # the release of covertable whose rows these are; another one when they change
FIRST = 256  # candidates looked at before all are: the first that covers enough is mostly among them
SAMPLES = 1 << 13  # random rows: a combination that a valid one has needs no propagation to be possible
CONFLICT = 16  # of a level that the row contradicts: more than any strength
FNV_START, FNV_PRIME = 0x811C9DC5, 0x01000193  # FNV-1a of 32 bits, by which covertable.sorters.hash orders combinations


class Gains:
    """What a candidate would cover beyond the row's own. counts[j - 1]: for j levels off the row, how many open combinations
    they make with levels of the row; the last of them, `wanted`, is 1 for an open combination."""

    def __init__(self, wanted: Numbers) -> None:
        size, strength = len(wanted), wanted.ndim
        self._counts = [*(np.zeros((size,) * j, dtype=np.int16) for j in range(1, strength)), wanted]
        self._held: list[int] = []

    def take(self, row: Iterable[int]) -> None:
        """The row has these levels now, those it had before among them."""
        for serial in row:
            if serial not in self._held:
                self._held.append(serial)
                for fewer, more in pairwise(self._counts):
                    fewer += more[serial]
        for counts in self._counts[:-1]:
            for axis in range(counts.ndim):
                counts.swapaxes(0, axis)[self._held] = 0

    def ranked(self, live: Numbers, pairs: Numbers, new: Numbers) -> Iterator[int]:
        """The numbers `live` of the candidates `pairs` [strength, n] in covertable's order of choice: those that cover enough
        for the levels they add, as they come; then those that cover most. new [n]: how many levels each adds."""
        start, width, others, covers = 0, FIRST, [], []
        while start < len(live):
            part = slice(start, start + width)
            found = self._of(pairs[:, part], new[part])
            enough = found > len(self._held) * new[part]
            yield from live[part][enough].tolist()
            others.append(live[part][~enough])
            covers.append(found[~enough])
            start, width = start + width, len(live)
        if others:
            yield from np.concatenate(others)[np.argsort(-np.concatenate(covers), kind="stable")].tolist()

    def _of(self, pairs: Numbers, new: Numbers) -> Numbers:
        found: Numbers = (new == len(pairs)).astype(np.int64)  # itself, where all of it is new
        for j, counts in enumerate(self._counts[:-1], 1):
            for levels in combinations(pairs, j):
                found += counts[levels]
        return found


class Covering:
    """Rows over axes of `sizes` levels. Levels are numbered through: `first` is the number of an axis's first one.

    order: the combinations of `strength` levels that are possible, in covertable's order; open [n]: the numbers of those that
    no row has yet; pairs [strength, n]: their levels; wanted: 1 at each of them, whatever the order of its levels. sure: takes
    only what a search can complete.
    """

    def __init__(self, sizes: Sequence[int], strength: int, tables: Sequence[tuple[tuple[int, ...], Numbers]]) -> None:
        self._sizes, self._strength, self._tables = tuple(sizes), strength, tables
        self._first = np.cumsum([0, *sizes[:-1]])
        self._place = [(axis, level) for axis, size in enumerate(sizes) for level in range(size)]
        self._propagation = Propagation(sizes, tables)
        self._subsets = np.array(list(combinations(range(len(sizes)), strength))).T
        self._row: list[int | None] = [None] * len(sizes)
        self.sure = False
        pairs = self._all()
        self._pairs = pairs[:, self._possible(pairs)] if tables else pairs
        self._order = self._pairs.T.tolist()
        self._open = np.arange(len(self._order))
        self._wanted = np.zeros((len(self._place),) * strength, dtype=np.int16)
        _mark(self._wanted, self._pairs, 1)

    def rows(self) -> Iterator[list[int]]:
        """Greedy ones. Where one cannot be completed, which propagation alone does not foresee, covertable makes a row for each
        combination that is open, thousands on the largest grids of ours; here `sure` rows go on."""
        while len(self._open):
            self._row = [None] * len(self._sizes)
            if self._take(self._order[self._open[0]]):
                self._grow()
                row = self._propagation.completed(self._row)
                if row is not None:
                    self._consume(row)
                    yield row
                    continue
            if self.sure:  # no row has this combination
                self._open, self._pairs = self._open[1:], self._pairs[:, 1:]
            self.sure = True

    def _all(self) -> Numbers:
        """[strength, n], in covertable's order."""
        axes = [first + np.arange(size) for first, size in zip(self._first, self._sizes, strict=True)]
        grids = (np.stack(np.meshgrid(*some, indexing="ij")) for some in combinations(axes, self._strength))
        pairs = np.concatenate([grid.reshape(self._strength, -1) for grid in grids], axis=1)
        ordered: Numbers = pairs[:, np.argsort(_hashes(pairs), kind="stable")]
        return ordered

    def _possible(self, pairs: Numbers) -> Numbers:
        """[n]: may some row have this combination, as far as propagation sees?"""
        found = np.zeros((len(self._place),) * self._strength, dtype=bool)
        samples = self._samples()
        for levels in self._subsets.T.tolist():
            found[tuple(samples[levels])] = True
        possible: Numbers = found[tuple(pairs)]
        for number in np.flatnonzero(~possible).tolist():
            possible[number] = self._added(pairs[:, number].tolist()) is not None
        return possible

    def _samples(self) -> Numbers:
        """Random rows that all tables allow: [axes, rows] level numbers."""
        random = np.random.default_rng(0)
        rows = np.stack([random.integers(size, size=SAMPLES) for size in self._sizes])
        valid = np.ones(SAMPLES, dtype=bool)
        for axes, flags in self._tables:
            valid &= flags[tuple(rows[list(axes)])]
        serials: Numbers = rows[:, valid] + self._first[:, None]
        return serials

    def _grow(self) -> None:
        """Take combinations into the row until none fits."""
        gains, live, pairs = Gains(self._wanted), self._open, self._pairs
        refused = np.zeros(len(self._order), dtype=bool)
        while None in self._row:
            state = self._state()
            gains.take(np.flatnonzero(state == 1).tolist())
            held = _total(state, pairs)
            fits = np.flatnonzero((held < self._strength) & ~refused[live])  # neither contradicts the row nor is in it
            live, pairs, held = live[fits], pairs[:, fits], held[fits]
            for number in gains.ranked(live, pairs, self._strength - held):
                if self._take(self._order[number]):
                    break
                refused[number] = True
            else:
                return

    def _state(self) -> Numbers:
        """[levels]: 1 for those of the row, CONFLICT for what else their axes could have, 0 on the other axes."""
        found = np.zeros(len(self._place), dtype=np.int8)
        for first, size, level in zip(self._first, self._sizes, self._row, strict=True):
            if level is not None:
                found[first : first + size] = CONFLICT
                found[first + level] = 1
        return found

    def _take(self, pair: Iterable[int]) -> bool:
        """Into the row, unless that leaves no valid row."""
        row = self._added(pair)
        self._row = row or self._row
        return row is not None

    def _added(self, pair: Iterable[int]) -> list[int | None] | None:
        row, new = self._row.copy(), []
        for serial in pair:
            axis, level = self._place[serial]
            if row[axis] is None:
                row[axis] = level
                new.append(axis)
        if not self._propagation.allows(row, new) or not self._propagation.possible(row):
            return None
        return row if not self.sure or self._propagation.completed(row) is not None else None

    def _consume(self, row: list[int]) -> None:
        """Cross off what a finished row covers."""
        levels = self._first + row
        inside = np.zeros(len(self._place), dtype=np.int8)
        inside[levels] = 1
        left = np.flatnonzero(_total(inside, self._pairs) < self._strength)
        self._open, self._pairs = self._open[left], self._pairs[:, left]
        _mark(self._wanted, levels[self._subsets], 0)


def _total(flags: Numbers, pairs: Numbers) -> Numbers:
    """[n]: the sum over each combination's levels. A quarter of the time of `flags[pairs].sum(axis=0)`."""
    found: Numbers = flags[pairs[0]]
    for levels in pairs[1:]:
        found += flags[levels]
    return found


def _mark(flags: Numbers, pairs: Numbers, value: int) -> None:
    for levels in permutations(pairs):
        flags[levels] = value


def _hashes(pairs: Numbers) -> Numbers:
    """covertable's sort key of each combination [strength, n]: FNV-1a of the text "1,20,300 "."""
    found = np.full(pairs.shape[1], FNV_START, dtype=np.uint64)
    for place, numbers in enumerate(pairs.astype(np.uint64), 1):
        for power in (10**p for p in reversed(range(len(str(numbers.max()))))):
            digit = numbers // power % 10 + ord("0")
            found = np.where((numbers >= power) | (power == 1), _hashed(found, digit), found)
        found = _hashed(found, np.uint64(ord(" " if place == len(pairs) else ",")))
    return found


def _hashed(before: Numbers, byte: Any) -> Numbers:
    found: Numbers = (before ^ byte) * np.uint64(FNV_PRIME) & np.uint64(0xFFFFFFFF)
    return found


def rows(
    axes: Mapping[str, Sequence[Any]], strength: int, tables: Sequence[tuple[tuple[str, ...], Any]]
) -> list[dict[str, Any]]:
    """Every combination of `strength` values that is possible is in a row, of axes of two values and more: what
    covertable.make(axes, strength, constraints) gives as long as its rows can be completed. tables: (axes, allowed
    combinations of their values)."""
    names, values = list(axes), list(axes.values())
    numbers = [{value: number for number, value in enumerate(some)} for some in values]
    flags = []
    for named, allowed in tables:
        places = tuple(map(names.index, named))
        table = np.zeros([len(values[place]) for place in places], dtype=bool)
        for combination in allowed:
            table[tuple(numbers[place][value] for place, value in zip(places, combination, strict=True))] = True
        flags.append((places, table))
    made = Covering([len(some) for some in values], strength, flags).rows()
    return [{name: some[level] for name, some, level in zip(names, values, row, strict=True)} for row in made]
