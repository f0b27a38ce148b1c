"""Shards: every item in exactly one of them for any count, about equally long, a case together where that is free."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import plan
from harness.case import Case
from harness.errors import RunFolderError, SelectionError
from harness.plan import Plan, Request
from harness.select import Item
from harness.shard import MAX_SHARDS, SLACK, Shard, assign, costs, estimate

CASE = "moe.bf16.t{}.h64.i32.e4.k2.renormalize.swiglu.standard.real.s0"
BIG = CASE.replace("h64", "h7168").replace("i32", "i2048").replace("e4", "e256")


def items_of(cases: int, subjects: int) -> list[Item]:
    return sorted(Item(CASE.format(tokens), f"b{subject}") for tokens in range(cases) for subject in range(subjects))


@st.composite
def timed(draw: st.DrawFn) -> tuple[list[Item], list[float]]:
    """Items of several cases, each with some of the subjects, and what each takes."""
    items = [item for item in items_of(draw(st.integers(1, 12)), 4) if draw(st.booleans())] or items_of(1, 1)
    return items, draw(st.lists(st.floats(0.001, 300), min_size=len(items), max_size=len(items)))


def length(parts: list[tuple[Item, ...]], items: list[Item], seconds: list[float]) -> float:
    cost = dict(zip(items, seconds, strict=True))
    return max(sum(cost[item] for item in part) for part in parts)


@given(timed(), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_shards_are_disjoint_complete_and_in_the_plans_order(given: tuple[list[Item], list[float]], count: int) -> None:
    """A dealer that rounds a share down loses the last items, one that rounds up deals them twice."""
    items, seconds = given
    parts = assign(items, seconds, count)
    assert len(parts) == count
    assert Counter(item for part in parts for item in part) == Counter(items)
    assert all(list(part) == [i for i in items if i in part] for part in parts)
    assert parts == assign(list(items), tuple(seconds), count)


@given(timed(), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_no_shard_is_much_longer_than_it_must_be(given: tuple[list[Item], list[float]], count: int) -> None:
    """Graham's bound of list scheduling (1966), times the price of keeping cases together: dealt by their number, a few long
    items end up in one shard."""
    items, seconds = given
    bound = sum(seconds) / count + (1 - 1 / count) * max(seconds) if count < len(items) else max(seconds)
    assert length(assign(items, seconds, count), items, seconds) <= SLACK * bound + 1e-6


def test_a_case_stays_with_its_subjects_where_that_is_free() -> None:
    """Each of them would draw the inputs and ask the oracle again."""
    items = items_of(40, 5)
    for part in assign(items, [1.0] * len(items), 8):
        assert set(Counter(item.case_id for item in part).values()) == {5}


def test_a_case_that_would_make_the_run_longer_is_taken_apart() -> None:
    """One case of two: kept whole it is the run."""
    items = items_of(2, 8)
    seconds = [100.0 if item.case_id == items[0].case_id else 1.0 for item in items]
    parts = assign(items, seconds, 4)
    assert length(parts, items, seconds) <= SLACK * 202


def test_more_shards_than_items_leave_some_empty() -> None:
    parts = assign(items_of(2, 1), [1.0, 1.0], 5)
    assert sorted(map(len, parts)) == [0, 0, 0, 1, 1]


def test_recorded_seconds_count_and_scale_the_estimates_of_the_others() -> None:
    """Unscaled, one subject's guesses would stand beside another's measurements in another unit."""
    items = [Item(CASE.format(1), "slow"), Item(CASE.format(2), "slow"), Item(CASE.format(1), "new")]
    one = estimate(Case.parse(CASE.format(1)))
    assert costs(items, {}) == pytest.approx((one, one, one), rel=1e-3)
    assert costs(items, {items[0]: 7 * one}) == pytest.approx((7 * one, 7 * one, 7 * one), rel=1e-3)
    other = {items[0]: 7 * one, Item(CASE.format(1), "quick"): 0.0}
    assert costs(items, other) == pytest.approx((7 * one, 7 * one, 3.5 * one), rel=1e-3)


def test_a_served_shape_is_estimated_longer_than_a_small_one() -> None:
    assert estimate(Case.parse(BIG.format(33))) > 4 * estimate(Case.parse(CASE.format(33)))


@pytest.mark.parametrize("text", ["", "3", "0/8", "9/8", "3/0", "-1/8", "3/8/9", "a/b", "1/99999999", "٣/٨", "1/1 "])
def test_a_shard_that_cannot_be_says_what_is_wanted(text: str) -> None:
    with pytest.raises(SelectionError, match="wanted I/N"):
        Shard.parse(text)


def test_a_shard_is_written_as_it_is_read() -> None:
    assert str(Shard.parse("3/8")) == "3/8"
    assert Shard.parse(f"1/{MAX_SHARDS}").count == MAX_SHARDS


def test_a_plan_keeps_its_seconds_and_shares_by_them(tmp_path: Path) -> None:
    """By the estimates of the machine that runs the shard, two versions of this file would disagree on who has what."""
    items = tuple(items_of(6, 1))
    made = Plan(Request("cpu", "smoke"), 60.0, items, 0, seconds=(100.0, *[1.0] * 5))
    made.write(tmp_path / "nightly.json")
    read = plan.load(tmp_path / "nightly.json")
    assert read == made
    assert made.digest == Plan(Request("cpu", "smoke"), 60.0, items, 0).digest
    assert sorted(len(read.share(Shard(i, 2)).items) for i in (1, 2)) == [1, 5]
    assert read.share(None) is read


@pytest.mark.parametrize(("old", "new"), [(', "seconds": 2.0', ""), ("2.0}", "-2.0}"), ("2.0}", '"x"}'), ("2.0}", "1e999}")])
def test_seconds_that_cannot_be_are_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / plan.NAME
    Plan(Request("cpu", "smoke"), 60.0, tuple(items_of(2, 1)), 0, seconds=(1.0, 2.0)).write(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(RunFolderError, match="not a moecheck plan"):
        plan.load(tmp_path)
