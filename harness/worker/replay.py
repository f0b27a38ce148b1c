"""Why did it die: alone, or only after others? Replays in fresh children, few and short enough for the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from harness.select import Item
from harness.verdict import Finding, Verdict

T = TypeVar("T")
SHOWN = 5


@dataclass(frozen=True)
class Budget:
    """What the replays of one death may cost. runs: fresh children; seconds: wall time."""

    runs: int = 0
    seconds: float = 0.0


class Meter:
    """A budget being spent."""

    def __init__(self, budget: Budget) -> None:
        self._budget, self.runs = budget, 0
        self._end = time.monotonic() + budget.seconds

    @property
    def left_s(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def spend(self) -> bool:
        """Take one run out of it; False when runs or time are used up."""
        if self.runs >= self._budget.runs or not self.left_s:
            return False
        self.runs += 1
        return True


def ddmin(items: Sequence[T], fails: Callable[[Sequence[T]], bool | None]) -> list[T]:
    """The shortest subsequence found that still fails (Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing
    Input, 2002, figure 3). `items` fails; fails() answers None when the budget is spent: then the best so far."""
    best, parts = list(items), 2
    while len(best) >= 2:
        size = -(-len(best) // parts)
        chunks = [best[i : i + size] for i in range(0, len(best), size)]
        rests = [[x for c in chunks[:i] + chunks[i + 1 :] for x in c] for i in range(len(chunks))]
        for number, candidate in enumerate([*reversed(chunks), *(rests if len(chunks) > 2 else [])]):
            answer = fails(candidate)
            if answer is None:
                return best
            if answer:
                best, parts = candidate, 2 if number < len(chunks) else max(parts - 1, 2)
                break
        else:
            if parts >= len(best):
                return best
            parts = min(2 * parts, len(best))
    return best


def explained(verdict: Verdict, before: Sequence[Item], dies: Callable[[Sequence[Item]], bool | None]) -> Verdict:
    """The verdict with a finding on what the death depends on. `before`: what the dead child ran; dies(sequence): does the
    victim die the same way right after these, in a fresh child? None when the budget is spent."""
    alone = dies(())
    if alone is None:
        return verdict
    if alone:
        return _with(verdict, "reproduces alone, in a fresh process", {"after": []})
    if not before:
        return _with(verdict, "did not happen again: the case ran alone both times", {})
    again = dies(before)
    if again is None:
        return _with(verdict, f"not alone: in a fresh process it does not die; {len(before)} cases ran before it there", {})
    if not again:
        text = f"did not happen again, neither alone nor after the {len(before)} cases that had run before it"
        return _with(verdict, text, {})
    cause = ddmin(before, dies)
    named = [f"{item.subject}:{item.case_id}" for item in cause]
    more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
    text = f"depends on what ran before: dies after {', '.join(named[:SHOWN])}{more}, not alone"
    return _with(verdict, text, {"after": named})


def _with(verdict: Verdict, text: str, evidence: dict[str, object]) -> Verdict:
    return replace(verdict, findings=(*verdict.findings, Finding("replay", text, evidence)))
