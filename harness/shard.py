"""Which part of a plan is whose: shards are disjoint, complete for any count, and about equally long. Pure.

Longest first (LPT, Graham 1969): the longest unit goes to the shard with the least. A unit is a case with all its subjects,
which share inputs and oracle; cases are taken apart, the longest first, only as far as whole ones would make a longer run.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.case import Case
from harness.errors import SelectionError
from harness.select import Item

MAX_SHARDS = 1 << 16  # Slurm's largest array is smaller (MaxArraySize), GitHub's matrix has 256 jobs
SLACK = 1.05  # a run this much longer than with every item alone is the price of an oracle computed once
PARTS = (math.inf, 1.0, 0.5, 0.25, 0.125, 0.0)  # of a shard's fair share: longer cases are taken apart, none to all of them
LEAST_S = 0.001
# Of the passed verdicts in configs/baselines (H200) and of a tier-ci run on CPU cores: 0.2..0.5 s at 10**4 elements, 4 to
# 6 times as much at 10**9; a case is mostly launches, relations and the oracle's fixed part.
REFERENCE_S, REFERENCE_SIZE, GROWTH = 0.3, 10**4, 0.2


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` parts, counted from 1; SelectionError for one that cannot be."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count <= MAX_SHARDS:
            raise SelectionError(f"shard {self}: wanted I/N with 1 <= I <= N <= {MAX_SHARDS}, e.g. 3/8")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard written as I/N."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise SelectionError(f"shard {text!r:.80} does not parse; wanted I/N with 1 <= I <= N, e.g. 3/8")
        return cls(int(match[1]), int(match[2]))


def size(case: Case) -> int:
    """Elements that a case touches, about."""
    shape = case.shape
    return shape.hidden * shape.inter * shape.experts + shape.tokens * shape.top_k * (shape.hidden + shape.inter)


def estimate(case: Case) -> float:
    """Seconds that a case may take where nobody has measured it."""
    return REFERENCE_S * math.pow(max(size(case), REFERENCE_SIZE) / REFERENCE_SIZE, GROWTH)


def costs(items: Sequence[Item], recorded: Mapping[Item, float]) -> tuple[float, ...]:
    """Seconds of each item: as recorded, else the estimate times what the subject's recorded items took of theirs (all
    recorded items', where the subject has none)."""
    guesses = {case_id: estimate(Case.parse(case_id)) for case_id in {i.case_id for i in (*items, *recorded)}}
    took: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for item, seconds in sorted(recorded.items()):
        for key in (item.subject, ""):
            took[key][0] += seconds
            took[key][1] += guesses[item.case_id]
    ratio = {key: measured / guessed for key, (measured, guessed) in took.items()}
    found = (recorded.get(i, guesses[i.case_id] * ratio.get(i.subject, ratio.get("", 1.0))) for i in items)
    return tuple(round(max(seconds, LEAST_S), 4) for seconds in found)


def assign(items: Sequence[Item], seconds: Sequence[float], count: int) -> list[tuple[Item, ...]]:
    """Every item in exactly one of `count` parts, each part in the order of `items`; some are empty where there are more
    parts than items. The same arguments give the same parts on every machine."""
    fair = sum(seconds) / count
    alone = _longest_first([[i] for i in range(len(items))], seconds, count)
    bound = SLACK * _length(alone, seconds)
    for part in PARTS:
        found = _longest_first(_units(items, seconds, part * fair), seconds, count)
        if _length(found, seconds) <= bound:
            break
    return [tuple(items[i] for i in sorted(mine)) for mine in found]


def _units(items: Sequence[Item], seconds: Sequence[float], longest: float) -> list[list[int]]:
    """The items of each case together, unless they take longer than `longest`."""
    cases: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        cases[item.case_id].append(index)
    whole = [(mine, sum(seconds[i] for i in mine) <= longest) for mine in cases.values()]
    return [unit for mine, together in whole for unit in ([mine] if together else [[i] for i in mine])]


def _longest_first(units: list[list[int]], seconds: Sequence[float], count: int) -> list[list[int]]:
    loads = [(0.0, shard) for shard in range(count)]
    parts: list[list[int]] = [[] for _ in range(count)]
    for cost, unit in sorted(((sum(seconds[i] for i in unit), unit) for unit in units), key=lambda pair: (-pair[0], pair[1])):
        load, shard = heapq.heappop(loads)
        parts[shard] += unit
        heapq.heappush(loads, (load + cost, shard))
    return parts


def _length(parts: list[list[int]], seconds: Sequence[float]) -> float:
    return max(sum(seconds[i] for i in part) for part in parts)
