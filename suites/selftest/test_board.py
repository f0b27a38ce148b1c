"""Who judges what next on many devices, and what a lost one leaves behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import MoecheckError, SelectionError
from harness.executor.board import Board
from harness.executor.on_ray import needs, places
from harness.run import Manner
from harness.select import Item
from harness.verdict import Status

CASES = [f"moe.bf16.t1.h64.i64.e8.k1.renormalize.swiglu.standard.real.s{seed}" for seed in range(3)]
ITEMS = [Item(case, subject) for case in CASES for subject in ("a", "b")]


def test_a_worker_keeps_to_its_case_and_the_longest_comes_first() -> None:
    board = Board(ITEMS, [1, 1, 5, 5, 2, 2])
    taken = [board.next("one"), board.next("two"), board.next("one"), board.next("two")]
    assert taken == [ITEMS[2], ITEMS[4], ITEMS[3], ITEMS[5]]
    assert {board.next("one"), board.next("two")} == {ITEMS[0], ITEMS[1]}  # the last case is shared
    assert board.next("one") is None


def test_only_the_item_that_was_being_judged_counts_as_lost_and_twice_is_a_verdict() -> None:
    board = Board(ITEMS[:2], [1, 1])
    assert [board.next("one"), board.next("one")] == ITEMS[:2]
    assert board.lost("one", "node A") is None
    assert [board.next("two"), board.next("two")] == ITEMS[:2]
    verdict = board.lost("two", "node B")
    assert verdict is not None
    assert (verdict.status, verdict.reason) == (Status.CRASHED, "lost with its node twice: node A and node B")
    assert (verdict.case_id, verdict.subject) == (ITEMS[0].case_id, ITEMS[0].subject)
    assert board.left == 1
    assert board.next("three") == ITEMS[1]
    assert board.lost("three", "node C") is None  # of this one it is the first loss
    assert board.lost("idle", "node D") is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from(["next", "answer", "lose"])), max_size=60))
def test_whatever_is_lost_every_item_gets_one_verdict(events: list[tuple[str, str]]) -> None:
    board, has, done = Board(ITEMS, [1.0] * len(ITEMS)), dict[str, list[Item]](), list[Item]()
    for worker, event in [*events, *[(w, e) for _ in ITEMS for w in "xyz" for e in ("next", "answer")]]:
        mine = has.setdefault(worker, [])
        if event == "next" and len(mine) < 2 and (item := board.next(worker)) is not None:
            mine.append(item)
        elif event == "answer" and mine:
            board.judged(worker, mine[0])
            done.append(mine.pop(0))
        elif event == "lose":
            mine.clear()
            if (verdict := board.lost(worker, "a node")) is not None:
                done.append(Item(verdict.case_id, verdict.subject))
    assert sorted(done) == sorted(ITEMS)
    assert board.left == 0


@pytest.mark.parametrize(
    ("kind", "offered", "wanted", "room"),
    [
        ("cpu", {"CPU": 3.0}, {"num_cpus": 1}, 3),
        ("cuda", {"CPU": 64.0, "GPU": 2.0}, {"num_gpus": 1}, 2),
        ("cuda", {"CPU": 64.0}, {"num_gpus": 1}, 0),
        ("cuda", {"GPU": 16.0, "moecheck_x": 8.0}, {"num_gpus": 1, "resources": {"moecheck_x": 1}}, 8),
    ],
)
def test_an_actor_asks_for_a_device_of_the_platform(
    kind: str, offered: dict[str, float], wanted: dict[str, object], room: int
) -> None:
    assert needs("x", kind, offered) == wanted
    assert places(wanted, offered) == room


def test_a_soak_is_not_for_many_devices() -> None:
    from harness.plan import Request

    with pytest.raises(MoecheckError, match="does not go with --executor ray"):
        Manner(ray=True).check(Request("cpu", "smoke", soak=True))
    assert issubclass(SelectionError, MoecheckError)
