"""Which of the packages that an upgrade moves breaks it: delta debugging over the set, as a pure function of what was observed.

ddmin (Zeller and Hildebrandt 2002) with its three answers: a set of new versions is bad, good, or cannot be told (it does not
resolve, does not import, fails in another way). A cause is a minimal set: it is bad, and every package in it is either
*needed* (bad no longer without it) or a *suspect* (nothing could be told without it). Several causes are found one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harness.versions.search import CONFIDENCE, PATIENCE, Answer, Model, likelihoods

MOST_SETS = 256  # of suspects looked through one by one: all those of eight packages

Names = frozenset[str]
Breaks = Callable[[Names], Answer]


@dataclass(frozen=True)
class Asked:
    """What is known of one set of new versions: its answer, and how often it failed and passed."""

    packages: Names
    answer: Answer
    fails: int
    passes: int


@dataclass(frozen=True)
class Cause:
    """packages: a set that is bad by itself; needed: those without which the rest of it is good; suspects: the others, of
    which the set without them cannot be told."""

    packages: Names
    needed: Names
    suspects: Names


@dataclass(frozen=True)
class Attribution:
    """causes: minimal sets, the packages of one in no other; rest: what the upgrade is without all of them; stopped: why
    there is no cause; asked: every set, in the order of its first run."""

    causes: tuple[Cause, ...]
    rest: Answer
    asked: tuple[Asked, ...]
    stopped: str = ""

    @property
    def untold(self) -> tuple[Names, ...]:
        """The sets that could not be told."""
        return tuple(a.packages for a in self.asked if a.answer is Answer.UNKNOWN)


def attribute(changed: Sequence[str], breaks: Breaks, model: Model = Model()) -> Attribution:  # noqa: B008 - frozen
    """The minimal sets of `changed` that break. breaks(names): one run with these packages new and all others old.

    Both ends first: nothing moved must be good, everything moved bad. With `EXACT` every set is run once, else until it is
    sure: the shares of failing runs with and without the bug are learned from all sets, as the bisect does.
    """
    asking, everything = _Asking(breaks, model), frozenset(changed)
    if (stopped := _ends(asking, everything)) is not None:
        return Attribution((), asking(everything) if everything else Answer.UNKNOWN, asking.log, stopped)
    causes: list[Cause] = []
    left, rest = everything, Answer.BAD
    while rest is Answer.BAD:
        causes.append(_cause(asking, left, tuple(changed)))
        left -= causes[-1].packages
        rest = asking(left)
    return Attribution(tuple(causes), rest, asking.log)


def _ends(asking: _Asking, everything: Names) -> str | None:
    if not everything:
        return "nothing moves"
    for names, wanted, text in ((everything, Answer.BAD, "with everything new"), (frozenset[str](), Answer.GOOD, "as it was")):
        if (answer := asking(names)) is not wanted:
            return (
                f"{text} it is {'not bad' if answer is Answer.GOOD else 'bad too'}"
                if answer is not Answer.UNKNOWN
                else (f"{text} it cannot be told")
            )
    return None


def _cause(asking: _Asking, bad: Names, order: Sequence[str]) -> Cause:
    """A minimal set within `bad`."""
    while True:
        bad = _ddmin(asking, bad, order)
        without = {name: asking(bad - {name}) for name in order if name in bad}
        needed = frozenset(n for n, answer in without.items() if answer is Answer.GOOD)
        smaller = next((s for s in _between(needed, bad, order) if asking(s) is Answer.BAD), None)
        if smaller is None:
            return Cause(bad, needed, bad - needed)
        bad = smaller


def _between(needed: Names, bad: Names, order: Sequence[str]) -> Iterator[Names]:
    """Proper subsets of `bad` that hold what is needed, the smallest first: several suspects may go at once where none may
    alone, as packages that pin each other do."""
    suspects = [n for n in order if n in bad - needed]
    sets = (needed | set(some) for size in range(len(suspects)) for some in itertools.combinations(suspects, size))
    return itertools.islice(sets, MOST_SETS)


def _ddmin(asking: _Asking, bad: Names, order: Sequence[str]) -> Names:
    """Parts first, then what is left without one, then finer parts; from any that is bad it goes on."""
    count = 2
    while len(bad) > 1:
        names = [n for n in order if n in bad]
        parts = [frozenset(names[len(names) * i // count : len(names) * (i + 1) // count]) for i in range(count)]
        if (part := next((p for p in parts if asking(p) is Answer.BAD), None)) is not None:
            bad, count = part, 2
        elif (part := next((p for p in parts if asking(bad - p) is Answer.BAD), None)) is not None:
            bad, count = bad - part, max(count - 1, 2)
        elif count < len(bad):
            count = min(2 * count, len(bad))
        else:
            break
    return bad


class _Asking:
    """Runs a set until it is sure, and remembers."""

    def __init__(self, breaks: Breaks, model: Model) -> None:
        self._breaks, self._model = breaks, model
        self._seen: dict[Names, list[Answer]] = {}
        self._said: dict[Names, Answer] = {}
        self._bad_end: Names | None = None

    @property
    def log(self) -> tuple[Asked, ...]:
        return tuple(
            Asked(names, self._said.get(names, Answer.UNKNOWN), runs.count(Answer.BAD), runs.count(Answer.GOOD))
            for names, runs in self._seen.items()
        )

    def __call__(self, names: Names) -> Answer:
        if names not in self._said:
            self._said[names] = self._decided(names)
        return self._said[names]

    def _decided(self, names: Names) -> Answer:
        if self._bad_end is None:  # the first question, of everything: one failure is what the other sets are compared with
            self._bad_end = names
            return self._until_a_failure(names)
        while (answer := self._sure(names)) is None:
            shy = sum(len(self._seen[s]) for s in self._said if self._said[s] is Answer.BAD) <= len(self._seen.get(names, ()))
            asked = self._bad_end if shy and self._model.certain_bad < 1 else names  # how often does it fail at all?
            if self._run(asked) is Answer.UNKNOWN or len(self._seen.get(names, ())) >= PATIENCE:
                return Answer.UNKNOWN
        return answer

    def _until_a_failure(self, names: Names) -> Answer:
        most = PATIENCE if self._model.certain_bad < 1 else 1
        for _ in range(most):
            if (answer := self._run(names)) is not Answer.GOOD:
                return answer
        return Answer.GOOD

    def _run(self, names: Names) -> Answer:
        answer = self._breaks(names)
        self._seen.setdefault(names, []).append(answer)
        return answer

    def _sure(self, names: Names) -> Answer | None:
        """Which of the two this set is like, once the odds are clear."""
        own = self._count(names)
        if not own.any():
            return None
        pools = [sum((self._count(s) for s, a in self._said.items() if a is kind), np.zeros(2, np.int64)) for kind in SIDES]
        odds = likelihoods(own, pools[0], pools[1], self._model)
        for kind, share in zip(SIDES, odds, strict=True):
            if share >= CONFIDENCE:
                return kind
        return None

    def _count(self, names: Names) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        runs = self._seen.get(names, [])
        return np.array([runs.count(Answer.BAD), runs.count(Answer.GOOD)], np.int64)


SIDES = (Answer.BAD, Answer.GOOD)
