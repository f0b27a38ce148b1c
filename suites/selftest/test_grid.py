"""Element grids against ml_dtypes and torch, code by code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import grid
from reference.grid import (
    BF16,
    E2M1,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E8M0,
    FP16,
    FP32,
    INT4,
    INT4_FULL,
    INT8,
    ElementType,
    IntegerType,
    odd_bf16,
)

INF, NAN = float("inf"), float("nan")
ALL16 = torch.arange(65536, dtype=torch.int32).to(torch.int16)
SMALL = [
    (E2M1, ml_dtypes.float4_e2m1fn),
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
    (E4M3FNUZ, ml_dtypes.float8_e4m3fnuz),
    (E5M2FNUZ, ml_dtypes.float8_e5m2fnuz),
]
WIDE = [(BF16, torch.bfloat16), (FP16, torch.float16), (FP32, torch.float32)]
FLOATS = [E2M1, E4M3, E5M2, E4M3FNUZ, E5M2FNUZ, BF16, FP16, FP32]
SIGNED_ZERO = [element for element in FLOATS if element.specials != "fnuz"]
BYTES = [element for element, _ in SMALL]


def finite_bf16() -> Tensor:
    values = ALL16.view(torch.bfloat16).double()
    return values[values.isfinite()]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values, equal signs of zero, NaN where the other is NaN."""
    a, b = a.double(), b.double()
    signs = (torch.signbit(a) == torch.signbit(b)) | a.isnan()
    return bool((((a == b) & signs) | (a.isnan() & b.isnan())).all())


def wide_fp32(count: int = 200_000) -> Tensor:
    """Random bits: every exponent is as likely as any other, subnormals included; non-finite ones left out."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    values = bits.view(torch.float32)
    return values[values.isfinite()]


@pytest.mark.parametrize(("element", "dtype"), SMALL, ids=lambda p: getattr(p, "name", ""))
def test_every_code_decodes_as_ml_dtypes_says(element: ElementType, dtype: type) -> None:
    codes = np.arange(2**element.bits, dtype=np.uint8)
    theirs = torch.tensor(codes.view(dtype).astype(np.float64))
    assert same(element.decode(torch.tensor(codes)), theirs)


def test_every_e8m0_code_decodes_as_ml_dtypes_says() -> None:
    """Byte 0 is 2**-127 and 255 is NaN; a reinterpretation as fp32 exponent bits gives 0 and inf there."""
    codes = np.arange(256, dtype=np.uint8)
    theirs = torch.tensor(codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64))
    assert same(E8M0.decode(torch.tensor(codes)), theirs)


@pytest.mark.parametrize(("element", "dtype"), SMALL, ids=lambda p: getattr(p, "name", ""))
def test_every_finite_bf16_encodes_as_ml_dtypes_rounds_it(element: ElementType, dtype: type) -> None:
    """After clamping: ml_dtypes overflows to NaN. Compared as codes, so that -0 is not 0."""
    values = finite_bf16()
    clamped = values.clamp(-element.max, element.max).float().numpy()
    assert element.encode(values).tolist() == clamped.astype(dtype).view(np.uint8).tolist()


@pytest.mark.parametrize(("element", "dtype"), SMALL, ids=lambda p: getattr(p, "name", ""))
def test_neighbours_of_every_midpoint_round_as_ml_dtypes_rounds_them(element: ElementType, dtype: type) -> None:
    """bf16 inputs never lie one fp32 ulp above a tie, which is where a lost sticky bit shows."""
    finite = element.values[element.values.isfinite()].unique()
    middle = ((finite[1:] + finite[:-1]) / 2).float().numpy()
    near = np.concatenate([middle, np.nextafter(middle, np.float32(INF)), np.nextafter(middle, np.float32(-INF))])
    assert element.encode(torch.tensor(near)).tolist() == near.astype(dtype).view(np.uint8).tolist()


@pytest.mark.parametrize(("tie", "code"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)])
def test_e2m1_ties_go_to_the_even_code(tie: float, code: int) -> None:
    assert E2M1.encode(torch.tensor([tie, -tie])).tolist() == [code, code | 8]


def test_e4m3_encodes_the_worked_example() -> None:
    values = torch.tensor([1.1, 17, 300, 0.001, 470, -0.0])
    assert E4M3.encode(values).tolist() == [0x39, 0x58, 0x79, 0x01, 0x7E, 0x80]


@pytest.mark.parametrize(("element", "dtype"), WIDE, ids=lambda p: getattr(p, "name", ""))
def test_wide_values_round_as_torch_casts_them(element: ElementType, dtype: torch.dtype) -> None:
    values = wide_fp32()
    cast = values.to(dtype).double()
    saturated = torch.where(cast.isinf(), cast.sign() * element.max, cast)
    assert same(element.round(values), saturated)


@pytest.mark.parametrize(("element", "dtype"), WIDE[:2], ids=lambda p: getattr(p, "name", ""))
def test_every_16_bit_code_decodes_as_torch_reads_it(element: ElementType, dtype: torch.dtype) -> None:
    assert same(element.decode(ALL16), ALL16.view(dtype).double())


@pytest.mark.parametrize(("element", "dtype"), WIDE[:2], ids=lambda p: getattr(p, "name", ""))
def test_every_finite_16_bit_code_survives_decode_and_encode(element: ElementType, dtype: torch.dtype) -> None:
    values = ALL16.view(dtype)
    finite = values.isfinite()
    assert torch.equal(element.encode(values[finite]), ALL16[finite].int() & 0xFFFF)


def test_random_fp32_bits_survive_decode_and_encode() -> None:
    values = wide_fp32()
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    assert torch.equal(FP32.encode(values), bits)
    assert same(FP32.decode(bits), values)


@pytest.mark.parametrize("element", FLOATS, ids=lambda e: e.name)
def test_overflow_and_infinity_saturate(element: ElementType) -> None:
    values = torch.tensor([element.max * 1.5, INF, -element.max * 1.5, -INF], dtype=torch.float64)
    limit = element.max
    assert element.round(values).tolist() == [limit, limit, -limit, -limit]
    assert element.decode(element.encode(values)).tolist() == [limit, limit, -limit, -limit]


@pytest.mark.parametrize(("element", "dtype"), [(BF16, torch.bfloat16), (FP16, torch.float16), (FP32, torch.float32)])
def test_max_is_the_largest_torch_has(element: ElementType, dtype: torch.dtype) -> None:
    assert element.max == torch.finfo(dtype).max


def test_max_of_the_small_grids() -> None:
    assert (E2M1.max, E4M3.max, E8M0.max, INT4.max, INT8.max) == (6.0, 448.0, 2.0**127, 7.0, 127.0)
    assert (E5M2.max, E4M3FNUZ.max, E5M2FNUZ.max) == (57344.0, 240.0, 57344.0)
    assert (INT4.min, INT4_FULL.min, INT8.min) == (-7.0, -8.0, -127.0)


@pytest.mark.parametrize("element", SIGNED_ZERO, ids=lambda e: e.name)
def test_zero_keeps_its_sign(element: ElementType) -> None:
    codes = element.encode(torch.tensor([0.0, -0.0], dtype=torch.float64))
    assert codes.tolist() == [0, 1 << (element.bits - 1)]
    assert torch.signbit(element.decode(codes)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("element", "code"), [(E2M1, 7), (E4M3, 0x7F), (E5M2, 0x7E), (BF16, 0x7FC0), (FP16, 0x7E00), (FP32, 0x7FC00000)]
)
def test_nan_drops_its_sign_and_takes_the_stated_code(element: ElementType, code: int) -> None:
    """ml_dtypes gives other codes for NaN in E2M1 (8 and 0), so these are pinned, not compared."""
    assert element.encode(torch.tensor([NAN, -NAN], dtype=torch.float64)).tolist() == [code, code]


@pytest.mark.parametrize("element", FLOATS, ids=lambda e: e.name)
def test_rounding_keeps_nan(element: ElementType) -> None:
    assert element.round(torch.tensor([NAN])).isnan().all()


@pytest.mark.parametrize("element", FLOATS, ids=lambda e: e.name)
def test_ulp_is_the_gap_to_the_next_value(element: ElementType) -> None:
    """Taken at the codes themselves: every positive finite one of the small grids, one in 97 of the wide ones."""
    top = int(element.encode(torch.tensor([element.max], dtype=torch.float64)))
    codes = torch.arange(0, top, 1 if element.bits <= 8 else max(97, top // 5000))
    low, high = element.decode(codes), element.decode(codes + 1)
    assert torch.equal(element.ulp(low), high - low)
    assert torch.equal(element.ulp(-low), high - low)


def test_ulp_above_the_grid_is_that_of_its_last_binade() -> None:
    assert E4M3.ulp(torch.tensor([448.0, 1e30])).tolist() == [32.0, 32.0]


def test_wide_grids_have_no_table() -> None:
    with pytest.raises(ValueError, match="no table"):
        _ = BF16.values


@pytest.mark.parametrize("power", [-126, -125, -60, -1, 0, 1, 60, 126])
def test_e8m0_rounds_up_just_above_a_power_of_two(power: int) -> None:
    """ceil(log2(x)) computed in fp32 misses 2**k * (1 + ulp) nearly everywhere."""
    exact = np.float32(2.0**power)
    values = torch.tensor([exact, np.nextafter(exact, np.float32(INF)), np.nextafter(exact, np.float32(0))])
    assert E8M0.encode(values).tolist() == [power + 127, power + 128, power + 127]


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.0, 0), (INF, 254), (NAN, 255), (-1.0, 127), (1.25, 128), (6.0, 130), (2.0**-127, 0), (1.0001 * 2.0**-127, 1)],
)
def test_e8m0_edges(value: float, code: int) -> None:
    """The torch cast rounds to nearest, ml_dtypes gives 255 for 0 and for negatives: neither is the kernels' rule."""
    assert E8M0.encode(torch.tensor([value])).tolist() == [code]


@pytest.mark.parametrize("element", [INT4, INT8], ids=lambda e: e.name)
def test_integers_are_twos_complement(element: IntegerType) -> None:
    half = 1 << (element.bits - 1)
    expected = [float(v) for v in (*range(half), *range(-half, 0))]
    assert element.decode(torch.arange(2 * half)).tolist() == expected


@pytest.mark.parametrize("element", [INT4, INT8], ids=lambda e: e.name)
def test_integers_round_to_even_and_clip_symmetrically(element: IntegerType) -> None:
    values = torch.tensor([0.5, 1.5, -2.5, 1e6, -1e6])
    assert element.decode(element.encode(values)).tolist() == [0, 2, -2, element.max, -element.max]
    assert element.ulp(values).tolist() == [1.0] * 5


@pytest.mark.parametrize("element", [INT4, INT8], ids=lambda e: e.name)
def test_every_integer_code_but_the_lowest_survives_decode_and_encode(element: IntegerType) -> None:
    codes = torch.arange(2**element.bits)
    codes = codes[codes != 1 << (element.bits - 1)]
    assert element.encode(element.decode(codes)).tolist() == codes.tolist()


def test_element_names_lead_to_their_grids() -> None:
    assert all(element.name == name for name, element in grid.FLOATS.items())


@pytest.mark.parametrize("element", [E4M3FNUZ, E5M2FNUZ], ids=lambda e: e.name)
def test_fnuz_types_have_one_zero_and_one_nan(element: ElementType) -> None:
    """The code that would be -0 is the only NaN: a negative that rounds to 0 must lose its sign, or it becomes NaN."""
    assert element.encode(torch.tensor([0.0, -0.0, -1e-9, NAN, -NAN])).tolist() == [0, 0, 0, 0x80, 0x80]
    assert element.values.isnan().nonzero().flatten().tolist() == [0x80]


def test_fnuz_codes_are_worth_half_the_fn_codes() -> None:
    """How an E4M3FN checkpoint is read on gfx942: same bits, scale doubled."""
    fn, fnuz = E4M3.values, E4M3FNUZ.values
    both = fn.isfinite() & fnuz.isfinite()
    assert torch.equal(fnuz[both], fn[both] / 2)
    assert fnuz[[0x7F, 0xFF]].tolist() == [240.0, -240.0]


@pytest.mark.parametrize("element", [E5M2, E4M3, E4M3FNUZ], ids=lambda e: e.name)
def test_the_worked_fp8_examples(element: ElementType) -> None:
    values = torch.tensor([1.1, 17, 300, 0.001, 470, -0.0])
    wanted = {
        "e4m3": [0x39, 0x58, 0x79, 0x01, 0x7E, 0x80],
        "e5m2": [0x3C, 0x4C, 0x5D, 0x14, 0x5F, 0x80],
        "e4m3fnuz": [0x41, 0x60, 0x7F, 0x01, 0x7F, 0x00],
    }
    assert element.encode(values).tolist() == wanted[element.name]


@pytest.mark.parametrize("element", BYTES, ids=lambda e: e.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_table_gives_what_the_arithmetic_gives_for_every_16_bit_value(element: ElementType, dtype: torch.dtype) -> None:
    """float64 inputs are encoded by arithmetic, narrower ones by a look-up after rounding to odd."""
    values = ALL16.view(dtype)
    assert torch.equal(element.encode(values), element.encode(values.double()))
    assert torch.equal(element.encode(values.float()), element.encode(values.double()))


def around(values: Tensor) -> Tensor:
    """float32 values with their next three neighbours on both sides, and all negated."""
    bits = values.float().view(torch.int32)
    near = torch.cat([bits + step for step in range(-3, 4)]).view(torch.float32)
    return torch.cat([near, -near])


@pytest.mark.parametrize("element", BYTES, ids=lambda e: e.name)
def test_the_table_is_right_next_to_every_value_and_midpoint(element: ElementType) -> None:
    finite = element.values[element.values.isfinite() & (element.values > 0)]
    near = around(torch.cat([finite, element.midpoints, torch.tensor([element.max * 1.0625, 2.0**-126, 3e38])]))
    assert torch.equal(element.encode(near), element.encode(near.double()))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64))
def test_the_table_is_right_for_any_float32(bits: list[int]) -> None:
    values = torch.tensor(bits).to(torch.int32).view(torch.float32)
    for element in BYTES:
        assert torch.equal(element.encode(values), element.encode(values.double()))


def test_rounding_to_odd_sets_the_last_bit_of_what_was_inexact() -> None:
    values = torch.tensor([1.0, 1.0 + 2.0**-23, 1.0 + 2.0**-7, 1.0 + 2.0**-7 + 2.0**-23, -1.0 - 2.0**-20, 2.0**-149])
    assert odd_bf16(values).tolist() == [0x3F80, 0x3F81, 0x3F81, 0x3F81, 0xBF81, 0x0001]


@pytest.mark.parametrize("element", BYTES, ids=lambda e: e.name)
def test_directed_ties_differ_from_nearest_even_at_ties_only(element: ElementType) -> None:
    """Strictly between midpoints all three agree; at midpoint i the lower magnitude has code i, the higher i + 1."""
    ties = element.midpoints.float()
    order = torch.arange(len(ties), dtype=torch.int32)
    assert torch.equal(element.encode_ties(ties, away=False), order)
    assert torch.equal(element.encode_ties(-ties, away=True), order + 1)
    near = around(ties)
    near = near[~torch.isin(near.abs(), ties)].abs()
    for away in (False, True):
        assert torch.equal(element.encode_ties(near, away), element.encode(near))


@pytest.mark.parametrize(
    ("value", "code"), [(0.0, 0), (1.0, 127), (1.99, 127), (2.0, 128), (6.5, 129), (2.0**-126, 1), (2.0**-127, 0), (INF, 255)]
)
def test_e8m0_rounded_down_is_the_exponent_field(value: float, code: int) -> None:
    assert E8M0.encode_down(torch.tensor([value])).tolist() == [code]


def test_full_range_int4_uses_its_lowest_code_and_nan_is_zero() -> None:
    assert INT4_FULL.encode(torch.tensor([-8.0, -9.0, -7.5, 7.5, NAN])).tolist() == [8, 8, 8, 7, 0]
    assert INT4.encode(torch.tensor([-8.0, NAN])).tolist() == [9, 0]
    assert INT4_FULL.round(torch.tensor([-9.0])).tolist() == [-8.0]
