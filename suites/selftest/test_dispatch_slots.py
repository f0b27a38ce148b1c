"""What travels in a slot: packed ids and weights, local ids, shared experts, the numbering of slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.dispatch import permuted_maps, to_k_major, to_token_major
from reference.expert_parallel import local_ids, mapped_ids, on_rank
from reference.packed_topk import decode, encode, encode_sign_extended
from reference.routing import RULES, with_shared


def packed_of(expert: int, weight: float, dtype: torch.dtype = torch.bfloat16) -> int:
    return int(encode(torch.tensor([[expert]]), torch.tensor([[weight]]), dtype))


def test_packing_gives_the_worked_example() -> None:
    assert packed_of(5, 0.75) == 0x00053F40
    assert packed_of(5, 0.75, torch.float16) == 0x00053A00
    assert packed_of(0, 0.0) == 0
    assert packed_of(-1, 0.0) == -65536


def test_a_negative_weight_keeps_its_expert() -> None:
    """OR-ing the sign-extended 16 bits destroys the id; packing masks them first."""
    ids, weights = torch.tensor([[5, 6]]), torch.tensor([[-0.75, 0.75]])
    assert decode(encode(ids, weights))[0].tolist() == [[5, 6]]
    assert decode(encode_sign_extended(ids, weights))[0].tolist() == [[-1, 6]]


@pytest.mark.parametrize("expert", [32768, -32769])
def test_an_id_beyond_16_bits_is_refused(expert: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        packed_of(expert, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_survives_packing(dtype: torch.dtype) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    ids = (torch.arange(1 << 16) % 2048)[None] - 1
    got_ids, weights = decode(encode(ids, bits.view(dtype)[None], dtype), dtype)
    assert torch.equal(got_ids, ids)
    nan = bits.view(dtype).isnan()
    assert torch.equal(weights.view(torch.int16)[0][~nan], bits[~nan])
    assert weights[0][nan].isnan().all()
    assert encode(ids, bits.view(dtype)[None], dtype).dtype == torch.int32


def test_weights_are_rounded_when_packed() -> None:
    ids, weights = decode(encode(torch.tensor([[3]]), torch.tensor([[1 / 3]], dtype=torch.float64)))
    assert (ids.item(), weights.item()) == (3, 0.333984375)


def test_local_ids_cover_the_rank_and_nothing_else() -> None:
    ids = torch.tensor([[-1, 0, 3, 4], [7, 8, 99, -7]])
    assert local_ids(ids, 4, 4).tolist() == [[-1, -1, -1, 0], [3, -1, -1, -1]]
    assert local_ids(ids, 0, 4).tolist() == [[-1, 0, 3, -1], [-1, -1, -1, -1]]


def test_an_expert_map_is_not_read_at_minus_one() -> None:
    """expert_map[-1] is the last expert's entry: a padding slot would become local expert 1."""
    expert_map = torch.tensor([-1, 0, -1, 1])
    ids = torch.tensor([[-1, 0, 1, 3, 4]])
    assert mapped_ids(ids, expert_map).tolist() == [[-1, -1, 0, 1, -1]]
    assert expert_map[ids[:, 0]].tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.integers(-3, 11), min_size=1, max_size=20), ranks=st.sampled_from((1, 2, 4)))
def test_every_expert_is_local_to_one_rank(ids: list[int], ranks: int) -> None:
    """A contiguous range is an expert map like any other."""
    given_ids, count = torch.tensor([ids]), 8 // ranks
    owned = [local_ids(given_ids, rank * count, count) for rank in range(ranks)]
    assert (torch.stack(owned) >= 0).sum(0).tolist() == [[int(0 <= i < 8) for i in ids]]
    for rank, local in enumerate(owned):
        whole = torch.arange(8)
        assert torch.equal(local, mapped_ids(given_ids, local_ids(whole, rank * count, count)))


def test_a_rank_keeps_the_weights_of_all_slots() -> None:
    routing = RULES["renormalize"](torch.tensor([[0.0, 3.0, 1.0, 2.0]]), None, 2)
    mine = on_rank(routing, 2, 2)
    assert mine.ids.tolist() == [[-1, 1]]
    assert mine.weights is routing.weights


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_shared_experts_are_extra_slots(weight: float) -> None:
    routing = RULES["renormalize"](torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]]), None, 1)
    fused = with_shared(routing, 3, 2, weight)
    assert fused.ids.tolist() == [[1, 3, 4], [0, 3, 4]]
    assert fused.weights.tolist() == [[1, weight, weight]] * 2
    assert fused.margin is routing.margin


def test_the_two_numberings_of_slots_are_transposes() -> None:
    """CUTLASS counts tokens first: slot k * tokens + token."""
    assert to_k_major(torch.arange(6), 3, 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert to_token_major(torch.arange(6), 3, 2).tolist() == [0, 2, 4, 1, 3, 5]


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(1, 9), top_k=st.integers(1, 9))
def test_numberings_invert_each_other(tokens: int, top_k: int) -> None:
    slots = torch.arange(tokens * top_k)
    assert torch.equal(to_token_major(to_k_major(slots, tokens, top_k), tokens, top_k), slots)
    assert torch.equal(slots.view(tokens, top_k).T.flatten(), to_token_major(slots, tokens, top_k))


def test_permuted_maps_pad_experts_to_tiles() -> None:
    """Slots 0..5 of ids; expert 0 has slot 1, expert 2 slots 0, 4 and 5; slots 2 and 3 are remote."""
    permuted, tokens = permuted_maps(torch.tensor([[2, 0], [-1, -1], [2, 2]]), 3, 2)
    assert permuted.tolist() == [2, 0, -1, -1, 3, 4]
    assert tokens.tolist() == [0, -1, 0, 2, 2, -1]


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.integers(-1, 5), min_size=2, max_size=2), max_size=9), tile=st.integers(1, 4))
def test_permuted_maps_lead_every_local_slot_to_its_token(rows: list[list[int]], tile: int) -> None:
    ids = torch.tensor(rows, dtype=torch.int64).view(-1, 2)
    permuted, tokens = permuted_maps(ids, 6, tile)
    local = ids.flatten() >= 0
    assert torch.equal(permuted >= 0, local)
    assert torch.equal(tokens[permuted[local]], torch.arange(len(local))[local] // 2)
    assert int((tokens >= 0).sum()) == int(local.sum())
    assert len(tokens) % tile == 0


def test_with_one_expert_a_token_rows_lead_to_slots() -> None:
    assert permuted_maps(torch.tensor([[1], [0], [1]]), 2, 1)[1].tolist() == [1, 0, 2]


@pytest.mark.parametrize("expert", [-32768, -1, 0, 32767])
def test_the_ends_of_the_id_range_pack(expert: int) -> None:
    ids, weights = torch.tensor([[expert, 0]]), torch.tensor([[0.5, -0.5]])
    back, kept = decode(encode(ids, weights))
    assert torch.equal(back, ids)
    assert torch.equal(kept.float(), weights)
