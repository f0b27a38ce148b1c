"""Physical layouts: closed forms, bijections, padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.layouts.linear import pack_nibbles, unpack_nibbles
from reference.layouts.swizzle_128x4 import padded_shape, swizzle, unswizzle

edges = st.one_of(st.sampled_from((1, 31, 32, 33, 127, 128, 129, 256)), st.integers(1, 300))
widths = st.one_of(st.sampled_from((1, 3, 4, 5, 8)), st.integers(1, 20))


@settings(max_examples=40, deadline=None)
@given(rows=edges, columns=widths)
def test_swizzle_puts_every_element_at_its_closed_form_offset(rows: int, columns: int) -> None:
    """A round trip alone would pass for the identity."""
    flat = swizzle(torch.arange(1, rows * columns + 1).view(rows, columns))
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tiles = -(-columns // 4)
    offset = ((r // 128) * tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
    assert torch.equal(flat[offset], torch.arange(1, rows * columns + 1).view(rows, columns))


@settings(max_examples=40, deadline=None)
@given(rows=edges, columns=widths)
def test_unswizzle_inverts_swizzle(rows: int, columns: int) -> None:
    scales = torch.arange(rows * columns).view(rows, columns)
    assert torch.equal(unswizzle(swizzle(scales), rows, columns), scales)


@settings(max_examples=20, deadline=None)
@given(rows=edges, columns=widths)
def test_padding_bytes_are_zero(rows: int, columns: int) -> None:
    flat = swizzle(torch.ones(rows, columns, dtype=torch.uint8))
    high, wide = padded_shape(rows, columns)
    assert flat.numel() == high * wide
    assert int(flat.sum()) == rows * columns


@pytest.mark.parametrize(("row", "column", "offset"), [(37, 5, 597), (130, 2, 2 * 512 + 34)])
def test_swizzle_offsets_of_the_worked_example(row: int, column: int, offset: int) -> None:
    """(130, 2) of an 8-column matrix: tile row 1 starts at 1024, row 2 of it at 32, column 2: 1058."""
    scales = torch.zeros(256, 8)
    scales[row, column] = 1
    assert swizzle(scales).nonzero().item() == offset


def test_unswizzle_refuses_a_wrong_size() -> None:
    with pytest.raises(ValueError, match="512 bytes, got 511"):
        unswizzle(torch.zeros(511), 3, 3)


def test_padded_shape_is_whole_tiles() -> None:
    assert padded_shape(1, 1) == (128, 4)
    assert padded_shape(128, 4) == (128, 4)
    assert padded_shape(129, 5) == (256, 8)


def test_nibbles_pack_the_even_column_low() -> None:
    assert pack_nibbles(torch.tensor([[0, 2, 10, 7]])).tolist() == [[0x20, 0x7A]]


def test_every_byte_survives_unpack_and_pack() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(pack_nibbles(unpack_nibbles(packed)), packed)


def test_an_odd_number_of_nibbles_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 columns"):
        pack_nibbles(torch.zeros(2, 3))
