"""What every layout must do, run over the folder: round trip, bijection, padding. Closed forms are in test_layouts_*.py."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference.layouts
from reference.layout import REST, Layout, Tiling, move_bits, pad_to, tiled
from reference.layouts import all_layouts, get
from reference.layouts.linear import pack_nibbles, unpack_nibbles
from reference.layouts.swizzle_128x4 import padded_shape, swizzle, unswizzle

Shape = tuple[int, ...]
LAYOUTS = [pytest.param(layout, id=name) for name, layout in all_layouts().items()]
AXES = {3: ((1, 3), (1, 140), (1, 9)), 2: ((1, 290), (1, 20))}  # unpadded edges on both sides of every tile


def shapes(layout: Layout) -> st.SearchStrategy[Shape]:
    """Logical shapes of `layout`: small, on and off its tile edges."""
    limits = AXES[len(layout.multiple)]
    axes = [
        st.integers(1, 2).map(lambda n, m=m: n * m)
        if m > 1
        else st.one_of(st.sampled_from((low, high)), st.integers(low, high))
        for m, (low, high) in zip(layout.multiple, limits, strict=True)
    ]
    return st.tuples(*axes)


def bits_of(x: Tensor) -> Tensor:
    """uint8 [...] -> int64 [bits] of 0 and 1, in memory order."""
    return (x.reshape(-1, 1) >> torch.arange(8, dtype=torch.uint8) & 1).long().flatten()


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_unpack_inverts_pack(layout: Layout, data: st.DataObject) -> None:
    shape = data.draw(shapes(layout))
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(math.prod(shape)))
    assert torch.equal(layout.unpack(layout.pack(x), shape), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_every_source_bit_lands_exactly_once_and_the_rest_is_zero(layout: Layout, data: st.DataObject) -> None:
    """Plane p holds bit p of every bit's own number: packed planes spell out where each stored bit came from."""
    shape = data.draw(shapes(layout))
    bits = 8 * math.prod(shape)
    number = torch.arange(1, bits + 1)
    origin: Tensor | int = 0
    for plane in range(bits.bit_length()):
        x = ((number >> plane & 1).view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8).view(shape)
        origin = origin + (bits_of(layout.pack(x)) << plane)
    assert isinstance(origin, Tensor)
    assert torch.equal(origin[origin != 0].sort().values, number)
    assert origin.numel() == 8 * math.prod(layout.padded_shape(shape))


@pytest.mark.parametrize("layout", [p for p in LAYOUTS if not p.values[0].bitwise])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_elements_of_any_width_move_whole(layout: Layout, dtype: torch.dtype) -> None:
    shape = tuple(m if m > 1 else 3 for m in layout.multiple)
    x = torch.arange(math.prod(shape)).remainder(100).view(shape).to(dtype)
    stored = layout.pack(x)
    assert stored.dtype == dtype
    assert torch.equal(layout.unpack(stored, shape).view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_covers_the_shape_and_is_stable(layout: Layout) -> None:
    shape = tuple(m if m > 1 else 3 for m in layout.multiple)
    padded = layout.padded_shape(shape)
    assert math.prod(padded) >= math.prod(shape)
    if layout.name != "swizzle_128x4_joint":  # its padded shape is the one joint matrix
        assert all(p >= n for p, n in zip(padded, shape, strict=True))
        assert layout.padded_shape(padded) == padded


STORAGE = {  # logical shape -> storage shape, as the libraries hold it in memory order
    "blackwell_scale": ((130, 9), (1, 2, 4, 2, 256)),
    "blackwell_value": ((5, 130), (5, 256)),
    "blackwell_value_packed_shuffled": ((513, 130), (2, 2, 512, 128)),
    "blackwell_value_shuffled": ((257, 5), (2, 2, 256, 64)),
    "block_major_k_128": ((5, 384), (3, 5, 128)),
    "block_major_k_64": ((5, 192), (3, 5, 64)),
    "cdna4_scale": ((33, 9), (2, 512)),
    "cdna4_scale_unpadded": ((64, 16), (2, 512)),
    "gated_interleave_16": ((96, 3), (96, 3)),
    "gated_interleave_32": ((192, 3), (192, 3)),
    "gated_interleave_64": ((384, 3), (384, 3)),
    "gated_interleave_8": ((48, 3), (48, 3)),
    "gated_reorder": ((6, 3), (6, 3)),
    "gfx1250_scale": ((129, 5), (2, 1024)),
    "hopper_scale_w4_k2": ((129, 3), (8, 128)),
    "hopper_scale_w4_k4": ((129, 3), (8, 128)),
    "hopper_scale_w8_k2": ((129, 5), (8, 192)),
    "hopper_scale_w8_k4": ((129, 5), (8, 256)),
    "hopper_value_mma2_first": ((17, 33), (8, 256)),
    "hopper_value_mma2_new": ((257, 65), (128, 512)),
    "hopper_value_mma2_old": ((65, 65), (32, 512)),
    "hopper_value_mma3_first": ((17, 33), (8, 256)),
    "hopper_value_mma3_new": ((257, 65), (128, 512)),
    "hopper_value_mma3_old": ((65, 65), (32, 512)),
    "linear": ((5, 3), (5, 3)),
    "marlin_scale_fp4": ((128, 3), (3, 128)),
    "marlin_scale_grouped": ((128, 3), (3, 128)),
    "marlin_scale_single": ((64, 3), (3, 64)),
    "marlin_weight_a16": ((65, 64), (8, 1024)),
    "marlin_weight_a16_g128": ((65, 32), (8, 1024)),
    "marlin_weight_a8": ((65, 64), (8, 1024)),
    "mma_6d_view": ((2, 129, 9), (32, 4, 2, 4, 3, 2)),
    "sm90_scale_fold_g128_b2": ((128, 3), (2, 3, 8, 8)),
    "sm90_scale_fold_g32_b1": ((128, 12), (2, 3, 16, 16)),
    "sm90_weight_fp4": ((32, 96), (32, 96)),
    "sm90_weight_fp4_fp8": ((32, 96), (32, 96)),
    "sm90_weight_int4": ((32, 96), (32, 96)),
    "swizzle_128x4": ((129, 5), (2048,)),
    "swizzle_128x4_joint": ((2, 65, 5), (2048,)),
    "swizzle_128x4_per_expert": ((2, 65, 5), (2, 1024)),
    "swizzle_8x4": ((9, 5), (128,)),
    "trtllm_row_shuffle_16": ((32, 3), (32, 3)),
    "trtllm_row_shuffle_32": ((64, 3), (64, 3)),
    "trtllm_scale_shuffle_16": ((128, 5), (1024,)),
    "trtllm_scale_shuffle_32": ((128, 5), (1024,)),
}


def test_every_layout_says_how_it_is_stored() -> None:
    assert sorted(STORAGE) == sorted(all_layouts())


@pytest.mark.parametrize("name", STORAGE)
def test_the_storage_has_the_shape_that_the_library_gives_it(name: str) -> None:
    logical, stored = STORAGE[name]
    assert tuple(get(name).pack(torch.zeros(logical, dtype=torch.uint8)).shape) == stored


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_size_a_wrong_rank_and_a_wrong_multiple_are_refused(layout: Layout) -> None:
    shape = tuple(m if m > 1 else 3 for m in layout.multiple)
    stored = layout.pack(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"{layout.name}: .* got {stored.numel() + 1}$"):
        layout.unpack(torch.zeros(stored.numel() + 1, dtype=torch.uint8), shape)
    with pytest.raises(ValueError, match="axes must be multiples of"):
        layout.pack(torch.zeros((1, *shape), dtype=torch.uint8))
    for axis, multiple in enumerate(layout.multiple):
        if multiple > 1:
            with pytest.raises(ValueError, match="axes must be multiples of"):
                layout.padded_shape(tuple(n + (i == axis) for i, n in enumerate(shape)))


def test_a_layout_that_moves_bits_takes_bytes_only() -> None:
    with pytest.raises(ValueError, match=r"moves bits: got torch\.float32"):
        get("hopper_value_mma3_new").pack(torch.zeros(16, 32))


def test_every_layout_names_its_source() -> None:
    assert not [name for name, layout in all_layouts().items() if not layout.source]


def test_an_unknown_layout_lists_the_known() -> None:
    with pytest.raises(KeyError, match=r"layout 'nope' unknown; known: .*swizzle_128x4"):
        get("nope")


def test_two_files_that_claim_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = sys.modules["reference.layouts.linear"]
    monkeypatch.setattr(linear, "LAYOUTS", linear.LAYOUTS * 2)
    with pytest.raises(ValueError, match=r"'linear' is defined twice \(second time in linear\.py\)"):
        reference.layouts.all_layouts.__wrapped__()


def test_a_tiling_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"an axis of 9 does not split into \(-1, 4\)"):
        Tiling(((REST, 4),), (0, 1), (2,)).store(torch.zeros(9))
    with pytest.raises(ValueError, match=r"an axis of 8 does not split into \(2, 2\)"):
        Tiling(((2, 2),), (0, 1), (2,)).store(torch.zeros(8))


def test_a_tiling_by_hand() -> None:
    """2 x 6 as tiles of 2 x 3, columns first inside."""
    tiling = Tiling(((REST, 2), (REST, 3)), (0, 2, 3, 1), (2, 2))
    stored = tiling.store(torch.arange(12).view(2, 6))
    assert stored.tolist() == [[0, 6, 1, 7, 2, 8], [3, 9, 4, 10, 5, 11]]


def test_a_tiled_layout_pads_at_the_end_of_each_axis() -> None:
    layout = tiled("t", Tiling(((REST,), (REST,)), (1, 0), (1, 1)), "", pad=(2, 3))
    assert layout.pack(torch.ones(1, 2, dtype=torch.long)).tolist() == [[1, 0], [1, 0], [0, 0]]
    assert pad_to(torch.ones(1, 2), (1, 2)).tolist() == [[1, 1]]


def test_bits_move_inside_little_endian_words() -> None:
    """Bit 0 to 31, the others one down."""
    bits = (31, *range(31))
    assert move_bits(torch.tensor([1, 0, 0, 0], dtype=torch.uint8), bits).tolist() == [0, 0, 0, 0x80]
    assert move_bits(torch.tensor([0, 1, 0, 0x80], dtype=torch.uint8), bits).tolist() == [0x80, 0, 0, 0x40]


def test_unswizzle_refuses_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="512 bytes, got 511"):
        unswizzle(torch.zeros(511), 3, 3)


def test_padded_shape_is_whole_tiles() -> None:
    assert padded_shape(1, 1) == (128, 4)
    assert padded_shape(128, 4) == (128, 4)
    assert padded_shape(129, 5) == (256, 8)


@pytest.mark.parametrize(("row", "column", "offset"), [(37, 5, 597), (130, 2, 2 * 512 + 34)])
def test_swizzle_offsets_of_the_worked_example(row: int, column: int, offset: int) -> None:
    """(130, 2) of an 8-column matrix: tile row 1 starts at 1024, row 2 of it at 32, column 2: 1058."""
    scales = torch.zeros(256, 8)
    scales[row, column] = 1
    assert swizzle(scales).nonzero().item() == offset


def test_nibbles_pack_the_even_column_low() -> None:
    assert pack_nibbles(torch.tensor([[0, 2, 10, 7]])).tolist() == [[0x20, 0x7A]]
    assert pack_nibbles(torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]])).tolist() == [[[0x21]], [[0x43]], [[0x65]]]
    assert pack_nibbles(torch.tensor([9, 10])).tolist() == [0xA9]


def test_every_byte_survives_unpack_and_pack() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_an_odd_number_of_nibbles_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 columns"):
        pack_nibbles(torch.zeros(2, 3))
