"""Closed forms of the scale layouts: one offset per element, looped over, with everything else 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.layout import Layout
from reference.layouts import blackwell_scale, get

rows = st.one_of(st.sampled_from((1, 31, 32, 33, 127, 128, 129, 256, 257)), st.integers(1, 300))
columns = st.one_of(st.sampled_from((1, 2, 3, 4, 5, 7, 8, 9)), st.integers(1, 13))
groups = st.integers(1, 3)
examples = settings(max_examples=12, deadline=None)


def assert_places(layout: Layout, shape: tuple[int, ...], size: int, place: Callable[..., int]) -> None:
    """The storage of 1, 2, 3... holds each element at `place(*index)` of `size`, and 0 elsewhere."""
    want = [0] * size
    for value, index in enumerate(itertools.product(*map(range, shape)), start=1):
        want[place(*index)] = value
    assert layout.pack(torch.arange(1, math.prod(shape) + 1).view(shape)).flatten().tolist() == want


def up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def atom(r: int, c: int, tiles: int) -> int:
    """The 128x4 offset, `tiles` of them side by side."""
    return ((r // 128) * tiles + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4


@examples
@given(m=rows, n=columns)
def test_swizzle_128x4(m: int, n: int) -> None:
    assert_places(get("swizzle_128x4"), (m, n), up(m, 128) * up(n, 4), lambda r, c: atom(r, c, up(n, 4) // 4))


@examples
@given(m=rows, n=columns)
def test_swizzle_8x4(m: int, n: int) -> None:
    tiles = up(n, 4) // 4
    assert_places(
        get("swizzle_8x4"), (m, n), up(m, 8) * up(n, 4), lambda r, c: ((r // 8) * tiles + c // 4) * 32 + (r % 8) * 4 + c % 4
    )


def test_the_worked_example_of_8x4() -> None:
    x = torch.zeros(16, 8)
    x[9, 5] = 1
    assert get("swizzle_8x4").pack(x).nonzero().item() == 101


@examples
@given(g=groups, m=rows, n=columns)
def test_stacked_swizzles(g: int, m: int, n: int) -> None:
    tiles = up(n, 4) // 4
    one = up(m, 128) * up(n, 4)
    assert_places(get("swizzle_128x4_per_expert"), (g, m, n), g * one, lambda e, r, c: e * one + atom(r, c, tiles))
    joint = up(g * m, 128) * up(n, 4)
    assert_places(get("swizzle_128x4_joint"), (g, m, n), joint, lambda e, r, c: atom(e * m + r, c, tiles))


@pytest.mark.parametrize(("m", "same"), [(128, True), (256, True), (96, False), (129, False)])
def test_a_joint_swizzle_is_the_stacked_one_only_for_whole_tiles(m: int, same: bool) -> None:
    x = torch.arange(1, 2 * m * 4 + 1).view(2, m, 4)
    joint, each = get("swizzle_128x4_joint").pack(x).flatten(), get("swizzle_128x4_per_expert").pack(x).flatten()
    assert (joint.tolist() == each.tolist()) is same


def test_row_96_of_96_row_groups_lands_in_the_first_tile() -> None:
    """Row 0 of group 1 is row 96 of the joint matrix: row 0 of the fourth quarter, offset 12."""
    x = torch.zeros(2, 96, 4)
    x[1, 0, 0] = 1
    assert get("swizzle_128x4_joint").pack(x).nonzero().item() == 12
    assert get("swizzle_128x4_per_expert").pack(x).nonzero().tolist() == [[1, 0]]


@examples
@given(g=groups, m=rows, n=columns)
def test_mma_view(g: int, m: int, n: int) -> None:
    x = torch.arange(1, g * m * n + 1).view(g, m, n)
    view = get("mma_6d_view").pack(x)
    high, wide = up(m, 128) // 128, up(n, 4) // 4
    assert view.shape == (32, 4, high, 4, wide, g)
    want = torch.zeros(view.shape, dtype=torch.long)
    for value, (e, r, c) in enumerate(itertools.product(range(g), range(m), range(n)), start=1):
        want[r % 32, (r % 128) // 32, r // 128, c % 4, c // 4, e] = value
    assert torch.equal(view, want)
    each = get("swizzle_128x4_per_expert").pack(x)
    assert torch.equal(view.permute(5, 2, 4, 0, 1, 3).flatten(1), each)


def test_mma_view_strides_of_the_worked_example() -> None:
    assert get("mma_6d_view").pack(torch.zeros(3, 256, 16)).stride() == (16, 4, 2048, 1, 512, 4096)


@examples
@given(block=st.sampled_from((16, 32)), tiles=st.integers(1, 2), n=columns)
def test_trtllm_scale_shuffle(block: int, tiles: int, n: int) -> None:
    """Row order first: source row i of a block goes to (i % q) * 8 + i // q with q = block / 8."""
    q = block // 8

    def place(r: int, c: int) -> int:
        i = r % block
        return atom(r - i + (i % q) * 8 + i // q, c, up(n, 4) // 4)

    assert_places(get(f"trtllm_scale_shuffle_{block}"), (128 * tiles, n), 128 * tiles * up(n, 4), place)


@examples
@given(m=rows, n=columns)
def test_blackwell_scale(m: int, n: int) -> None:
    layout = get("blackwell_scale")
    assert_places(layout, (m, n), up(m, 128) * up(n, 8), lambda r, c: atom(r, c, up(n, 8) // 4))
    assert layout.pack(torch.zeros(m, n)).shape == (1, up(m, 128) // 128, up(n, 8) // 4, 2, 256)


@examples
@given(sizes=st.lists(st.sampled_from((0, 1, 2, 127, 128, 129)), min_size=1, max_size=4), spare=st.integers(0, 3), n=columns)
def test_blackwell_ragged_activation_scale(sizes: list[int], spare: int, n: int) -> None:
    """Expert e's rows start at the next multiple of 128; rows after the last expert's are not stored and read back as 0."""
    tokens = sum(sizes) + spare
    layout = blackwell_scale.ragged(tuple(sizes))
    x = torch.arange(1, tokens * n + 1).view(tokens, n)
    blocks = tokens if tokens <= len(sizes) else len(sizes) - 1 - ((len(sizes) - tokens - 1) // 128)
    want = [0] * (blocks * 128 * up(n, 8))
    start, token = 0, 0
    for size in sizes:
        for r, c in itertools.product(range(size), range(n)):
            want[atom(start + r, c, up(n, 8) // 4)] = int(x[token + r, c])
        start, token = start + up(size, 128), token + size
    stored = layout.pack(x)
    assert stored.flatten().tolist() == want
    x[sum(sizes) :] = 0
    assert torch.equal(layout.unpack(stored, (tokens, n)), x)


@pytest.mark.parametrize(
    ("slices", "tokens", "blocks"), [(4, 3, 3), (4, 4, 4), (4, 5, 4), (4, 131, 4), (4, 132, 5), (1, 128, 1)]
)
def test_the_most_blocks_that_a_ragged_batch_can_need(slices: int, tokens: int, blocks: int) -> None:
    """One row in every slice but one, the rest in that one."""
    assert blackwell_scale.most_blocks(slices, tokens) == blocks


@examples
@given(warps=st.sampled_from((4, 8)), pad=st.sampled_from((2, 4)), m=rows, n=columns)
def test_hopper_scale(warps: int, pad: int, m: int, n: int) -> None:
    wide = up(n, pad)

    def place(row: int, k: int) -> int:
        block, q = divmod(row, 32 * warps)
        a, w, b, e = q // (16 * warps), q // 16 % warps, q // 8 % 2, q % 8
        return (((((block * warps + w) * (wide // 2) + k // 2) * 2 + a) * 8 + e) * 2 + k % 2) * 2 + b

    layout = get(f"hopper_scale_w{warps}_k{pad}")
    assert_places(layout, (m, n), up(m, 32 * warps) * wide, place)
    assert layout.pack(torch.zeros(m, n)).shape == (up(m, 32 * warps) // 32, 32 * wide)


def test_the_first_bytes_of_hopper_scale() -> None:
    x = torch.arange(128 * 4).view(128, 4)
    first = get("hopper_scale_w4_k2").pack(x).flatten()[:5].tolist()
    assert [divmod(value, 4) for value in first] == [(0, 0), (8, 0), (0, 1), (8, 1), (1, 0)]


@examples
@given(m=rows, n=columns)
def test_cdna4_scale(m: int, n: int) -> None:
    wide = up(n, 8)

    def place(row: int, k: int) -> int:
        inside = ((((k // 8) * 4 + k % 4) * 16 + row % 16) * 2 + (k % 8) // 4) * 2 + (row % 32) // 16
        return row // 32 * 32 * wide + inside

    layout = get("cdna4_scale")
    assert_places(layout, (m, n), up(m, 32) * wide, place)
    whole = (up(m, 32), wide)
    assert torch.equal(
        get("cdna4_scale_unpadded").pack(torch.arange(math.prod(whole)).view(whole)),
        layout.pack(torch.arange(math.prod(whole)).view(whole)),
    )


@examples
@given(m=rows, n=columns)
def test_gfx1250_scale(m: int, n: int) -> None:
    width = min(4, n)
    tiles = up(n, width) // width

    def place(r: int, c: int) -> int:
        tile = (r // 128) * tiles + c // width
        return tile * 128 * width + ((r % 32) * 4 + (r % 128) // 32) * width + c % width

    layout = get("gfx1250_scale")
    assert_places(layout, (m, n), up(m, 128) * up(n, width), place)
    if n >= 4:
        x = torch.rand(m, n)
        assert torch.equal(layout.pack(x).flatten(), get("swizzle_128x4").pack(x))


@examples
@given(m=st.integers(1, 3), blocks=st.integers(1, 3), kind=st.sampled_from(((32, 1, 16, 4, 16), (128, 2, 8, 1, 8))))
def test_sm90_scale_fold(m: int, blocks: int, kind: tuple[int, ...]) -> None:
    """MXFP4: 16 physical columns of 4 groups, 16 folded rows; W4A8: 8 columns of 1 group, 8 rows."""
    group, itemsize, wide, per_block, high = kind

    def place(r: int, k: int) -> int:
        line = ((r // 64) * blocks + k // per_block) * high + r % 64 % high
        return line * wide + (r % 64 // high) * per_block + k % per_block

    layout = get(f"sm90_scale_fold_g{group}_b{itemsize}")
    shape = (64 * m, per_block * blocks)
    assert_places(layout, shape, math.prod(shape), place)
    assert layout.pack(torch.zeros(shape)).shape == (m, blocks, high, wide)


@examples
@given(runs=st.integers(1, 3), n=columns)
def test_marlin_scales(runs: int, n: int) -> None:
    """Destination-driven, as the library's permutation lists read: column d of a run takes source column list[d]."""
    grouped = [i + 8 * j for i in range(8) for j in range(8)]
    fp4 = [grouped[4 * q + t] for q in range(16) for t in (0, 2, 1, 3)]
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    for name, order in (("grouped", grouped), ("fp4", fp4), ("single", single)):
        size = len(order)

        def place(row: int, k: int, order: list[int] = order, size: int = size) -> int:
            return k * size * runs + row // size * size + order.index(row % size)

        assert_places(get(f"marlin_scale_{name}"), (size * runs, n), size * runs * n, place)
