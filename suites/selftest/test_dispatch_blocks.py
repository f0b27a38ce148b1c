"""Blocks of one expert each: moe_align_block_size with its buffers, batched activations and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.aligned import Aligned, align, align_batched, buffer_size, ordered
from reference.batched import from_batched, to_batched

IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
SORTED = [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
some_ids = st.lists(st.lists(st.integers(-2, 7), min_size=3, max_size=3), min_size=1, max_size=12)


def test_align_gives_the_worked_example_with_its_tail() -> None:
    made = align(IDS, 5, 4)
    assert made.slots.tolist() == SORTED + [12] * 11
    assert made.experts.tolist() == [1, 2, 3, 4, -1, -1, -1]
    assert (made.used, made.sentinel) == (16, 12)


@pytest.mark.parametrize(
    ("slots", "experts", "block", "whole", "size"),
    [(12, 5, 4, False, 27), (12, 5, 4, True, 28), (2, 64, 16, False, 32), (2, 64, 16, True, 32), (64, 64, 16, False, 1024)],
)
def test_buffers_hold_the_worst_case(slots: int, experts: int, block: int, whole: bool, size: int) -> None:
    assert buffer_size(slots, experts, block, whole) == size


def test_remote_experts_are_counted_and_marked() -> None:
    """Global experts 1 and 4 are local 0 and 1 in reverse; blocks of 2 and 3 stay, marked -1."""
    made = align(IDS, 5, 4, torch.tensor([-1, 1, -1, -1, 0]))
    assert made.slots.tolist()[:16] == SORTED
    assert made.experts.tolist() == [1, -1, -1, 0, -1, -1, -1]
    assert made.used == 16


def test_ignored_experts_take_no_blocks_and_local_order_rules() -> None:
    made = align(IDS, 5, 4, torch.tensor([-1, 1, -1, -1, 0]), ignore_invalid=True)
    assert made.slots.tolist()[:8] == [2, 5, 8, 12, 3, 6, 9, 12]
    assert made.experts.tolist()[:2] == [0, 1]
    assert made.used == 8


def test_invalid_ids_are_skipped() -> None:
    """Also where an expert map could be read at -1, the last expert's entry, or beyond its end."""
    ids = torch.tensor([[0, -1], [5, 1], [9, 1]])
    plain = align(ids, 2, 2)
    assert plain.slots.tolist() == [0, 6, 3, 5, 6, 6, 6, 6]
    assert plain.experts.tolist() == [0, 1, -1, -1]
    for ignore in (False, True):
        assert align(ids, 2, 2, torch.tensor([0, 1]), ignore).slots.tolist() == plain.slots.tolist()


def test_no_token_uses_no_block() -> None:
    made = align(torch.zeros(0, 2, dtype=torch.int64), 4, 8)
    assert (made.used, made.slots.numel(), made.experts.numel()) == (0, 0, 0)


def test_batched_blocks_give_the_worked_example() -> None:
    made = align_batched(torch.tensor([2, 3, 0, 6, 8]), 8, 4)
    real = [0, 1, 40, 40, 8, 9, 10, 40, 24, 25, 26, 27, 28, 29, 40, 40, 32, 33, 34, 35, 36, 37, 38, 39]
    assert made.slots.tolist() == real + [40] * 16
    assert made.experts.tolist() == [0, 1, 3, 3, 4, 4, -1, -1, -1, -1]
    assert (made.used, made.sentinel) == (24, 40)


def test_a_batch_that_is_no_whole_number_of_blocks_still_fits() -> None:
    """Two experts of 6 rows in blocks of 4 need 16 slots, more than the 12 rows there are."""
    made = align_batched(torch.tensor([6, 5]), 6, 4)
    assert made.slots.tolist() == [0, 1, 2, 3, 4, 5, 12, 12, 6, 7, 8, 9, 10, 12, 12, 12]
    assert made.experts.tolist() == [0, 0, 1, 1]


def test_more_rows_than_the_batch_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="has 3 rows, more than max_tokens 2"):
        align_batched(torch.tensor([1, 3]), 2, 4)
    with pytest.raises(ValueError, match="has 2 tokens, more than max_tokens 1"):
        to_batched(torch.ones(2, 4), torch.tensor([[0], [0]]), 2, 1)


@settings(max_examples=50, deadline=None)
@given(rows=some_ids, block=st.integers(1, 5), whole=st.booleans())
def test_aligned_slots_fit_their_buffer(rows: list[list[int]], block: int, whole: bool) -> None:
    ids = torch.tensor(rows)
    made = align(ids, 6, block)
    assert len(made.slots) == buffer_size(ids.numel(), 6, block) <= buffer_size(ids.numel(), 6, block, whole)
    assert (made.slots[made.used :] == made.sentinel).all()
    assert (made.experts[made.used // block :] == -1).all()


@settings(max_examples=50, deadline=None)
@given(rows=some_ids, block=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_order_within_an_expert_is_put_in_order(rows: list[list[int]], block: int, seed: int) -> None:
    """Shuffle each expert's run, fill the tail with rubbish: the ordered form is ours again."""
    made, generator = align(torch.tensor(rows), 6, block), torch.Generator().manual_seed(seed)
    slots, owners = made.slots.clone(), made.experts[: made.used // block].repeat_interleave(block)
    for expert in owners.unique().tolist():
        mine = (owners == expert).nonzero().flatten()
        slots[mine] = slots[mine[torch.randperm(len(mine), generator=generator)]]
    slots[made.used :] = 0
    shuffled = Aligned(slots, made.experts.clone(), made.used, made.sentinel)
    shuffled.experts[made.used // block :] = 0
    again = ordered(shuffled, block)
    assert torch.equal(again.slots, made.slots)
    assert torch.equal(again.experts, made.experts)


def test_a_slot_under_the_wrong_expert_stays_wrong() -> None:
    made = align(IDS, 5, 4)
    slots = made.slots.clone()
    slots[[0, 4]] = slots[[4, 0]]
    assert not torch.equal(ordered(replace(made, slots=slots), 4).slots, made.slots)


def test_batched_rows_hold_each_experts_tokens_and_poison() -> None:
    x = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    made = to_batched(x, torch.tensor([[1, 0], [1, -1], [2, 1]]), 4, 3)
    assert made.masked_m.tolist() == [1, 3, 1, 0]
    assert made.slots.tolist() == [[1, -1, -1], [0, 2, 5], [4, -1, -1], [-1, -1, -1]]
    assert made.rows[1].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert made.rows[0, 0].tolist() == [1, 2]
    assert made.rows[0, 1:].isnan().all()
    assert made.rows[3].isnan().all()


def test_the_poison_is_of_your_choice() -> None:
    made = to_batched(torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[0]]), 1, 2, poison=-3.0)
    assert made.rows.tolist() == [[[1, 1], [-3, -3]]]
    assert made.rows.dtype == torch.bfloat16


@settings(max_examples=50, deadline=None)
@given(rows=some_ids)
def test_from_batched_inverts_to_batched(rows: list[list[int]]) -> None:
    """Slots without an expert come back as zero, never as poison."""
    ids = torch.tensor(rows)
    x = torch.arange(1.0, 1 + 2 * len(ids)).view(-1, 2)
    back = from_batched(to_batched(x, ids, 6, 3 * len(ids)), len(ids), 3)
    valid = (ids >= 0) & (ids < 6)
    assert torch.equal(back, torch.where(valid[..., None], x[:, None], 0.0))


def test_one_expert_a_token_needs_no_division() -> None:
    made = to_batched(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1], [0], [1]]), 2, 2, poison=0.0)
    assert made.rows.flatten().tolist() == [2, 0, 1, 3]
    assert from_batched(made, 3, 1).flatten().tolist() == [1, 2, 3]
