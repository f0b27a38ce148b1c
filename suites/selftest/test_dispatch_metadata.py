"""triton_kernels' metadata: bitmatrix with both kinds of division, and the ragged schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.bitmatrix import DIVISIONS, bitmatrix, histogram, stored, unpack
from reference.dispatch import dispatch
from reference.ragged import BLOCK_SIZES, HIP_BLOCK_SIZES, block_offsets, block_schedule, most_blocks, ragged

IDS = torch.tensor([[1, 3], [0, 3], [1, 2], [3, -1]])
some_ids = st.lists(st.lists(st.integers(-2, 41), min_size=3, max_size=3), min_size=1, max_size=12)


def test_a_bit_is_its_expert() -> None:
    words = bitmatrix(torch.tensor([[0, 31], [32, 63], [64, 5]]), 65)
    assert words.tolist() == [[0x80000001, 0, 0], [0, 0x80000001, 0], [32, 0, 1]]
    assert words.dtype == torch.int64


@pytest.mark.parametrize(
    ("division", "words"),
    [("guarded", [[2, 0]] * 3), ("floor", [[2, 0]] * 3), ("c", [[0x80000002, 0], [0x40000002, 0], [2, 0]])],
)
def test_minus_one_becomes_expert_31_under_c_division(division: str, words: list[list[int]]) -> None:
    """-1 / 32 is 0 in C and the shift by -1 % 32 is one by 31; -2 hits expert 30. -33 falls off either way."""
    ids = torch.tensor([[1, -1], [1, -2], [1, -33]])
    assert bitmatrix(ids, 40, division).tolist() == words


def test_the_phantom_expert_gains_tokens() -> None:
    ids = torch.tensor([[1, -1], [-1, -1], [31, 2]])
    assert histogram(bitmatrix(ids, 40), 40)[31] == 1
    assert histogram(bitmatrix(ids, 40, "floor"), 40)[31] == 1
    assert histogram(bitmatrix(ids, 40, "c"), 40)[31] == 3


@pytest.mark.parametrize(("division", "bit"), [("guarded", 0), ("floor", 1), ("c", 1)])
def test_an_id_beyond_the_experts_sets_a_padding_bit_unless_guarded(division: str, bit: int) -> None:
    """40 experts leave 24 bits of the second word free; beyond the words nothing can be set."""
    words = bitmatrix(torch.tensor([[40, 64]]), 40, division)
    assert words.tolist() == [[0, bit << 8]]
    assert histogram(words, 40).sum() == 0


def test_an_unknown_division_is_refused() -> None:
    with pytest.raises(ValueError, match="known: guarded, floor, c"):
        bitmatrix(IDS, 4, "round")


@settings(max_examples=50, deadline=None)
@given(rows=some_ids, division=st.sampled_from(DIVISIONS))
def test_unpacked_bits_are_the_sets_of_ids(rows: list[list[int]], division: str) -> None:
    words = bitmatrix(torch.tensor(rows), 37, division)
    for row, bits in zip(rows, unpack(words, 37).tolist(), strict=True):
        phantoms = {32 + i for i in row if i < 0} if division == "c" else set()
        assert {e for e, on in enumerate(bits) if on} == {i for i in row if 0 <= i < 37} | phantoms


def test_the_stored_bitmatrix_is_transposed_and_padded() -> None:
    kept = stored(bitmatrix(torch.tensor([[0, 31], [32, 33], [1, 2]]), 64))
    assert (tuple(kept.shape), kept.dtype) == ((2, 32), torch.uint32)
    assert kept[:, :4].tolist() == [[0x80000001, 0, 6, 0], [0, 3, 0, 0]]
    assert stored(torch.zeros(33, 1, dtype=torch.int64)).shape == (1, 64)


def test_ragged_metadata_gives_the_worked_example() -> None:
    made = ragged(IDS, 4)
    assert made.sizes.tolist() == [1, 2, 1, 3]
    assert made.offsets.tolist() == [0, 1, 3, 4, 7]
    assert made.col_sorted.tolist() == [2, 0, 4, 5, 1, 3, 6, -1]
    assert made.row_sorted.tolist() == [1, 4, 0, 5, 2, 3, 6, -1]
    assert made.gathered.tolist() == [1, 0, 2, 2, 0, 1, 3, -1]
    assert block_offsets(made.sizes, 2).tolist() == [0, 1, 2, 3, 5]
    assert block_schedule(made.sizes, 2, 6).tolist() == [0, 1, 2, 3, 0x10003, -1]


def test_a_missing_slot_in_the_middle_keeps_the_numbers_of_the_others() -> None:
    """Numbering the valid slots only, as a compacting argsort does, would shift everything behind the gap."""
    made = ragged(torch.tensor([[1, -1], [0, 1]]), 2)
    assert made.col_sorted.tolist() == [2, 0, 3, -1]
    assert made.row_sorted.tolist() == [1, -1, 0, 2]


def test_schedules_give_the_example_of_the_library() -> None:
    """Slices of 15, 17, 0 and 127 rows in blocks of 16 to 128."""
    sizes = torch.tensor([15, 17, 0, 127])
    assert [block_offsets(sizes, b).tolist() for b in BLOCK_SIZES] == [
        [0, 1, 3, 3, 11],
        [0, 1, 2, 2, 6],
        [0, 1, 2, 2, 4],
        [0, 1, 2, 2, 3],
    ]
    entries = most_blocks(4, 159)
    assert entries == 13
    assert block_schedule(sizes, 64, entries).tolist() == [0, 1, 3, 0x10003, *[-1] * 9]
    assert HIP_BLOCK_SIZES[-1] == 256


@pytest.mark.parametrize(("experts", "slots", "entries"), [(8, 8, 8), (8, 3, 3), (8, 9, 8), (8, 23, 8), (8, 24, 9), (1, 17, 2)])
def test_the_schedule_holds_the_worst_distribution(experts: int, slots: int, entries: int) -> None:
    """One row in each expert but one, the rest in the last: experts - 1 + ceil((slots - experts + 1) / 16)."""
    assert most_blocks(experts, slots) == entries
    sizes = torch.zeros(experts, dtype=torch.int64)
    sizes[: min(experts, slots)] = 1
    sizes[0] += slots - int(sizes.sum())
    assert int(block_offsets(sizes, 16)[-1]) == entries


def test_a_schedule_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        block_schedule(torch.tensor([33]), 16, 2)


@settings(max_examples=50, deadline=None)
@given(rows=some_ids, block=st.sampled_from(BLOCK_SIZES))
def test_ragged_metadata_is_consistent(rows: list[list[int]], block: int) -> None:
    ids = torch.tensor(rows)
    made, valid = ragged(ids, 40), int(dispatch(ids, 40).offsets[-1])
    order = made.col_sorted[:valid]
    flat = ids.flatten()
    assert made.sizes.tolist() == [int((flat == e).sum()) for e in range(40)]
    assert torch.equal(flat[order], flat[order].sort(stable=True).values)
    assert torch.equal(made.row_sorted[order], torch.arange(valid))
    assert torch.equal(made.gathered[:valid], order // 3)
    assert (made.col_sorted[valid:] == -1).all()
    assert int((made.row_sorted == -1).sum()) == flat.numel() - valid
    schedule = block_schedule(made.sizes, block, most_blocks(40, flat.numel()))
    seen = [(s & 0xFFFF, s >> 16) for s in schedule.tolist() if s >= 0]
    assert seen == [(e, b) for e in range(40) for b in range(-(-int(made.sizes[e]) // block))]


def test_with_one_expert_a_token_slots_are_tokens() -> None:
    assert ragged(torch.tensor([[1], [0], [1]]), 2).gathered.tolist() == [1, 0, 2]


def test_the_block_sizes_are_those_of_triton_kernels() -> None:
    assert BLOCK_SIZES == (16, 32, 64, 128)
    assert HIP_BLOCK_SIZES == (16, 32, 64, 128, 256)
