"""Attribution: against every subset by brute force, with sets that cannot be told, flaky bugs, several causes."""

from __future__ import annotations

import random
from itertools import chain, combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.versions.attribute import Attribution, attribute
from harness.versions.search import EXACT, Answer

GOOD, BAD, UNKNOWN = Answer.GOOD, Answer.BAD, Answer.UNKNOWN
FIVE = ("flashinfer", "cutlass-dsl", "tvm-ffi", "triton", "numpy")
Sets = frozenset[str]


def subsets(names: Sets) -> list[Sets]:
    return [frozenset(c) for c in chain.from_iterable(combinations(sorted(names), n) for n in range(len(names) + 1))]


def world(causes: list[Sets], untold: set[Sets]) -> dict[Sets, Answer]:
    """Bad where a cause is in: more new packages do not mend it."""
    answers = {s: BAD if any(c <= s for c in causes) else GOOD for s in subsets(frozenset(FIVE))}
    return {s: UNKNOWN if s in untold and 0 < len(s) < len(FIVE) else a for s, a in answers.items()}


def solve(answers: dict[Sets, Answer]) -> tuple[Attribution, list[Sets]]:
    asked: list[Sets] = []

    def breaks(names: Sets) -> Answer:
        asked.append(names)
        return answers[names]

    return attribute(FIVE, breaks, EXACT), asked


CAUSE = st.frozensets(st.sampled_from(FIVE), min_size=1)


@settings(max_examples=60)
@given(CAUSE)
def test_a_cause_is_found_as_it_is_in_few_runs(cause: Sets) -> None:
    found, asked = solve(world([cause], set()))
    (only,) = found.causes
    assert (only.packages, only.needed, only.suspects) == (cause, cause, frozenset())
    assert found.rest is GOOD
    assert len(asked) == len(set(asked)) <= (9 if len(cause) == 1 else 22)  # of 32 sets; the ends are two


@settings(max_examples=120)
@given(st.lists(CAUSE, min_size=1, max_size=3), st.sets(st.sampled_from(subsets(frozenset(FIVE)))))
def test_every_cause_is_minimal_among_all_sets_that_can_be_told(causes: list[Sets], untold: set[Sets]) -> None:
    answers = world(causes, untold)
    found, asked = solve(answers)
    assert len(asked) == len(set(asked))
    seen: Sets = frozenset()
    for cause in found.causes:
        assert answers[cause.packages] is BAD
        assert not seen & cause.packages
        assert not [s for s in subsets(cause.packages) if s != cause.packages and answers[s] is BAD]
        assert all(answers[cause.packages - {n}] is GOOD for n in cause.needed)
        assert all(answers[cause.packages - {n}] is UNKNOWN for n in cause.suspects)
        seen |= cause.packages
    assert answers[frozenset(FIVE) - seen] is found.rest is not BAD
    assert set(found.untold) == {s for s in asked if answers[s] is UNKNOWN}


def test_two_packages_that_only_resolve_together_are_both_told() -> None:
    """The culprit pins its companion: neither moves alone."""
    pair = frozenset(FIVE[:2])
    untold = {s for s in subsets(frozenset(FIVE)) if len(s & pair) == 1}
    (only,) = solve(world([frozenset(FIVE[:1])], untold))[0].causes
    assert (only.packages, only.needed, only.suspects) == (pair, frozenset(), pair)


@pytest.mark.parametrize(
    ("names", "answers", "said"),
    [
        ((), {}, "nothing moves"),
        (("a",), {1: GOOD}, "with everything new it is not bad"),
        (("a",), {1: UNKNOWN}, "with everything new it cannot be told"),
        (("a",), {1: BAD, 0: BAD}, "as it was it is bad too"),
        (("a",), {1: BAD, 0: UNKNOWN}, "as it was it cannot be told"),
    ],
)
def test_ends_that_do_not_differ_are_told(names: tuple[str, ...], answers: dict[int, Answer], said: str) -> None:
    found = attribute(names, lambda s: answers[len(s)], EXACT)
    assert (found.causes, found.stopped) == ((), said)


@pytest.mark.parametrize(("rate", "false", "most"), [(1.0, 0.0, 40), (0.5, 0.0, 150), (0.5, 0.02, 190), (0.3, 0.0, 280)])
def test_a_flaky_bug_is_attributed(rate: float, false: float, most: int) -> None:
    """Single culprits and pairs in turn; the confidence of one answer is 99.8 %, and a dozen are needed."""
    right = runs = 0
    for seed in range(16):
        rng = random.Random(seed)
        cause = frozenset(rng.sample(FIVE, 1 + seed % 2))
        asked: list[Sets] = []

        def breaks(names: Sets, rng: random.Random = rng, cause: Sets = cause, asked: list[Sets] = asked) -> Answer:
            asked.append(names)
            return BAD if rng.random() < (rate if cause <= names else false) else GOOD

        found = attribute(FIVE, breaks)
        right += [c.packages for c in found.causes] == [cause]
        runs += len(asked)
    assert right >= 15
    assert runs / 16 <= most
