"""Shrinks a failing case to a smaller one that fails in the same way: greedy, axis by axis, deterministic. Pure.

Every step goes to the plainest value first and doubles from there, so that the small, quick cases are judged before the
large ones; between the last value that does not fail and the first that does it halves. Dependent sizes also go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from harness.case import Case
from harness.space import Space, moved
from harness.steady import Judge, signature

# Lowered together: first what saves most. A pair goes to one value, because a defect may want two sizes to be equal.
SIZE_MOVES = (("hidden", "inter"), ("experts", "top_k"), ("tokens",), ("top_k",), ("experts",), ("hidden",), ("inter",))
# nothing to halve: each value is tried
NAME_MOVES = (("skew",), ("bias",), ("weighting",), ("routing",), ("activation",), ("fill",), ("seed",))


@dataclass
class Search:
    """One search. judge: a failing verdict of it is one that a fresh child gives; more(): is there time for another run;
    found(case): told of every improvement. runs: cases judged; spent: it ended before it was done."""

    judge: Judge
    space: Space
    wanted: str
    more: Callable[[], bool] = lambda: True
    found: Callable[[Case], None] = lambda case: None
    runs: int = 0
    spent: bool = False
    _said: dict[str, bool] = field(default_factory=dict)

    def shrink(self, case: Case) -> Case:
        """The smallest case found from one whose verdict has the signature `wanted`. Unless `spent`, no axis of it can be
        lowered to its plainest or its next lower value; what lies between was looked at by doubling and halving only."""
        before = None
        while case != before and not self.spent:
            before = case
            for move in (*SIZE_MOVES, *NAME_MOVES):
                for smaller in self._lowered(case, move):
                    case = smaller
                    self.found(case)
        return case

    def _lowered(self, case: Case, axes: tuple[str, ...]) -> Iterator[Case]:
        """Ever smaller failing cases that differ from `case` on `axes` alone, where these take one value."""
        smaller = self._smaller(case, axes)
        if axes in NAME_MOVES:
            first = next((c for c in smaller if self._fails(c)), None)
            yield from () if first is None else (first,)
            return
        low, step = -1, 0  # smaller[low] is known not to fail
        while step < len(smaller) and not self._fails(smaller[step]):
            low, step = step, 2 * step + 1
        high = min(step, len(smaller))
        if high < len(smaller):
            yield smaller[high]
        while high - low > 1:
            middle = (low + high) // 2
            if self._fails(smaller[middle]):
                yield smaller[middle]
                high = middle
            else:
                low = middle

    def _smaller(self, case: Case, axes: tuple[str, ...]) -> Sequence[Case]:
        """The legal cases below this one, the smallest first."""
        own = [case.axes[axis] for axis in axes]
        if len(axes) == 1:
            choices = self.space.choices(case, axes[0])
            return [moved(case, axes[0], v) for v in choices[: choices.index(own[0])]]
        equal = [moved(moved(case, axes[0], v), axes[1], v) for v in range(1, min(int(v) for v in own) + 1)]
        return [other for other in equal if other != case and self.space.takes(other)]

    def _fails(self, case: Case) -> bool:
        """In the same way. Nothing does once time is up."""
        if case.id not in self._said:
            self.spent = self.spent or not self.more()
            if self.spent:
                return False
            self.runs += 1
            self._said[case.id] = signature(self.judge(case)) == self.wanted
        return self._said[case.id]
