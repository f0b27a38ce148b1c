"""Closed forms of the weight layouts: one place per byte, code or bit, looped over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference.layout import Layout
from reference.layouts import get
from reference.layouts.gated_interleave import gated_interleave
from reference.layouts.hopper_value import BITS
from reference.layouts.marlin_weight import padded_nk
from reference.layouts.trtllm_row_shuffle import block_rows, row_shuffle

examples = settings(max_examples=10, deadline=None)
few = st.integers(1, 3)
widths = st.one_of(st.sampled_from((1, 31, 32, 33, 63, 64, 65, 127, 128, 129)), st.integers(1, 140))
heights = st.one_of(st.sampled_from((1, 15, 16, 17, 63, 64, 65)), st.integers(1, 80))


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(math.prod(shape)))


def assert_places(layout: Layout, shape: tuple[int, ...], size: int, place: Callable[..., int]) -> None:
    """The storage of 1, 2, 3... holds each element at `place(*index)` of `size`, and 0 elsewhere."""
    want = [0] * size
    for value, index in enumerate(itertools.product(*map(range, shape)), start=1):
        want[place(*index)] = value
    assert layout.pack(torch.arange(1, math.prod(shape) + 1).view(shape)).flatten().tolist() == want


def up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


@examples
@given(m=widths, n=few)
def test_linear(m: int, n: int) -> None:
    assert_places(get("linear"), (m, n), m * n, lambda r, c: r * n + c)


@examples
@given(block=st.sampled_from((16, 32)), blocks=few, n=few)
def test_trtllm_row_shuffle(block: int, blocks: int, n: int) -> None:
    """Destination-driven: row j of a block is source row 2 (j % 8) + j // 8 (16) or 4 (j % 8) + j // 8 (32)."""
    x = torch.arange(block * blocks * n).view(-1, n)
    got = get(f"trtllm_row_shuffle_{block}").pack(x)
    for row in range(block * blocks):
        j = row % block
        source = row - j + (2 if block == 16 else 4) * (j % 8) + j // 8
        assert torch.equal(got[row], x[source])


def test_the_first_rows_of_the_32_row_shuffle() -> None:
    order = get("trtllm_row_shuffle_32").pack(torch.arange(32)[:, None]).flatten().tolist()
    assert order[:10] == [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]


@pytest.mark.parametrize(("tile", "block"), [(64, 16), (8, 16), (128, 32), (256, 32), (192, 16)])
def test_the_epilogue_tile_picks_the_shuffle(tile: int, block: int) -> None:
    assert block_rows(tile) == block


@examples
@given(half=st.integers(1, 40), n=few)
def test_gated_reorder(half: int, n: int) -> None:
    assert_places(
        get("gated_reorder"), (2 * half, n), 2 * half * n, lambda r, c: (2 * r if r < half else 2 * (r - half) + 1) * n + c
    )


def test_reorder_then_shuffle_of_the_worked_example() -> None:
    """64 rows, epilogue tile 128: 0, 2, .. 14 of the first half's stride, then the second half's."""
    order = row_shuffle(32).pack(get("gated_reorder").pack(torch.arange(64)[:, None])).flatten().tolist()
    assert order[:18] == [0, 2, 4, 6, 8, 10, 12, 14, 32, 34, 36, 38, 40, 42, 44, 46, 1, 3]


@examples
@given(g=st.sampled_from((1, 3, 8, 16, 32, 64)), blocks=few, n=few)
def test_gated_interleave(g: int, blocks: int, n: int) -> None:
    half = g * blocks

    def place(r: int, c: int) -> int:
        i, second = r % half, r // half
        return ((i // g) * 2 * g + i % g + second * g) * n + c

    assert_places(gated_interleave(g), (2 * half, n), 2 * half * n, place)
    if g in (8, 16, 32, 64):
        assert_places(get(f"gated_interleave_{g}"), (2 * half, n), 2 * half * n, place)


@examples
@given(m=heights, blocks=few, width=st.sampled_from((64, 128)))
def test_block_major_k(m: int, blocks: int, width: int) -> None:
    layout = get(f"block_major_k_{width}")
    shape = (m, width * blocks)
    assert_places(layout, shape, math.prod(shape), lambda r, c: (c // width * m + r) * width + c % width)
    assert layout.pack(torch.zeros(shape)).shape == (blocks, m, width)


def int4_place(r: int, c: int, wide: int) -> int:
    """Byte offset of source byte (r, c) of a [rows, wide] matrix after the 16-bit unit move."""
    partition, unit, byte = c // 32, c % 32 // 2, c % 2
    row = r // 16 * 16 + r % 8 + 8 * ((unit % 8) >= 4)
    column = 16 * partition + (unit // 8) * 8 + (unit % 4) * 2 + (r % 16) // 8
    return row * wide + 2 * column + byte


@examples
@given(m=few, n=few)
def test_sm90_int4_weights(m: int, n: int) -> None:
    assert_places(get("sm90_weight_int4"), (16 * m, 32 * n), 512 * m * n, lambda r, c: int4_place(r, c, 32 * n))


def test_the_first_units_of_sm90_int4_rows_0_and_8() -> None:
    x = torch.arange(16 * 16).view(16, 16).repeat_interleave(2, 1)
    rows = get("sm90_weight_int4").pack(x)[:, ::2]
    first = [divmod(v, 16) for v in rows[0].tolist()[:10]]
    assert first == [(0, 0), (8, 0), (0, 1), (8, 1), (0, 2), (8, 2), (0, 3), (8, 3), (0, 8), (8, 8)]
    assert [divmod(v, 16) for v in rows[8].tolist()[:2]] == [(0, 4), (8, 4)]


@examples
@given(m=few, n=few)
def test_sm90_fp4_fp8_weights(m: int, n: int) -> None:
    x = random_bytes(16 * m, 32 * n)
    got = get("sm90_weight_fp4_fp8").pack(x).flatten().tolist()
    words = [0] * (len(got) // 4)
    for r, c in itertools.product(range(16 * m), range(32 * n)):
        offset = int4_place(r, c, 32 * n)
        words[offset // 4] |= int(x[r, c]) << 8 * (offset % 4)
    signs = {3: 7, 7: 15, 11: 23, 15: 31, 19: 3, 23: 11, 27: 19, 31: 27}
    for i, word in enumerate(words):
        want = word & 0x77777777
        for source, target in signs.items():
            want |= (word >> source & 1) << target
        assert int.from_bytes(bytes(got[4 * i : 4 * i + 4]), "little") == want


def decode_word(word: int) -> list[int]:
    """The four bytes in a twiddled word, unpacked as the kernels do: shift, mask, read sign and exponent, mantissa."""
    mask = 0b1000000111000000_1000000111000000
    fourth = (word << 1 & 0x80008000) | (word >> 3 & 0x01800180) | (word >> 7 & 0x00400040)
    lanes = (word & mask, word << 3 & mask, word << 6 & mask, fourth)
    code = [[(lane >> 12 & 8) | (lane >> 6 & 7), (lane >> 28 & 8) | (lane >> 22 & 7)] for lane in lanes]
    return [low | high << 4 for low, high in code]


def decoded(stored: Tensor) -> list[int]:
    """A twiddled storage as the plain bytes it holds."""
    raw = bytes(stored.flatten().tolist())
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    return [byte for word in words for byte in decode_word(word)]


@examples
@given(m=few, n=few)
def test_sm90_fp4_weights(m: int, n: int) -> None:
    x = random_bytes(16 * m, 32 * n)
    got = decoded(get("sm90_weight_fp4").pack(x))
    for r, c in itertools.product(range(16 * m), range(32 * n)):
        mma, lane, half = c % 32 // 8, c % 4, c % 8 // 4
        row = r // 16 * 16 + r % 8 + 8 * (mma % 2)
        byte = 32 * (c // 32) + 16 * (mma // 2) + 4 * lane + 2 * half + r % 16 // 8
        assert got[row * 32 * n + byte] == x[r, c]


@examples
@given(mma=st.sampled_from((2, 3)), padding=st.sampled_from(("first", "old", "new")), m=heights, n=widths)
def test_hopper_value(mma: int, padding: str, m: int, n: int) -> None:
    """Row digits (rest, warp 2, thread 4, pair 2); byte digits (rest, tile 4 / u, warp 2, thread 4, own u)."""
    u = 4 if mma == 2 else 1
    high, wide = {"first": (16, 32), "old": (64, 64), "new": (256, 64)}[padding]
    x = random_bytes(m, n)
    stored = get(f"hopper_value_mma{mma}_{padding}").pack(x)
    assert stored.shape == (up(m, high) // 4, up(n, wide) * 4)
    got = decoded(stored)
    for r, c in itertools.product(range(m), range(n)):
        row_warp, row_thread, pair = r // 8 % 2, r // 2 % 4, r % 2
        tile, warp, thread, own = c % 32 // (8 * u), c // (4 * u) % 2, c // u % 4, c % u
        inside = ((((pair * 4 + thread) * (4 // u) + tile) * 2 + warp) * 2 + row_warp) * u + own
        assert got[(r // 16 * 4 + row_thread) * 4 * up(n, wide) + c // 32 * 128 + inside] == x[r, c]
    assert sum(1 for byte in got if byte) == int((x != 0).sum())


def test_the_bits_of_a_twiddled_word() -> None:
    """Sign and (exponent high, low, mantissa) places of codes 0..7, as the sm90 kernel's masks put them."""
    sign = [15, 31, 12, 28, 9, 25, 14, 30]
    rest = [(8, 7, 6), (24, 23, 22), (5, 4, 3), (21, 20, 19), (2, 1, 0), (18, 17, 16), (11, 10, 13), (27, 26, 29)]
    for code, bit in itertools.product(range(8), range(4)):
        want = sign[code] if bit == 3 else rest[code][2 - bit]
        word = torch.zeros(4, dtype=torch.uint8)
        word[code // 2] = 1 << (bit + 4 * (code % 2))
        assert decode_word(1 << want) == word.tolist()
        assert BITS[4 * code + bit] == want


@examples
@given(m=st.sampled_from((1, 255, 256, 257, 511, 513)), n=widths)
def test_blackwell_value(m: int, n: int) -> None:
    wide = up(n, 128)
    assert_places(get("blackwell_value"), (m, n), m * wide, lambda r, c: r * wide + c)

    def shuffled(r: int, c: int) -> int:
        return ((c // 64 * (up(m, 256) // 256) + r // 256) * 256 + r % 256) * 64 + c % 64

    assert_places(get("blackwell_value_shuffled"), (m, n), up(m, 256) * wide, shuffled)
    assert get("blackwell_value_shuffled").pack(torch.zeros(m, n)).shape == (wide // 64, up(m, 256) // 256, 256, 64)

    def packed(r: int, c: int) -> int:
        k, tile = c % 64, c % 128 // 64
        return ((c // 128 * (up(m, 512) // 512) + r // 512) * 512 + r % 512) * 128 + 16 * (k // 8) + 8 * tile + k % 8

    assert_places(get("blackwell_value_packed_shuffled"), (m, n), up(m, 512) * wide, packed)
    assert get("blackwell_value_packed_shuffled").pack(torch.zeros(m, n)).shape == (wide // 128, up(m, 512) // 512, 512, 128)


def marlin_word(code: Callable[[int, int], int], thread: int, warp: int, small: bool) -> int:
    """One 32-bit word of a tile, gathered as gptq_marlin_repack does; `small`: 8-bit activations (32 x 32 tiles)."""
    column, quad = thread // 4, thread % 4
    if small:
        values = [code(4 * quad + i % 4 + 16 * (i // 4), 8 * warp + column) for i in range(8)]
        order = (0, 4, 1, 5, 2, 6, 3, 7)
    else:
        offsets = (0, 1, 8, 9)
        values = [code(2 * quad + offsets[i % 4], 16 * warp + column + 8 * (i // 4)) for i in range(8)]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
    return sum(values[source] << 4 * i for i, source in enumerate(order))


@pytest.mark.parametrize("name", ["a16", "a16_g128", "a8"])
@settings(max_examples=6, deadline=None)
@given(n=st.sampled_from((1, 63, 64, 65, 128)), k=st.sampled_from((2, 64, 66, 128, 130)))
def test_marlin_weights(name: str, n: int, k: int) -> None:
    x = random_bytes(n, k // 2)
    stored = get(f"marlin_weight_{name}").pack(x)
    high, deep = padded_nk(n, k, 128 if name == "a16_g128" else 32)
    assert stored.shape == (deep // 16, 8 * high)
    got = stored.flatten().tolist()
    codes = [[int(b) >> s & 15 for b in row for s in (0, 4)] for row in x]
    tile_k, tile_n = (32, 32) if name == "a8" else (16, 64)
    tiles = itertools.product(range(deep // tile_k), range(high // tile_n))
    for number, (tk, tn) in enumerate(tiles):

        def code(i: int, j: int, tk: int = tk, tn: int = tn) -> int:
            row, column = tn * tile_n + j, tk * tile_k + i
            return codes[row][column] if row < n and column < k else 0

        for thread, warp in itertools.product(range(32), range(4)):
            at = 4 * (number * 128 + 4 * thread + warp)
            assert int.from_bytes(bytes(got[at : at + 4]), "little") == marlin_word(code, thread, warp, name == "a8")


@pytest.mark.parametrize(
    ("n", "k", "group", "want"),
    [
        (64, 128, 32, (64, 128)),
        (128, 64, 32, (128, 64)),
        (64, 64, 32, (64, 128)),  # both families double it: the first wins
        (100, 192, 32, (128, 192)),
        (100, 192, 128, (128, 256)),
        (2880, 2880, 32, (2880, 2944)),
        (1, 1, 16, (64, 128)),
    ],
)
def test_marlin_padding_takes_the_smaller_family(n: int, k: int, group: int, want: tuple[int, int]) -> None:
    assert padded_nk(n, k, group) == want
