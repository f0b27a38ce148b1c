"""Who judges what next, and what a lost worker leaves behind. Pure: workers are names.

The subjects of a case share inputs and oracle, so a worker keeps to its case; the longest cases come first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from harness.select import Item
from harness.verdict import Finding, Stage, Status, Verdict

LOSSES = 2  # an item that was in flight when a worker was lost is judged once more; lost again, it has its verdict


class Board:
    """The items of a plan without a verdict, and who has which. seconds: what each may take."""

    def __init__(self, items: Sequence[Item], seconds: Sequence[float]) -> None:
        length: Counter[str] = Counter()
        for item, cost in zip(items, seconds, strict=True):
            length[item.case_id] += cost  # type: ignore[assignment]
        self._cases: dict[str, deque[Item]] = {case: deque() for case, _ in length.most_common()}
        for item in items:
            self._cases[item.case_id].append(item)
        self._mine: dict[str, str] = {}
        self._flying: dict[str, deque[Item]] = {}
        self._lost: dict[Item, list[str]] = {}
        self.left = len(items)

    def next(self, worker: str) -> Item | None:
        """What a worker is to judge after what it has; None where nothing is left to hand out."""
        case = self._mine.get(worker)
        if case not in self._cases:
            taken = set(self._mine.values())
            free = (c for c in self._cases if c not in taken)
            case = next(free, None) or max(self._cases, key=lambda c: len(self._cases[c]), default=None)
        if case is None:
            return None
        self._mine[worker] = case
        item = self._cases[case].popleft()
        if not self._cases[case]:
            del self._cases[case]
        self._flying.setdefault(worker, deque()).append(item)
        return item

    def judged(self, worker: str, item: Item) -> None:
        """A worker has answered for an item."""
        self._flying[worker].remove(item)
        self.left -= 1

    def lost(self, worker: str, where: str) -> Verdict | None:
        """A worker is gone. What it had not begun is anybody's; the item it was judging is judged once more, or has the verdict
        that is returned."""
        items = self._flying.pop(worker, deque())
        self._mine.pop(worker, None)
        for item in list(items)[:0:-1]:
            self._back(item)
        return self._struck(items[0], where) if items else None

    def _struck(self, item: Item, where: str) -> Verdict | None:
        places = self._lost.setdefault(item, [])
        places.append(where)
        if len(places) < LOSSES:
            self._back(item)
            return None
        self.left -= 1
        text = f"lost with its node twice: {' and '.join(places)}"
        finding = Finding("node", text, {"nodes": list(places)})
        return Verdict(item.case_id, item.subject, Status.CRASHED, Stage.LAUNCH, text, (finding,))

    def _back(self, item: Item) -> None:
        self._cases.setdefault(item.case_id, deque()).appendleft(item)
