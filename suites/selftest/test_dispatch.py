"""Tokens to expert order: the worked example of moe_align_block_size, stability, dropped ids."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.dispatch import align_blocks, dispatch

IDS = torch.tensor([[2, 3, 4], [1, 2, 4], [1, 3, 4], [1, 2, 3]])
some_ids = st.lists(st.lists(st.integers(-2, 7), min_size=3, max_size=3), min_size=0, max_size=12)


def test_align_blocks_gives_the_worked_example() -> None:
    slots, owners = align_blocks(IDS, 5, 4)
    assert slots.tolist() == [3, 6, 9, 12, 0, 4, 10, 12, 1, 7, 11, 12, 2, 5, 8, 12]
    assert owners.tolist() == [1, 2, 3, 4]


def test_dispatch_groups_slots_and_counts_them() -> None:
    """The example of triton_kernels' ragged metadata, its padding slot written as -1."""
    groups = dispatch(torch.tensor([[1, 3], [0, 3], [1, 2], [3, -1]]), 4)
    assert groups.order.tolist() == [2, 0, 4, 5, 1, 3, 6]
    assert groups.offsets.tolist() == [0, 1, 3, 4, 7]
    assert groups.slots(1).tolist() == [0, 4]


def test_ids_outside_the_experts_are_dropped() -> None:
    groups = dispatch(torch.tensor([[-1, 0], [5, 2], [-7, 1]]), 2)
    assert groups.order.tolist() == [1, 5]
    assert groups.offsets.tolist() == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(rows=some_ids)
def test_every_valid_slot_appears_once_in_its_group_in_order(rows: list[list[int]]) -> None:
    ids = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    flat = ids.flatten().tolist()
    groups = dispatch(ids, 6)
    for expert in range(6):
        assert groups.slots(expert).tolist() == [i for i, e in enumerate(flat) if e == expert]


@settings(max_examples=50, deadline=None)
@given(rows=some_ids, block=st.integers(1, 5))
def test_blocks_hold_one_expert_each_and_only_sentinels_pad_them(rows: list[list[int]], block: int) -> None:
    ids = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    flat = ids.flatten().tolist()
    slots, owners = align_blocks(ids, 6, block)
    assert len(slots) == block * len(owners)
    for owner, members in zip(owners.tolist(), slots.view(-1, block).tolist() if len(owners) else [], strict=True):
        real = [s for s in members if s != len(flat)]
        assert real
        assert members[: len(real)] == real
        assert all(flat[s] == owner for s in real)
    assert sorted(s for s in slots.tolist() if s != len(flat)) == [i for i, e in enumerate(flat) if 0 <= e < 6]
