"""When is a sum the same in every order? When no partial sum can leave the integers its accumulator holds.

A sum of products is exact in any order if sum |a||b|, in units of the smallest power of two that divides every product,
stays within the accumulator's exact integers. A GEMM that meets this has one right answer, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference.grid import FP16, FP32, ElementType, binade


@dataclass(frozen=True)
class Accumulator:
    """`units`: every integer up to it is held; `largest` and `least`: of what it holds, largest value and smallest unit;
    `slab`: so many consecutive terms are summed in it, the slabs' sums in fp32 (None: it takes the whole sum)."""

    name: str
    units: float
    source: str
    slab: int | None = None
    largest: float = torch.inf
    least: float = 0.0


def _of(grid: ElementType, source: str) -> Accumulator:
    smallest = 2.0 ** (grid.min_exponent - grid.mantissa_bits)
    return Accumulator(grid.name, 2.0 ** (grid.mantissa_bits + 1), source, largest=grid.max, least=smallest)


_HOPPER = (
    "SageAttention2 (arXiv 2411.10958): FP22, 13 mantissa bits; DeepSeek-V3 (arXiv 2412.19437): about 14 bits, truncated."
    " One of the 14 is left out: they are aligned to the largest product, not to the sum"
)
ACCUMULATORS = {
    accumulator.name: accumulator
    for accumulator in (
        _of(FP32, "24-bit significand, IEEE 754-2019"),
        _of(FP16, "11-bit significand, IEEE 754-2019"),
        Accumulator("int32", 2.0**31 - 1, "two's complement; operands in code units"),
        Accumulator("hopper_fp8", 2.0**13, f"{_HOPPER}; CUTLASS and DeepGEMM promote every 4 MMAs of K 32", slab=128),
        Accumulator("hopper_fp8_fast", 2.0**13, f"{_HOPPER}; CUTLASS FastAccum and Triton's default never promote"),
    )
}


def exact_in_any_order(a: Tensor, b: Tensor, accumulator: Accumulator) -> bool:
    """True if a [rows, K] @ b [columns, K].T, float64, is exact in `accumulator` whatever the order of the sums; of several
    such pairs, one after another along leading axes, if all are."""
    if not a.numel() or not b.numel() or _bounded(a, b, accumulator):
        return True
    if accumulator.slab is None:
        return _fits(a, b, accumulator)
    slabs = zip(a.split(accumulator.slab, -1), b.split(accumulator.slab, -1), strict=True)
    return all(_fits(*slab, accumulator) for slab in slabs) and _fits(a, b, ACCUMULATORS["fp32"])


def lowest_bit(x: Tensor) -> Tensor:
    """[rows, 1] float64: the largest power of two that divides every entry of the row of x [rows, K]; 1 for a row of zeros."""
    mantissa = x.view(torch.int64) | -1 << 52  # and all bits above it, the lowest being the implicit one
    unit = binade(x) * (mantissa & -mantissa).double() * 2.0**-52
    least = torch.where(x == 0, torch.inf, unit).amin(-1, keepdim=True)
    return torch.where(least.isinf(), 1.0, least)


def _bounded(a: Tensor, b: Tensor, accumulator: Accumulator) -> bool:
    """The condition by Hoelder, sum |a||b| <= sum |a| max |b|, with one unit for all of b: settles sparse operands without
    a GEMM, in few passes over b. A sum below 2**52 units with 1.5 * 2**52 units leaves b only if b is whole units."""
    of_a = lowest_bit(a)
    low, high = b.aminmax()
    bound = float((a.abs() / of_a).sum(-1).max() * torch.maximum(-low, high))
    if not 0 < bound < torch.inf:
        return False
    unit = 2.0 ** math.ceil(math.log2(bound / accumulator.units))
    whole = torch.equal((b + 1.5 * 2**52 * unit).sub_(1.5 * 2**52 * unit), b)
    return whole and float(of_a.max()) * bound <= accumulator.largest and float(of_a.min()) * unit >= accumulator.least


def _fits(a: Tensor, b: Tensor, accumulator: Accumulator) -> bool:
    """The condition element by element: one GEMM of magnitudes, in units of each row's own smallest bit."""
    of_a, of_b = lowest_bit(a), lowest_bit(b)
    total, unit = (a.abs() / of_a) @ (b.abs() / of_b).mT, of_a * of_b.mT
    ranged = (total * unit <= accumulator.largest) & ((unit >= accumulator.least) | (total == 0))
    return bool(((total <= accumulator.units) & ranged).all())
