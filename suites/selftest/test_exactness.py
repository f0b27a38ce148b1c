"""Sums that are the same in every order: the condition against accumulators that really add, in shuffled orders."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.case import Case
from harness.checks import untrusted
from harness.inputs import make_inputs
from harness.oracle import expect
from reference import exactness
from reference.exactness import ACCUMULATORS, Accumulator, exact_in_any_order, lowest_bit
from reference.rounding import Rounding

MMA_K = 32  # terms of one FP8 wgmma
KEPT = 13  # mantissa bits of FP22
ORDERS = 20
RANGES = {  # largest exact integer, terms a slab: goldens that share no constant with the accumulators
    "fp32": (16777216, None),
    "fp16": (2048, None),
    "int32": (2147483647, None),
    "hopper_fp8": (8192, 128),
    "hopper_fp8_fast": (8192, None),
}


@pytest.fixture(params=["shortcut", "gemm"])
def alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two forms of the condition: the other one may not be asked, or knows nothing."""
    if request.param == "shortcut":
        monkeypatch.delattr(exactness, "_fits")
    else:
        monkeypatch.setattr(exactness, "_bounded", lambda *_: False)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def fp32_sum(products: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float32)
    for product in products.float():
        total = total + product
    return float(total)


def fp22_sum(products: Tensor, slab: int | None) -> float:
    """Each MMA aligns its products and the running sum to the largest exponent and cuts off what lies below 13 more bits;
    every `slab` terms the running sum moves on to fp32."""
    total, promoted = 0.0, torch.zeros((), dtype=torch.float32)
    for start in range(0, len(products), MMA_K):
        terms = [total, *products[start : start + MMA_K].tolist()]
        unit = 2.0 ** (max(math.frexp(t)[1] for t in terms) - 1 - KEPT)
        total = sum(math.trunc(t / unit) * unit for t in terms)
        kept = 2.0 ** (math.frexp(total)[1] - 1 - KEPT)
        total = math.trunc(total / kept) * kept
        if slab is not None and (start + MMA_K) % slab == 0:
            promoted, total = promoted + total, 0.0
    return float(promoted + total)


def orders(products: Tensor, slab: int | None = None) -> list[Tensor]:
    """The products in random orders, shuffled within each slab."""
    generator = torch.Generator().manual_seed(5)
    parts = products.split(slab or len(products))
    return [torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts]) for _ in range(ORDERS)]


def integers(total: int, terms: int, seed: int) -> tuple[Tensor, Tensor]:
    """a, b [1, terms] of random signs with sum |a||b| = total, and the one product of 1 that fixes the unit."""
    generator = torch.Generator().manual_seed(seed)
    left, magnitudes = total - 1, [1]
    for k in range(terms - 1):
        share = left if k == terms - 2 else int(torch.randint(0, 2 * left // (terms - 1 - k) + 1, (), generator=generator))
        magnitudes.append(min(share, left))
        left -= magnitudes[-1]
    sign = (1 - 2 * torch.randint(0, 2, (terms,), generator=generator)).double()
    a = torch.tensor(magnitudes, dtype=torch.float64)[torch.randperm(terms, generator=generator)]
    return (a * sign)[None], torch.ones(1, terms, dtype=torch.float64)


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_the_bound_itself_is_inside_and_one_unit_more_is_outside(name: str) -> None:
    accumulator = ACCUMULATORS[name]
    top = min(accumulator.units, accumulator.largest)
    a, b = f64([top - 1, 1]), f64([1, 1])
    assert exact_in_any_order(a, b, accumulator)
    assert exact_in_any_order(-a, b, accumulator)
    assert not exact_in_any_order(f64([top, 1]), b, accumulator)
    assert not exact_in_any_order(f64([top, -1]), b, accumulator)  # cancels, but not in every order


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_the_exact_ranges_are_the_stated_numbers(name: str) -> None:
    assert (ACCUMULATORS[name].units, ACCUMULATORS[name].slab) == RANGES[name]


@pytest.mark.parametrize("seed", range(5))
def test_inside_the_bound_every_order_in_fp32_gives_the_exact_sum(seed: int) -> None:
    a, b = integers(2**24, 64, seed)
    assert exact_in_any_order(a, b, ACCUMULATORS["fp32"])
    products = (a * b)[0]
    assert {fp32_sum(p) for p in orders(products)} == {float(products.sum())}


def test_just_outside_the_bound_orders_in_fp32_differ() -> None:
    a, b = f64([2**24, 1, 1, 1, 1]), f64([1, 1, 1, 1, 1])
    assert not exact_in_any_order(a, b, ACCUMULATORS["fp32"])
    assert len({fp32_sum(p) for p in orders((a * b)[0])}) > 1
    for power in (-30, 30):
        assert not exact_in_any_order(f64([1, 1]), f64([2**24 - 1, 0.5]) * 2.0**power, ACCUMULATORS["fp32"])


@pytest.mark.parametrize("seed", range(5))
def test_inside_the_bound_an_accumulator_that_truncates_to_14_bits_is_exact(seed: int) -> None:
    parts = [integers(2**13, 128, seed + 10 * i) for i in range(3)]
    a, b = (torch.cat(side, -1) for side in zip(*parts, strict=True))
    assert exact_in_any_order(a, b, ACCUMULATORS["hopper_fp8"])
    products = (a * b)[0]
    assert {fp22_sum(p, 128) for p in orders(products, 128)} == {float(products.sum())}


def test_outside_the_bound_an_accumulator_that_truncates_to_14_bits_is_not_exact() -> None:
    a = torch.ones(1, 128, dtype=torch.float64)
    a[0, 0] = 2**14
    assert not exact_in_any_order(a, torch.ones_like(a), ACCUMULATORS["hopper_fp8"])
    assert exact_in_any_order(a, torch.ones_like(a), ACCUMULATORS["fp32"])
    assert fp22_sum(a[0], 128) != float(a.sum())


def test_promotion_makes_the_bound_one_per_slab() -> None:
    a = torch.full((1, 512), 63.0, dtype=torch.float64)
    b = torch.ones_like(a)
    assert exact_in_any_order(a, b, ACCUMULATORS["hopper_fp8"])  # 8064 a slab
    assert fp22_sum(a[0], 128) == float(a.sum())
    assert not exact_in_any_order(a, b, ACCUMULATORS["hopper_fp8_fast"])  # 32256 together
    assert fp22_sum(a[0], None) != float(a.sum())


def test_slabs_that_fit_may_still_exceed_what_they_are_promoted_to() -> None:
    """1024 slabs of 8192 and one of 2**-23 of that: 33 bits in all."""
    a = torch.zeros(1, 129 * 128, dtype=torch.float64)
    a[0, : 128 * 128 : 128] = 2.0**20
    a[0, -1] = 1
    assert not exact_in_any_order(a, torch.ones_like(a), ACCUMULATORS["hopper_fp8"])
    assert exact_in_any_order(a[:, : 128 * 128], torch.ones(1, 128 * 128, dtype=torch.float64), ACCUMULATORS["hopper_fp8"])


def test_the_unit_is_each_rows_own() -> None:
    """Scales that are powers of two, per token or per channel, do not matter; a finer last bit does."""
    a, b = integers(2**13, 64, 1)
    tokens = f64([1], [2.0**-60], [2.0**40])
    for name in ("fp32", "int32", "hopper_fp8", "hopper_fp8_fast"):
        assert exact_in_any_order(a * tokens, b * 2.0**-9 * tokens, ACCUMULATORS[name])
    a, b = integers(2**24, 64, 1)
    a[0, 5] += 0.5
    assert not exact_in_any_order(a * tokens, b, ACCUMULATORS["fp32"])


def test_half_precision_has_a_largest_value_and_a_smallest_unit() -> None:
    fp16 = ACCUMULATORS["fp16"]
    assert exact_in_any_order(f64([1000.0, 1.0]), f64([1.0, 1.0]), fp16)
    assert not exact_in_any_order(f64([2.0**17]), f64([1.0]), fp16)
    assert not exact_in_any_order(f64([2.0**14]), f64([8.0]), fp16)
    assert exact_in_any_order(f64([2.0**-24]), f64([1.0]), fp16)
    assert not exact_in_any_order(f64([2.0**-25]), f64([1.0]), fp16)
    assert exact_in_any_order(f64([2.0**-25, 0.0]), f64([0.0, 1.0]), fp16)  # a product of 0 has no unit


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_both_forms_reach_the_ends_of_the_range(sign: float) -> None:
    """65504 = 2047 * 32 is the largest of fp16, 2**-24 its smallest unit, 2**24 units that of fp32."""
    fp16, fp32 = ACCUMULATORS["fp16"], ACCUMULATORS["fp32"]
    assert exact_in_any_order(f64([2047.0, 0.0]), sign * f64([32.0, -32.0]), fp16)
    assert exact_in_any_order(f64([2047 * 2.0**-14]), sign * f64([2.0**-10]), fp16)
    for power in (-30, 3):
        b = sign * f64([2.0**24 - 1, 2.0**23 + 1]) * 2.0**power
        assert exact_in_any_order(f64([1.0, 0.0]), b[:, :1].expand(1, 2), fp32)
        assert exact_in_any_order(f64([1.0, 0.0]), b, fp32)
    assert exact_in_any_order(f64([4.0, 0.0], [0.0, 12.0]), sign * f64([5.0, 7.0]), fp32)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_what_is_not_a_number_is_not_exact(name: str, value: float) -> None:
    assert not exact_in_any_order(f64([value, 1.0]), f64([1.0, 1.0]), ACCUMULATORS[name])
    assert not exact_in_any_order(f64([1.0, 1.0]), f64([value, 1.0]), ACCUMULATORS[name])


def test_nothing_to_sum_is_exact() -> None:
    for a, b in ((f64([0.0, -0.0]), f64([0.0, 3.0])), (torch.zeros(0, 2).double(), f64([1.0, 1.0]))):
        assert all(exact_in_any_order(a, b, accumulator) for accumulator in ACCUMULATORS.values())


def test_lowest_bit() -> None:
    x = f64([12.0, -20.0], [0.0, -0.0], [0.375, 1.0], [-3.0, 2.0**-40], [1 + 2.0**-52, -1.0])
    assert lowest_bit(x).flatten().tolist() == [4.0, 1.0, 0.125, 2.0**-40, 2.0**-52]


entries = st.integers(-40, 40).map(float)


@given(
    st.lists(st.lists(entries, min_size=6, max_size=6), min_size=1, max_size=3),
    st.lists(st.lists(entries, min_size=6, max_size=6), min_size=1, max_size=3),
    st.integers(6, 12),
)
def test_the_condition_is_the_definition(a: list[list[float]], b: list[list[float]], bits: int) -> None:
    """Integer arithmetic by hand; the shortcut must agree with the GEMM of magnitudes."""

    def unit(row: list[float]) -> int:
        return math.gcd(*(int(v) & -int(v) for v in row if v)) if any(row) else 1

    wanted = all(sum(abs(int(p * q)) for p, q in zip(i, j, strict=True)) <= 2**bits * unit(i) * unit(j) for i in a for j in b)
    assert exact_in_any_order(f64(*a), f64(*b), Accumulator("toy", 2.0**bits, "made up")) == wanted


def test_an_exact_case_beyond_the_accumulator_is_untrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.parse("moe.bf16.t9.h192.i128.e6.k2.renormalize.swiglu.standard.exact.s1")
    inputs = make_inputs(case)
    for accumulate in ("fp32", "hopper_fp8"):
        assert expect(case, inputs, Rounding(out="bf16", accumulate=accumulate)).exact
    monkeypatch.setitem(ACCUMULATORS, "toy", Accumulator("toy", 4.0, "made up"))
    expected = expect(case, inputs, Rounding(out="bf16", accumulate="toy"))
    assert not expected.exact
    assert expected.reason.endswith("GEMM 2's sum exceeds the exact range of toy")
    assert "GEMM 2" in (untrusted(case, expected) or "")


def test_an_unknown_accumulator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fp31.*known: fp32"):
        Rounding(accumulate="fp31")
